"""Evolution strategies as the article uses them (Salimans et al., arXiv 1703.03864)."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from spartan_ray.config import Evolution
from spartan_ray.noise import member_seeds
from spartan_ray.strategies.base import SHAPING, Members, Move


class EvolutionStrategies:
    """theta += lr / (K sigma) * sum_k shaped_k * noise_k.

    In the protocol's form the scale is sigma and weight_k = lr * shaped_k / (K sigma^2). With
    mirrored sampling members 2j and 2j+1 share a seed, with signs +1 and -1.
    """

    def __init__(self, config: Evolution) -> None:
        self.config = config

    def ask(self, run_seed: int, generation: int) -> Members:
        population = self.config.population
        if self.config.mirrored:
            seed_K = np.repeat(member_seeds(run_seed, generation, population // 2), 2)
            sign_K = np.tile(np.array([1, -1], np.int8), population // 2)
        else:
            seed_K = member_seeds(run_seed, generation, population)
            sign_K = np.ones(population, np.int8)
        return Members(seed_K, sign_K, self.config.sigma)

    def tell(self, fitness_K: NDArray[np.float64]) -> Move:
        shaped_K = SHAPING[self.config.shaping](fitness_K)
        weight_K = self.config.lr * shaped_K / (len(fitness_K) * self.config.sigma**2)
        nonfinite = int((~np.isfinite(fitness_K)).sum())
        note = None if shaped_K.any() else "no update: all members have equal fitness"
        return Move(weight_K, nonfinite, note)
