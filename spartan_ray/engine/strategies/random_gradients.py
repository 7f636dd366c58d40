"""Random gradients, the article's first experiment: the parent's gradient, each element times a number of
its own, as the step to a descendant that is kept when it is better.

    descendant = parent - lr * temperature * gradient * u,   u uniform in [low, high) per element
"""

from __future__ import annotations

from collections.abc import Callable
from collections.abc import Generator as Generate
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from spartan_ray.engine.strategies.requests import (
    NOT_CONFIRMED,
    PARENT,
    CaseSet,
    Generation,
    Members,
    Outcome,
    Request,
    Score,
    Scores,
    SetScale,
    Take,
    confirm,
    decayed,
    is_better,
    joined,
    noisy,
    parts,
    refuse,
)
from spartan_ray.noise.contract import member_seeds

NONE_BETTER = "no member is better than the parent"


class RandomGradients:
    """The best of K random multiples of a gradient step, or a chain of them. The fitness needs a `loss`.

    population       members of a generation, K
    lr               length of the step, lr * temperature * gradient * u
    low, high        u is uniform from `low` to `high`
    temperature      factor of the step: a function of the parent's mean statistics (M) on the fitness cases
    accept           best: all members descend from one parent, and the best replaces it if it is better;
                     chain: one member after another, a better one becomes the parent at once
    wave             members of a chain that are scored at once; the result is the same for each
    confirm          take a member only if it is better on cases that did not choose it
    racing           n rounds of successive halving, with `accept` best: all members on 1/2^n of the cases, the better
                     half on twice as many, and so on
    early_rejection  stop scoring a member that cannot win any more; changes no result
    lr_decay         factor after each generation; generations are numbered in steps of `every`
    """

    def __init__(
        self,
        population: int = 50,
        *,
        lr: float = 0.01,
        low: float = 0.0,
        high: float = 1.0,
        temperature: Callable[[NDArray[np.float64]], float] | None = None,
        accept: Literal["best", "chain"] = "best",
        wave: int = 1,
        confirm: bool = False,
        racing: int = 0,
        early_rejection: bool = True,
        lr_decay: float = 1.0,
        every: int = 1,
    ) -> None:
        """Raises InputError for a setting that cannot be used, by its name."""
        refuse(population < 2, f"population ({population}) must be at least 2")
        refuse(not 0 < lr < np.inf, f"lr ({lr}) must be above 0 and finite")
        refuse(not -np.inf < low < high < np.inf, f"low ({low}) must be below high ({high}), both finite")
        refuse(accept not in ("best", "chain"), f"accept ({accept!r}) must be one of best, chain")
        refuse(wave < 1, f"wave ({wave}) must be at least 1")
        refuse(not 0 <= racing <= 8, f"racing ({racing}) must be from 0 to 8")
        refuse(bool(racing) and accept == "chain", f"racing ({racing}) has no effect with accept chain")
        refuse(not 0 < lr_decay <= 1, f"lr_decay ({lr_decay}) must be above 0 and at most 1")
        self.population, self.lr, self.low, self.high = population, lr, low, high
        self.temperature = temperature
        self.chain, self.wave, self.confirm, self.racing = accept == "chain", wave, confirm, racing
        self.early_rejection, self.lr_decay, self.every = early_rejection, lr_decay, every
        self.case_sets: tuple[CaseSet, ...] = ("fitness", "confirm") if confirm else ("fitness",)

    def generation(self, seed: int, number: int) -> Generation:
        """One phase: score the members of the gradient, and take the best or each better one."""
        seed_K = member_seeds(seed, number, self.population)
        yield SetScale("gradient")
        parent = yield from self._race(PARENT)
        return (yield from (self._chain if self.chain else self._best)(seed_K, number, parent))

    def _members(self, seed_K: NDArray[np.uint64], number: int, parent: Scores) -> Members:
        """The members that descend from a parent of these scores: u = middle + half * noise."""
        step = decayed(self.lr, self.lr_decay, number, self.every)
        step *= self.temperature(parent.mean_KM[0]) if self.temperature else 1.0
        middle, half = (self.high + self.low) / 2, (self.high - self.low) / 2
        return noisy(seed_K, -step * middle, -step * half)

    def _threshold(self, fitness: float) -> float:
        return fitness if self.early_rejection else -np.inf

    def _best(self, seed_K: NDArray[np.uint64], number: int, parent: Scores) -> Generation:
        before = float(parent.fitness_K[0])
        members = self._members(seed_K, number, parent)
        scores = yield from self._race(members, self._threshold(before))
        fitness_K = scores.fitness_K
        outcome = Outcome(members, fitness_K, scores.cases_K, np.zeros(len(members)), before, before)
        # Who was left behind in a race was scored on less than the parent.
        lost_K = scores.cases_K < (parent.cases_K[0] if self.racing else 0)
        best = int(np.argmax(np.where(np.isnan(fitness_K) | lost_K, -np.inf, fitness_K)))
        if not is_better(before, fitness_K[best]):
            return outcome.stay(NONE_BETTER)
        winner = members[best : best + 1]
        if self.confirm:
            outcome.confirm = yield from confirm(winner)
            if not is_better(*outcome.confirm):
                return outcome.stay(NOT_CONFIRMED)
        yield Take(winner)
        outcome.weight_K[best], outcome.chosen, outcome.after = 1, best, float(fitness_K[best])
        return outcome

    def _race(self, members: Members, threshold: float = -np.inf) -> Generate[Request, Scores, Scores]:
        """The members' scores. With `racing` all are scored on the first part of the cases, the better half on the
        next part too, and so on; one that is left has its means over the parts that it saw, and there is no
        threshold."""
        rounds = parts(self.racing)
        if len(rounds) == 1:
            return (yield Score(members, threshold=threshold))
        scores = yield Score(members, part=rounds[0])
        racing_R = np.arange(len(members))
        for part in rounds[1:]:
            fitness_R = scores.fitness_K[racing_R]
            best_first_R = np.argsort(np.where(np.isnan(fitness_R), np.inf, -fitness_R), kind="stable")
            racing_R = np.sort(racing_R[best_first_R[: -(-len(racing_R) // 2)]])
            both = yield Score(members[racing_R], part=part, onto=scores[racing_R])
            for column_K, column_R in zip(vars(scores).values(), vars(both).values(), strict=True):
                column_K[racing_R] = column_R
        return scores

    def _chain(self, seed_K: NDArray[np.uint64], number: int, parent: Scores) -> Generation:
        """In waves: the members of a wave descend from one parent; those after the first better one are
        discarded and drawn again from it. What is kept is the same for waves of every length."""
        before = current = float(parent.fitness_K[0])
        kept: list[tuple[Members, Scores]] = []
        accepted: list[int] = []
        checks: list[tuple[float, float]] = []
        on_confirm = None  # the parent's fitness on the confirm cases
        discarded = start = 0
        while start < self.population:
            wave = self._members(seed_K[start : start + self.wave], number, parent)
            scores: Scores = yield Score(wave, threshold=self._threshold(current))
            fitness_W, end = scores.fitness_K, len(wave)
            for place in np.flatnonzero(fitness_W > current).tolist():
                better = wave[place : place + 1]
                if self.confirm:
                    on_confirm, after = yield from confirm(better, on_confirm)
                    checks.append((on_confirm, after))
                    if not is_better(on_confirm, after):
                        continue
                    on_confirm = after
                yield Take(better)
                accepted.append(start + place)
                current, end = float(fitness_W[place]), place + 1
                parent = scores[place : place + 1]
                break
            kept.append((wave[:end], scores[:end]))
            discarded += int(scores.cases_K[end:].sum())
            start += end
        scores = joined(*(scores for _, scores in kept))
        weight_K = np.zeros(self.population)
        weight_K[accepted] = 1
        outcome = Outcome(
            joined(*(members for members, _ in kept)),
            scores.fitness_K,
            scores.cases_K,
            weight_K,
            before,
            current,
            discarded_cases=discarded,
        )
        if checks:  # of the whole chain, or of the last candidate where none was taken
            taken = [after for before, after in checks if is_better(before, after)]
            outcome.confirm = (checks[0][0], (taken or checks[-1])[-1])
        if not accepted:
            return outcome.stay(NOT_CONFIRMED if checks else NONE_BETTER)
        outcome.chosen = accepted[-1]
        return outcome
