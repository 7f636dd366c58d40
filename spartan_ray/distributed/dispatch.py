"""Cover a range with tasks on workers that may fail, hang, join and leave.

Does not depend on Ray: a transport carries the tasks. If a worker dies, hangs or fails, other workers repeat the tasks
that were queued on it. A late task runs a second time on an idle worker. The result of a task depends on its range
alone, so the outcome is the same bit for bit.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.joining import WorkerInfo
from spartan_ray.distributed.placement import described, worker_resources
from spartan_ray.distributed.protocol import Failed, Lost, Transport
from spartan_ray.distributed.slots import End, Slot, Task, may_do
from spartan_ray.distributed.spans import Blame, Range, Span
from spartan_ray.errors import RunError

# Tasks queued per worker: one that runs, and one that is ready when it ends.
QUEUED_PER_WORKER = 2
# Failures of a span of the smallest size after which it is given up.
TRIES = 3
# Consecutive failures per worker of the pool after which the workers are not to blame, and the run stops.
FAILURES_PER_WORKER = 3
# A lost worker is replaced at once. If its replacement is lost too, wait BACKOFF_SECONDS before the next one. Double
# the wait each time, up to LONGEST_BACKOFF_SECONDS.
BACKOFF_SECONDS, LONGEST_BACKOFF_SECONDS = 1.0, 30.0
# A task is late after LATE_SECONDS plus LATE_FACTOR times its usual duration. Idle workers then run it as well.
LATE_SECONDS, LATE_FACTOR = 2.0, 3.0
# A worker hangs after cluster.task_timeout plus this many times the usual duration of its task.
HANG_FACTOR = 10.0
# Seconds of waiting for workers after which the user is told.
SLOW_START_SECONDS = 30.0
# Seconds until the user is told again.
SAY_SECONDS = 60.0
# Seconds to wait for a result, between checks of the workers, and between checks for nodes that joined or left.
POLL_SECONDS = 0.5
TEND_SECONDS = 0.1
NODES_SECONDS = 5.0


class PoolError(RunError):
    """The workers cannot do the work. The message says why."""


class Dispatcher:
    """The workers of a pool and their tasks.

    `note` takes one-line messages for the user. `advance` is called again and again, and may raise to end the run;
    then close the dispatcher. `refuse` returns why a worker that joins is refused, or an empty string."""

    def __init__(
        self,
        transport: Transport,
        cluster: Cluster,
        note: Callable[[str], None],
        advance: Callable[[int, int], None],
        refuse: Callable[[WorkerInfo], str],
    ) -> None:
        self.transport = transport
        self.cluster = cluster
        self.note, self.advance, self.refuse = note, advance, refuse
        self.room = transport.room(0, 0)
        self.size = self.able = self.room.workers  # workers wanted, and workers that can take tasks
        self.slots: list[Slot] = []
        self.tasks: dict[Any, Task] = {}  # in flight, by reference
        self.refused: list[str] = []  # the node of each refused worker
        self.counts: dict[str, float] = {"retries": 0, "late_results": 0}
        self.failures_in_a_row = 0
        self.blame = Blame()
        self.last_reason = ""
        now = transport.now()
        self.nodes_seen = self.tend_at = now  # when nodes were last checked, and workers will be next
        self.began = now  # when the current range began
        self.looked = now  # when it was last checked whether a task had ended
        self.progress = now  # when work was last completed
        self.manned = now  # when a worker was last present
        self.covering = self.had_workers = False
        self.said_unmanned = -math.inf  # when the user was last told that there are no workers
        self.places = self.size
        # Workers to start: when, in which place, and after how many failures there.
        self.starts = [(now, place, 0) for place in range(self.size)]

    @property
    def infos(self) -> list[WorkerInfo]:
        """The workers that have joined."""
        return [slot.info for slot in list(self.slots) if slot.info]

    def wait_until_joined(self) -> None:
        """Wait until every worker has joined or was refused. After a while, settle for `cluster.least_workers`."""
        deadline = self.transport.now() + SLOW_START_SECONDS
        while self.starts or any(slot.info is None for slot in self.slots):
            self._collect()
            if len(self.infos) >= self.cluster.least_workers and self.transport.now() > deadline:
                self.note(f"{len(self.infos)} of {self.size} workers have started; the others join when they can")
                return

    def close(self) -> None:
        """End all workers."""
        idle = [slot.worker for slot in self.slots if slot.info and not slot.tasks]
        for slot in self.slots:
            if slot.worker not in idle:
                self.transport.kill(slot.worker)
        self.transport.end(idle)
        self.slots.clear()
        self.tasks.clear()
        self.starts.clear()

    def cover(
        self, range_: Range, is_finite: Callable[[Any], bool], give_up: Callable[[int, str], Any]
    ) -> Iterator[tuple[Slot, Span, Any]]:
        """Cover a range in spans, in any order. Yield the worker, the span and the result of each span once.

        A failed span is repeated in parts of the smallest size, on other workers if possible. A part that fails TRIES
        times gets the result of `give_up(start, reason)`. If a result is not finite, a second worker, if there is one,
        computes it again. If that result is not finite either, `range_.either` combines the two. If it is finite, it
        counts, and the first worker has to show again that it computes the same noise."""
        # Nobody has checked the workers since the last range. Some may have answered or died meanwhile.
        self.began = self.progress = self.manned = self.transport.now()
        self.covering = True
        self._look_who_is_late()
        for slot in self.slots:
            slot.unwatched += self.began - self.looked
        answered = self.transport.wait(list(self.tasks), 0) if self.tasks else []
        self.counts["late_results"] += sum(end.error is None for end in self._receive(answered))
        while range_.left:
            self._dispatch(range_)
            if range_.waiting and not self.tasks and not self.starts and self.infos:
                # The only worker left was contradicted before and is not trusted alone: replace it.
                self._replace(self.slots[0], Lost("it is the only worker left, and its result was contradicted"))
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
                    if span.copies:
                        continue  # another worker has it
                    if span.failures < TRIES:
                        range_.put_back(span.parts(range_.smallest) if end.running else [span], end.running)
                        continue
                    result = give_up(span.start, str(end.error))
                elif is_finite(result):
                    if span.unconfirmed:
                        self._doubt(span.unconfirmed, slot)
                elif span.unconfirmed is None and (len(self.infos) > 1 or slot.doubted):
                    span.unconfirmed, span.doubtful = slot, result
                    if not span.copies:
                        range_.waiting.append(span)
                    continue
                elif span.unconfirmed:
                    result = range_.either(span.doubtful, result)
                self.failures_in_a_row = 0
                self.progress = self.transport.now()
                span.done = True
                range_.left -= len(span)
                yield slot, span, result
        self.covering = False

    def _dispatch(self, range_: Range) -> None:
        """Queue spans on the workers that have joined, idle ones first. If no span is left to queue, give idle workers
        the late tasks of others."""
        there = [slot for slot in self.slots if slot.info and not slot.late]
        # A worker on a draining node only finishes its tasks, unless all workers are on such nodes.
        fit = [slot for slot in there if slot.info and slot.info.node not in self.room.leaving] or there
        self.able = len(fit)
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
            if free := next((slot for slot in idle if slot is not task.span.unconfirmed), None):
                idle.remove(free)
                self._queue(free, task.span, range_)

    def _queue(self, slot: Slot, span: Span, range_: Range) -> None:
        span.copies += 1
        self._add(Task(slot, range_.submit(slot.worker, span.start, span.stop), range_, span))

    def _add(self, task: Task) -> None:
        if not task.slot.tasks:
            task.slot.since, task.slot.unwatched = self.transport.now(), 0.0
        task.slot.tasks.append(task)
        self.tasks[task.reference] = task

    def _look_who_is_late(self) -> None:
        """Mark the workers whose work is late. No worker is late while the usual duration is unknown."""
        now = self.transport.now()
        for slot in self.slots:
            doing = slot.tasks[0].range if slot.tasks else None
            usual = doing.expected(slot.tasks[0].span) if doing and doing.elements else math.inf
            slot.late = now - slot.since > LATE_SECONDS + LATE_FACTOR * usual

    def _collect(self) -> list[End]:
        """Check the workers, wait briefly for a task to end, and return the tasks that ended."""
        ended = self._tend()
        # Without tasks, this waits until a worker is due to start.
        ready = self.transport.wait(list(self.tasks), 0 if ended else POLL_SECONDS)
        self.looked = self.transport.now()
        self.advance(0, 0)
        return ended + self._receive(ready)

    def _receive(self, ready: list[Any]) -> list[End]:
        """Take the results of references that are ready. Return the tasks that ended."""
        ended = []
        for reference in ready:
            if reference not in self.tasks:
                continue  # removed with its worker, at an earlier reference
            task = self.tasks[reference]
            try:
                result = self.transport.result(reference)
            except (Lost, Failed) as error:
                ended += self._fail(task.slot, error)
                continue
            ended += self._took(task, result)
        return ended

    def _took(self, task: Task, result: Any) -> list[End]:
        """Record the result of a task. Return the tasks that ended."""
        now, slot = self.transport.now(), task.slot
        if task.range:
            task.range.seconds += now - slot.since
            task.range.elements += len(task.span)
        slot.heard, slot.since, slot.unwatched = now, now, 0.0
        slot.late = False
        slot.tasks.remove(task)
        del self.tasks[task.reference]
        if task.range:
            slot.failures = 0
            return [End(task, result)]
        return self._welcome(slot, result)

    def _tend(self) -> list[End]:
        """Start the workers that are due, replace those that hang, and follow the nodes that join and leave. Return the
        tasks that ended. Raises PoolError if no workers are left, or none made progress for too long."""
        now = self.transport.now()
        if now < self.tend_at:
            return []
        self.tend_at = now + TEND_SECONDS
        self._look_who_is_late()
        if now - self.nodes_seen > NODES_SECONDS:
            self.nodes_seen = now
            self._follow_nodes()
        due = [start for start in self.starts if start[0] <= now]
        self.starts = [start for start in self.starts if start[0] > now]
        for _, place, failures in due:
            worker, reference = self.transport.start()
            slot = Slot(worker, place, failures)
            self.slots.append(slot)
            self._add(Task(slot, reference, None, Span(0, 0)))
        if not self.slots and not self.starts:
            raise PoolError(f"no workers are left: {self.last_reason}")
        self._look_for_progress(now)
        ended = []
        for slot in list(self.slots):
            if slot.tasks and (slot.info or slot.doubted):
                doing = slot.tasks[0].range
                usual = doing.expected(slot.tasks[0].span) if doing else 0.0
                # Time in which nobody checked for answers does not count: one may have been waiting.
                if now - slot.since - slot.unwatched > self.cluster.task_timeout + HANG_FACTOR * usual:
                    ended += self._fail(
                        slot, Failed(f"no answer for {self.cluster.task_timeout:g} s or more (cluster.task_timeout)")
                    )
        return ended

    def _look_for_progress(self, now: float) -> None:
        """Raise PoolError if no worker completed anything for too long. The time since the oldest running task began
        does not count: it may be long work, and a worker that hangs is replaced elsewhere."""
        joined = self.infos
        if joined:
            self.manned, self.had_workers, self.said_unmanned = now, True, -math.inf
        # Wait indefinitely for the first worker, unless one has failed: nodes may be on their way.
        for_room = not self.had_workers and not self.last_reason
        if for_room or (joined and not self.covering):
            self.progress = now
        at_work = min((slot.since for slot in self.slots if slot.info and slot.tasks), default=now)
        timeout = self.cluster.worker_timeout
        if at_work - self.progress > timeout:
            said = "no worker" if now - self.manned > timeout / 2 else "no worker got anything done"
            reason = f"; the last one: {self.last_reason}" if self.last_reason else ""
            raise PoolError(f"{said} for {timeout:g} s (cluster.worker_timeout){reason}")
        if now - self.manned > SLOW_START_SECONDS and now - self.said_unmanned > SAY_SECONDS:
            self.said_unmanned = now
            if for_room and (reason := self.transport.impossible()):
                raise PoolError(reason)
            until = "" if for_room else f", for {timeout:g} s at most (cluster.worker_timeout)"
            each = described(worker_resources(self.cluster))
            self.note(f"no workers: waiting for room for {self.size} workers with {each} each{until}")

    def _follow_nodes(self) -> None:
        """Start workers where there is new room, and drop starting workers whose room is gone."""
        starting = [slot for slot in self.slots if not slot.info and not slot.doubted]
        leaving = self.room.leaving
        self.room = self.transport.room(len(self._staying()) - len(starting), len(starting))
        held = sum(slot.info.node in self.room.leaving - leaving for slot in self.slots if slot.info)
        if held:
            self.note(f"workers on draining nodes, which get no more work: {held}")
        self.size = self.room.workers
        wanted = self.size - sum(node in self.room.up for node in self.refused)
        staying = len(self._staying())
        missing = max(0, wanted - staying)
        fresh = max(0, missing - len(self.starts))
        new = [(self.transport.now(), self.places + number, 0) for number in range(fresh)]
        self.places += fresh
        self.starts = (self.starts + new)[:missing]
        for slot in starting[: max(0, staying - wanted)]:
            self._remove(slot)

    def _staying(self) -> list[Slot]:
        """Return the workers that are not on draining nodes."""
        return [slot for slot in self.slots if not (slot.info and slot.info.node in self.room.leaving)]

    def _welcome(self, slot: Slot, info: WorkerInfo) -> list[End]:
        """Accept a worker that computes as this process does, or refuse it. Return the tasks that ended with a worker
        that had joined before and is now refused."""
        odd = self.refuse(info)
        if slot.doubted:
            if odd:  # its answers that were not read yet are dropped too
                return self._replace(slot, Failed(odd))
            self.note(f"{info} computes the right noise: the fitness differs between workers")
        elif odd:
            self.last_reason = f"refused {info}: {odd}"
            self.note(self.last_reason)
            self.refused.append(info.node)
            return self._remove(slot)
        devices = {info.device for info in self.infos}
        if devices and info.device not in devices:
            others = ", ".join(sorted(devices))
            self.note(f"{info} is unlike the others ({others}): bits of scores depend on the worker")
        slot.info = info
        self.transport.joined(slot.worker, info.node)
        # Sort by node: the transport may send the tasks of a node together.
        self.slots = sorted(self.slots, key=lambda slot: (slot.info is None, slot.info.node if slot.info else ""))
        return []

    def _doubt(self, slot: Slot, other: Slot) -> None:
        """Make a worker join again whose result was not finite where another worker's was. This shows whether its noise
        is still right. If it is, the fitness differs between workers."""
        if slot in self.slots and slot.info and not slot.doubted:
            self.note(f"{slot.info} returned NaN where {other.info} does not: its noise is checked again")
            slot.doubted, slot.info = slot.info, None
            self._add(Task(slot, self.transport.submit(slot.worker, "join"), None, Span(0, 0)))

    def _fail(self, slot: Slot, error: Lost | Failed) -> list[End]:
        """Blame the running task, and replace a worker that failed or was lost. Return its tasks, which end with it."""
        if slot in self.slots:
            self._hold_against_its_work(slot, error)
        return self._replace(slot, error)

    def _replace(self, slot: Slot, error: Lost | Failed) -> list[End]:
        """Remove a worker and start another one in its place. Return the tasks that it had."""
        if slot not in self.slots:
            return []
        self.last_reason = str(error)
        if isinstance(error, Failed):
            self.progress = self.transport.now()  # failures have a limit of their own
            self.failures_in_a_row += 1
            if self.failures_in_a_row >= FAILURES_PER_WORKER * (self.size + bool(self.infos)):
                raise PoolError(f"the workers fail one after another; the last one: {error}") from error
        wait = backoff(slot.failures)
        self.starts.append((self.transport.now() + wait, slot.place, slot.failures + 1))
        who, when = slot.info or slot.doubted or "a worker that was starting", f" in {wait:g} s" if wait else ""
        self.note(f"{who} was lost and is replaced{when}: {error}")
        return self._remove(slot, error)

    def _hold_against_its_work(self, slot: Slot, error: Lost | Failed) -> None:
        """Count the end of a worker against the task that it was running."""
        task, now = slot.tasks[0] if slot.tasks else None, self.transport.now()
        if not task or not task.range:
            self.blame.deaths_elsewhere += 1
            return
        alone = len(task.span) <= task.range.smallest
        task.span.failed_on.append(slot.place)
        if isinstance(error, Failed):
            task.span.failures += alone
            return
        if now - slot.since > LONGEST_BACKOFF_SECONDS:
            self.progress = now  # it was working for long, not waiting
        # A worker that has not answered since the range began may have died before it got the task.
        self.blame.died_at(task.span, alone and slot.heard > self.began, slot.heard, now)

    def _remove(self, slot: Slot, error: Exception | None = None) -> list[End]:
        """Remove a worker from the pool. Return the tasks that it had."""
        self.slots.remove(slot)
        self.transport.kill(slot.worker)
        for task in slot.tasks:
            del self.tasks[task.reference]
        return [End(task, error=error, running=place == 0) for place, task in enumerate(slot.tasks) if task.range]


def backoff(failures: int) -> float:
    """Return the seconds to wait before replacing a worker, after `failures` consecutive failures in its place."""
    return min(LONGEST_BACKOFF_SECONDS, BACKOFF_SECONDS * 2 ** (failures - 1)) if failures else 0.0
