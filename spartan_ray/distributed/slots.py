"""The workers of a pool and the tasks of each."""

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
    place: int  # in the pool; a replacement takes over the place
    failures: int = 0  # in this place, since the last success there
    info: WorkerInfo | None = None  # None until it has joined
    doubted: WorkerInfo | None = None  # its info, if it had to join again
    tasks: list[Task] = field(default_factory=list)  # in the order in which it runs them
    heard: float = -math.inf  # when it last answered
    since: float = 0.0  # when it last answered, or got a task while idle
    unwatched: float = 0.0  # seconds since then in which nobody checked for its answer
    late: bool = False  # at the last check
    paces: dict[Hashable, float] = field(default_factory=dict)  # seconds per member, by kind of score


@dataclass(eq=False)
class Task:
    """A span on a worker."""

    slot: Slot
    reference: Any
    range: Range | None  # None: the worker is joining
    span: Span


@dataclass
class End:
    """A task that ended with a result, or because its worker ended. A task that was `running` then may be at fault."""

    task: Task
    result: Any = None
    error: Exception | None = None
    running: bool = False


def may_do(span: Span, slot: Slot, fit: list[Slot]) -> bool:
    """Whether a worker may take a span. A span that failed in its place, or whose result from this worker was not
    finite, is left to other fit workers as long as there are any."""
    if span.unconfirmed is slot:  # a worker that was contradicted before is not trusted alone
        return not slot.doubted and all(other is slot for other in fit)
    others = (other for other in fit if other is not span.unconfirmed)
    return slot.place not in span.failed_on or all(other.place in span.failed_on for other in others)
