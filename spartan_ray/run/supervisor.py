"""A run from outside: follows its driver, and starts it again when it is lost."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spartan_ray.distributed.placement import resolve_cluster
from spartan_ray.distributed.transport import nodes_here_first
from spartan_ray.errors import RunError
from spartan_ray.run.config import Config
from spartan_ray.run.driver import Driver
from spartan_ray.run.progress import Progress
from spartan_ray.run.record import Row

# Seconds that a driver which was lost may take to end and let go of its run folder.
LOCK_PATIENCE = 60.0
# Seconds that the driver may take to say how far it is before that is counted as silence.
ANSWER_SECONDS = 10.0


class Supervisor:
    """A run from outside: its driver actor, which is started again from the last checkpoint when it is lost.

    Runs on the Ray that this process is connected to. Raises InputError when the workers that the
    configuration asks for do not fit."""

    def __init__(self, config: Config, folder: str | None = None) -> None:
        nodes = nodes_here_first()
        cluster = resolve_cluster(config.cluster, [node["Resources"] for node in nodes])
        self.config = config.model_copy(update={"cluster": cluster})
        self.folder = folder
        self.node = nodes[0]["NodeID"]
        self.restarts = 0
        self.stopping = False
        self.shown = 0  # the last epoch of which a row was said
        self.unsaid: deque[Row | str] = deque()  # for who shows it
        # Who is submitted again may find the one before it still ending.
        self._start(LOCK_PATIENCE if config.run.resume == "auto" else 0.0)

    def _start(self, patience: float = 0.0, reason: str | None = None) -> None:
        cluster = self.config.cluster
        # The driver stays where the command runs, if it fits there, since it writes the run folder.
        # Two threads: one runs the loop, the other answers look and stop.
        actor: Any = ray.remote(Driver).options(
            num_cpus=cluster.driver_cpus,
            num_gpus=cluster.driver_gpus,
            max_concurrency=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(self.node, soft=True),
        )
        self.driver = actor.remote(self.config, self.folder, patience, reason)
        self.running = self.driver.run.remote()
        self.said = 0
        self.answered = time.monotonic()

    def watch(self, seconds: float, rows: int | None = None) -> tuple[bool, Progress]:
        """Wait so long for the end: whether it came, and the progress with what was said since the last call
        and, if they are asked for, the rows after the first `rows`. Raises the driver's error when it was
        lost too often, or RunError when it does not answer, or start, for as long as a worker may be missing."""
        try:
            ended = bool(ray.wait([self.running], timeout=seconds)[0])
            progress: Progress = ray.get(self.driver.look.remote(rows, self.said), timeout=ANSWER_SECONDS)
        except GetTimeoutError:
            if time.monotonic() - self.answered > self.config.cluster.worker_timeout:
                raise RunError(
                    f"no answer of the driver, or no room for it, for {self.config.cluster.worker_timeout:g} s "
                    "(cluster.worker_timeout)"
                ) from None
            return False, self._silence([])
        except RayTaskError:
            raise
        except RayError as error:  # died, out of memory, its node lost
            return False, self._restart(error)
        self.answered = time.monotonic()
        for said in progress.said:
            self._say(said)
        self.said += len(progress.said)
        self.folder = progress.folder or self.folder
        return ended, progress

    def _say(self, said: Row | str) -> None:
        """Put what was said where it is shown, after the rows that a lost driver has written and not said."""
        if not isinstance(said, str):
            if self.shown and said["epoch"] > self.shown + 1:
                known: Progress = ray.get(self.driver.look.remote(self.shown, self.said))
                self.unsaid += [row for row in known.rows if self.shown < row["epoch"] < said["epoch"]]
            self.shown = said["epoch"]
        self.unsaid.append(said)

    def result(self) -> bool:
        """What the driver's `run` returned, or its error."""
        return bool(ray.get(self.running))

    def stop(self) -> None:
        """Ask the driver to end the run; one that is lost now stays lost."""
        self.stopping = True
        self.driver.stop.remote()

    def close(self) -> None:
        """End the driver, and with it its workers."""
        ray.kill(self.driver)

    def _restart(self, error: RayError) -> Progress:
        self.restarts += 1
        if self.stopping or self.restarts > self.config.cluster.driver_restarts:
            raise error
        self.close()
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        said = f"the driver was lost and is started again from the last checkpoint: {reason}"
        self._start(LOCK_PATIENCE, said)
        return self._silence([said])

    def _silence(self, notes: list[str]) -> Progress:
        """What is known of a driver that does not answer."""
        self.unsaid += notes
        return Progress(self.folder, epochs=self.config.run.epochs, said=list(notes))
