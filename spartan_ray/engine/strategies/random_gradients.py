"""Random gradients, the article's first experiment: descendants differ by random multiples of the gradient.

    descendant = parent - lr * temperature * gradient * u,   u uniform in [low, high) per element

A descendant is kept if it is better than the parent.
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
    """Random gradients: members are random multiples of a gradient step.

    The best member becomes the parent if it is better, or each better member does so in turn (a chain). Each member
    is::

        parent - lr * temperature * gradient * u

    with u drawn uniformly from [low, high) for each element. It is the first experiment of the article that this
    project follows. The gradient comes from the population's `gradient` function or from the `loss` of the fitness. The
    noise of the population must be "uniform" for u to be uniform.

    Attributes:
        population: Number of members per generation, K.
        case_sets: The sets of cases that the settings need: "fitness", and "confirm" if in use.
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
        """Check and store the settings.

        Args:
            population: Number of members per generation, K, at least 2.
            lr: Learning rate of the step.
            low: Lower bound of the random factor u.
            high: Upper bound of the random factor u.
            temperature: A function from the parent's mean statistics on the fitness cases, shape (M,), to a factor of
                the step. None: 1.
            accept: "best": all members descend from one parent, and the best replaces it if it is better than the
                parent. "chain": members are tried one after another, and each better one becomes the parent at once.
            wave: Number of members of a chain that are scored at once. Does not change which members are kept.
            confirm: Take a member only if it is also better on the cases of the set "confirm", which did not choose it.
            racing: Number n of successive halvings with `accept` "best", 0 to 8. All members are scored on 1/2**n of
                the cases, the better half on twice as many, and so on. 0: score all members on all cases.
            early_rejection: Stop scoring a member that can no longer win. Does not change the next parent. Needs
                `Fitness.best`; not used in a race.
            lr_decay: Multiply `lr` by this factor after each evolve phase.
            every: Difference between the numbers of two successive phases; the decay counts phases with it.

        Raises:
            InputError: A setting cannot be used. The message names it.
        """
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
        """Run one evolve phase: score the members and take the best, or each better one.

        Args:
            seed: Seed of the population.
            number: Number of the phase.

        Returns:
            A generator of requests that returns the `Outcome`. `Population.step` runs it.
        """
        seed_K = member_seeds(seed, number, self.population)
        yield SetScale("gradient")
        parent = yield from self._race(PARENT)
        return (yield from (self._chain if self.chain else self._best)(seed_K, number, parent))

    def _members(self, seed_K: NDArray[np.uint64], number: int, parent: Scores) -> Members:
        """Return the members of a parent with these scores: u = middle + half * noise."""
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
        # A member that dropped out of a race was scored on fewer cases than the parent, and cannot win.
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
        """Score the members, in a race if `racing` is above 0.

        In a race, all members are scored on the first part of the cases, the better half also on the next part, and so
        on. A member that drops out keeps its means over the parts that it saw. A race uses no threshold."""
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
        """Run a chain in waves. The members of a wave descend from one parent.

        Members after the first better one are discarded and built again from that new parent. The members that are kept
        are the same for any length of the waves."""
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
        if checks:  # for the whole chain, or for the last candidate if none was taken
            taken = [after for before, after in checks if is_better(before, after)]
            outcome.confirm = (checks[0][0], (taken or checks[-1])[-1])
        if not accepted:
            return outcome.stay(NOT_CONFIRMED if checks else NONE_BETTER)
        outcome.chosen = accepted[-1]
        return outcome
