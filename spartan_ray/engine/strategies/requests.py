"""What strategies are made of: members, and the requests of an evolve phase.

Every strategy is the same linear algebra on the same noise, elementwise:

    descendant_k = theta + scale * (offset_k + gain_k * noise_k)

The scale is 1 (or a number a tensor), the parent's gradient, or the update whose length is sought. A
generation is a generator: it yields requests, is sent the answers, and returns the phase's Outcome. What
answers (a Population, or a test) has the parent; the strategy has the maths. Shapes: K members.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Literal, Protocol, Self, TypeVar, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from spartan_ray.errors import InputError

# Disjoint sets of cases: those that score a generation, and those that choose nothing before they are asked.
CaseSet = Literal["fitness", "search", "confirm"]
OptimizerKind = Literal["sgd", "momentum", "adam"]


class Columns:
    """A table of K rows, one array a column: sliced and joined by rows."""

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Self:
        if isinstance(rows, int | np.integer):
            raise InputError(f"rows of a table: [{rows} : {rows + 1}] is a table of one row, [{rows}] is none")
        return type(self)(*(column_K[rows] for column_K in vars(self).values()))


Table = TypeVar("Table", bound=Columns)


def joined(*tables: Table) -> Table:
    """The rows of all tables in order."""
    columns = zip(*(vars(table).values() for table in tables), strict=True)
    return type(tables[0])(*(np.concatenate(column) for column in columns))


@dataclass(frozen=True)
class Members(Columns):
    """Row k is a member, theta + scale * (offset_k + gain_k * noise(seed_k))."""

    seed_K: NDArray[np.uint64]
    offset_K: NDArray[np.float32]
    gain_K: NDArray[np.float32]


def noisy(seed_K: NDArray[np.uint64], offset: float, gain: float) -> Members:
    """Members of one offset and one gain."""
    return Members(seed_K, np.full(len(seed_K), offset, np.float32), np.full(len(seed_K), gain, np.float32))


def line(*length_K: float) -> Members:
    """Members without noise, theta + length_k * scale."""
    zero_K = np.zeros(len(length_K), np.float32)
    return Members(zero_K.astype(np.uint64), np.array(length_K, np.float32), zero_K)


# The parent as a member, so that it is scored by the very path that scores descendants.
PARENT = line(0.0)


@dataclass(frozen=True)
class Scores(Columns):
    """What is known of members. One that was rejected early has its means over the cases that it was scored on."""

    mean_KM: NDArray[np.float64]  # of each statistic of the fitness over the cases
    fitness_K: NDArray[np.float64]  # higher is better
    cases_K: NDArray[np.int64]  # how many it was scored on


# Shares of a set of cases between which the cases lie.
Part = tuple[float, float]
WHOLE: Part = (0.0, 1.0)


def parts(halvings: int) -> list[Part]:
    """Nested sets of cases as what each adds to the one before: the first holds a share of 1 / 2**halvings, each
    of the others twice the one before."""
    ends = [0.0, *(2.0**-halving for halving in range(halvings, -1, -1))]
    return list(pairwise(ends))


@dataclass(frozen=True)
class Score:
    """Score members on a part of the cases, from one share of them to another; answered with Scores. A member that
    can no longer exceed the threshold may be left. With `onto`, what is known of them already, the answer is of the
    cases of both. With `own` each seed draws so many cases of the set for its members, a mirrored pair the same ones:
    the fitness of different seeds is then not of the same cases."""

    members: Members
    cases: CaseSet = "fitness"
    threshold: float = -np.inf
    part: Part = WHOLE
    onto: Scores | None = None
    own: int | None = None


@dataclass(frozen=True)
class DrawCases:
    """Draw the sets of cases anew, as often as one likes in a phase; number 0 are those that it began with."""

    number: int


@dataclass(frozen=True)
class SetScale:
    """From here on what is added to the parent is multiplied, elementwise, by the parent's gradient, taken anew after
    each `Take`, by the root mean square that each parameter tensor has now, or, none, by 1 again."""

    kind: Literal["gradient", "rms", "none"]


@dataclass(frozen=True)
class SetDirection:
    """Make the update the scale, up to the next `Take` or `SetScale`: what the optimizer makes, at a learning rate, of
    the estimated gradient scale * sum_u weight_u * noise(seed_u), with the scale that noise has. With a ratio the
    update is multiplied by the factor that makes its norm so many times the norm of one mutation; answered with the
    factor. The optimizer keeps its moments from one generation to the next."""

    seed_U: NDArray[np.uint64]
    weight_U: NDArray[np.float32]
    rate: float
    ratio: float | None = None
    optimizer: OptimizerKind = "sgd"
    weight_decay: float = 0.0


@dataclass(frozen=True)
class Compare:
    """Answered with the cosine between the update, which is the scale, and the direction in which the loss of all
    fitness cases falls. For diagnostics: it takes a gradient, of a fitness that has a loss."""


@dataclass(frozen=True)
class Take:
    """Make one member the parent."""

    member: Members


Request = Score | DrawCases | SetScale | SetDirection | Compare | Take


@dataclass
class Outcome:
    """The account of a phase, which goes into the record. A member's weight is what it has in the new parent: any
    number but 0 of one that was taken, what `SetDirection` was given of one in an update. All zero: the parent stays,
    and `note` says why. A strategy that takes several members one after another says so by `chosen`, the last of
    them; `accepted` then counts the weights that are not 0."""

    members: Members
    fitness_K: NDArray[np.float64]
    cases_K: NDArray[np.int64]
    weight_K: NDArray[np.float64]
    before: float  # the parent's fitness
    after: float  # the next parent's, on the same cases
    rate: float = 1.0  # learning rate of the update
    factor: float = 1.0  # what `SetDirection` was answered
    length: float = 1.0  # along the update after that
    note: str | None = None
    chosen: int | None = None  # the member that became the parent, the last of them in a chain
    confirm: tuple[float, float] | None = None  # fitness before and after on the confirm cases
    search: tuple[list[float], list[float]] | None = None  # lengths tried, as step ratios, and their fitness
    cosine: float | None = None  # of the update to the gradient, where it was asked for
    cosine_expected: float | None = None  # in the whole space: the root of seeds over parameters
    discarded_cases: int = 0  # scored for members that were drawn again from a new parent
    # The weights of an update that was made, taken or not: the moments of its optimizer hold it.
    estimate_K: NDArray[np.float64] | None = None
    generations: list[Outcome] = field(default_factory=list)  # of a phase of several, each by itself

    # What the population adds: how many cases score a member, where the strategy does not say it, how many were scored,
    # how far the parent moved in mutations, seconds by part, what the executor counted meanwhile, and how many workers
    # there were at the end.
    cases: int = 0
    cases_scored: int = 0
    step_ratio: float = 0.0
    seconds: dict[str, float] = field(default_factory=dict)
    counts: dict[str, float] = field(default_factory=dict)
    workers: int = 0

    @property
    def accepted(self) -> int:
        """Members that became the parent one after another, or 1 for an update by all."""
        return int(bool(np.any(self.weight_K))) if self.chosen is None else int(np.count_nonzero(self.weight_K))

    def stay(self, reason: str) -> Outcome:
        """The same phase with the parent as it was."""
        self.weight_K = np.zeros_like(self.weight_K)
        self.after, self.note, self.chosen = self.before, reason, None
        return self


Generation = Generator[Request, Any, Outcome]


@runtime_checkable
class Strategy(Protocol):
    """Turns fitnesses into the next parent."""

    population: int
    """Members of a generation."""
    case_sets: tuple[CaseSet, ...]
    """The sets of cases that it asks for, `fitness` first."""

    def generation(self, seed: int, number: int) -> Generation:
        """One evolve phase: requests out, answers in, the account at the end. What it asks is a function of its
        arguments, its settings and the answers alone."""


NOT_CONFIRMED = "not confirmed: no better than the parent on cases that did not choose it"


def confirm(member: Members, before: float | None = None) -> Generator[Request, Scores, tuple[float, float]]:
    """The fitness of the parent and of a member that was chosen, on cases that did not choose it: the best of K owes
    part of its score to luck, and the record shows how much. `before` is the parent's fitness there, if it is known."""
    scores = yield Score(joined(PARENT, member) if before is None else member, cases="confirm")
    *known, after = scores.fitness_K.tolist()
    return (known[0] if before is None else before), after


def refuse(wrong: bool, message: str) -> None:
    """Raises InputError if a setting is wrong; the message names it, with its value."""
    if wrong:
        raise InputError(message)


def is_better(before: float, after: float) -> bool:
    """Strictly; a fitness that is not a number is no better, and a parent's that is not one stays."""
    return after > before


def decayed(value: float, decay: float, generation: int, every: int) -> float:
    """A value that is multiplied by `decay` after each evolve phase; a generation is named by its epoch."""
    return value * decay ** (generation // every - 1)


def merge_seeds(members: Members, weight_K: NDArray[np.float64]) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """sum_k weight_k * gain_k * noise_k as one weight a seed, in the order of first use: a mirrored pair
    costs its noise once, and a seed without weight nothing."""
    seed_U, first_U, index_K = np.unique(members.seed_K, return_index=True, return_inverse=True)
    weight_U = np.zeros(len(seed_U))
    np.add.at(weight_U, index_K, weight_K * members.gain_K)
    order_U = np.argsort(first_U)
    order_U = order_U[weight_U[order_U] != 0]
    return seed_U[order_U], weight_U[order_U].astype(np.float32)
