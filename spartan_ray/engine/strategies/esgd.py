"""Evolutionary SGD (Cui et al., arXiv 1810.06773): several parents, each trained with settings of its own, and now and
then a selection among them and their offspring.

The words are the paper's. Shapes: P parents (its mu), K offspring (lambda), R parents of one offspring (rho),
C = P + K candidates.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spartan_ray.engine.draws import fractions, permutation
from spartan_ray.engine.strategies.requests import Columns, decayed, refuse
from spartan_ray.noise.contract import member_seeds

# Purposes of the keys of draws, beside the seed.
SETTINGS_OF_GENERATION = 1 << 37
PARENTS_OF_OFFSPRING = 1 << 38
REST_OF_GENERATION = 1 << 39


@dataclass(frozen=True)
class Settings:
    """What trains a parent in a generation."""

    optimizer: str
    lr: float


@dataclass(frozen=True)
class Offspring(Columns):
    """Row k is the mean of parents parent_kr plus gain_k * noise(seed_k)."""

    parent_KR: NDArray[np.int64]
    seed_K: NDArray[np.uint64]
    gain_K: NDArray[np.float32]

    def rows(self, places: Iterable[int]) -> list[Offspring]:
        """Some of them, each by itself."""
        return [self[place : place + 1] for place in places]


class EvolutionarySGD:
    """The draws and the selection of evolutionary SGD. All that is drawn is a function of (seed, generation)."""

    def __init__(
        self,
        population: int = 50,
        *,
        parents: int = 4,
        recombine: int = 2,
        elite: int | None = None,
        sigma: float = 0.01,
        sigma_decay: float = 1.0,
        every: int = 5,
        optimizers: Sequence[tuple[str, float, float]] = (("sgd", 0.003, 0.03),),
    ) -> None:
        """population    offspring of a generation, lambda
        parents       mu
        recombine     parents whose mean an offspring is, rho
        elite         the best of all that are sure to be the next parents, m (default: half of the parents); the others
                      are drawn from what is left
        sigma         scale of the noise of offspring, times `sigma_decay` after each generation
        every         epochs between generations, by which they are numbered
        optimizers    names, each with the lowest and the highest of its learning rates: each parent draws one of them
                      anew in each generation, and a rate, uniform in its logarithm"""
        self.population, self.parents, self.recombine = population, parents, recombine
        self.elite = max(1, parents // 2) if elite is None else elite
        self.sigma, self.sigma_decay, self.every, self.optimizers = sigma, sigma_decay, every, optimizers
        refuse(recombine > parents, f"recombine ({recombine}) is more than the parents ({parents})")
        refuse(self.elite > parents, f"elite ({self.elite}) is more than the parents ({parents})")

    def settings(self, seed: int, generation: int) -> list[Settings]:
        """Those of each parent, up to a generation."""
        fraction_P2 = fractions(2 * self.parents, seed, SETTINGS_OF_GENERATION + generation).reshape(-1, 2)
        drawn = []
        for which, where in fraction_P2.tolist():
            name, low, high = self.optimizers[int(which * len(self.optimizers))]
            drawn.append(Settings(name, low * math.exp(where * math.log(high / low))))
        return drawn

    def offspring(self, seed: int, generation: int) -> Offspring:
        """Those of a generation. The parents of each are different ones, all equally likely."""
        fraction_KP = fractions(self.population * self.parents, seed, PARENTS_OF_OFFSPRING + generation)
        order_KP = fraction_KP.reshape(-1, self.parents).argsort(1, kind="stable")
        sigma = decayed(self.sigma, self.sigma_decay, generation, self.every)
        return Offspring(
            np.sort(order_KP[:, : self.recombine], 1),
            member_seeds(seed, generation, self.population),
            np.full(self.population, sigma, np.float32),
        )

    def select(self, fitness_C: NDArray[np.float64], seed: int, generation: int) -> NDArray[np.int64]:
        """The next parents among the candidates, P, the best first: the elite, and a draw from the others. What is not
        finite is never among them while enough are."""
        finite_C = np.isfinite(fitness_C)
        ranked_C = np.argsort(np.where(finite_C, -fitness_C, np.inf), kind="stable")
        rest = ranked_C[self.elite : max(self.parents, int(finite_C.sum()))]
        drawn = permutation(len(rest), seed, REST_OF_GENERATION + generation)[: self.parents - self.elite]
        return np.concatenate([ranked_C[: self.elite], rest[np.sort(drawn)]])
