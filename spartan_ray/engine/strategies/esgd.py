"""Evolutionary SGD (Cui et al., arXiv 1810.06773): several parents trained side by side, and selection among them.

Each parent is trained with settings of its own. Every N epochs, the next parents are selected from the parents and
their offspring. The terms are those of the paper. Shapes: P parents (mu in the paper), K offspring (lambda), R parents
of one offspring (rho), C = P + K candidates.
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

# Keys that keep the random draws for different purposes apart. Each is used together with the seed.
SETTINGS_OF_GENERATION = 1 << 37
PARENTS_OF_OFFSPRING = 1 << 38
REST_OF_GENERATION = 1 << 39


@dataclass(frozen=True)
class Settings:
    """The optimizer and learning rate that train one parent during a generation."""

    optimizer: str
    lr: float


@dataclass(frozen=True)
class Offspring(Columns):
    """A table of offspring. Row k is the mean of the parents parent_kr, plus gain_k * noise(seed_k)."""

    parent_KR: NDArray[np.int64]
    seed_K: NDArray[np.uint64]
    gain_K: NDArray[np.float32]

    def rows(self, places: Iterable[int]) -> list[Offspring]:
        """Return the rows at these places, each as a table of one row."""
        return [self[place : place + 1] for place in places]


class EvolutionarySGD:
    """The random draws and the selection of evolutionary SGD (Cui et al., arXiv 1810.06773).

    All draws are functions of (seed, generation)."""

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
        """Check and store the settings.

        Args:
            population: Number of offspring per generation, lambda.
            parents: Number of parents, mu.
            recombine: Number of parents whose mean makes an offspring, rho.
            elite: Number of the best candidates that always become parents, m. The other parents are drawn from the
                remaining candidates. Default: half of the parents, at least 1.
            sigma: Scale of the noise of offspring.
            sigma_decay: Multiply sigma by this factor after each generation.
            every: Epochs between generations. A generation has the number of its epoch.
            optimizers: Names of optimizers, each with the lowest and the highest learning rate. Each parent draws one
                in each generation, with a log-uniform learning rate.

        Raises:
            InputError: `recombine` or `elite` is larger than `parents`.
        """
        self.population, self.parents, self.recombine = population, parents, recombine
        self.elite = max(1, parents // 2) if elite is None else elite
        self.sigma, self.sigma_decay, self.every, self.optimizers = sigma, sigma_decay, every, optimizers
        refuse(recombine > parents, f"recombine ({recombine}) is more than the parents ({parents})")
        refuse(self.elite > parents, f"elite ({self.elite}) is more than the parents ({parents})")

    def settings(self, seed: int, generation: int) -> list[Settings]:
        """Return the settings of each parent for the epochs that lead up to a generation."""
        fraction_P2 = fractions(2 * self.parents, seed, SETTINGS_OF_GENERATION + generation).reshape(-1, 2)
        drawn = []
        for which, where in fraction_P2.tolist():
            name, low, high = self.optimizers[int(which * len(self.optimizers))]
            drawn.append(Settings(name, low * math.exp(where * math.log(high / low))))
        return drawn

    def offspring(self, seed: int, generation: int) -> Offspring:
        """Return the offspring of a generation. Each has distinct parents; all parents are equally likely."""
        fraction_KP = fractions(self.population * self.parents, seed, PARENTS_OF_OFFSPRING + generation)
        order_KP = fraction_KP.reshape(-1, self.parents).argsort(1, kind="stable")
        sigma = decayed(self.sigma, self.sigma_decay, generation, self.every)
        return Offspring(
            np.sort(order_KP[:, : self.recombine], 1),
            member_seeds(seed, generation, self.population),
            np.full(self.population, sigma, np.float32),
        )

    def select(self, fitness_C: NDArray[np.float64], seed: int, generation: int) -> NDArray[np.int64]:
        """Return the indices of the next parents among the candidates, shape (P,), the best first.

        They are the elite and a random draw from the other candidates. A candidate whose fitness is not finite is
        chosen only if there are fewer than P finite ones."""
        finite_C = np.isfinite(fitness_C)
        ranked_C = np.argsort(np.where(finite_C, -fitness_C, np.inf), kind="stable")
        rest = ranked_C[self.elite : max(self.parents, int(finite_C.sum()))]
        drawn = permutation(len(rest), seed, REST_OF_GENERATION + generation)[: self.parents - self.elite]
        return np.concatenate([ranked_C[: self.elite], rest[np.sort(drawn)]])
