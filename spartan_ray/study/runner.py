"""Does the runs of a study on one Ray, several at a time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ray.exceptions import RayError, RayTaskError

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.nodes import grows, nodes_here_first
from spartan_ray.distributed.placement import resolve_cluster, workers_that_fit
from spartan_ray.errors import InputError, RunError, one_line
from spartan_ray.run.supervisor import Supervisor
from spartan_ray.study.plan import Planned

# Seconds in which all active runs are watched once, one after another.
WATCH_SECONDS = 0.5
# Seconds between two lines about the progress.
SAY_SECONDS = 60.0
# Seconds that runs may take to stop.
STOP_SECONDS = 30.0


class Runner:
    """Does the missing runs of a study. After an interrupt, each run ends with a checkpoint."""

    def __init__(self, folder: Path, at_once: int, ended: Callable[[Planned, Path], None], say: Callable[[str], None]):
        """Run folders are made in `folder`. `ended` is called with each finished run and its folder."""
        self.folder, self.at_once, self.ended, self.say = folder, at_once, ended, say
        self.active: dict[Supervisor, Planned] = {}
        self.epochs: dict[Supervisor, int] = {}
        self.failed: list[str] = []
        self.epochs_done = 0

    def run(self, runs: list[Planned]) -> list[str]:
        """Do the runs in order. Return one line for each failed run."""
        waiting, started, said = deque(runs), time.monotonic(), time.monotonic()
        total = sum(run.config.run.epochs for run in runs)
        at_once = max(1, min([self.at_once, *(fit_together(run.config.cluster, self.at_once) for run in runs)]))
        if at_once < self.at_once:
            self.say(f"{at_once} runs at a time: the drivers and workers of more do not fit this Ray")
        try:
            while waiting or self.active:
                while waiting and len(self.active) < at_once:
                    self._start(waiting.popleft())
                for supervisor in list(self.active):
                    self._watch(supervisor)
                if time.monotonic() - said > SAY_SECONDS:
                    said = time.monotonic()
                    done = self.epochs_done + sum(self.epochs.values())
                    left = f"{_time((said - started) / done * (total - done))} left" if done else "no epoch has ended"
                    where = ", ".join(
                        f"{run.name} epoch {self.epochs[one]}/{run.config.run.epochs}"
                        for one, run in self.active.items()
                    )
                    count = len(runs) - len(waiting) - len(self.active)
                    self.say(f"{count}/{len(runs)} runs; {where}; {left}")
        except KeyboardInterrupt:
            self._stop()
            raise
        finally:
            for supervisor in self.active:
                supervisor.close()
        return self.failed

    def _start(self, run: Planned) -> None:
        section = run.config.run.model_copy(update={"name": run.name, "out": str(self.folder)})
        config = run.config.model_copy(update={"run": section})
        place = self.folder / run.name
        try:
            supervisor = Supervisor(config, str(place) if place.exists() else None)
        except (InputError, RunError) as error:
            self._fail(run, error)
            return
        self.active[supervisor], self.epochs[supervisor] = run, 0

    def _watch(self, supervisor: Supervisor) -> None:
        run = self.active[supervisor]
        try:
            ended, progress = supervisor.watch(WATCH_SECONDS / len(self.active))
            while supervisor.unsaid:
                if isinstance(said := supervisor.unsaid.popleft(), str):  # the record has the rows
                    self.say(f"{run.name}: {said}")
            self.epochs[supervisor] = max(0, progress.epoch - 1)
            if not ended:
                return
            supervisor.result()
            self.ended(run, Path(str(supervisor.folder)))
            self.say(f"{run.name}: done")
        except RayTaskError as error:
            self._fail(run, error.cause)
        except (RayError, InputError, RunError, OSError) as error:  # the last ones of a record that cannot be read
            self._fail(run, error)
        supervisor.close()
        del self.active[supervisor]
        self.epochs_done += run.config.run.epochs
        del self.epochs[supervisor]

    def _fail(self, run: Planned, error: Any) -> None:
        self.failed.append(f"{run.name}: {one_line(str(error))}")
        self.say(self.failed[-1])

    def _stop(self) -> None:
        self.say("stopping")
        for supervisor in self.active:
            supervisor.stop()
        until = time.monotonic() + STOP_SECONDS
        for supervisor in list(self.active):
            try:
                while time.monotonic() < until and not supervisor.watch(WATCH_SECONDS)[0]:
                    pass
            except (RayError, RunError):  # a signal to the whole process group ended it too
                continue


def fit_together(cluster: Cluster, most: int) -> int:
    """Return how many of `most` runs fit this Ray at the same time, each with its driver and its least number of
    workers. Return `most` if an autoscaler starts nodes on demand."""
    if grows():
        return most
    nodes = [node["Resources"] for node in nodes_here_first()]
    cluster = resolve_cluster(cluster, nodes)
    workers = cluster.workers if isinstance(cluster.workers, int) else cluster.least_workers
    for count in range(most, 1, -1):
        drivers = {"driver_cpus": count * cluster.driver_cpus, "driver_gpus": count * (cluster.driver_gpus or 0.0)}
        if workers_that_fit(cluster.model_copy(update=drivers), nodes) >= count * workers:
            return count
    return 1


def _time(seconds: float) -> str:
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02} min" if minutes >= 60 else f"{minutes} min"
