"""The supervisor: starts the driver of a run, follows it, and restarts it if it is lost."""

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

# Seconds that a lost driver may take to end and release its run folder.
LOCK_PATIENCE = 60.0
# Seconds that the driver may take to report its progress before it counts as not answering.
ANSWER_SECONDS = 10.0
# Seconds that nodes may take to join a Ray without an autoscaler.
ROOM_SECONDS = 30.0


class Supervisor:
    """Starts the driver actor of a run, and restarts it from the last checkpoint if it is lost.

    The driver runs on the Ray that this process is connected to. If the configured workers do not fit, the supervisor
    waits up to `room_seconds` for more nodes; then `watch` raises InputError. With 0, the constructor raises it. If the
    Ray can start nodes itself, the supervisor waits indefinitely."""

    def __init__(self, config: Config, folder: str | None = None, room_seconds: float = 0.0) -> None:
        self.config = config
        self.folder = folder
        self.room_until = time.monotonic() + room_seconds
        self.said_waiting = -SAY_SECONDS  # when it last reported that it waits
        self.driver: Any = None
        self.restarts = 0
        self.stopping = False
        self.shown = 0  # last epoch whose row was reported
        self.unsaid: deque[Row | str] = deque()  # rows and notes not displayed yet
        self._begin()

    def _begin(self) -> bool:
        """Start the driver if there is room for the workers, and return whether it was started. Raises InputError if
        the time to wait for room is over."""
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
        # A run that is submitted again may find the driver before it still ending.
        self._start(LOCK_PATIENCE if self.config.run.resume == "auto" else 0.0)
        return True

    def _start(self, patience: float = 0.0, reason: str | None = None) -> None:
        cluster = self.config.cluster
        # The driver writes the run folder, so it runs on the node of the command if it fits there.
        # Two threads: one runs the loop, the other answers `look` and `stop`.
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
        """Wait up to `seconds` for the end of the run. Return whether it ended, and the progress: the messages since
        the last call and, unless `rows` is None, the rows after the first `rows`.

        Raises the Ray error if the driver was lost more often than `cluster.driver_restarts`, and RunError if it does
        not start or answer for `cluster.worker_timeout` seconds, or if no node can ever run it."""
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
                    f"no answer from the driver, or no room for it, for {self.config.cluster.worker_timeout:g} s "
                    "(cluster.worker_timeout)"
                ) from None
            return False, self._silence([])
        except RayTaskError:
            raise
        except RayError as error:  # it died, ran out of memory, or lost its node
            return False, self._restart(error)
        self.answered = time.monotonic()
        for said in progress.said:
            self._say(said)
        self.said += len(progress.said)
        self.folder = progress.folder or self.folder
        return ended, progress

    def _say(self, said: Row | str) -> None:
        """Queue a row or note for display. First add the rows that a lost driver wrote but did not report."""
        if not isinstance(said, str):
            if self.shown and said["epoch"] > self.shown + 1:
                known: Progress = ray.get(self._look(self.shown))
                self.unsaid += [row for row in known.rows if self.shown < row["epoch"] < said["epoch"]]
            self.shown = said["epoch"]
        self.unsaid.append(said)

    def _look(self, rows: int | None) -> Any:
        """Ask the driver for its progress. Frequent calls must not fill Ray's list of tasks, so they emit no events."""
        return self.driver.look.options(enable_task_events=False).remote(rows, self.said)

    def _waits_for_room(self) -> bool:
        """Return whether the driver still has no room, and report so. Raises RunError if it can never have any."""
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
        """Return the result of the driver's `run`, or raise its error."""
        return bool(ray.get(self.running))

    def stop(self) -> None:
        """Ask the driver to stop the run. From now on a lost driver is not restarted."""
        self.stopping = True
        if self.driver:
            self.driver.stop.remote()

    def close(self) -> None:
        """End the driver and its workers."""
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
        said = f"the driver was lost and is restarted from the last checkpoint: {reason}"
        self._start(LOCK_PATIENCE, said)
        return self._silence([said])

    def _silence(self, notes: list[str]) -> Progress:
        """Return the progress of a driver that does not answer: its folder and these notes."""
        self.unsaid += notes
        return Progress(self.folder, epochs=self.config.run.epochs, said=list(notes))
