"""The Ray workers: dispatch, retry, stragglers, replacement. Shapes: D parameters, K members.

Both things that workers do cover a range with tasks: members 0..K-1 with chunks to score, elements
0..D-1 with slices of the update. `_cover` is the one engine for both. A worker that dies, hangs or fails
costs what was queued on it, which others do again, and what is late is done twice; since a task's result
depends on nothing but its range, the outcome is the same to the bit.
"""

from __future__ import annotations

import functools
import itertools
import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import ray
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from spartan_ray.config import Cluster, ImageSet, RunError
from spartan_ray.evaluator import EvaluatorSpec, ParentState, Scale
from spartan_ray.joining import WorkerInfo, versions
from spartan_ray.noise import fingerprint_agrees
from spartan_ray.resources import workers_that_fit
from spartan_ray.spans import Range, Span, chunk_size, workers_worth
from spartan_ray.strategies.base import WHOLE, Members, Part, Scores, joined
from spartan_ray.worker import Worker

# Tasks on a worker: one that runs and one that is ready when it ends.
QUEUED_PER_WORKER = 2
# What fails alone on so many workers is given up.
TRIES = 3
# Failures in a row, for each worker of the pool, after which the fault is not a worker's.
FAILURES_PER_WORKER = 3
# A worker that fails is replaced at once; if the new one fails too, after so many seconds, doubled each time.
BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 1.0, 60.0
# A task is late after so many seconds more than so many times its usual: idle workers then do it too.
LATE_SECONDS, LATE_FACTOR = 2.0, 3.0
# A worker hangs after cluster.task_timeout more than so many times the usual.
HANG_FACTOR = 10.0
# After so long a start the user is told what is waited for.
SLOW_START_SECONDS = 30.0
# How long to wait for a result, how often to look after the workers, and to look for nodes that came or went.
POLL_SECONDS = 0.5
TEND_SECONDS = 0.1
NODES_SECONDS = 5.0


class PoolError(RunError):
    """The workers cannot do the work; the message says why."""


def nodes_here_first() -> list[dict[str, Any]]:
    """The nodes of the Ray that are up, this one first."""
    here = ray.get_runtime_context().get_node_id()
    return sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here)


def pool_size(cluster: Cluster) -> int:
    """How many workers a run is to have now. With `workers` auto that follows the nodes that are up."""
    if cluster.workers != "auto":
        return cluster.workers
    assert cluster.gpus_per_worker is not None, "resolved before"
    return max(1, workers_that_fit(cluster, [node["Resources"] for node in nodes_here_first()]))


@dataclass(eq=False)
class _Slot:
    """A worker of the pool."""

    worker: ActorHandle[Any]
    place: int  # in the pool; a worker that replaces another one takes its place
    failures: int = 0  # in its place, since the last success there
    info: WorkerInfo | None = None  # None until it joined
    tasks: list[_Task] = field(default_factory=list)  # in the order in which it does them
    since: float = 0.0  # when it last answered, or began to have something to answer
    late: bool = False  # as it was when somebody last looked
    seconds_per_member: float | None = None  # in the last chunk that it scored


@dataclass(eq=False)
class _Task:
    slot: _Slot
    ref: Any
    range: Range | None  # None: the worker is joining
    span: Span


@dataclass
class _End:
    """A task that ended: with a result, or with an error, which it caused if it was running."""

    task: _Task
    result: Any = None
    error: Exception | None = None
    running: bool = False


