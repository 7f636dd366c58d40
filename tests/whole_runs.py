"""Helpers that do whole runs on Ray and read their results."""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar
from unittest.mock import patch

import pytest
import ray
from ray.exceptions import RayActorError

from spartan_ray.cli import main as cli
from spartan_ray.cli.flags import take_config
from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.placement import resolve_cluster
from spartan_ray.distributed.relayed import RelayTransport
from spartan_ray.distributed.worker import Worker
from spartan_ray.engine.evaluator import EvaluatorSpec
from spartan_ray.engine.strategies.requests import WHOLE, CaseSet, Members, Part, Scores
from spartan_ray.run.config import Config
from spartan_ray.run.driver import Driver
from spartan_ray.run.progress import Progress
from spartan_ray.run.replay import Replay
from spartan_ray.run.supervisor import Supervisor

TIMINGS = {"seconds", "evaluation_seconds", "images_per_second", "scoring_seconds", "update_seconds",
           "gradient_seconds", "broadcast_seconds", "retries", "late_results", "workers",
           "images_discarded", "time", "run_seconds", "average_seconds"}  # fmt: skip
ROOT = Path(__file__).parent.parent
SMALL = ["--data.name", "digits", "--parent.model", "convnet", "--evolution.every", "2", "--evolution.population", "4"]


def parse_config(arguments: list[str]) -> Config:
    """Return the configuration of `spartan train` with these arguments."""
    return take_config(cli.parse(["train", *arguments]))


def change(config: Config, **sections: dict[str, Any]) -> Config:
    """Return the configuration with fields of sections replaced."""
    return Config(
        **{
            name: type(section)(**section.model_dump() | sections.get(name, {}))
            for name, section in ((name, getattr(config, name)) for name in Config.model_fields)
        }
    )


def run(config: Config, watch: Callable[[Progress], None] = lambda progress: None, folder: Path | None = None) -> Path:
    """Do a run, or resume the one in `folder`. Call `watch` with the progress repeatedly. Return the run folder."""
    return attend(Supervisor(config, str(folder) if folder else None), watch)


class WarmTransport(RelayTransport):
    """A transport that keeps the workers of a finished run for the next run in the session, which saves their start."""

    idle: ClassVar[list[Any]] = []

    def __init__(self, spec: object, cluster: Cluster, name: str) -> None:
        class Warm(Worker):
            def take(self, spec: EvaluatorSpec) -> None:
                Worker.__init__(self, spec)

        super().__init__(spec, cluster, name=name)
        self.actor, self.resources = ray.remote(Warm), {"num_cpus": 0}  # idle workers must not hold cores

    def start(self) -> tuple[Any, Any]:
        while self.idle:
            worker = self.idle.pop()
            with contextlib.suppress(RayActorError):  # a test killed it
                ray.get(worker.take.remote(self.spec))
                return worker, worker.join.remote()
        return super().start()

    def kill(self, worker: Any) -> None:
        self.idle.append(worker)

    def end(self, workers: list[Any]) -> None:
        self.idle.extend(workers)


def run_here(config: Config, folder: Path | str | None = None) -> tuple[Path, list[str]]:
    """Do a run with the driver in this process and warm workers. Return the run folder and the messages.

    No worker may be killed meanwhile."""
    config = config.model_copy(update={"cluster": resolve_cluster(config.cluster, [{"CPU": 2}])})
    driver = Driver(config, str(folder) if folder else None)
    with patch("spartan_ray.run.driver.RelayTransport", WarmTransport):
        assert driver.run()
    return Path(str(driver.progress.folder)), driver.progress.notes


def spartan(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """Run the program as a user does, with `more` in its environment."""
    command = [sys.executable, "-m", "spartan_ray", *arguments]
    given = environment() | more
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=given, timeout=900, check=False)


def environment() -> dict[str, str]:
    """Return this process's environment without the variables of the tests' Ray."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return keep | {"PYTHONPATH": str(ROOT)}


def command(*arguments: str, cwd: Path, **more: str) -> tuple[int, str, str]:
    """Run `spartan` in this process, which is faster than another process. It must not start a Ray.

    Return the exit code, the standard output and the standard error."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["spartan", *arguments]),
        patch.dict(os.environ, {"HOME": str(cwd)}),  # also removes variables that are set meanwhile
        contextlib.chdir(cwd),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        for name in [name for name in os.environ if name.startswith("RAY_")]:
            del os.environ[name]
        os.environ.update(more)
        with pytest.raises(SystemExit) as end:
            cli.main()
    assert isinstance(end.value.code, int)
    return end.value.code, out.getvalue(), err.getvalue()


def attend(supervisor: Supervisor, watch: Callable[[Progress], None]) -> Path:
    """Follow a run to its end and return its folder."""
    try:
        ended = False
        while not ended:
            ended, progress = supervisor.watch(0.02, 0)
            watch(progress)
        assert supervisor.result()
        return Path(str(progress.folder))
    finally:
        supervisor.close()


def in_worker(supervisor: Supervisor, pid: int, change_worker: Callable[[Any], None]) -> None:
    """Change a worker of a run: call `change_worker` with the actor's object in the worker's process."""

    def in_driver(driver: Any) -> None:
        for slot in driver.pool.dispatcher.slots:
            if slot.info and slot.info.pid == pid:
                slot.worker.__ray_call__.remote(change_worker)

    ray.get(supervisor.driver.__ray_call__.remote(in_driver))


def thresholds_of(replay: Replay) -> list[float]:
    """Return a list to which each scoring of a replay appends its threshold."""
    thresholds: list[float] = []
    evaluate = replay.executor.evaluate

    def watched(
        members: Members,
        cases: CaseSet = "fitness",
        threshold: float = -math.inf,
        part: Part = WHOLE,
        own: int | None = None,
    ) -> Scores:
        thresholds.append(threshold)
        return evaluate(members, cases, threshold, part, own)

    replay.executor.evaluate = watched  # type: ignore[method-assign]
    return thresholds


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def outcome(folder: Path) -> list[dict[str, Any]]:
    """Return the record without the fields that depend on timing and workers."""
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in metrics(folder)]


def same_result(folder: Path, other: Path) -> bool:
    """Return whether the weights and journals of two runs have the same bits, and their records are equal."""
    journals = [{path.name: path.read_bytes() for path in (run / "journal").glob("*")} for run in (folder, other)]
    return (
        (folder / "final.safetensors").read_bytes() == (other / "final.safetensors").read_bytes()
        and outcome(folder) == outcome(other)
        and journals[0] == journals[1]
    )
