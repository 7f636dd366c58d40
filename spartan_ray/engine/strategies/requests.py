"""The building blocks of strategies: members, the requests of an evolve phase, and its outcome.

All strategies build their members in the same way, elementwise:

    descendant_k = theta + scale * (offset_k + gain_k * noise_k)

The scale is 1, one factor per parameter tensor, the parent's gradient, or the update whose length is searched. A
strategy's `generation` is a Python generator: it yields requests, receives the answers, and returns the Outcome of the
phase. The strategy holds the mathematics. The parent belongs to the object that answers: a Population, or a test.
Shapes: K members, M statistics, U seeds.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from spartan_ray.errors import InputError

# Disjoint sets of cases: "fitness" scores a generation; "search" and "confirm" chose nothing before they are used.
CaseSet = Literal["fitness", "search", "confirm"]
OptimizerKind = Literal["sgd", "momentum", "adam"]


class Columns:
    """A table of K rows with one array per column. Slices and `joined` act on rows."""

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Self:
        if isinstance(rows, int | np.integer):
            raise InputError(f"use [{rows} : {rows + 1}] for a table of one row; [{rows}] is not a table")
        return type(self)(*(column_K[rows] for column_K in vars(self).values()))


Table = TypeVar("Table", bound=Columns)


def joined(*tables: Table) -> Table:
    """Concatenate the rows of tables of one class, such as `Members` or `Scores`, in order."""
    columns = zip(*(vars(table).values() for table in tables), strict=True)
    return type(tables[0])(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True)
class Members(Columns):
    """A table of K members. Row k is theta + scale * (offset_k + gain_k * noise(seed_k)).

    `members[k : k + 1]` is row k as a table. An integer index raises InputError."""

    seed_K: NDArray[np.uint64]
    """Seed of the noise of each member, shape (K,)."""
    offset_K: NDArray[np.float32]
    """Constant added to the noise term, shape (K,)."""
    gain_K: NDArray[np.float32]
    """Factor of the noise, shape (K,). It is sigma for evolution strategies."""


def noisy(seed_K: NDArray[np.uint64], offset: float, gain: float) -> Members:
    """Build members that share one offset and one gain.

    Args:
        seed_K: Seed of each member, shape (K,).
        offset: Offset of all members.
        gain: Gain of all members.

    Returns:
        K members.
    """
    return Members(seed_K, np.full(len(seed_K), offset, np.float32), np.full(len(seed_K), gain, np.float32))


def line(*length_K: float) -> Members:
    """Build members without noise: theta + length_k * scale.

    After `SetDirection` the scale is the update, so that `line(0.5)` is the parent plus half of the update.

    Args:
        *length_K: Length of each member along the scale.

    Returns:
        One member per length.
    """
    zero_K = np.zeros(len(length_K), np.float32)
    return Members(zero_K.astype(np.uint64), np.array(length_K, np.float32), zero_K)


PARENT = line(0.0)
"""The parent as a member, so that it is scored in the same way as its descendants."""


@dataclass(frozen=True)
class Scores(Columns):
    """The scores of K members. The means of a member that was rejected early are over the cases it was scored on."""

    mean_KM: NDArray[np.float64]
    """Mean of each statistic of the fitness over the cases, shape (K, M). NaN if one of them is not finite."""
    fitness_K: NDArray[np.float64]
    """Fitness of each member, shape (K,). Higher is better. NaN if it could not be computed."""
    cases_K: NDArray[np.int64]
    """Number of cases that each member was scored on, shape (K,)."""


# A part of a set of cases: the shares of the set at which it starts and ends.
Part = tuple[float, float]
WHOLE: Part = (0.0, 1.0)


def parts(halvings: int) -> list[Part]:
    """Split a set of cases for successive halving.

    The first part is a share of 1 / 2**halvings. Each further part doubles the share that is covered."""
    ends = [0.0, *(2.0**-halving for halving in range(halvings, -1, -1))]
    return list(pairwise(ends))


@dataclass(frozen=True)
class Score:
    """Request: score members. The answer is `Scores`, one row per member."""

    members: Members
    """The members to score."""
    cases: CaseSet = "fitness"
    """The set of cases, "fitness", "search" or "confirm". It must be one of the strategy's `case_sets`."""
    threshold: float = -np.inf
    """Scoring of a member may stop as soon as its fitness can no longer exceed this. Needs `Fitness.best`."""
    part: Part = WHOLE
    """The part of the set, from one share of its cases to another. (0.0, 1.0) is the whole set."""
    onto: Scores | None = None
    """Earlier scores of the same members on other cases. The answer then covers the cases of both."""
    own: int | None = None
    """Number of cases that each seed draws from the set for its members. Members with one seed, such as a mirrored
    pair, get the same cases; members with different seeds are scored on different cases. None: all cases."""


