"""An evolve phase without selection, as a control: the parent moves by noise."""

from __future__ import annotations

import numpy as np

from spartan_ray.engine.strategies.requests import (
    PARENT,
    CaseSet,
    Generation,
    Outcome,
    Score,
    Take,
    joined,
    noisy,
    refuse,
)
from spartan_ray.noise.contract import member_seeds


class PureNoise:
    """One member becomes the parent, whatever its fitness.

    sigma       scale of a mutation's noise, as in evolution strategies
    step_ratio  length of the move divided by the length of a mutation"""

    case_sets: tuple[CaseSet, ...] = ("fitness",)
    population = 1

    def __init__(self, sigma: float = 0.01, step_ratio: float = 0.5) -> None:
        """Raises InputError, with the name of the setting, for an invalid one."""
        for name, number in (("sigma", sigma), ("step_ratio", step_ratio)):
            refuse(not 0 < number < np.inf, f"{name} ({number}) must be above 0 and finite")
        self.gain = sigma * step_ratio

    def generation(self, seed: int, number: int) -> Generation:
        """Run one evolve phase."""
        member = noisy(member_seeds(seed, number, 1), 0.0, self.gain)
        scores = yield Score(joined(PARENT, member))
        before, after = scores.fitness_K.tolist()
        yield Take(member)
        return Outcome(member, scores.fitness_K[1:], scores.cases_K[1:], np.ones(1), before, after, chosen=0)
