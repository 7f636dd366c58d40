"""Evolution strategies, as in the article (Salimans et al., arXiv 1703.03864)."""

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

# Lengths that a search tries first, in lengths of one perturbation. The best was between 0.3 and 1 for 50 to 1,000
# members and falls as the population grows. Steps of a factor of 4 find its neighbourhood; later rounds refine it.
SEARCH_LENGTHS = (0.0, 1 / 32, 1 / 8, 1 / 2, 2.0)
SEARCH_FACTORS = (2.0, 2**0.5)
# While the longest length is the best, as with a tiny sigma, the search continues up to about this length.
LONGEST = 1e4


class EvolutionStrategies:
    """Evolution strategies: the parent moves along a gradient that is estimated from the fitness of its members.

    The default update is::

        theta += lr / (K * sigma) * sum_k(shaped_k * noise_k)

    It is described in Salimans et al., "Evolution Strategies as a Scalable Alternative to Reinforcement Learning",
    arXiv 1703.03864. The article that this project follows uses it with z-score shaping.

    Attributes:
        population: Number of members per generation, K.
        case_sets: The sets of cases that the settings need: "fitness", and "search" and "confirm" if in use.
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
        """Check and store the settings.

        Args:
            population: Number of members per generation, K, at least 2, and even if `mirrored`.
            sigma: Scale of the noise. The perturbation of a member is sigma * noise.
            lr: Learning rate of the update. No effect if `step` is "ratio" or "search".
            shaping: How fitness becomes a weight: "zscore" (subtract the mean, divide by the standard deviation) or
                "centered-rank" (rank, scaled to [-0.5, 0.5]).
            mirrored: Use mirrored pairs: members 2j and 2j+1 share a seed, and their perturbations are +sigma * noise
                and -sigma * noise.
            own_cases: Number of cases that each mirrored pair draws for itself from the fitness cases, so that more
                pairs see more cases. The difference between a member's fitness and the mean of its pair is then shaped.
                None: all members are scored on all fitness cases.
            generations: Number of generations per phase, one after another, each with its own members and cases.
            sigma_scale: "absolute" uses sigma as it is. "relative" multiplies it by the RMS of each parameter tensor.
            step: Length of the update. "lr": as given by `lr`. "ratio": `step_ratio` times the length of one
                perturbation. "search": the best of about ten lengths on the cases of the set "search", which did not
                choose the direction; later generations of the phase try only two lengths around the last one found.
            step_ratio: Length of the update divided by the length of one perturbation, for `step` "ratio".
            adapt_sigma: With `step` "search" and several generations: after each generation that moved the parent,
                multiply sigma by sqrt(2 * length), limited to [0.8, 1.25]. `length` is the length found, in lengths of
                one perturbation.
            accept: "always" takes every update with a finite fitness. "if-better" takes it only if the fitness rises.
            confirm: Take an update only if it is also better on the cases of the set "confirm", which did not choose
                it.
            diagnostics: Also compute the cosine between the update and the direction in which the loss of the fitness
                falls. The fitness must have a `loss`.
            optimizer: Optimizer that turns the estimated gradient into the update: "sgd", "momentum" (0.9), or "adam"
                (beta1 0.9, beta2 0.999).
            weight_decay: L2 weight decay of the parent, added to the estimated gradient.
            sigma_decay: Multiply sigma by this factor after each evolve phase.
            lr_decay: Multiply `lr` by this factor after each evolve phase.
            every: Difference between the numbers of two successive phases; the decay counts phases with it.

        Raises:
            InputError: A setting cannot be used. The message names it.
        """
        refuse(population < 2, f"population ({population}) must be at least 2")
        refuse(mirrored and population % 2 == 1, f"population ({population}) must be even when mirrored")
        refuse(generations < 1, f"generations ({generations}) must be at least 1")
        refuse(own_cases is not None and own_cases < 1, f"own_cases ({own_cases}) must be at least 1")
        refuse(own_cases is not None and not mirrored, f"own_cases ({own_cases}) needs mirrored pairs: set mirrored")
        refuse(adapt_sigma and step != "search", f"adapt_sigma has no effect with step {step!r}: it needs search")
        refuse(adapt_sigma and generations == 1, "adapt_sigma has no effect unless generations is above 1")
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
        """Run one evolve phase: score members and move the parent along the estimated gradient.

        Args:
            seed: Seed of the population.
            number: Number of the phase.

        Returns:
            A generator of requests that returns the `Outcome`. `Population.step` runs it.
        """
        sigma, length = decayed(self.sigma, self.sigma_decay, number, self.every), None
        outcomes: list[Outcome] = []
        for draw in range(self.generations):
            if draw:
                yield DrawCases(draw)
            outcome = yield from self._generation(seed, number, draw, sigma, length)
            outcomes.append(outcome)
            if self.search:
                # If no generation has moved the parent yet, no length is known, and the next search is a full one.
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
        """Run one generation. `length` is the last length found in this phase, if any."""
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
        """Score the parent and the members; return the parent's fitness and the members' scores."""
        if self.own_cases is None:
            scores = yield Score(joined(PARENT, members))
            return float(scores.fitness_K[0]), scores[1:]
        parent = yield Score(PARENT)
        return float(parent.fitness_K[0]), (yield Score(members, own=self.own_cases))

    def direction(self, seed_U: NDArray[np.uint64], weight_U: NDArray[np.float32], rate: float) -> SetDirection:
        """Return the request that turns weighted seeds into an update."""
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
    """Subtract from the fitness of members 2j and 2j+1 the mean of both, because pairs are scored on different cases.

    Both become NaN if one is not finite."""
    pair_P2 = fitness_K.reshape(-1, 2)
    centred_K: NDArray[np.float64] = (pair_P2 - pair_P2.mean(1, keepdims=True)).reshape(-1)
    return centred_K


def adaptation(length: float) -> float:
    """Return the factor of sigma after an update of this length, in lengths of one perturbation.

    While sigma suits the distance to go, the best length stays near half a perturbation. A longer update asks for a
    larger sigma, a shorter one for a smaller sigma."""
    return float(np.clip(np.sqrt(2 * length), 0.8, 1.25))


def in_one(outcomes: list[Outcome], after: float) -> Outcome:
    """Combine the outcomes of several generations into the outcome of their phase.

    It has the members of all generations in order. `after` is the parent's fitness after the last generation, on the
    cases of the first."""
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
    """Score a few lengths of the update on the search cases, which did not choose the direction.

    Length 0, the parent, is always among them; the search ends if it is the best. If an earlier generation found a
    length (`last`), only 0 and two lengths around it are tried. Return the fitness of each length."""
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
    """Return the length with the highest fitness, the shortest on a tie. NaN is the lowest fitness."""
    return max(sorted(fitness_of), key=lambda length: -np.inf if np.isnan(fitness_of[length]) else fitness_of[length])


def peak(fitness_of: dict[float, float]) -> float | None:
    """Return the vertex of the parabola through the best length and its two neighbours.

    None if a neighbour is missing, not finite, or as good as the best."""
    lengths = sorted(fitness_of)
    place = lengths.index(best_length(fitness_of))
    near = np.array(lengths[max(0, place - 1) : place + 2])
    fitness = np.array([fitness_of[length] for length in near])
    if len(near) < 3 or not np.isfinite(fitness).all() or fitness[1] <= fitness[[0, 2]].max():
        return None
    curvature, slope, _ = np.polyfit(near, fitness, 2)
    return float(-slope / (2 * curvature))
