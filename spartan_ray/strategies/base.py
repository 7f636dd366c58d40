"""The protocol of a strategy, and the fitness shaping that strategies share.

Every strategy is the same linear algebra on the same noise:

    descendant_k = theta + scale * sign_k * noise_k
    new parent   = theta + scale * sum_k weight_k * sign_k * noise_k

A strategy chooses the members, the scale, and, from the fitnesses, the weights. Shapes: K members.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Members:
    """The population of a generation: row k is member k."""

    seed_K: NDArray[np.uint64]
    sign_K: NDArray[np.int8]  # +1 or -1; 0 is the parent itself
    scale: float

    def __len__(self) -> int:
        return len(self.seed_K)


@dataclass(frozen=True)
class Move:
    """What `tell` makes of the fitnesses. All weights zero: the parent stays, and `note` says why."""

    weight_K: NDArray[np.float64]
    nonfinite: int = 0  # members whose fitness was NaN or infinite
    note: str | None = None

    @property
    def accepted(self) -> bool:
        return bool(np.any(self.weight_K))


# The parent as a member: sign 0 adds nothing, so it is scored by the very path that scores descendants.
PARENT = Members(np.zeros(1, np.uint64), np.zeros(1, np.int8), scale=0.0)


def with_parent(members: Members) -> Members:
    """The members with the parent before them."""
    return Members(
        np.concatenate([PARENT.seed_K, members.seed_K]),
        np.concatenate([PARENT.sign_K, members.sign_K]),
        members.scale,
    )


def merge_seeds(members: Members, move: Move) -> tuple[NDArray[np.uint64], NDArray[np.float32]]:
    """One signed weight a seed, in the order of first use: a mirrored pair costs its noise once, and a
    seed without weight nothing."""
    seed_U, first_U, index_K = np.unique(members.seed_K, return_index=True, return_inverse=True)
    weight_U = np.zeros(len(seed_U))
    np.add.at(weight_U, index_K, move.weight_K * members.sign_K)
    order_U = np.argsort(first_U)
    order_U = order_U[weight_U[order_U] != 0]
    return seed_U[order_U], weight_U[order_U].astype(np.float32)


class Strategy(Protocol):
    """One evolve phase is ask, evaluate, tell."""

    def ask(self, run_seed: int, generation: int) -> Members:
        """The members of a generation, a function of its arguments and the configuration alone."""

    def tell(self, fitness_K: NDArray[np.float64]) -> Move:
        """The weights of the members in the next parent. Higher fitness is better."""


def worst_for_nonfinite(fitness_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """NaN and both infinities replaced by the worst finite fitness, so that none of them wins."""
    finite_K = np.isfinite(fitness_K)
    worst = float(fitness_K[finite_K].min()) if finite_K.any() else 0.0
    return np.where(finite_K, fitness_K, worst)


def zscore(fitness_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """(f - mean) / std with the population's own std, as the article does; zeros when all are equal."""
    fitness_K = worst_for_nonfinite(fitness_K)
    if fitness_K.min() == fitness_K.max():
        return np.zeros_like(fitness_K)
    shaped_K: NDArray[np.float64] = (fitness_K - fitness_K.mean()) / fitness_K.std()
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
