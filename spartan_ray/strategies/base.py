"""What strategies are made of: members, the requests of an evolve phase, and fitness shaping.

Every strategy is the same linear algebra on the same noise, elementwise:

    descendant_k = theta + scale * (offset_k + gain_k * noise_k)

The scale is 1 (or a number a tensor), the parent's gradient, or the update whose length is sought. A
strategy is a generator: it yields requests, is sent the answers, and returns the phase's Outcome. What
answers (`evolve.py`, or a test) has the parent; the strategy has the maths. Shapes: K members.
"""

from __future__ import annotations

from collections.abc import Callable, Generator
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, Protocol, Self, TypeVar

import numpy as np
from numpy.typing import NDArray

from spartan_ray.config import FitnessKind, ImageSet


class Columns:
    """A table of K rows, one array a column: sliced and joined by rows."""

    def __len__(self) -> int:
        return len(next(iter(vars(self).values())))

    def __getitem__(self, rows: slice | NDArray[np.int64]) -> Self:
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
    """What the workers say of members. A member that was rejected early has its means over the images
    that it was scored on."""

    loss_K: NDArray[np.float64]
    accuracy_K: NDArray[np.float64]
    images_K: NDArray[np.int64]

    def fitness_K(self, kind: FitnessKind) -> NDArray[np.float64]:
        """Higher is better."""
        return -self.loss_K if kind == "loss" else self.accuracy_K


# Shares of an image set between which the images lie.
Part = tuple[float, float]
WHOLE: Part = (0.0, 1.0)


def parts(halvings: int) -> list[Part]:
    """Nested image sets as what each adds to the one before: the first holds a share of 1 / 2**halvings, each
    of the others twice the one before."""
    ends = [0.0, *(2.0**-halving for halving in range(halvings, -1, -1))]
    return list(pairwise(ends))


def pooled(first: Scores, second: Scores) -> Scores:
    """The scores of the same members on the images of both."""
    images_K = first.images_K + second.images_K
    loss_K = (first.loss_K * first.images_K + second.loss_K * second.images_K) / images_K
    accuracy_K = (first.accuracy_K * first.images_K + second.accuracy_K * second.images_K) / images_K
    return Scores(loss_K, accuracy_K, images_K)


@dataclass(frozen=True)
class Score:
    """Score members on a part of the images, from one share of them to another; answered with Scores. A member
    that can no longer exceed the bar may be left."""

    members: Members
    images: ImageSet = "fitness"
    bar: float = -np.inf
    part: Part = WHOLE


@dataclass(frozen=True)
class Gradient:
    """From here on the scale is the gradient of the parent, taken anew after each `Take`."""


@dataclass(frozen=True)
class Aim:
    """Make the update the scale: what the optimizer makes, at a learning rate, of the estimated gradient
    scale * sum_u weight_u * noise(seed_u). Where a ratio is wanted, the update is multiplied by the factor
    that makes its norm so many times the norm of one mutation; answered with the factor."""

    seed_U: NDArray[np.uint64]
    weight_U: NDArray[np.float32]
    rate: float
    ratio: float | None = None


@dataclass(frozen=True)
class Take:
    """Make one member the parent."""

    member: Members


Request = Score | Gradient | Aim | Take


@dataclass
class Outcome:
    """The account of a phase. A member's weight is what it has in the new parent; all zero: the parent
    stays, and `note` says why."""

    members: Members
    fitness_K: NDArray[np.float64]
    images_K: NDArray[np.int64]
    weight_K: NDArray[np.float64]
    before: float  # the parent's fitness
    after: float  # the next parent's, on the same images
    rate: float = 1.0  # learning rate of the update
    factor: float = 1.0  # what `Aim` was answered
    length: float = 1.0  # along the update after that
    note: str | None = None
    chosen: int | None = None  # the member that became the parent, the last of them in a chain
    confirm: tuple[float, float] | None = None  # fitness before and after on the confirm images
    search: tuple[list[float], list[float]] | None = None  # lengths tried, as step ratios, and their fitness
    discarded_images: int = 0  # scored for members that were drawn again from a new parent

    @property
    def accepted(self) -> int:
        """Members that became the parent one after another, or 1 for an update by all."""
        return int(bool(np.any(self.weight_K))) if self.chosen is None else int(np.count_nonzero(self.weight_K))

    def stay(self, reason: str) -> Outcome:
        """The same phase with the parent as it was."""
        self.weight_K = np.zeros_like(self.weight_K)
        self.after, self.note, self.chosen = self.before, reason, None
        return self


Phase = Generator[Request, Any, Outcome]


class Strategy(Protocol):
    """Turns fitnesses into the next parent."""

    def phase(self, run_seed: int, generation: int) -> Phase:
        """One evolve phase: requests out, answers in, the account at the end. What it asks is a function
        of its arguments, the configuration and the answers alone."""


NOT_CONFIRMED = "not confirmed: no better than the parent on images that did not choose it"


def confirm(
    member: Members, kind: FitnessKind, before: float | None = None
) -> Generator[Request, Scores, tuple[float, float]]:
    """The fitness of the parent and of a member that was chosen, on images that did not choose it: the
    best of K owes part of its score to luck, and the record shows how much. `before` is the parent's fitness
    there, if it is known."""
    scores = yield Score(joined(PARENT, member) if before is None else member, images="confirm")
    *known, after = scores.fitness_K(kind).tolist()
    return (known[0] if before is None else before), after


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


def zscore(fitness_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """(f - mean) / std with the population's own std, as the article does; zeros when all are equal. A non-finite
    fitness counts for neither and gets the weight of the worst finite one."""
    finite_K, shaped_K = np.isfinite(fitness_K), np.zeros(len(fitness_K))
    finite_F = fitness_K[finite_K]
    if len(finite_F) and finite_F.min() < finite_F.max():
        shaped_F = (finite_F - finite_F.mean()) / finite_F.std()
        shaped_K[:] = shaped_F.min()
        shaped_K[finite_K] = shaped_F
    return shaped_K


def centered_rank(fitness_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks scaled to [-1/2, 1/2], ties sharing their mean rank (Salimans et al., arXiv 1703.03864);
    zeros when all are equal. A non-finite fitness ranks below every finite one."""
    fitness_K = np.where(np.isfinite(fitness_K), fitness_K, -np.inf)
    _, group_K, count_G = np.unique(fitness_K, return_inverse=True, return_counts=True)
    mean_rank_G = np.cumsum(count_G) - (count_G + 1) / 2
    return mean_rank_G[group_K] / (len(fitness_K) - 1) - 0.5


SHAPING: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "zscore": zscore,
    "centered-rank": centered_rank,
}
