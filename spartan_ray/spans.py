"""The book of a range that tasks cover: what waits, what runs, what is done. Knows nothing of Ray."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(eq=False)
class Span:
    """A part of a range, done as a whole."""

    start: int
    stop: int
    copies: int = 0  # workers that have it now
    failures: int = 0  # workers that failed at it
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
    next_size: Callable[[int], int]
    waiting: deque[Span]
    left: int  # elements that are not done
    seconds: float = 0.0  # that so many elements took
    elements: int = 0

    def expected(self, spans: list[Span]) -> float:
        """Seconds that spans should take, 0 if nothing is known."""
        return self.seconds * sum(map(len, spans)) / max(self.elements, 1)

    def take(self, worker: object, alone: bool) -> Span | None:
        """The next span for a worker: a fresh one is cut to size, one that failed or is doubtful stays as it is.
        A doubtful one is for another worker than the one that it came from, unless that is alone."""
        for span in self.waiting:
            if span.doubtful is worker and not alone:
                continue
            self.waiting.remove(span)
            if span.failures or span.doubtful:
                return span
            size = self.next_size(sum(map(len, self.waiting)) + len(span))
            if size < len(span):
                self.waiting.appendleft(Span(span.start + size, span.stop))
                span = Span(span.start, span.start + size)
            return span
        return None
