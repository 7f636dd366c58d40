"""Whole runs in an object store: killed, resumed, replayed and reported, and a store that fails during a run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from object_store import BUCKET, ObjectStore, object_store
from whole_runs import SMALL, change, environment, parse_config, run_here, spartan

from spartan_ray.errors import RunError
from spartan_ray.run import storage
from spartan_ray.run.config import Config
from spartan_ray.run.place import reading
from spartan_ray.run.storage import Store

URL = f"s3://{BUCKET}/runs"
FLAGS = [*SMALL, "--run.epochs", "6", "--cluster.workers", "1", "--cluster.driver-cpus", "1", "--run.out"]


@pytest.fixture(scope="module")
def s3() -> Iterator[ObjectStore]:
    with object_store() as store:
        yield store


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Shorten the waits of this process for a failing store and for the lease of a killed process."""
    monkeypatch.setattr(storage, "RETRIES", (0.1, 0.1))
    monkeypatch.setattr(storage, "LEASE_SECONDS", 1.0)


@pytest.fixture(scope="module")
def config() -> Config:
    return change(parse_config([*FLAGS, "runs"]), cluster={"workers": 1})


@pytest.fixture(scope="module")
def undisturbed(config: Config, tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> bytes:
    folder, _ = run_here(change(config, run={"out": str(tmp_path_factory.mktemp("runs"))}))
    return (folder / "final.safetensors").read_bytes()


def test_a_run_that_is_killed_goes_on_from_the_store_on_another_machine(
    s3: ObjectStore, config: Config, undisturbed: bytes, tmp_path: Path
) -> None:
    """The program, the driver and the workers are killed. The resumed run has only the URL."""
    command = [sys.executable, "-m", "spartan_ray", "train", *FLAGS, URL, "--run.name", "killed"]
    process = subprocess.Popen(command, cwd=tmp_path, env=environment(), start_new_session=True)
    while "checkpoints/epoch-000003.sha256" not in s3.names("runs/killed/") and process.poll() is None:
        time.sleep(0.05)
    os.killpg(process.pid, signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    driver = json.loads(s3.content("runs/killed/environment.json"))["driver"]["pid"]
    while psutil.pid_exists(driver):  # the driver ends with the program's Ray
        time.sleep(0.05)
    assert "final.safetensors" not in s3.names("runs/killed/")

    _, notes = run_here(change(config, run={"out": URL}), folder=f"{URL}/killed")
    assert any(note.startswith("going on after epoch ") for note in notes)
    assert s3.content("runs/killed/final.safetensors") == undisturbed

    done = spartan("resume", f"{URL}/killed", cwd=tmp_path)
    assert done.stdout == f"{URL}/killed: finished, all 6 epochs are done\n"
    done = spartan("replay", f"{URL}/killed", "--verify", cwd=tmp_path)
    assert done.stdout.endswith("3 of 3 updates agree with the recorded parents\n"), done.stderr
    done = spartan("report", f"{URL}/killed", cwd=tmp_path)
    assert list((tmp_path / "report").glob("*.html")), done.stderr


def test_a_store_that_goes_away_ends_the_run_which_goes_on_when_it_is_back(
    s3: ObjectStore, config: Config, undisturbed: bytes, local_ray: None
) -> None:
    s3.fails = lambda method, path: method == "PUT" and "epoch-000004" in path
    try:
        with pytest.raises(RunError, match=r"cannot write: .*; unsent files are in ") as caught:
            run_here(change(config, run={"out": URL, "name": "away"}))
    finally:
        s3.fails = lambda method, path: False
    kept = Path(str(caught.value).split("are in ")[1]) / "away"
    assert kept.is_relative_to(tempfile.gettempdir())
    assert (kept / "checkpoints" / "epoch-000004.sha256").exists()
    assert "checkpoints/epoch-000003.sha256" in s3.names("runs/away/")
    assert "checkpoints/epoch-000004.sha256" not in s3.names("runs/away/")

    run_here(config, folder=f"{URL}/away")
    assert s3.content("runs/away/final.safetensors") == undisturbed
    with reading(f"{URL}/away") as folder:
        assert len((folder / "metrics.jsonl").read_text().splitlines()) == 6
    assert not any(name.endswith(".tmp") for name in Store(f"{URL}/away").sizes())
