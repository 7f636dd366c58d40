"""A run from outside: follows its driver, and starts it again when it is lost."""

from __future__ import annotations

import time
from collections import deque
from typing import Any

import ray
from ray.exceptions import GetTimeoutError, RayError, RayTaskError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spartan_ray.distributed.dispatch import SAY_SECONDS
from spartan_ray.distributed.nodes import free_resources, grows, is_impossible, nodes_here_first
from spartan_ray.distributed.placement import described, holds, resolve_cluster
from spartan_ray.distributed.transport import actor_name, leave
from spartan_ray.errors import InputError, RunError
from spartan_ray.run.config import Config
from spartan_ray.run.driver import Driver
from spartan_ray.run.progress import Progress
from spartan_ray.run.record import Row

# Seconds that a driver which was lost may take to end and let go of its run folder.
LOCK_PATIENCE = 60.0
# Seconds that the driver may take to say how far it is before that is counted as silence.
ANSWER_SECONDS = 10.0
# Seconds that nodes may take to join a Ray which does not start any itself.
ROOM_SECONDS = 30.0


class Supervisor:
    """A run from outside: its driver actor, which is started again from the last checkpoint when it is lost.

    Runs on the Ray that this process is connected to. Where the workers that the configuration asks for do not fit,
    more nodes are waited for so many seconds, after which `watch` raises InputError; with 0, this call does."""

    def __init__(self, config: Config, folder: str | None = None, room_seconds: float = 0.0) -> None:
        self.config = config
        self.folder = folder
        self.room_until = time.monotonic() + room_seconds
        self.said_waiting = -SAY_SECONDS  # when
        self.driver: Any = None
        self.restarts = 0
        self.stopping = False
        self.shown = 0  # the last epoch of which a row was said
        self.unsaid: deque[Row | str] = deque()  # for who shows it
        self._begin()

    def _begin(self) -> bool:
        """Start the driver where there is room for the workers. Raises InputError where there is none in time."""
        nodes, growing = nodes_here_first(), grows()
        self.node = nodes[0]["NodeID"]
        try:
            cluster = resolve_cluster(self.config.cluster, [node["Resources"] for node in nodes], growing)
        except InputError as error:
            if growing or time.monotonic() >= self.room_until:
                raise
            self._say_waiting(f"waiting for nodes: {error}")
            return False
        self.config = self.config.model_copy(update={"cluster": cluster})
        # Who is submitted again may find the one before it still ending.
        self._start(LOCK_PATIENCE if self.config.run.resume == "auto" else 0.0)
        return True

    def _start(self, patience: float = 0.0, reason: str | None = None) -> None:
        cluster = self.config.cluster
        # The driver stays where the command runs, if it fits there, since it writes the run folder.
        # Two threads: one runs the loop, the other answers look and stop.
        actor: Any = ray.remote(Driver).options(
            name=actor_name(self.config.run.name, "driver"),
            num_cpus=cluster.driver_cpus,
            num_gpus=cluster.driver_gpus,
            max_concurrency=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(self.node, soft=True),
        )
        self.driver = actor.remote(self.config, self.folder, patience, reason)
        self.running = self.driver.run.options(name=f"spartan:{self.config.run.name}:run").remote()
        self.said = 0
        self.answered = time.monotonic()

    def watch(self, seconds: float, rows: int | None = None) -> tuple[bool, Progress]:
        """Wait so long for the end: whether it came, and the progress with what was said since the last call
        and, if they are asked for, the rows after the first `rows`. Raises the driver's error when it was
        lost too often, or RunError when it does not answer, or start, for as long as a worker may be missing."""
        if self.driver is None and self.stopping:
            return True, self._silence([])
        if self.driver is None and not self._begin():
            time.sleep(seconds)
            return False, self._silence([])
        try:
            ended = bool(ray.wait([self.running], timeout=seconds)[0])
            progress: Progress = ray.get(self._look(rows), timeout=ANSWER_SECONDS)
        except GetTimeoutError:
            if self._waits_for_room():
                return False, self._silence([])
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
                known: Progress = ray.get(self._look(self.shown))
                self.unsaid += [row for row in known.rows if self.shown < row["epoch"] < said["epoch"]]
            self.shown = said["epoch"]
        self.unsaid.append(said)

    def _look(self, rows: int | None) -> Any:
        """What the driver is asked again and again, which is not to fill the list of Ray's tasks."""
        return self.driver.look.options(enable_task_events=False).remote(rows, self.said)

    def _waits_for_room(self) -> bool:
        """Whether the driver has no room yet, which is said. Raises RunError where it will never have."""
        cluster = self.config.cluster
        wanted = {"CPU": float(cluster.driver_cpus), "GPU": cluster.driver_gpus or 0.0}
        if is_impossible(wanted):
            raise RunError(f"no node of this Ray has {described(wanted)} for the driver, and none can be started")
        if any(holds(free, wanted) for free in free_resources()):
            return False
        self.answered = time.monotonic()
        self._say_waiting(f"the driver waits for {described(wanted)}")
        return True

    def _say_waiting(self, text: str) -> None:
        if time.monotonic() - self.said_waiting >= SAY_SECONDS:
            self.said_waiting = time.monotonic()
            self.unsaid.append(text)

    def result(self) -> bool:
        """What the driver's `run` returned, or its error."""
        return bool(ray.get(self.running))

    def stop(self) -> None:
        """Ask the driver to end the run; one that is lost now stays lost."""
        self.stopping = True
        if self.driver:
            self.driver.stop.remote()

    def close(self) -> None:
        """End the driver, and with it its workers."""
        if self.driver and ray.wait([self.running], timeout=0)[0]:
            leave([self.driver])
        elif self.driver:
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