@dataclass(frozen=True)
class DrawCases:
    """Request: draw the sets of cases anew. A phase may do this several times. There is no answer."""

    number: int
    """Number of the draw, 0 to 2**19 - 1. 0 restores the cases with which the phase began."""


@dataclass(frozen=True)
class SetScale:
    """Request: set the factor of everything that is added to the parent. There is no answer."""

    kind: Literal["gradient", "rms", "none"]
    """The factor. "gradient" is the parent's gradient, elementwise, computed again after each `Take`. "rms" is the
    present root mean square of each parameter tensor. "none" is 1."""


@dataclass(frozen=True)
class SetDirection:
    """Request: make an update, and use it as the scale until the next `Take`, `SetScale` or `DrawCases`.

    The estimated gradient is scale * sum_u weight_u * noise(seed_u), with the scale that the noise has. The optimizer
    turns it into the update, and keeps its moments from one generation to the next. The answer is the factor by which
    `ratio` lengthened the update, or 1.0 without a ratio."""

    seed_U: NDArray[np.uint64]
    """Seeds, shape (U,)."""
    weight_U: NDArray[np.float32]
    """Weight of the noise of each seed, shape (U,)."""
    rate: float
    """Learning rate."""
    ratio: float | None = None
    """Desired length of the update divided by the length of one perturbation. None keeps the length that `rate`
    gives."""
    optimizer: OptimizerKind = "sgd"
    """The optimizer, "sgd", "momentum" (0.9) or "adam" (beta1 0.9, beta2 0.999)."""
    weight_decay: float = 0.0
    """L2 weight decay of the parent, added to the estimated gradient."""


@dataclass(frozen=True)
class Compare:
    """Request: compare the update with the gradient, for diagnostics. Use it after `SetDirection`.

    The answer is the cosine between the update and the direction in which the loss of all fitness cases falls. It
    computes a gradient, so that the fitness must have a `loss`."""


@dataclass(frozen=True)
class Take:
    """Request: make one member the parent. A phase may do this several times. There is no answer."""

    member: Members
    """A table of one row."""


Request = Score | DrawCases | SetScale | SetDirection | Compare | Take


@dataclass
class Outcome:
    """The result of an evolve phase, which is recorded in the journal.

    If all weights are zero, the parent stayed as it was and `note` gives the reason. The strategy sets the fields up to
    `generations`; `Population.step` sets `cosine_expected` and the fields from `cases` on."""

    members: Members
    """The K members, without the parent."""
    fitness_K: NDArray[np.float64]
    """Fitness of each member, shape (K,). Higher is better."""
    cases_K: NDArray[np.int64]
    """Number of cases that each member was scored on, shape (K,)."""
    weight_K: NDArray[np.float64]
    """Weight of each member in the new parent, shape (K,), also if `SetDirection` gets fewer seeds than members. For a
    member that became the parent, it is any number other than 0, usually 1."""
    before: float
    """Fitness of the parent before the phase."""
    after: float
    """Fitness of the parent after the phase, on the same cases."""
    rate: float = 1.0
    """Learning rate of the update."""
    factor: float = 1.0
    """Answer to `SetDirection`, the factor by which its `ratio` lengthened the update."""
    length: float = 1.0
    """Length along the update that was taken, as a multiple of the update after `factor`."""
    note: str | None = None
    """Reason why the parent stayed as it was, if it did, or why some generations of the phase did not move it."""
    chosen: int | None = None
    """Index of the member that became the parent, the last one in a chain. None for an update."""
    confirm: tuple[float, float] | None = None
    """Fitness before and after on the confirm cases."""
    search: tuple[list[float], list[float]] | None = None
    """Lengths that were tried, as step ratios, and the fitness of each on the search cases."""
    cosine: float | None = None
    """Cosine between the update and the negative gradient, if the strategy computed it."""
    cosine_expected: float | None = None
    """Cosine to expect in the whole space, sqrt(seeds / parameters), at most 1. Set together with `cosine`."""
    discarded_cases: int = 0
    """Number of cases scored for members of a chain that were discarded and built again from a new parent."""
    estimate_K: NDArray[np.float64] | None = None
    """Weights of an update that was computed, shape (K,), even if it was not taken. The moments of the optimizer
    contain it in both cases."""
    generations: list[Outcome] = field(default_factory=list)
    """Outcome of each generation, if the phase had several."""

    cases: int = 0
    """Number of cases that score a member. The population sets it if the strategy does not."""
    cases_scored: int = 0
    """Number of cases scored in the phase, summed over members."""
    step_ratio: float = 0.0
    """Length of the parent's move divided by the length of one perturbation."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Wall-clock seconds per part of the phase, by name (scoring, update, gradient)."""
    counts: dict[str, float] = field(default_factory=dict)
    """Counters of the executor during the phase, such as retries."""
    workers: int = 0
    """Number of workers at the end of the phase."""

    def __repr__(self) -> str:
        moved = f"accepted={self.accepted}" if self.accepted else f"note={self.note!r}"
        return f"Outcome(members={len(self.members)}, before={self.before:.6g}, after={self.after:.6g}, {moved})"

    @property
    def accepted(self) -> int:
        """Number of members that became the parent one after another; 1 for an update; 0 if the parent stayed."""
        return int(bool(np.any(self.weight_K))) if self.chosen is None else int(np.count_nonzero(self.weight_K))

    def stay(self, reason: str) -> Outcome:
        """Change this outcome to one that left the parent as it was, and return it.

        All weights become 0, and `after` becomes `before`.

        Args:
            reason: The reason, which becomes `note`.

        Returns:
            This outcome.
        """
        self.weight_K = np.zeros_like(self.weight_K)
        self.after, self.note, self.chosen = self.before, reason, None
        return self


