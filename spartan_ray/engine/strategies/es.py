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
    Compare,
    DrawCases,
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
    generations   how many a phase has, one after another, each with members and cases of its own
    sigma         scale of the noise; with `sigma_scale` relative it is multiplied by the RMS of each parameter tensor
    lr            learning rate of the estimated gradient, used with `step` lr
    shaping       fitness to weight: zscore, centered-rank
    mirrored      members 2j and 2j+1 share a seed, with gains +sigma and -sigma
    own_cases     cases that each mirrored pair draws of the fitness cases for itself, so that more pairs see more of
                  them; what is shaped is then a member's fitness less the mean of its pair
    step          length of the update: lr; ratio, `step_ratio` mutations; search, the best of about ten lengths on
                  cases that did not choose the direction. Generations after the first try two lengths around the last
    adapt_sigma   with search, multiply sigma after each generation by the root of twice the length in mutations, within
                  [0.8, 1.25]: members stay as far from the parent as its moves go
    accept        always, or if-better
    confirm       take the update only if it is better on cases that did not choose it
    diagnostics   take the gradient of the fitness' loss too, for the cosine between it and the update in the outcome
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
        own_cases: int | None = None,
        generations: int = 1,
        sigma_scale: Literal["absolute", "relative"] = "absolute",
        step: Literal["lr", "ratio", "search"] = "lr",
        step_ratio: float = 0.5,
        adapt_sigma: bool = False,
        accept: Literal["always", "if-better"] = "always",
        confirm: bool = False,
        diagnostics: bool = False,
        optimizer: OptimizerKind = "sgd",
        weight_decay: float = 0.0,
        sigma_decay: float = 1.0,
        lr_decay: float = 1.0,
        every: int = 1,
    ) -> None:
        """Raises InputError for a setting that cannot be used, by its name."""
        refuse(population < 2, f"population ({population}) must be at least 2")
        refuse(mirrored and population % 2 == 1, f"population ({population}) must be even when mirrored")
        refuse(generations < 1, f"generations ({generations}) must be at least 1")
        refuse(own_cases is not None and own_cases < 1, f"own_cases ({own_cases}) must be at least 1")
        refuse(
            own_cases is not None and not mirrored, f"own_cases ({own_cases}) compares the members of a mirrored pair"
        )
        refuse(adapt_sigma and step != "search", f"adapt_sigma has no effect with step {step!r}: it needs search")
        refuse(adapt_sigma and generations == 1, "adapt_sigma has no effect with one generation a phase (generations)")
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
        self.only_better, self.confirm, self.diagnostics = accept == "if-better", confirm, diagnostics
        self.optimizer, self.weight_decay = optimizer, weight_decay
        self.own_cases, self.generations, self.adapt_sigma = own_cases, generations, adapt_sigma
        self.sigma_decay, self.lr_decay, self.every = sigma_decay, lr_decay, every
        self.case_sets: tuple[CaseSet, ...] = ("fitness",)
        if self.search:
            self.case_sets += ("search",)
        if confirm:
            self.case_sets += ("confirm",)

    def generation(self, seed: int, number: int) -> Generation:
        """One phase: score the members and move the parent along the estimated gradient, once or several times."""
        sigma, length = decayed(self.sigma, self.sigma_decay, number, self.every), None
        outcomes: list[Outcome] = []
        for draw in range(self.generations):
            if draw:
                yield DrawCases(draw)
            outcome = yield from self._generation(seed, number, draw, sigma, length)
            outcomes.append(outcome)
            if self.search:
                # After a first direction that led nowhere nothing is known of the next one's length.
                length = outcome.length if outcome.accepted else length and length / 2
            if self.adapt_sigma and outcome.accepted and length:
                factor = adaptation(length)
                sigma, length = sigma * factor, length / factor
        if len(outcomes) == 1:
            return outcome
        yield DrawCases(0)
        scores: Scores = yield Score(PARENT)
        return in_one(outcomes, float(scores.fitness_K[0]))

    def _generation(self, seed: int, number: int, draw: int, sigma: float, length: float | None) -> Generation:
        """One generation; `length` is what the last one found."""
        members = self._members(seed, number, draw, sigma)
        if self.relative:
            yield SetScale("rms")
        before, scores = yield from self._score(members)
        fitness_K = scores.fitness_K
        centred_K = fitness_K if self.own_cases is None else less_pair_mean(fitness_K)
        shaped_K = self.shaping(centred_K)
        outcome = Outcome(
            members,
            fitness_K,
            scores.cases_K,
            weight_K=shaped_K / (len(members) * sigma**2),
            before=before,
            after=before,
            rate=decayed(self.lr, self.lr_decay, number, self.every),
            cases=int(scores.cases_K.max()) if self.own_cases else 0,
        )
        if not shaped_K.any():
            finite = np.isfinite(centred_K).sum()
            alike = "all members have equal fitness" if finite > 1 else f"{finite} of {len(members)} members are finite"
            return outcome.stay(f"no update: {alike}")
        seed_U, weight_U = merge_seeds(members, outcome.weight_K)
        if not len(seed_U):
            return outcome.stay("no update: the weights of the members cancel")
        outcome.estimate_K = outcome.weight_K
        outcome.factor = yield self.direction(seed_U, weight_U, outcome.rate)
        if self.diagnostics:
            outcome.cosine = yield Compare()
        if self.search:
            fitness_of = yield from search_lengths(length)
            outcome.search = (sorted(fitness_of), [fitness_of[tried] for tried in sorted(fitness_of)])
            outcome.length = best_length(fitness_of)
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

    def _score(self, members: Members) -> Generate[Request, Scores, tuple[float, Scores]]:
        """The fitness of the parent, and the members' scores."""
        if self.own_cases is None:
            scores = yield Score(joined(PARENT, members))
            return float(scores.fitness_K[0]), scores[1:]
        parent = yield Score(PARENT)
        return float(parent.fitness_K[0]), (yield Score(members, own=self.own_cases))

    def direction(self, seed_U: NDArray[np.uint64], weight_U: NDArray[np.float32], rate: float) -> SetDirection:
        """The request that makes the update of weighted seeds."""
        return SetDirection(seed_U, weight_U, rate, self.ratio, self.optimizer, self.weight_decay)

    def _members(self, seed: int, number: int, draw: int, sigma: float) -> Members:
        seeds = self.population // 2 if self.mirrored else self.population
        seed_U = member_seeds(seed, number, (draw + 1) * seeds)[draw * seeds :]
        if not self.mirrored:
            return noisy(seed_U, 0.0, sigma)
        seed_K = np.repeat(seed_U, 2)
        gain_K = np.tile(np.array([sigma, -sigma], np.float32), self.population // 2)
        return Members(seed_K, np.zeros(self.population, np.float32), gain_K)


def less_pair_mean(fitness_K: NDArray[np.float64]) -> NDArray[np.float64]:
    """The fitness of members 2j and 2j+1 less the mean of both: what is left of scores on cases of their own. NaN for
    both where one is not finite."""
    pair_P2 = fitness_K.reshape(-1, 2)
    centred_K: NDArray[np.float64] = (pair_P2 - pair_P2.mean(1, keepdims=True)).reshape(-1)
    return centred_K


def adaptation(length: float) -> float:
    """The factor of sigma after a move of so many mutations. The best length of an update stays near half a mutation
    while sigma suits the distance to go: a longer one asks for a larger sigma, and a shorter one for a smaller."""
    return float(np.clip(np.sqrt(2 * length), 0.8, 1.25))


def in_one(outcomes: list[Outcome], after: float) -> Outcome:
    """The account of a phase of several generations: the members of all in order, and the parent's fitness after the
    last on the cases of the first."""
    columns = zip(*((one.fitness_K, one.cases_K, one.weight_K) for one in outcomes), strict=True)
    fitness_K, cases_K, weight_K = (np.concatenate(column) for column in columns)
    moved = [one for one in outcomes if one.accepted]
    last = moved[-1] if moved else outcomes[-1]
    reasons = [one.note for one in outcomes if one.note]
    note = f"{len(moved)} of {len(outcomes)} generations moved; {reasons[-1]}" if reasons else None
    members = joined(*(one.members for one in outcomes))
    whole = Outcome(members, fitness_K, cases_K, weight_K, outcomes[0].before, after, last.rate, note=note)
    whole.factor, whole.length, whole.cases, whole.cosine = last.factor, last.length, last.cases, last.cosine
    made = [np.zeros(len(one.members)) if one.estimate_K is None else one.estimate_K for one in outcomes]
    whole.estimate_K = np.concatenate(made)
    whole.confirm, whole.search, whole.generations = last.confirm, last.search, outcomes
    return whole


def search_lengths(last: float | None = None) -> Generate[Request, Scores, dict[float, float]]:
    """Fitness of a few lengths of the update on cases that did not choose the direction. 0, the parent, is one of
    them, and when it is best the search ends. After a generation that found one (`last`) it is that length, a step
    shorter or longer, or 0."""
    fitness_of: dict[float, float] = {}
    if last:
        yield from _try((0.0, last / SEARCH_FACTORS[1], last * SEARCH_FACTORS[1]), fitness_of)
        return fitness_of
    yield from _try(SEARCH_LENGTHS, fitness_of)
    while best_length(fitness_of) == max(fitness_of) < LONGEST:
        yield from _try((4 * max(fitness_of),), fitness_of)
    for factor in SEARCH_FACTORS:
        if best := best_length(fitness_of):
            yield from _try((best / factor, best * factor), fitness_of)
    if vertex := peak(fitness_of):
        yield from _try((vertex,), fitness_of)
    return fitness_of


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
