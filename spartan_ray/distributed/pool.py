"""The workers of a run: the data that they hold and the work that they do. Shapes: D parameters, K members.

All work covers a range with tasks: members 0..K-1 in chunks to score, elements 0..D-1 in slices of the update.
`dispatch.py` runs all of it. A transport carries the tasks: the one of Ray, or a scripted one in the tests.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.dispatch import TRIES, Dispatcher, PoolError
from spartan_ray.distributed.joining import WorkerInfo, objections
from spartan_ray.distributed.protocol import Transport
from spartan_ray.distributed.slots import Slot
from spartan_ray.distributed.spans import Range, Span, chunk_size, workers_worth
from spartan_ray.engine.evaluator import ParentState, Scale
from spartan_ray.engine.executor import given_up
from spartan_ray.engine.strategies.requests import WHOLE, CaseSet, Members, Part, Scores
from spartan_ray.engine.subspace import Basis
from spartan_ray.noise.contract import NoiseKind

# Assumed seconds per case of work whose duration is unknown. Its worker hangs after cluster.task_timeout plus ten times
# that.
SLOW_CASE_SECONDS = 0.1
# Members that take equally long: the set of cases, the part of it, the number of own cases, and whether some members
# may be rejected early.
Kind = tuple[CaseSet, Part, int | None, bool]
# The answer of a worker: scores, errors of the fitness by member, seconds to load new data, and seconds to score.
Answer = tuple[Scores, dict[int, str], float, float]


class Pool:
    """The workers of a run.

    `note` takes one-line messages for the user. `advance` takes the numbers of members and cases that were completed,
    as they come in. It may raise to end the run; then close the pool."""

    def __init__(
        self,
        transport: Transport,
        cluster: Cluster,
        noise: NoiseKind,
        note: Callable[[str], None],
        advance: Callable[[int, int], None],
        batch_members: int = 1,
    ) -> None:
        self.transport = transport
        self.cluster = cluster
        self.note, self.advance = note, advance
        self.batch_members = batch_members
        refuse = functools.partial(objections, noise=noise)
        self.dispatcher = Dispatcher(transport, cluster, note, advance, refuse)
        self.counts = self.dispatcher.counts
        self.counts |= {"broadcast_seconds": 0.0, "members_failed": 0}
        self.keys = itertools.count(1)
        self.parent: tuple[int, Any]  # key and reference of the last broadcast, here and below
        self.scale: tuple[int, Any]
        self.basis: tuple[int, Any] = 0, None
        self.paces: dict[Kind, float] = {}  # seconds per member, in the last answer of each kind
        self.seconds_per_noise = 0.0  # seconds per element of one noise vector, in the last update
        self.seconds_each: dict[str, float] = {}  # seconds per item, in the last `each` of a method

    @property
    def infos(self) -> list[WorkerInfo]:
        """The workers that have joined."""
        return self.dispatcher.infos

    @property
    def workers(self) -> int:
        return len(self.infos)

    @property
    def devices(self) -> set[str]:
        """The names of the devices that score."""
        return {info.device for info in self.infos}

    def wait_until_joined(self) -> None:
        """Wait until every worker has joined or was refused. After a while, settle for `cluster.least_workers`."""
        self.dispatcher.wait_until_joined()

    def close(self) -> None:
        """End all workers."""
        self.dispatcher.close()

    def broadcast(self, parent: ParentState) -> None:
        """Set the parent of the members that are evaluated from now on."""
        self.parent = self._put(parent)

    def broadcast_scale(self, scale: Scale) -> None:
        """Set the scale of the perturbations."""
        self.scale = self._put(scale)

    def broadcast_basis(self, basis: Basis | None) -> None:
        """Set the subspace of the noise. None is the whole space."""
        self.basis = self._put(basis)

    def _put(self, value: ParentState | Scale | Basis | None) -> tuple[int, Any]:
        started = self.transport.now()
        reference = self.transport.put(value)
        self.counts["broadcast_seconds"] += self.transport.now() - started
        return next(self.keys), reference

    def evaluate(
        self,
        members: Members,
        cases: CaseSet = "fitness",
        threshold: float = -math.inf,
        part: Part = WHOLE,
        own: int | None = None,
    ) -> Scores:
        """Return the scores of all members on a part of the cases, or on `own` cases that each seed draws from them.

        A member that can no longer exceed the threshold may be rejected early. A member that no worker can score gets
        NaN. Raises RunError instead if `cluster.on_member_error` is stop, or if that member is the parent or its
        update."""
        keys, sent = zip(self.parent, self.scale, self.basis, strict=True)
        found: list[tuple[int, Scores]] = []  # first member and scores; later entries count
        slowest_load = 0.0

        def submit(worker: Any, start: int, stop: int) -> Any:
            chunk = members[start:stop]
            return self.transport.submit(worker, "evaluate", keys, *sent, chunk, cases, threshold, part, own)

        def give_up(start: int, reason: str) -> Answer:
            return Scores(np.empty((1, 0)), np.array([math.nan]), np.zeros(1, np.int64)), {0: reason}, 0.0, 0.0

        def is_finite(answer: Answer) -> bool:
            scores, failed, *_ = answer
            mean_KM = np.delete(scores.mean_KM, list(failed), 0) if failed else scores.mean_KM
            return bool(np.isfinite(mean_KM).all())

        kind = cases, part, own, threshold > -math.inf
        next_size = functools.partial(self._chunk_size, len(members), kind, self._pace(kind))
        spans = [Span(0, len(members))]
        for tries in range(1, TRIES + 1):
            size = sum(map(len, spans))
            range_ = Range(submit, next_size, deque(spans), size, smallest=1, either=_either)
            if kind in self.paces:
                range_.seconds, range_.elements = self.paces[kind], 1
            spans = []
            for slot, span, (scores, failed, seconds_to_load, seconds) in self.dispatcher.cover(
                range_, is_finite, give_up
            ):
                found.append((span.start, scores))
                slowest_load, again = max(slowest_load, seconds_to_load), 0
                if seconds:
                    self.paces[kind] = slot.paces[kind] = seconds / len(span)
                for k, reason in failed.items():
                    if tries == TRIES or not seconds:  # raised on TRIES workers, or killed them
                        self._give_up(members, span.start + k, reason)
                    else:
                        failed_on = [*span.failed_on, slot.place]
                        spans.append(Span(span.start + k, span.start + k + 1, failed_on=failed_on))
                        again += 1
                self.advance(len(span) - again, int(scores.cases_K.sum()))
            if not spans:
                break
        self.counts["broadcast_seconds"] += slowest_load
        mean_KM = np.full((len(members), max(scores.mean_KM.shape[1] for _, scores in found)), math.nan)
        fitness_K, cases_K = np.full(len(members), math.nan), np.zeros(len(members), np.int64)
        for start, scores in found:
            rows = slice(start, start + len(scores))
            if scores.mean_KM.shape[1]:  # else no worker could score them
                mean_KM[rows] = scores.mean_KM
            fitness_K[rows], cases_K[rows] = scores.fitness_K, scores.cases_K
        return Scores(mean_KM, fitness_K, cases_K)

    def _give_up(self, members: Members, member: int, reason: str, tries: int = TRIES) -> None:
        self.note(given_up(members, member, tries, reason, self.cluster.on_member_error == "stop"))
        self.counts["members_failed"] += 1

    def weighted_sum(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        """Return elements [start, stop) of sum_k weight_k * noise_k in float32. Each worker computes one slice, or only
        as many workers as make it faster. Raises PoolError if a slice fails on three workers."""
        size_D, first = stop - start, start
        seeds, weights = self.transport.put(seed_K), self.transport.put(weight_K)
        usual = self.seconds_per_noise * len(seed_K) * size_D or math.inf
        answers = self.transport.answers_per_second("accumulate")
        slice_size = -(-size_D // workers_worth(usual, max(1, len(self.dispatcher.slots)), answers))
        sum_D = np.empty(size_D, np.float32)

        def submit(worker: Any, start: int, stop: int) -> Any:
            return self.transport.submit(worker, "accumulate", seeds, weights, first + start, first + stop)

        def give_up(start: int, reason: str) -> NDArray[np.float32]:
            raise PoolError(f"the update failed on {TRIES} workers: {reason}")

        def is_finite(part: NDArray[np.float32]) -> bool:
            return bool(np.isfinite(part).all())

        range_ = Range(submit, lambda slot, left: slice_size, deque([Span(0, size_D)]), size_D, smallest=slice_size)
        if self.seconds_per_noise:
            range_.seconds, range_.elements = self.seconds_per_noise * len(seed_K), 1
        for _, span, part in self.dispatcher.cover(range_, is_finite, give_up):
            sum_D[span.start : span.stop] = part
        self.seconds_per_noise = range_.seconds / (range_.elements * max(len(seed_K), 1))
        return sum_D

    def share(self, value: Any) -> Any:
        """Put a value where each node gets it once. Return its stand-in for the arguments of `each`."""
        return self.transport.put(value)

    def each(
        self,
        method: str,
        items: Sequence[Any],
        *shared: Any,
        cases: int = 0,
        at_once: int | None = None,
        is_finite: Callable[[Any], bool] = lambda answer: True,
        give_up: Callable[[str], Any] | None = None,
    ) -> list[Any]:
        """Call `method(items, *shared)` on the workers' evaluators. Return one answer per item, in their order.

        Each item forwards `cases` cases. A task has `at_once` items; by default its size is chosen as for members. If
        an answer is not finite, a second worker computes it too. An item that fails on three workers gets the answer
        `give_up(reason)`. Raises PoolError for such an item if there is no `give_up`."""
        answers: list[Any] = [None] * len(items)
        known = self.seconds_each.get(method)
        # Work of unknown duration may take long, as an epoch does. It must not be mistaken for a worker that hangs.
        usual = cases * SLOW_CASE_SECONDS if known is None else known

        def submit(worker: Any, start: int, stop: int) -> Any:
            return self.transport.submit(worker, "ask", method, items[start:stop], *shared)

        def next_size(slot: Slot, left: int) -> int:
            if at_once:
                return at_once
            if self.cluster.chunk != "auto":
                return self.cluster.chunk
            return chunk_size(left, len(items), self.dispatcher.able, known, self.transport.answers_per_second("ask"))

        def fail(start: int, reason: str) -> list[Any]:
            if give_up:
                return [give_up(reason)]
            raise PoolError(f"{method} failed on {TRIES} workers: {reason}")

        range_ = Range(submit, next_size, deque([Span(0, len(items))]), len(items), smallest=1)
        range_.seconds, range_.elements = usual, 1
        for _, span, answer in self.dispatcher.cover(range_, lambda answer: all(map(is_finite, answer)), fail):
            answers[span.start : span.stop] = answer
            self.advance(len(span) if cases else 0, len(span) * cases)
        if range_.elements > 1:
            self.seconds_each[method] = (range_.seconds - usual) / (range_.elements - 1)
        return answers

    def could_not_score(self, member: Members, reason: str) -> None:
        """Report that an offspring could not be scored and is the worst. Raises RunError if the run must stop."""
        self._give_up(member, 0, reason, tries=1)

    def _pace(self, kind: Kind) -> float | None:
        """Return the mean seconds per member of the current workers (harmonic), or None if unknown."""
        paces = [slot.paces[kind] for slot in self.dispatcher.slots if kind in slot.paces]
        return len(paces) / sum(1 / pace for pace in paces) if paces else None

    def _chunk_size(self, members: int, kind: Kind, pace: float | None, slot: Slot, left: int) -> int:
        if self.cluster.chunk != "auto":
            return self.cluster.chunk
        pace, answers = pace or self.paces.get(kind), self.transport.answers_per_second("evaluate")
        size = chunk_size(left, members, self.dispatcher.able, pace, answers, slot.paces.get(kind))
        return -(-size // self.batch_members) * self.batch_members  # a pass with fewer members costs the same


def _either(first: Answer, second: Answer) -> Answer:
    """Return the second answer, with the scores of the first one for members that are finite only there."""
    one, (two, failed, to_load, to_score) = first[0], second
    better_K: NDArray[np.bool_] = np.logical_and(
        np.isfinite(one.mean_KM).all(axis=1), ~np.isfinite(two.mean_KM).all(axis=1)
    )
    mean_KM = np.where(better_K[:, None], one.mean_KM, two.mean_KM)
    still = {k: reason for k, reason in failed.items() if not better_K[k]}
    fitness_K = np.where(better_K, one.fitness_K, two.fitness_K)
    cases_K = np.where(better_K, one.cases_K, two.cases_K)
    return Scores(mean_KM, fitness_K, cases_K), still, to_load, to_score
