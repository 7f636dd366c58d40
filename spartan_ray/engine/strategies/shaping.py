"""Fitness shaping: turns fitnesses into weights. Shapes: K members."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


def zscore(fitness_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Standardise fitnesses: (f - mean) / std, with the std of the population (divisor K), as in the article.

    A fitness that is not finite is left out of the mean and the std. It gets the weight of the worst finite one.

    Args:
        fitness_K: Fitness of each member, shape (K,).

    Returns:
        Weights, shape (K,). All zero if all finite fitnesses are equal.
    """
    finite_K, shaped_K = np.isfinite(fitness_K), np.zeros(len(fitness_K))
    finite_F = fitness_K[finite_K]
    if len(finite_F) and finite_F.min() < finite_F.max():
        shaped_F = (finite_F - finite_F.mean()) / finite_F.std()
        shaped_K[:] = shaped_F.min()
        shaped_K[finite_K] = shaped_F
    return shaped_K


def centered_rank(fitness_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """Rank fitnesses and scale the ranks to [-1/2, 1/2] (Salimans et al., arXiv 1703.03864).

    Ties share their mean rank. A fitness that is not finite ranks below every finite one.

    Args:
        fitness_K: Fitness of each member, shape (K,). K is at least 2.

    Returns:
        Weights, shape (K,). All zero if all fitnesses are equal.
    """
    fitness_K = np.where(np.isfinite(fitness_K), fitness_K, -np.inf)
    _, group_K, count_G = np.unique(fitness_K, return_inverse=True, return_counts=True)
    mean_rank_G = np.cumsum(count_G) - (count_G + 1) / 2
    return mean_rank_G[group_K] / (len(fitness_K) - 1) - 0.5


SHAPING: dict[str, Callable[[NDArray[np.float64]], NDArray[np.float64]]] = {
    "zscore": zscore,
    "centered-rank": centered_rank,
}
