"""Many generations while workers are killed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
from whole_runs import change, metrics

from spartan_ray.noise.contract import member_seeds
from spartan_ray.run.config import Config
from spartan_ray.run.journal import read_journal
from spartan_ray.run.replay import Replay

pytestmark = [pytest.mark.faults, pytest.mark.ray]
POPULATION = 64


def test_generations_with_a_worker_killed_every_few_generations(small_config: Config, long: bool) -> None:
    generations = 200 if long else 70
    config = change(
        small_config,
        run={"epochs": generations},
        data={"sgd_images": 64, "validation_images": 40},
        evolution={"every": 1, "population": POPULATION, "fitness_images": 32},
    )
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    shared = set(os.listdir("/dev/shm"))
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "soak.py"), config.model_dump_json()],
        capture_output=True, text=True, timeout=1800, check=False, env=environment,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout.splitlines()[-1])
    folder = Path(seen["folder"])
    rows = metrics(folder)
    assert [row["epoch"] for row in rows] == list(range(1, generations + 1))
    assert len(seen["killed"]) >= generations // 10
    assert sum(row["retries"] for row in rows) >= generations // 10
    assert sum(row["members_failed"] for row in rows) == 0

    # No member is lost or counted twice: each journal has every member once, and replay gives the recorded parents.
    for generation in range(1, generations + 1):
        journal = read_journal(folder / "journal" / f"{generation:06d}.npz")
        assert journal["seed"].tolist() == member_seeds(0, generation, POPULATION).tolist()
        assert journal["images"].tolist() == [32] * POPULATION
    replay = Replay(folder, lambda note: None)
    assert replay.generations == list(range(1, generations + 1))
    assert all(replay.verify(generation) for generation in replay.generations)
    recorded, scored = replay.descendant(37, 5, folder / "descendant.safetensors")
    assert recorded == scored

    resident = {int(epoch): size for epoch, size in seen["resident"].items()}
    late = [size for epoch, size in resident.items() if epoch >= generations / 4]
    assert max(late) / min(late) < 1.05, late

    left = [psutil.Process(pid) for pid in {*seen["processes"], *seen["killed"]} if psutil.pid_exists(pid)]
    assert psutil.wait_procs(left, timeout=60)[1] == []
    assert set(os.listdir("/dev/shm")) <= shared
