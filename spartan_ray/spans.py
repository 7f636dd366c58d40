"""The book of a range that tasks cover: what waits, what runs, what is done. Knows nothing of Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(eq=False)
class Span:
    """A part of a range, done as a whole."""

    start: int
    stop: int
    copies: int = 0  # workers that have it now
    failed_on: list[int] = field(default_factory=list)  # places in the pool whose worker failed at it
    doubtful: Any = None  # a worker whose result was not finite
    done: bool = False

    def __len__(self) -> int:
        return self.stop - self.start

    def parts(self, smallest: int) -> list[Span]:
        """What failed, in its smallest parts."""
        if len(self) <= smallest:
            return [self]
        return [Span(start, min(start + smallest, self.stop)) for start in range(self.start, self.stop, smallest)]


@dataclass(eq=False)
class Range:
    """A range that is being covered."""

    submit: Callable[[Any, int, int], Any]
    next_size: Callable[[Any, int], int]  # for a worker, when so many elements wait
    waiting: deque[Span]
    left: int  # elements that are not done
    seconds: float = 0.0  # that so many elements took
    elements: int = 0

    def expected(self, span: Span) -> float:
        """Seconds that a span should take, 0 if nothing is known."""
        return self.seconds * len(span) / max(self.elements, 1)

    def take(self, worker: Any, accepts: Callable[[Span], bool]) -> Span | None:
        """The next span that a worker accepts: a fresh one is cut to its size, one that was tried stays as it is."""
        for span in self.waiting:
            if not accepts(span):
                continue
            self.waiting.remove(span)
            if span.failed_on or span.doubtful:
                return span
            size = self.next_size(worker, sum(map(len, self.waiting)) + len(span))
            if size < len(span):
                self.waiting.appendleft(Span(span.start + size, span.stop))
                span = Span(span.start, span.start + size)
            return span
        return None
