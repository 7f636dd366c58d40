"""Evolution strategies as the article uses them (Salimans et al., arXiv 1703.03864)."""

from __future__ import annotations

from collections.abc import Generator

import numpy as np

from spartan_ray.config import Evolution
from spartan_ray.noise import member_seeds
from spartan_ray.strategies.base import (
    NOT_CONFIRMED,
    PARENT,
    SHAPING,
    Aim,
    Members,
    Outcome,
    Phase,
    Request,
    Score,
    Scores,
    Take,
    confirm,
    decayed,
    is_better,
    joined,
    line,
    merge_seeds,
    noisy,
)

# Lengths of a search in units of one mutation. The best was between 0.3 and 1 for 50 to 1,000 members and
# falls as the population grows: factors of 4 find its neighbourhood, the rounds after that the place.
SEARCH_LENGTHS = (0.0, 1 / 32, 1 / 8, 1 / 2, 2.0)
SEARCH_FACTORS = (2.0, 2**0.5)
# Where the longest is the best, as with a tiny sigma, the search goes on to such lengths.
LONGEST = 1e4


class EvolutionStrategies:
    """theta += lr / (K sigma) * sum_k shaped_k * noise_k, or that direction at another length.

    The gain is sigma and weight_k = shaped_k / (K sigma^2). With mirrored sampling members 2j and 2j+1
    share a seed, with gains +sigma and -sigma. With `sigma_scale` relative, sigma is times the RMS of the
    tensor, in the descendants and in the update.
    """

    def __init__(self, config: Evolution) -> None:
        self.config = config

    def phase(self, run_seed: int, generation: int) -> Phase:
        config = self.config
        assert config.lr, "resolved before"
        sigma = decayed(config.sigma, config.sigma_decay, generation, config.every)
        members = self._members(run_seed, generation, sigma)
        scores: Scores = yield Score(joined(PARENT, members))
        fitness_K = scores.fitness_K(config.fitness)
        before, fitness_K = float(fitness_K[0]), fitness_K[1:]
        shaped_K = SHAPING[config.shaping](fitness_K)
        outcome = Outcome(
            members,
            fitness_K,
            scores.images_K[1:],
            weight_K=shaped_K / (len(members) * sigma**2),
            before=before,
            after=before,
            rate=decayed(config.lr, config.lr_decay, generation, config.every),
        )
        if not shaped_K.any():
            finite = np.isfinite(fitness_K).sum()
            alike = "all members have equal fitness" if finite > 1 else f"{finite} of {len(members)} members are finite"
            return outcome.stay(f"no update: {alike}")
        seed_U, weight_U = merge_seeds(members, outcome.weight_K)
        if not len(seed_U):
            return outcome.stay("no update: the weights of the members cancel")
        ratio = {"lr": None, "ratio": config.step_ratio, "search": 1.0}[config.step]
        outcome.factor = yield Aim(seed_U, weight_U, outcome.rate, ratio)
        if config.step == "search":
            outcome.length = yield from self._search(outcome)
            if outcome.length == 0:
                return outcome.stay("no length along the update is better than the parent")
        step = line(outcome.length)
        scores = yield Score(step)
        outcome.after = float(scores.fitness_K(config.fitness)[0])
        if not np.isfinite(outcome.after):
            return outcome.stay("the score of the update is not finite")
        if config.accept == "if-better" and not is_better(outcome.before, outcome.after):
            return outcome.stay("the update is no better than the parent")
        if config.confirm:
            outcome.confirm = yield from confirm(step, config.fitness)
            if not is_better(*outcome.confirm):
                return outcome.stay(NOT_CONFIRMED)
        yield Take(step)
        return outcome

    def _members(self, run_seed: int, generation: int, sigma: float) -> Members:
        population = self.config.population
        if not self.config.mirrored:
            return noisy(member_seeds(run_seed, generation, population), 0.0, sigma)
        seed_K = np.repeat(member_seeds(run_seed, generation, population // 2), 2)
        gain_K = np.tile(np.array([sigma, -sigma], np.float32), population // 2)
        return Members(seed_K, np.zeros(population, np.float32), gain_K)

    def _search(self, outcome: Outcome) -> Generator[Request, Scores, float]:
        """The best of a few lengths on images that did not choose the direction, the shortest of equals;
        0, the parent, is one of them, and when it is best the search ends."""
        fitness_of: dict[float, float] = {}
        yield from self._try(SEARCH_LENGTHS, fitness_of)
        while best_length(fitness_of) == max(fitness_of) < LONGEST:
            yield from self._try((4 * max(fitness_of),), fitness_of)
        for factor in SEARCH_FACTORS:
            if best := best_length(fitness_of):
                yield from self._try((best / factor, best * factor), fitness_of)
        if vertex := peak(fitness_of):
            yield from self._try((vertex,), fitness_of)
        outcome.search = (sorted(fitness_of), [fitness_of[length] for length in sorted(fitness_of)])
        return best_length(fitness_of)

    def _try(self, lengths: tuple[float, ...], fitness_of: dict[float, float]) -> Generator[Request, Scores, None]:
        scores = yield Score(line(*lengths), images="search")
        fitness_of |= dict(zip(lengths, scores.fitness_K(self.config.fitness).tolist(), strict=True))


def best_length(fitness_of: dict[float, float]) -> float:
    """The length of the highest fitness, the shortest of equals; NaN is the lowest."""
    return max(sorted(fitness_of), key=lambda length: -np.inf if np.isnan(fitness_of[length]) else fitness_of[length])


def peak(fitness_of: dict[float, float]) -> float | None:
    """The vertex of the parabola through the best length and its neighbours, if it has one."""
    lengths = sorted(fitness_of)
    place = lengths.index(best_length(fitness_of))
    near = np.array(lengths[max(0, place - 1) : place + 2])
    fitness = np.array([fitness_of[length] for length in near])
    if len(near) < 3 or not np.isfinite(fitness).all() or fitness[1] <= fitness[[0, 2]].max():
        return None
    curvature, slope, _ = np.polyfit(near, fitness, 2)
    return float(-slope / (2 * curvature))
