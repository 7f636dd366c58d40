"""The workers of a run: what they hold, and the two things that they do. Shapes: D parameters, K members.

Both cover a range with tasks: members 0..K-1 with chunks to score, elements 0..D-1 with slices of the update.
`dispatch.py` is the one engine for both, a transport carries the tasks: Ray's, or a scripted one of the tests.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import deque
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spartan_ray.config import Cluster, ImageSet, NoiseKind
from spartan_ray.dispatch import TRIES, Dispatcher, PoolError, Slot, Transport
from spartan_ray.evaluator import ParentState, Scale
from spartan_ray.joining import WorkerInfo, objections
from spartan_ray.spans import Range, Span, chunk_size, workers_worth
from spartan_ray.strategies.base import WHOLE, Members, Part, Scores, joined


class Pool:
    """The workers of a run. `note` takes one-line messages for the user, `advance` the members
    and images that are done as they come in; it may raise to end the run, after which the pool is to be closed."""

    def __init__(
        self,
        transport: Transport,
        cluster: Cluster,
        noise: NoiseKind,
        note: Callable[[str], None],
        advance: Callable[[int, int], None],
    ) -> None:
        self.transport = transport
        self.cluster = cluster
        self.note, self.advance = note, advance
        refuse = functools.partial(objections, noise=noise)
        self.dispatcher = Dispatcher(transport, cluster, note, advance, refuse)
        self.wait_until_joined = self.dispatcher.wait_until_joined
        self.close = self.dispatcher.close
        self.counts = self.dispatcher.counts
        self.counts |= {"broadcast_seconds": 0.0, "members_failed": 0}
        self.keys = itertools.count()
        self.parent: tuple[int, Any]  # the last broadcast of each and its key
        self.scale: tuple[int, Any]
        self.seconds_per_member: float | None = None
        self.seconds_per_noise = 0.0  # an element of one noise vector, in the last update

    @property
    def infos(self) -> list[WorkerInfo]:
        """The workers that have joined."""
        return self.dispatcher.infos

    @property
    def devices(self) -> set[str]:
        """The names of the devices that score."""
        return {info.device for info in self.infos}

    def broadcast(self, parent: ParentState) -> None:
        """Make this the parent of the members that are evaluated from here on."""
        self.parent = self._put(parent)

    def broadcast_scale(self, scale: Scale) -> None:
        """Make this the scale of what is added to the parent."""
        self.scale = self._put(scale)

    def _put(self, value: ParentState | Scale) -> tuple[int, Any]:
        started = self.transport.now()
        reference = self.transport.put(value)
        self.counts["broadcast_seconds"] += self.transport.now() - started
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

        def submit(worker: Any, start: int, stop: int) -> Any:
            chunk = members[start:stop]
            return self.transport.submit(worker, "evaluate", keys, parent, scale, chunk, images, bar, part)

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
        range_ = Range(submit, next_size, deque([Span(0, len(members))]), len(members), smallest=1)
        if self.seconds_per_member:
            range_.seconds, range_.elements = self.seconds_per_member, 1
        for slot, (start, stop), result in self.dispatcher.cover(range_, is_finite, give_up):
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
        seeds, weights = self.transport.put(seed_K), self.transport.put(weight_K)
        usual = self.seconds_per_noise * len(seed_K) * size_D or math.inf
        slice_size = -(-size_D // workers_worth(usual, max(1, len(self.dispatcher.slots))))
        sum_D = np.empty(size_D, np.float32)

        def submit(worker: Any, start: int, stop: int) -> Any:
            return self.transport.submit(worker, "accumulate", seeds, weights, start, stop)

        def give_up(start: int, reason: str) -> NDArray[np.float32]:
            raise PoolError(f"the update failed on {TRIES} workers: {reason}")

        def is_finite(part: NDArray[np.float32]) -> bool:
            return bool(np.isfinite(part).all())

        range_ = Range(submit, lambda slot, left: slice_size, deque([Span(0, size_D)]), size_D, smallest=slice_size)
        if self.seconds_per_noise:
            range_.seconds, range_.elements = self.seconds_per_noise * len(seed_K), 1
        for _, (start, stop), part in self.dispatcher.cover(range_, is_finite, give_up):
            sum_D[start:stop] = part
        self.seconds_per_noise = range_.seconds / (range_.elements * max(len(seed_K), 1))
        return sum_D

    def _chunk_size(self, members: int, slot: Slot, left: int) -> int:
        if self.cluster.chunk != "auto":
            return self.cluster.chunk
        return chunk_size(left, members, self.dispatcher.size, slot.seconds_per_member or self.seconds_per_member)
