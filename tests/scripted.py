"""A transport without processes. Its workers compute by formulas, and its clock jumps from event to event."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import count
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.joining import WorkerInfo, versions
from spartan_ray.distributed.pool import Pool
from spartan_ray.distributed.protocol import Lost, Room
from spartan_ray.engine.strategies.requests import Members, Scores
from spartan_ray.noise.contract import noise
from spartan_ray.noise.cpu import CpuKernel
from spartan_ray.noise.fingerprint import fingerprint

FINGERPRINT = fingerprint(CpuKernel("uniform"))
START_SECONDS, MEMBER_SECONDS, ELEMENT_SECONDS = 3.0, 0.125, 0.001
CHUNK = 4  # position of the members in the arguments of `evaluate`


@dataclass(eq=False)
class Process:
    """A worker. `factor` multiplies the duration of its tasks. If it is infinite, the worker hangs."""

    pid: int
    factor: float = 1.0
    free: float = 0.0  # when it will have finished all its tasks
    alive: bool = True


@dataclass(eq=False)
class Answer:
    """The answer to a task, and the time at which it is ready."""

    process: Process
    ready: float
    value: Any


class Scripted:
    """A transport with room for `room` workers on the nodes in `up`.

    `script(process, method, arguments)` may change the answer to a task. It returns an exception to raise, a function
    to apply to the answer, or None to keep the answer."""

    def __init__(self, room: int = 2, script: Callable[[Process, str, tuple[Any, ...]], Any] | None = None) -> None:
        self.clock = 0.0
        self.workers = room
        self.up = {"node"}
        self.leaving: set[str] = set()
        self.never = ""
        self.script = script or (lambda process, method, arguments: None)
        self.pids = count(1)
        self.processes: list[Process] = []
        self.answers: set[Answer] = set()
        self.sent: list[tuple[str, int]] = []  # method and size of each task
        self.events: list[tuple[float, Callable[[], None]]] = []

    def start(self) -> tuple[Process, Answer]:
        process = Process(next(self.pids))
        self.processes.append(process)
        return process, self.submit(process, "join")

    def answers_per_second(self, method: str) -> float:
        return 500.0

    def joined(self, worker: Process, node: str) -> None:
        pass

    def put(self, value: Any) -> Any:
        return value

    def submit(self, worker: Process, method: str, *arguments: Any) -> Answer:
        value, seconds = getattr(self, f"_{method}")(worker, *arguments)
        changed = self.script(worker, method, arguments)
        if changed is not None:
            value = changed(value) if callable(changed) else changed
        worker.free = max(worker.free, self.clock) + seconds * worker.factor
        answer = Answer(worker, worker.free, value)
        if not worker.alive:
            answer.ready, answer.value = self.clock, Lost("the process was dead")
        self.answers.add(answer)
        return answer

    def wait(self, references: list[Answer], seconds: float) -> list[Answer]:
        until = self.clock + seconds
        while True:
            if ready := [answer for answer in references if answer.ready <= self.clock]:
                return ready[:1] if seconds else ready
            at = min((answer.ready for answer in references), default=math.inf)
            event = min((when for when, _ in self.events), default=math.inf)
            if min(at, event) > until:
                self.clock = until
                return []
            self.clock = max(self.clock, min(at, event))
            for when, happen in [due for due in self.events if due[0] <= self.clock]:
                self.events.remove((when, happen))
                happen()

    def result(self, reference: Answer) -> Any:
        self.answers.remove(reference)
        if isinstance(reference.value, Exception):
            raise reference.value
        return reference.value

    def kill(self, worker: Process) -> None:
        self.die(worker, "it was killed")

    def end(self, workers: list[Process]) -> None:
        for worker in workers:
            self.kill(worker)

    def now(self) -> float:
        return self.clock

    def room(self, workers: int, starting: int) -> Room:
        return Room(self.workers, self.up, self.leaving)

    def impossible(self) -> str:
        return self.never

    def die(self, process: Process, reason: str = "a signal") -> None:
        """End a process. Its answers that are not ready yet are lost."""
        process.alive = False
        for answer in self.answers:
            if answer.process is process and answer.ready > self.clock:
                answer.ready, answer.value = self.clock, Lost(reason)

    def freeze(self, process: Process) -> Callable[[], None]:
        """Stop a process, and return a function that lets it continue."""
        stopped, pending = self.clock, [a for a in self.answers if a.process is process and a.ready > self.clock]
        left = {answer: answer.ready - stopped for answer in pending}
        process.factor = math.inf
        for answer in pending:
            answer.ready = math.inf

        def go_on() -> None:
            process.factor = 1.0
            for answer in self.answers:
                if answer.process is process and answer.ready == math.inf:
                    answer.ready = self.clock + left.get(answer, MEMBER_SECONDS)
            process.free = max((a.ready for a in self.answers if a.process is process), default=self.clock)

        return go_on

    def alive(self) -> list[Process]:
        return [process for process in self.processes if process.alive]

    def _join(self, process: Process) -> tuple[WorkerInfo, float]:
        info = WorkerInfo("host", "node", process.pid, "cpu", 1, FINGERPRINT, versions())
        return info, START_SECONDS

    def _evaluate(self, process: Process, *arguments: Any) -> tuple[tuple[Scores, dict[int, str], float, float], float]:
        members = arguments[CHUNK]
        self.sent.append(("evaluate", len(members)))
        seconds = MEMBER_SECONDS * len(members)
        return (scores(members), {}, 0.25, seconds * min(process.factor, 1e9)), seconds

    def _ask(self, process: Process, method: str, items: list[float], *shared: Any) -> tuple[list[float], float]:
        """Return twice each item. `method` is the number of seconds per item."""
        self.sent.append((method, len(items)))
        return [2 * item for item in items], float(method) * len(items)

    def _accumulate(
        self, process: Process, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> tuple[NDArray[np.float32], float]:
        self.sent.append(("accumulate", stop - start))
        return weighted_sum(seed_K, weight_K, stop)[start:], ELEMENT_SECONDS * (stop - start)


def scores(members: Members) -> Scores:
    """Return the scores that every worker computes for these members."""
    fitness_K = members.seed_K / 8 + members.gain_K.astype(np.float64)
    return Scores(np.stack([fitness_K, fitness_K % 1], axis=1), fitness_K, np.full(len(members), 10))


def without(found: Scores, nowhere_K: NDArray[np.bool_]) -> Scores:
    """Return the same scores with NaN for some members."""
    nan_K = np.where(nowhere_K, np.nan, 0.0)
    return replace(found, mean_KM=found.mean_KM + nan_K[:, None], fitness_K=found.fitness_K + nan_K)


def weighted_sum(seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], stop: int) -> NDArray[np.float32]:
    """Return the first elements of the sum that the workers compute."""
    sum_S = np.zeros(stop, np.float32)
    for seed, weight in zip(seed_K, weight_K, strict=True):
        sum_S += weight * noise("uniform", int(seed), 0, stop)
    return sum_S


class Team:
    """A pool on a scripted transport, and its messages. `disturb` is called whenever the pool calls `advance`."""

    def __init__(self, transport: Scripted, **cluster: Any) -> None:
        self.transport = transport
        self.notes: list[str] = []
        self.done = 0
        self.disturb: Callable[[], None] = lambda: None
        self.pool = Pool(
            transport, Cluster(workers=transport.workers, **cluster), "uniform", self.notes.append, self.advance
        )
        self.pool.broadcast(None)  # type: ignore[arg-type]
        self.pool.broadcast_scale(None)

    def advance(self, members: int, images: int) -> None:
        self.done += members
        self.disturb()
