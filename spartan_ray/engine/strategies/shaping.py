"""Fitness shaping: fitnesses to weights. Shapes: K members."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray


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