Generation = Generator[Request, Any, Outcome]


@runtime_checkable
class Strategy(Protocol):
    """The interface of a strategy: an object that turns fitnesses into the next parent."""

    population: int
    """Number of members per generation."""
    case_sets: tuple[CaseSet, ...]
    """The sets of cases that it uses, "fitness" first."""

    def generation(self, seed: int, number: int) -> Generation:
        """Run one evolve phase as a generator.

        The requests must depend only on the arguments, the settings and the answers, so that a run can be repeated.

        Args:
            seed: Seed of the population.
            number: Number of the phase. `member_seeds` derives the members' seeds from both.

        Returns:
            A generator that yields requests, receives their answers, and returns the `Outcome`.
        """


NOT_CONFIRMED = "not confirmed: no better than the parent on cases that did not choose it"


def confirm(member: Members, before: float | None = None) -> Generator[Request, Scores, tuple[float, float]]:
    """Score the parent and a chosen member on the confirm cases, which did not choose the member.

    The best of K members owes part of its score to chance; the comparison shows how much. Use it in a strategy as
    `before, after = yield from confirm(member)`.

    Args:
        member: The chosen member, a table of one row.
        before: The parent's fitness on the confirm cases, if it is known.

    Returns:
        The fitness of the parent and of the member.
    """
    scores = yield Score(joined(PARENT, member) if before is None else member, cases="confirm")
    *known, after = scores.fitness_K.tolist()
    return (known[0] if before is None else before), after


def refuse(wrong: bool, message: str) -> None:
    """Raise InputError with this message if `wrong` is true. The message names the setting and its value."""
    if wrong:
        raise InputError(message)


def is_better(before: float, after: float) -> bool:
    """Return whether `after` is strictly greater than `before`. False if one of them is NaN."""
    return after > before


def decayed(value: float, decay: float, generation: int, every: int) -> float:
    """Return a value that is multiplied by `decay` after each evolve phase.

    `generation` is the number of the phase, its epoch in a run; `every` is the difference between two numbers."""
    return value * decay ** (generation // every - 1)


def merge_seeds(members: Members, weight_K: NDArray[np.float64]) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """Merge sum_k weight_k * gain_k * noise_k into one weight per seed, in the order of first use.

    The noise of a mirrored pair is then computed once, and that of a seed with weight 0 not at all."""
    seed_U, first_U, index_K = np.unique(members.seed_K, return_index=True, return_inverse=True)
    weight_U = np.zeros(len(seed_U))
    np.add.at(weight_U, index_K, weight_K * members.gain_K)
    order_U = np.argsort(first_U)
    order_U = order_U[weight_U[order_U] != 0]
    return seed_U[order_U], weight_U[order_U].astype(np.float32)
