"""The bookkeeping of a range that tasks cover: which spans wait, run or are done. Does not depend on Ray."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# Duration of an automatic chunk: long compared with Ray's overhead per task, short compared with a generation ...
CHUNK_SECONDS = 2.0
# ... but long enough that the driver can receive all answers. In one round every worker is sent one task. A generation
# that lasts less than this many rounds is sent in one round.
ONE_ROUND = 3.0


def workers_worth(seconds: float, workers: int, answers_per_second: float) -> int:
    """Return how many workers to use for work that takes one worker this many seconds. n workers compute for
    seconds / n, and take n / answers_per_second to send the tasks and receive the answers."""
    return max(1, int(min(workers, math.sqrt(seconds * answers_per_second))))


def chunk_size(
    left: int,
    members: int,
    workers: int,
    seconds_per_member: float | None,
    answers_per_second: float,
    own_seconds: float | None = None,
) -> int:
    """Return the number of members in the next chunk of a worker, when `left` of all `members` are left.

    `seconds_per_member` is the average of the workers, `own_seconds` that of this worker. Chunks shrink towards the
    end, so that the workers finish together. If the speed is unknown the size is 1.

    A short generation is sent in one round. Each worker gets its task 1 / answers_per_second later than the one before,
    and so gets that much less work. If sizes shrink from n to m in steps of d, the work left is (n^2 - m^2) / 2d. This
    gives n."""
    if seconds_per_member is None:
        return 1
    seconds_per_member = max(seconds_per_member, 1e-9)
    round_ = workers / answers_per_second
    share, rest = members * seconds_per_member / workers, left * seconds_per_member
    if share < ONE_ROUND * round_:
        last = max(0.0, share - round_ / 2)  # 0: not all workers get a task
        seconds = math.sqrt(last**2 + 2 * rest / answers_per_second)
    else:
        seconds = min(max(rest / (4 * workers), round_), max(CHUNK_SECONDS, round_))
    return max(1, math.ceil(seconds / (own_seconds or seconds_per_member)))


@dataclass(eq=False)
class Span:
    """A part of a range, done as a whole."""

    start: int
    stop: int
    copies: int = 0  # number of workers that have it now
    failed_on: list[int] = field(default_factory=list)  # places in the pool whose worker ended while running it
    suspected: bool = False  # a worker was killed while running it, or the span that it was a part of
    failures: int = 0  # held against it, at the smallest size
    died: float = -math.inf  # when a worker was last killed while running it ...
    others: int | None = None  # ... and how many had been killed elsewhere by then
    unconfirmed: Any = None  # the worker whose result was not finite ...
    doubtful: Any = None  # ... and that result
    done: bool = False

    def __len__(self) -> int:
        return self.stop - self.start

    def parts(self, smallest: int) -> list[Span]:
        """Split a failed span into parts of the smallest size."""
        if len(self) <= smallest:
            return [self]
        starts = range(self.start, self.stop, smallest)
        return [Span(start, min(start + smallest, self.stop), suspected=self.suspected) for start in starts]


@dataclass(eq=False)
class Range:
    """A range that is being covered."""

    submit: Callable[[Any, int, int], Any]
    next_size: Callable[[Any, int], int]  # for a worker, given the number of elements that wait
    waiting: deque[Span]
    left: int  # elements that are not done
    smallest: int  # elements of a task that is not split further
    either: Callable[[Any, Any], Any] = lambda first, second: second  # combine two results that are not finite
    seconds: float = 0.0  # taken so far by this many elements:
    elements: int = 0

    def expected(self, span: Span) -> float:
        """Return the seconds that a span should take; 0 if unknown."""
        return self.seconds * len(span) / max(self.elements, 1)

    def put_back(self, spans: list[Span], running: bool) -> None:
        """Queue spans that have to be repeated. They come first, unless they may have killed a worker: such suspects
        come last, because the tasks queued behind them would wait for the next worker. A suspect that was running is
        repeated before the other suspects, so that each one is settled soon."""
        place = next((place for place, span in enumerate(self.waiting) if span.suspected), len(self.waiting))
        if not spans[0].suspected:
            place = 0
        elif not running:
            place += 1
        for span in reversed(spans):
            self.waiting.insert(place, span)

    def take(self, worker: Any, accepts: Callable[[Span], bool]) -> Span | None:
        """Return the next span that a worker accepts, or None. A fresh span is cut to the size for this worker. A span
        that was tried before keeps its size."""
        for span in self.waiting:
            if not accepts(span):
                continue
            self.waiting.remove(span)
            if span.failed_on or span.unconfirmed:
                return span
            size = self.next_size(worker, sum(map(len, self.waiting)) + len(span))
            if size < len(span):
                self.waiting.appendleft(Span(span.start + size, span.stop))
                span = Span(span.start, span.start + size)
            return span
        return None


@dataclass
class Blame:
    """Decides whether a span kills its workers. One killed process is no evidence. Repeated deaths at the same span
    are, if no worker dies elsewhere meanwhile."""

    deaths_elsewhere: int = 0  # of workers that ran nothing suspected

    def died_at(self, span: Span, evidence: bool, heard: float, now: float) -> None:
        """Record that a worker that last answered at `heard` was killed while running a span. This is no evidence if
        the worker may have died before, or if the span is larger than the smallest size."""
        span.suspected = True
        if not evidence:
            self.deaths_elsewhere += 1
        elif heard > span.died:  # else it may have died together with the last one
            if span.others is None:
                self.deaths_elsewhere += 1  # as seen from all other spans
            elif span.others != self.deaths_elsewhere:
                span.failures = 0
            span.failures += 1
            span.others = self.deaths_elsewhere
        span.died = now
