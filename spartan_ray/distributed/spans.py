"""The book of a range that tasks cover: what waits, what runs, what is done. Knows nothing of Ray."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

# An automatic chunk is long against Ray's overhead of a task, and short against a generation ...
CHUNK_SECONDS = 2.0
# ... but no shorter than what keeps the driver from more answers a second than it can take. A generation that lasts
# less than so many rounds, in each of which every worker is told once, is told in one.
ONE_ROUND = 3.0


def workers_worth(seconds: float, workers: int, answers_per_second: float) -> int:
    """How many of the workers are worth an answer each, for work that one would do in so many seconds: n workers
    take seconds / n, and n / answers_per_second to be told and heard."""
    return max(1, int(min(workers, math.sqrt(seconds * answers_per_second))))


def chunk_size(
    left: int,
    members: int,
    workers: int,
    seconds_per_member: float | None,
    answers_per_second: float,
    own_seconds: float | None = None,
) -> int:
    """Members of a worker's next chunk, when so many of all are left; it may take other seconds a member than the
    workers do on average. Chunks shrink towards the end, so that the workers finish together. 1 where nothing is known
    of the speed.

    A short generation is told in one round: each worker is told 1 / answers_per_second later than the one before, and
    has so much less to do. With sizes that shrink by d from n to m, what is left is (n^2 - m^2) / 2d: so n follows from
    what is left."""
    if seconds_per_member is None:
        return 1
    seconds_per_member = max(seconds_per_member, 1e-9)
    round_ = workers / answers_per_second
    share, rest = members * seconds_per_member / workers, left * seconds_per_member
    if share < ONE_ROUND * round_:
        last = max(0.0, share - round_ / 2)  # 0: not all workers are worth an answer
        seconds = math.sqrt(last**2 + 2 * rest / answers_per_second)
    else:
        seconds = min(max(rest / (4 * workers), round_), max(CHUNK_SECONDS, round_))
    return max(1, math.ceil(seconds / (own_seconds or seconds_per_member)))


@dataclass(eq=False)
class Span:
    """A part of a range, done as a whole."""

    start: int
    stop: int
    copies: int = 0  # workers that have it now
    failed_on: list[int] = field(default_factory=list)  # places in the pool whose worker ended at it
    suspected: bool = False  # a worker was killed at it, or at the whole that it is a part of
    failures: int = 0  # that are held against it, in the smallest size
    died: float = -math.inf  # when a worker was last killed at it ...
    others: int | None = None  # ... and how many there had been that were killed elsewhere
    unconfirmed: Any = None  # a worker whose result was not finite ...
    doubtful: Any = None  # ... and that result
    done: bool = False

    def __len__(self) -> int:
        return self.stop - self.start

    def parts(self, smallest: int) -> list[Span]:
        """What failed, in its smallest parts."""
        if len(self) <= smallest:
            return [self]
        starts = range(self.start, self.stop, smallest)
        return [Span(start, min(start + smallest, self.stop), suspected=self.suspected) for start in starts]


@dataclass(eq=False)
class Range:
    """A range that is being covered."""

    submit: Callable[[Any, int, int], Any]
    next_size: Callable[[Any, int], int]  # for a worker, when so many elements wait
    waiting: deque[Span]
    left: int  # elements that are not done
    smallest: int  # elements of a task that can fail no smaller
    either: Callable[[Any, Any], Any] = lambda first, second: second  # of two results what is finite in one
    seconds: float = 0.0  # that so many elements took
    elements: int = 0

    def expected(self, span: Span) -> float:
        """Seconds that a span should take, 0 if nothing is known."""
        return self.seconds * len(span) / max(self.elements, 1)

    def put_back(self, spans: list[Span], running: bool) -> None:
        """What is to be done again comes first; but what may have killed a worker comes last, since others would wait
        for the next one, and one suspect after another, so that each is found out soon."""
        place = next((place for place, span in enumerate(self.waiting) if span.suspected), len(self.waiting))
        if not spans[0].suspected:
            place = 0
        elif not running:
            place += 1
        for span in reversed(spans):
            self.waiting.insert(place, span)

    def take(self, worker: Any, accepts: Callable[[Span], bool]) -> Span | None:
        """The next span that a worker accepts: a fresh one is cut to its size, one that was tried stays as it is."""
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
    """Whether it is a span that kills workers. A killed process is no evidence, unless it dies at the same span again
    and again, and none dies elsewhere meanwhile."""

    deaths_elsewhere: int = 0  # of workers at nothing that is suspected

    def died_at(self, span: Span, evidence: bool, heard: float, now: float) -> None:
        """A worker that last answered at `heard` was killed at a span. It is no evidence where it may have died
        before, or where the span is more than the smallest."""
        span.suspected = True
        if not evidence:
            self.deaths_elsewhere += 1
        elif heard > span.died:  # else it may have died with the last one
            if span.others is None:
                self.deaths_elsewhere += 1  # to all others
            elif span.others != self.deaths_elsewhere:
                span.failures = 0
            span.failures += 1
            span.others = self.deaths_elsewhere
        span.died = now
