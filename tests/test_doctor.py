"""Tests of the output of `spartan doctor`, for Ray instances where a run would start and where it would not."""

from __future__ import annotations

from pathlib import Path

import pytest
from whole_runs import change, spartan

from spartan_ray.cli.doctor import diagnose
from spartan_ray.distributed import examine
from spartan_ray.run.config import Config

KINDS = ["versions", "Ray", "node with 2 CPUs, 0 GPUs", "workers", "paths"]


def said(config: Config) -> tuple[bool, list[str]]:
    lines: list[str] = []
    return diagnose(config, lines.append), lines


def test_where_a_run_would_start_it_says_what_it_would_run_on(local_ray: None, small_config: Config) -> None:
    fine, lines = said(small_config)
    assert fine
    assert [line.split(":")[0] for line in lines] == [*(f"ok  {kind}" for kind in KINDS), "a run would start"]
    assert lines[3].startswith("ok  workers: 2 with 1 CPUs and 0 GPUs each, and a driver with ")
    assert not Path(small_config.run.out).exists()


def test_each_thing_that_is_missing_is_said_and_the_others_are_looked_at(
    local_ray: None, small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(examine, "objections", lambda info, noise: "numpy 1.0, here 2.0")
    fine, lines = said(change(small_config, cluster={"workers": 3}, data={"name": "folder", "root": "/nowhere/at/all"}))
    assert not fine
    assert [line[:3] for line in lines[:-1]] == ["ok ", "ok ", "NO ", "NO ", "NO "]
    assert lines[2].endswith("numpy 1.0, here 2.0")
    assert "cluster.workers (3)" in lines[3]
    assert "/nowhere/at/all" in lines[4]
    assert lines[-1] == "a run would not start"


def test_a_ray_that_cannot_be_reached_is_the_end_of_it(tmp_path: Path) -> None:
    done = spartan("doctor", "--cluster.address", "127.0.0.1:1", "--data.name", "digits", cwd=tmp_path)
    assert done.returncode == 1, done.stderr
    assert "NO  Ray: cluster.address 127.0.0.1:1: " in done.stdout
    assert done.stdout.endswith("a run would not start\n")
    assert not list(tmp_path.iterdir())
