"""Evolution strategies as the article uses them (Salimans et al., arXiv 1703.03864)."""

from __future__ import annotations

from collections.abc import Generator as Generate
from typing import Literal, get_args

import numpy as np
from numpy.typing import NDArray

from spartan_ray.engine.strategies.requests import (
    NOT_CONFIRMED,
    PARENT,
    CaseSet,
    Generation,
    Members,
    OptimizerKind,
    Outcome,
    Request,
    Score,
    Scores,
    SetDirection,
    SetScale,
    Take,
    confirm,
    decayed,
    is_better,
    joined,
    line,
    merge_seeds,
    noisy,
    refuse,
)
from spartan_ray.engine.strategies.shaping import SHAPING
from spartan_ray.noise.contract import member_seeds

# Lengths of a search in units of one mutation. The best was between 0.3 and 1 for 50 to 1,000 members and
# falls as the population grows: factors of 4 find its neighbourhood, the rounds after that the place.
SEARCH_LENGTHS = (0.0, 1 / 32, 1 / 8, 1 / 2, 2.0)
SEARCH_FACTORS = (2.0, 2**0.5)
# Where the longest is the best, as with a tiny sigma, the search goes on to such lengths.
LONGEST = 1e4


class EvolutionStrategies:
    """theta += lr / (K sigma) * sum_k shaped_k * noise_k, or that direction at another length.

    population    members of a generation, K
    sigma         scale of the noise; with `sigma_scale` relative it is multiplied by the RMS of each parameter tensor
    lr            learning rate of the estimated gradient, used with `step` lr
    shaping       fitness to weight: zscore, centered-rank
    mirrored      members 2j and 2j+1 share a seed, with gains +sigma and -sigma
    step          length of the update: lr; ratio, `step_ratio` mutations; search, the best of about ten lengths on
                  cases that did not choose the direction
    accept        always, or if-better
    confirm       take the update only if it is better on cases that did not choose it
    optimizer     makes the update of the estimated gradient: sgd, momentum, adam, with `weight_decay` (L2)
    sigma_decay, lr_decay    factors after each generation; generations are numbered in steps of `every`
    """

    def __init__(
        self,
        population: int = 50,
        *,
        sigma: float = 0.01,
        lr: float = 0.0005,
        shaping: Literal["zscore", "centered-rank"] = "zscore",
        mirrored: bool = False,
        sigma_scale: Literal["absolute", "relative"] = "absolute",
        step: Literal["lr", "ratio", "search"] = "lr",
        step_ratio: float = 0.5,
        accept: Literal["always", "if-better"] = "always",
        confirm: bool = False,
        optimizer: OptimizerKind = "sgd",
        weight_decay: float = 0.0,
        sigma_decay: float = 1.0,
        lr_decay: float = 1.0,
        every: int = 1,
    ) -> None:
        """Raises InputError for a setting that cannot be used, by its name."""
        refuse(population < 2, f"population ({population}) must be at least 2")
        refuse(mirrored and population % 2 == 1, f"population ({population}) must be even when mirrored")
        for name, number in (("sigma", sigma), ("lr", lr), ("step_ratio", step_ratio)):
            refuse(not 0 < number < np.inf, f"{name} ({number}) must be above 0 and finite")
        for name, number in (("sigma_decay", sigma_decay), ("lr_decay", lr_decay)):
            refuse(not 0 < number <= 1, f"{name} ({number}) must be above 0 and at most 1")
        refuse(not 0 <= weight_decay < np.inf, f"weight_decay ({weight_decay}) must be at least 0 and finite")
        for name, chosen, known in (
            ("shaping", shaping, tuple(SHAPING)),
            ("sigma_scale", sigma_scale, ("absolute", "relative")),
            ("step", step, ("lr", "ratio", "search")),
            ("accept", accept, ("always", "if-better")),
            ("optimizer", optimizer, get_args(OptimizerKind)),
        ):
            refuse(chosen not in known, f"{name} ({chosen!r}) must be one of {', '.join(known)}")
        self.population, self.sigma, self.lr = population, sigma, lr
        self.shaping, self.mirrored, self.relative = SHAPING[shaping], mirrored, sigma_scale == "relative"
        self.search, self.ratio = step == "search", {"lr": None, "ratio": step_ratio, "search": 1.0}[step]
        self.only_better, self.confirm = accept == "if-better", confirm
        self.optimizer, self.weight_decay = optimizer, weight_decay
        self.sigma_decay, self.lr_decay, self.every = sigma_decay, lr_decay, every
        self.case_sets: tuple[CaseSet, ...] = ("fitness",)
        if self.search:
            self.case_sets += ("search",)
        if confirm:
            self.case_sets += ("confirm",)

    def generation(self, seed: int, number: int) -> Generation:
        """One phase: score the members, and move the parent along the estimated gradient."""
        sigma = decayed(self.sigma, self.sigma_decay, number, self.every)
        members = self._members(seed, number, sigma)
        if self.relative:
            yield SetScale("rms")
        scores: Scores = yield Score(joined(PARENT, members))
        before, fitness_K = float(scores.fitness_K[0]), scores.fitness_K[1:]
        shaped_K = self.shaping(fitness_K)
        outcome = Outcome(
            members,
            fitness_K,
            scores.cases_K[1:],
            weight_K=shaped_K / (len(members) * sigma**2),
            before=before,
            after=before,
            rate=decayed(self.lr, self.lr_decay, number, self.every),
        )
        if not shaped_K.any():
            finite = np.isfinite(fitness_K).sum()
            alike = "all members have equal fitness" if finite > 1 else f"{finite} of {len(members)} members are finite"
            return outcome.stay(f"no update: {alike}")
        seed_U, weight_U = merge_seeds(members, outcome.weight_K)
        if not len(seed_U):
            return outcome.stay("no update: the weights of the members cancel")
        outcome.factor = yield self.direction(seed_U, weight_U, outcome.rate)
        if self.search:
            outcome.length = yield from self._search(outcome)
            if outcome.length == 0:
                return outcome.stay("no length along the update is better than the parent")
        step = line(outcome.length)
        scores = yield Score(step)
        outcome.after = float(scores.fitness_K[0])
        if not np.isfinite(outcome.after):
            return outcome.stay("the score of the update is not finite")
        if self.only_better and not is_better(outcome.before, outcome.after):
            return outcome.stay("the update is no better than the parent")
        if self.confirm:
            outcome.confirm = yield from confirm(step)
            if not is_better(*outcome.confirm):
                return outcome.stay(NOT_CONFIRMED)
        yield Take(step)
        return outcome

    def direction(self, seed_U: NDArray[np.uint64], weight_U: NDArray[np.float32], rate: float) -> SetDirection:
        """The request that makes the update of weighted seeds."""
        return SetDirection(seed_U, weight_U, rate, self.ratio, self.optimizer, self.weight_decay)

    def _members(self, seed: int, number: int, sigma: float) -> Members:
        if not self.mirrored:
            return noisy(member_seeds(seed, number, self.population), 0.0, sigma)
        seed_K = np.repeat(member_seeds(seed, number, self.population // 2), 2)
        gain_K = np.tile(np.array([sigma, -sigma], np.float32), self.population // 2)
        return Members(seed_K, np.zeros(self.population, np.float32), gain_K)

    def _search(self, outcome: Outcome) -> Generate[Request, Scores, float]:
        """The best of a few lengths on cases that did not choose the direction, the shortest of equals;
        0, the parent, is one of them, and when it is best the search ends."""
        fitness_of: dict[float, float] = {}
        yield from _try(SEARCH_LENGTHS, fitness_of)
        while best_length(fitness_of) == max(fitness_of) < LONGEST:
            yield from _try((4 * max(fitness_of),), fitness_of)
        for factor in SEARCH_FACTORS:
            if best := best_length(fitness_of):
                yield from _try((best / factor, best * factor), fitness_of)
        if vertex := peak(fitness_of):
            yield from _try((vertex,), fitness_of)
        outcome.search = (sorted(fitness_of), [fitness_of[length] for length in sorted(fitness_of)])
        return best_length(fitness_of)


def _try(lengths: tuple[float, ...], fitness_of: dict[float, float]) -> Generate[Request, Scores, None]:
    scores = yield Score(line(*lengths), cases="search")
    fitness_of |= dict(zip(lengths, scores.fitness_K.tolist(), strict=True))


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
