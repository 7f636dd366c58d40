"""Tests of `scripts/gpu`, which measures a GPU, by its rehearsal on a CPU."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from gpu.__main__ import PHASES, STOPPED, run

ROOT = Path(__file__).parent.parent


def scripts_gpu(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"PYTHON": sys.executable}
    command = [ROOT / "scripts" / "gpu", *arguments]
    return subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment)


@pytest.mark.ray
def test_all_of_it_runs_on_a_cpu(tmp_path: Path) -> None:
    """Every phase ends well and writes figures, and the bytes of the runs agree."""
    done = scripts_gpu("--rehearse", "-o", tmp_path)
    assert done.returncode == 0, done.stdout
    phases = json.loads((tmp_path / "gpu.json").read_text())["phases"]
    assert phases.keys() == PHASES.keys()
    assert all(phase["ended"] == "well" and phase["figures"] for phase in phases.values())
    assert list(phases["whole"]["figures"].values())[1:] == ["same bytes"] * 4
    assert all(row["agrees"] for row in phases["bits"]["figures"])
    assert not any("failed" in name for row in phases["scoring"]["figures"] for name in row)
    assert (tmp_path / "gpu.png").stat().st_size > 10_000
    table = (tmp_path / "gpu.md").read_text()
    assert table.startswith("A rehearsal on a CPU: the figures mean nothing.")
    assert table in done.stdout


def test_scoring_and_training_are_measured_without_ray_and_pydantic(tmp_path: Path) -> None:
    """The setup imitates a machine that has torch and few other packages."""
    absent = "for name in ('ray', 'pydantic', 'tyro', 'safetensors'): sys.modules[name] = None"
    program = f"import runpy, sys\n{absent}\nrunpy.run_module('gpu.measure', run_name='__main__')"
    path = f"{ROOT}:{ROOT / 'benchmarks'}"
    for phase in ("bits", "scoring", "training"):
        command = [sys.executable, "-c", program, phase, tmp_path / phase, "--rehearse"]
        subprocess.run(command, env={"PYTHONPATH": path}, check=True)
        assert json.loads((tmp_path / phase).read_text())


def test_how_a_program_ended_is_told_with_its_last_words() -> None:
    assert run(["-c", "print('well')"], 60) == ("", "well")
    assert run(["-c", "print('one'); print('two'); raise SystemExit(3)"], 60)[0] == "3: one | two"
    assert run(["-c", "import time; print('here', flush=True); time.sleep(60)"], 3)[0] == "killed after 3 s: here"


def test_a_program_is_ended_with_the_one_that_waits_for_it() -> None:
    program = "import os, signal, time; os.kill(os.getppid(), signal.SIGTERM); time.sleep(60)"
    before = signal.getsignal(signal.SIGTERM)
    assert run(["-c", program], 60) == (STOPPED, "")
    assert signal.getsignal(signal.SIGTERM) == before


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_without_a_gpu_it_says_what_to_do() -> None:
    done = scripts_gpu("-o", "nowhere")
    assert done.returncode == 2
    assert done.stdout == "scripts/gpu: torch finds no GPU here; --rehearse runs everything on a CPU\n"
    assert not Path("nowhere").exists()
