"""Workers are killed, stopped, broken or removed during a run. The bits of the result do not change."""

from __future__ import annotations

import contextlib
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from whole_runs import attend, change, in_worker, metrics, run, run_here, same_result

from spartan_ray.run.config import Config, Evolution, Run
from spartan_ray.run.progress import Progress
from spartan_ray.run.supervisor import Supervisor
from spartan_ray.vision.config import Data, Parent

pytestmark = [pytest.mark.faults, pytest.mark.ray]
GENERATIONS = 10


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the configuration of a run of ten evolve phases of 120 members. Each phase moves the parent."""
    return Config(
        run=Run(name="x", out=str(tmp_path_factory.mktemp("runs")), epochs=GENERATIONS),
        data=Data(name="digits"),
        parent=Parent(model="convnet", threads=1),
        evolution=Evolution(every=1, population=120, fitness_images=64, optimizer="momentum"),
    )


@pytest.fixture(scope="module")
def undisturbed(local_ray: None, config: Config) -> Path:
    folder, _ = run_here(config)
    assert all(row["accepted"] and row["retries"] == 0 for row in metrics(folder))
    return folder


def test_a_random_worker_killed_in_mid_generation(undisturbed: Path, config: Config) -> None:
    chance = random.Random(0)
    when = {generation: chance.randint(1, 90) for generation in (2, 5, 8)}

    def kill(progress: Progress) -> None:
        if progress.phase == "evolve" and progress.worker_pids and progress.done >= when.get(progress.epoch, math.inf):
            del when[progress.epoch]
            os.kill(chance.choice(progress.worker_pids), signal.SIGKILL)

    folder = run(change(config, cluster={"chunk": 5}), kill)
    assert not when
    assert sum(row["retries"] for row in metrics(folder)) >= 2
    assert same_result(folder, undisturbed)


def test_a_storm_of_kills_while_sgd_trains_and_while_workers_start(local_ray: None, config: Config, long: bool) -> None:
    """One worker is killed per second, whether it has joined or is starting. A start takes longer than a second.

    A run that limited the total number of deaths would fail. The storm begins in an SGD epoch, in which the driver does
    not look for lost workers."""
    storm_seconds = 60.0 if long else 30.0
    epochs = {"epochs": 90 if long else 20}  # they take longer than the storm
    config = change(
        config, run=epochs, parent={"batch_size": 4}, evolution={"every": 10}, cluster={"driver_restarts": 0}
    )
    calm, _ = run_here(config)
    chance = random.Random(0)
    began = next_kill = math.inf
    killed: dict[str, list[int]] = {"joined": [], "starting": []}

    def kill(progress: Progress) -> None:
        nonlocal began, next_kill
        now = time.monotonic()
        if progress.epoch == 2 and began == math.inf:
            began = next_kill = now
        if not next_kill <= now < began + storm_seconds:
            return
        next_kill += 1.0
        processes = [process for process in worker_processes() if process.pid != progress.driver_pid]
        if processes:
            process = chance.choice(processes)
            killed["joined" if process.pid in progress.worker_pids else "starting"].append(process.pid)
            process.kill()

    folder = run(config, kill)
    assert len(set(killed["joined"])) >= 2
    assert killed["starting"]
    assert same_result(folder, calm)


def worker_processes() -> list[psutil.Process]:
    """Return the processes of workers that have joined or are starting."""
    found = []
    for process in psutil.Process().children(recursive=True):
        with contextlib.suppress(psutil.Error):
            # A busy worker has the name of its task. Leave out warm workers, and agents, whose end would end the node.
            if process.cmdline()[0].startswith(("ray::Worker", "ray::spartan:")):
                found.append(process)
    return found


def test_workers_killed_while_parents_train_and_while_offspring_are_scored(local_ray: None, config: Config) -> None:
    evolution = {"strategy": "esgd", "every": 3, "population": 200, "optimizer": "sgd", "noise": "gaussian"}
    config = change(config, run={"epochs": 6}, parent={"batch_size": 8}, evolution=evolution)
    calm, _ = run_here(config)
    when = {(2, "sgd"): 1, (3, "evolve"): 20, (5, "sgd"): 0, (6, "evolve"): 100}
    chance = random.Random(0)

    def kill(progress: Progress) -> None:
        if progress.worker_pids and progress.done >= when.get((progress.epoch, progress.phase), math.inf):
            del when[progress.epoch, progress.phase]
            os.kill(chance.choice(progress.worker_pids), signal.SIGKILL)

    folder = run(config, kill)
    assert not when
    assert sum(row["retries"] for row in metrics(folder)) >= 3
    assert same_result(folder, calm)


def test_a_worker_that_returns_nan_one_that_raises_and_one_that_hangs(undisturbed: Path, config: Config) -> None:
    """The faults of a broken device, a GPU out of memory and a stuck device, one after another in a run.

    Each fault is detected, and the last two workers are replaced."""
    notes: list[str] = []
    disturbed: list[int] = []
    supervisor = Supervisor(change(config, cluster={"task_timeout": 1.0, "chunk": 5}))

    def to_nan(worker: Any) -> None:
        worker.evaluator.fitness.normalise.shift_C += math.nan

    def out_of_memory(worker: Any) -> None:
        def fail(*_: Any) -> None:
            raise MemoryError("out of memory")

        worker.evaluator.evaluate = fail

    def stuck(worker: Any) -> None:
        os.kill(os.getpid(), signal.SIGSTOP)

    faults = [(2, to_nan), (4, out_of_memory), (6, stuck)]

    def disturb(progress: Progress) -> None:
        notes.extend(progress.notes)
        due = faults and progress.epoch >= faults[0][0] and progress.phase == "evolve"
        pids = [pid for pid in progress.worker_pids if pid not in disturbed]
        # A wrong NaN is detected only if there is a second worker.
        if due and len(pids) >= (2 if faults[0][1] is to_nan else 1):
            disturbed.append(pids[0])
            in_worker(supervisor, pids[0], faults.pop(0)[1])

    folder = attend(supervisor, disturb)
    assert not faults
    said = "\n".join(notes)
    for pid, reason in zip(
        disturbed,
        (
            "returned NaN where worker",
            "MemoryError: out of memory",
            "no answer for 1 s or more (cluster.task_timeout)",
        ),
        strict=True,
    ):
        assert any(f"worker {pid} on" in note and reason in note for note in notes), said
    assert same_result(folder, undisturbed)


def test_a_node_removed_in_mid_generation(undisturbed: Path, config: Config, tmp_path: Path) -> None:
    """The cluster has a head and two nodes. It needs another process, because a process can connect to only one Ray."""
    given = change(config, run={"out": str(tmp_path / "runs")}).model_dump_json()
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "two_nodes.py"), given],
        capture_output=True, text=True, timeout=900, check=False, env=environment,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert same_result(Path(seen["folder"]), undisturbed)
    assert seen["removed"] == "evolve"
    assert seen["workers"] == [1, 2, 1]
    assert re.fullmatch(r"waiting for nodes: cluster.workers \(auto\) .* do not fit the 1 nodes .*", seen["waited"])


def test_where_driver_and_workers_go_among_gpus_and_what_a_lost_node_of_relays_costs() -> None:
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    ended = subprocess.run(
        [sys.executable, str(Path(__file__).parent / "pretended_gpus.py")],
        capture_output=True, text=True, timeout=900, check=False, env=environment,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    seen = json.loads(ended.stdout.splitlines()[-1])
    assert seen.pop("lost") >= 2
    assert seen.pop("driver") in (1, 2)
    assert seen == {
        "driver_gpus": 0.1, "workers": [[2, 2], [2, 2, 2], [2, 2]], "head": False, "removed": True, "right": True,
        "relayed": True,
    }  # fmt: skip
