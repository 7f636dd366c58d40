"""The workers of a pool, and the tasks that each has."""

from __future__ import annotations

import math
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Any

from spartan_ray.distributed.joining import WorkerInfo
from spartan_ray.distributed.spans import Range, Span


@dataclass(eq=False)
class Slot:
    """A worker of the pool."""

    worker: Any
    place: int  # in the pool; a worker that replaces another one takes its place
    failures: int = 0  # in its place, since the last success there
    info: WorkerInfo | None = None  # None until it joined
    doubted: WorkerInfo | None = None  # it had to join again
    tasks: list[Task] = field(default_factory=list)  # in the order in which it does them
    heard: float = -math.inf  # when it last answered
    since: float = 0.0  # the same, or when it began to have something to answer
    unwatched: float = 0.0  # seconds of those since then in which nobody looked whether it had answered
    late: bool = False  # as it was when somebody last looked
    paces: dict[Hashable, float] = field(default_factory=dict)  # seconds a member, by kind of score


@dataclass(eq=False)
class Task:
    """A span on a worker."""

    slot: Slot
    reference: Any
    range: Range | None  # None: the worker is joining
    span: Span


@dataclass
class End:
    """A task that ended: with a result, or with its worker, and then it is at fault or not."""

    task: Task
    result: Any = None
    error: Exception | None = None
    running: bool = False


def may_do(span: Span, slot: Slot, fit: list[Slot]) -> bool:
    """Whether a worker may have a span: one that failed in its place, or that it made doubtful, is for others
    of those that are fit."""
    if span.unconfirmed is slot:  # what was contradicted before is not believed alone
        return not slot.doubted and all(other is slot for other in fit)
    others = (other for other in fit if other is not span.unconfirmed)
    return slot.place not in span.failed_on or all(other.place in span.failed_on for other in others)