class Pool:
    """The workers of a run. `note` takes one-line messages for the user, `advance` the members
    and images that are done as they come in; it may raise to end the run, after which the pool is to be closed."""

    def __init__(
        self,
        spec: EvaluatorSpec,
        cluster: Cluster,
        note: Callable[[str], None],
        advance: Callable[[int, int], None],
        worker: type[Any] = Worker,
    ) -> None:
        self.spec = ray.put(spec)
        self.noise = spec.evolution.noise
        self.cluster = cluster
        self.size = pool_size(cluster)
        self.note, self.advance = note, advance
        self.actor: Any = ray.remote(worker).options(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)
        self.slots: list[_Slot] = []
        self.tasks: dict[Any, _Task] = {}  # in flight, by their references
        self.refused: list[str] = []  # nodes, one for each worker that was refused there
        self.keys = itertools.count()
        self.parent: tuple[int, Any]  # the last broadcast of each and its key
        self.scale: tuple[int, Any]
        self.counts: dict[str, float] = {"broadcast_seconds": 0.0, "retries": 0, "late_results": 0, "members_failed": 0}
        self.failures_in_a_row = 0
        self.last_reason = ""
        self.seconds_per_member: float | None = None
        now = time.monotonic()
        self.nodes_seen = self.manned = now  # when the nodes were last looked at, and a worker was last there
        self.tend_at = now
        self.said_unmanned = False
        self.places = itertools.count()
        # Workers to be started: when, in which place, after how many failures there.
        self.starts = [(now, next(self.places), 0) for _ in range(self.size)]
        self.seconds_per_noise = 0.0  # an element of one noise vector, in the last update

    @property
    def infos(self) -> list[WorkerInfo]:
        """The workers that have joined."""
        return [slot.info for slot in list(self.slots) if slot.info]

    @property
    def devices(self) -> set[str]:
        """The names of the devices that score."""
        return {info.device for info in self.infos}

    def wait_until_joined(self) -> None:
        """Return when every worker has joined or was refused, or after a while with those that have."""
        deadline = time.monotonic() + SLOW_START_SECONDS
        while self.starts or any(slot.info is None for slot in self.slots):
            self._collect()
            if self.infos and time.monotonic() > deadline:
                self.note(f"{len(self.infos)} of {self.size} workers have started; the others join when they can")
                return

    def broadcast(self, parent: ParentState) -> None:
        """Make this the parent of the members that are evaluated from here on."""
        self.parent = self._put(parent)

    def broadcast_scale(self, scale: Scale) -> None:
        """Make this the scale of what is added to the parent."""
        self.scale = self._put(scale)

    def _put(self, value: ParentState | Scale) -> tuple[int, Any]:
        started = time.perf_counter()
        reference = ray.put(value)
        self.counts["broadcast_seconds"] += time.perf_counter() - started
        return next(self.keys), reference

    def evaluate(
        self, members: Members, images: ImageSet = "fitness", bar: float = -math.inf, part: Part = WHOLE
    ) -> Scores:
        """The scores of every member on a part of the images; one that can no longer exceed the bar is left. A
        member that no worker can score has the loss and the accuracy NaN, or ends the run as
        `cluster.on_member_error` says."""
        (parent_key, parent), (scale_key, scale) = self.parent, self.scale
        keys = (parent_key, scale_key)
        parts: dict[int, Scores] = {}
        slowest_load = 0.0

        def submit(worker: ActorHandle[Any], start: int, stop: int) -> Any:
            return worker.evaluate.remote(keys, parent, scale, members[start:stop], images, bar, part)

        def give_up(start: int, reason: str) -> tuple[Scores, float, float]:
            said = f"the member of seed {members.seed_K[start]} failed on {TRIES} workers"
            # What has no noise is the parent or its update: there is no score without it.
            if self.cluster.on_member_error == "stop" or not members.gain_K[start]:
                raise PoolError(f"{said}: {reason}")
            self.note(f"{said} and is scored worst: {reason}")
            self.counts["members_failed"] += 1
            return Scores(np.array([math.nan]), np.array([math.nan]), np.array([0])), 0.0, 0.0

        def is_finite(result: tuple[Scores, float, float]) -> bool:
            return bool(np.isfinite(result[0].loss_K).all())

        next_size = functools.partial(self._chunk_size, len(members))
        range_ = Range(submit, next_size, deque([Span(0, len(members))]), len(members))
        if self.seconds_per_member:
            range_.seconds, range_.elements = self.seconds_per_member, 1
        for slot, (start, stop), result in self._cover(range_, 1, is_finite, give_up):
            parts[start], seconds_to_load, seconds = result
            slowest_load = max(slowest_load, seconds_to_load)
            if seconds:
                self.seconds_per_member = slot.seconds_per_member = seconds / (stop - start)
            self.advance(stop - start, int(parts[start].images_K.sum()))
        self.counts["broadcast_seconds"] += slowest_load
        return joined(*(parts[start] for start in sorted(parts)))

    def weighted_sum(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], size_D: int
    ) -> NDArray[np.float32]:
        """sum_k weight_k * noise_k, D float32, computed by the workers in one slice each, or by as many as pay."""
        seed_ref, weight_ref = ray.put(seed_K), ray.put(weight_K)
        usual = self.seconds_per_noise * len(seed_K) * size_D or math.inf
        slice_size = -(-size_D // workers_worth(usual, max(1, len(self.slots))))
        sum_D = np.empty(size_D, np.float32)

        def submit(worker: ActorHandle[Any], start: int, stop: int) -> Any:
            return worker.accumulate.remote(seed_ref, weight_ref, start, stop)

        def give_up(start: int, reason: str) -> NDArray[np.float32]:
            raise PoolError(f"the update failed on {TRIES} workers: {reason}")

        def is_finite(part: NDArray[np.float32]) -> bool:
            return bool(np.isfinite(part).all())

        range_ = Range(submit, lambda slot, left: slice_size, deque([Span(0, size_D)]), size_D)
        if self.seconds_per_noise:
            range_.seconds, range_.elements = self.seconds_per_noise * len(seed_K), 1
        for _, (start, stop), part in self._cover(range_, slice_size, is_finite, give_up):
            sum_D[start:stop] = part
        self.seconds_per_noise = range_.seconds / (range_.elements * max(len(seed_K), 1))
        return sum_D

    def close(self) -> None:
        """End all workers."""
        for slot in self.slots:
            ray.kill(slot.worker)
        self.slots.clear()
        self.tasks.clear()
        self.starts.clear()

    def _chunk_size(self, members: int, slot: _Slot, left: int) -> int:
        if self.cluster.chunk != "auto":
            return self.cluster.chunk
        return chunk_size(left, members, self.size, slot.seconds_per_member or self.seconds_per_member)

    def _cover(
        self, range_: Range, smallest: int, is_finite: Callable[[Any], bool], give_up: Callable[[int, str], Any]
    ) -> Iterator[tuple[_Slot, tuple[int, int], Any]]:
        """Do a range in spans, in any order; yield each span's worker and result once.

        A span that failed is done again in parts of the smallest size, elsewhere if it can be; one that fails
        in that size on TRIES workers has the result that `give_up(start, reason)` returns. A result that is
        not finite counts when a second worker, if there is one, agrees; else the worker is replaced."""
        # Nobody has looked after the workers since the last range, and some may have answered meanwhile.
        self.manned = time.monotonic()
        self._look_who_is_late()
        answered = ray.wait(list(self.tasks), num_returns=len(self.tasks), timeout=0)[0] if self.tasks else []
        self.counts["late_results"] += sum(end.error is None for end in self._receive(answered))
        while range_.left:
            self._dispatch(range_)
            ended = deque(self._collect())
            while ended:
                end = ended.popleft()
                span, slot, result = end.task.span, end.task.slot, end.result
                span.copies -= 1
                if end.task.range is not range_ or span.done:
                    self.counts["late_results"] += end.error is None
                    continue
                if end.error:
                    self.counts["retries"] += 1
                    if end.running:
                        span.failed_on.append(slot.place)
                    if span.copies:
                        continue  # another worker has it
                    if len(span.failed_on) < TRIES or len(span) > smallest:
                        range_.waiting.extendleft(reversed(span.parts(smallest) if end.running else [span]))
                        continue
                    result = give_up(span.start, _reason(end.error))
                elif is_finite(result):
                    if span.doubtful:
                        ended += self._fail(span.doubtful, f"it returned NaN where {slot.info} does not")
                elif span.doubtful is None and len(self.infos) > 1:
                    span.doubtful = slot
                    if not span.copies:
                        range_.waiting.append(span)
                    continue
                self.failures_in_a_row = 0
                span.done = True
                range_.left -= len(span)
                yield slot, (span.start, span.stop), result

    def _dispatch(self, range_: Range) -> None:
        """Queue spans on the workers that have joined, the idle ones first; where nothing is left to queue,
        idle workers take what is late on others."""
        fit = [slot for slot in self.slots if slot.info and not slot.late]
        for queued in range(QUEUED_PER_WORKER):
            for slot in fit:
                if not range_.waiting:
                    break
                if len(slot.tasks) > queued:
                    continue
                if span := range_.take(slot, lambda span, slot=slot: may_do(span, slot, fit)):  # type: ignore[misc]
                    self._queue(slot, span, range_)
        idle = [slot for slot in fit if not slot.tasks]
        late = [slot for slot in self.slots if slot.late] if idle else []
        for task in (task for slot in late for task in slot.tasks):
            if task.range is not range_ or task.span.copies > 1 or task.span.done:
                continue
            if free := next((slot for slot in idle if slot is not task.span.doubtful), None):
                idle.remove(free)
                self._queue(free, task.span, range_)

    def _queue(self, slot: _Slot, span: Span, range_: Range) -> None:
        span.copies += 1
        self._add(_Task(slot, range_.submit(slot.worker, span.start, span.stop), range_, span))

    def _add(self, task: _Task) -> None:
        if not task.slot.tasks:
            task.slot.since = time.monotonic()
        task.slot.tasks.append(task)
        self.tasks[task.ref] = task

    def _look_who_is_late(self) -> None:
        """Mark the workers whose work is late. Unknown, and so not late, before anything like it was done."""
        now = time.monotonic()
        for slot in self.slots:
            doing = slot.tasks[0].range if slot.tasks else None
            usual = doing.expected(slot.tasks[0].span) if doing and doing.elements else math.inf
            slot.late = now - slot.since > LATE_SECONDS + LATE_FACTOR * usual

    def _collect(self) -> list[_End]:
        """Wait for something to end, or a moment, and look after the workers; the tasks that ended."""
        ended = self._tend()
        if self.tasks:
            ready, _ = ray.wait(list(self.tasks), num_returns=1, timeout=0 if ended else POLL_SECONDS)
        else:
            ready = []
            time.sleep(0 if ended else POLL_SECONDS)  # for a worker that is to be started
        self.advance(0, 0)
        return ended + self._receive(ready)

    def _receive(self, ready: list[Any]) -> list[_End]:
        """The tasks behind references that are ready."""
        ended = []
        for ref in ready:
            if ref not in self.tasks:
                continue  # lost with its worker, a reference ago
            task = self.tasks[ref]
            try:
                result = ray.get(ref)
            except RayError as error:  # died, out of memory, unreachable, its result lost, or raised by the work
                ended += self._fail(task.slot, _reason(error), error)
                continue
            ended += self._took(task, result)
        return ended

    def _took(self, task: _Task, result: Any) -> list[_End]:
        """A task's result has come."""
        now, slot = time.monotonic(), task.slot
        if task.range:
            task.range.seconds += now - slot.since
            task.range.elements += len(task.span)
        slot.since, slot.late = now, False
        slot.tasks.remove(task)
        del self.tasks[task.ref]
        if task.range:
            slot.failures = 0
            return [_End(task, result)]
        self._welcome(slot, result)
        return []

    def _tend(self) -> list[_End]:
        """Start the workers that are due, drop those that hang, follow the nodes that come and go. Raises
        PoolError when there has been no worker for too long."""
        now = time.monotonic()
        if now < self.tend_at:
            return []
        self.tend_at = now + TEND_SECONDS
        self._look_who_is_late()
        if self.cluster.workers == "auto" and now - self.nodes_seen > NODES_SECONDS:
            self.nodes_seen = now
            self._resize()
        due = [start for start in self.starts if start[0] <= now]
        self.starts = [start for start in self.starts if start[0] > now]
        for _, place, failures in due:
            slot = _Slot(self.actor.remote(self.spec), place, failures)
            self.slots.append(slot)
            self._add(_Task(slot, slot.worker.join.remote(), None, Span(0, 0)))
        if not self.slots and not self.starts:
            raise PoolError(f"no workers are left: {self.last_reason}")
        if self.infos:
            self.manned, self.said_unmanned = now, False
        elif now - self.manned > self.cluster.worker_timeout:
            reason = f"; the last one: {self.last_reason}" if self.last_reason else ""
            raise PoolError(f"no worker for {self.cluster.worker_timeout:g} s (cluster.worker_timeout){reason}")
        elif now - self.manned > SLOW_START_SECONDS and not self.said_unmanned:
            self.said_unmanned = True
            self.note(
                f"no worker is there: waiting for {self.cluster.worker_timeout:g} s (cluster.worker_timeout) for "
                "room in Ray or a node"
            )
        ended = []
        for slot in list(self.slots):
            if slot.info and slot.tasks and slot.tasks[0].range:
                usual = slot.tasks[0].range.expected(slot.tasks[0].span)
                if now - slot.since > self.cluster.task_timeout + HANG_FACTOR * usual:
                    ended += self._fail(
                        slot, f"no answer for {self.cluster.task_timeout:g} s or more (cluster.task_timeout)"
                    )
        return ended

    def _resize(self) -> None:
        """Follow the nodes: start workers where there is new room, give up waiting for room that is gone."""
        self.size = pool_size(self.cluster)
        up = {node["NodeID"] for node in nodes_here_first()}
        wanted = self.size - sum(node in up for node in self.refused)
        missing = max(0, wanted - len(self.slots))
        new = [(time.monotonic(), next(self.places), 0) for _ in range(missing - len(self.starts))]
        self.starts = (self.starts + new)[:missing]
        for slot in [slot for slot in self.slots if not slot.info][: max(0, len(self.slots) - wanted)]:
            self._remove(slot)

    def _welcome(self, slot: _Slot, info: WorkerInfo) -> None:
        """Let a worker in that computes as this process does."""
        ours = versions()
        odd = [f"{name} {info.versions[name]}, here {ours[name]}" for name in ours if info.versions[name] != ours[name]]
        if not fingerprint_agrees(self.noise, info.fingerprint):
            odd.append("its noise fingerprint differs")
        if odd:
            self.last_reason = f"refused {info}: {'; '.join(odd)}"
            self.note(self.last_reason)
            self.refused.append(info.node)
            self._remove(slot)
            return
        if self.devices and info.device not in self.devices:
            others = ", ".join(sorted(self.devices))
            self.note(f"{info} is not like the others ({others}): bits depend on who scores what")
        slot.info = info

    def _fail(self, slot: _Slot, reason: str, error: Exception | None = None) -> list[_End]:
        """Replace a worker that failed; its tasks, which end with it."""
        if slot not in self.slots:
            return []
        self.last_reason = reason
        self.failures_in_a_row += 1
        if self.failures_in_a_row >= FAILURES_PER_WORKER * (self.size + bool(self.infos)):
            raise PoolError(f"the workers fail one after another; the last one: {reason}") from error
        wait = backoff(slot.failures)
        self.starts.append((time.monotonic() + wait, slot.place, slot.failures + 1))
        when = f" in {wait:g} s" if wait else ""
        self.note(f"{slot.info or 'a worker that was starting'} was lost and is replaced{when}: {reason}")
        return self._remove(slot, error or TimeoutError(reason))

    def _remove(self, slot: _Slot, error: Exception | None = None) -> list[_End]:
        """Take a worker out of the pool; the tasks that it had."""
        self.slots.remove(slot)
        ray.kill(slot.worker)
        for task in slot.tasks:
            del self.tasks[task.ref]
        return [_End(task, error=error, running=place == 0) for place, task in enumerate(slot.tasks) if task.range]


def backoff(failures: int) -> float:
    """Seconds before a worker is replaced in a place where so many failed before it without a success."""
    return min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (failures - 1)) if failures else 0.0


def may_do(span: Span, slot: _Slot, fit: list[_Slot]) -> bool:
    """Whether a worker may have a span: one that failed in its place, or that it made doubtful, is for others
    of those that are fit."""
    if span.doubtful is slot:
        return all(other is slot for other in fit)
    return slot.place not in span.failed_on or all(other.place in span.failed_on for other in fit)


def _reason(error: Exception) -> str:
    """What an error says, in a line: of an error in the work its last line, else the first."""
    lines = (str(error).strip() or type(error).__name__).splitlines()
    in_the_work = isinstance(error, RayTaskError) or (isinstance(error, RayActorError) and error.actor_init_failed)
    return lines[-1 if in_the_work else 0].strip()
