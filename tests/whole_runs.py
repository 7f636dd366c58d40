"""Whole runs on Ray, and what they left."""

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
    """The configuration of `spartan train` with these arguments."""
    return take_config(cli.parse(["train", *arguments]))


def change(config: Config, **sections: dict[str, Any]) -> Config:
    """The configuration with fields of sections replaced."""
    return Config(
        **{
            name: type(section)(**section.model_dump() | sections.get(name, {}))
            for name, section in ((name, getattr(config, name)) for name in Config.model_fields)
        }
    )


def run(config: Config, watch: Callable[[Progress], None] = lambda progress: None, folder: Path | None = None) -> Path:
    """Run to the end, or go on in a folder, and show `watch` the progress again and again; the run folder."""
    return attend(Supervisor(config, str(folder) if folder else None), watch)


class WarmTransport(RelayTransport):
    """Workers of one session of tests: those that a run is done with are for the next one, which saves their start."""

    idle: ClassVar[list[Any]] = []

    def __init__(self, spec: object, cluster: Cluster, name: str) -> None:
        class Warm(Worker):
            def take(self, spec: EvaluatorSpec) -> None:
                Worker.__init__(self, spec)

        super().__init__(spec, cluster, name=name)
        self.actor, self.resources = ray.remote(Warm), {"num_cpus": 0}  # idle, they leave the cores to others

    def start(self) -> tuple[Any, Any]:
        while self.idle:
            worker = self.idle.pop()
            with contextlib.suppress(RayActorError):  # another test killed it
                ray.get(worker.take.remote(self.spec))
                return worker, worker.join.remote()
        return super().start()

    def kill(self, worker: Any) -> None:
        self.idle.append(worker)

    def end(self, workers: list[Any]) -> None:
        self.idle.extend(workers)


def run_here(config: Config, folder: Path | str | None = None) -> tuple[Path, list[str]]:
    """The same with the driver in this process and workers that are warm: the run folder and what was said. No
    worker may be killed meanwhile."""
    config = config.model_copy(update={"cluster": resolve_cluster(config.cluster, [{"CPU": 2}])})
    driver = Driver(config, str(folder) if folder else None)
    with patch("spartan_ray.run.driver.RelayTransport", WarmTransport):
        assert driver.run()
    return Path(str(driver.progress.folder)), driver.progress.notes


def spartan(*arguments: str, cwd: Path, **more: str) -> subprocess.CompletedProcess[str]:
    """The program as a user runs it, with `more` in its environment."""
    command = [sys.executable, "-m", "spartan_ray", *arguments]
    given = environment() | more
    return subprocess.run(command, capture_output=True, text=True, cwd=cwd, env=given, timeout=900, check=False)


def environment() -> dict[str, str]:
    """This process's, without the Ray of the other tests."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return keep | {"PYTHONPATH": str(ROOT)}


def command(*arguments: str, cwd: Path, **more: str) -> tuple[int, str, str]:
    """What `spartan` says where it starts no Ray, in this process, which saves the start of another one: exit code,
    standard output and error."""
    out, err = io.StringIO(), io.StringIO()
    with (
        patch.object(sys, "argv", ["spartan", *arguments]),
        patch.dict(os.environ, {"HOME": str(cwd)}),  # and what is set meanwhile goes again
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
    """Follow a run to its end."""
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
    """Change a worker of a run from within: `change_worker` gets the actor's object."""

    def in_driver(driver: Any) -> None:
        for slot in driver.pool.dispatcher.slots:
            if slot.info and slot.info.pid == pid:
                slot.worker.__ray_call__.remote(change_worker)

    ray.get(supervisor.driver.__ray_call__.remote(in_driver))


def thresholds_of(replay: Replay) -> list[float]:
    """A list that grows by the threshold of each scoring that a replay does."""
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
    """The record without what timing and workers may change."""
    return [{key: value for key, value in row.items() if key not in TIMINGS} for row in metrics(folder)]


def same_result(folder: Path, other: Path) -> bool:
    """Whether weights, record and journals of two runs are equal to the bit."""
    journals = [{path.name: path.read_bytes() for path in (run / "journal").glob("*")} for run in (folder, other)]
    return (
        (folder / "final.safetensors").read_bytes() == (other / "final.safetensors").read_bytes()
        and outcome(folder) == outcome(other)
        and journals[0] == journals[1]
    )
