"""Random gradients, the article's first experiment: the parent's gradient, each element times a number of
its own, as the step to a descendant that is kept when it is better.

    descendant = parent - lr * temperature * gradient * u,   u uniform in [low, high) per element

The temperature shrinks the step as the parent's metric on the fitness images improves:

    none    1
    error   1 - accuracy
    loss    cross-entropy / ln(classes), which is the loss of a uniform guess
"""

from __future__ import annotations

import math
from collections.abc import Generator

import numpy as np
from numpy.typing import NDArray

from spartan_ray.config import Evolution, Temperature
from spartan_ray.noise import member_seeds
from spartan_ray.strategies.base import (
    NOT_CONFIRMED,
    PARENT,
    Gradient,
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
    noisy,
    parts,
    pooled,
)

NONE_BETTER = "no member is better than the parent"


def temperature(kind: Temperature, loss: float, accuracy: float, classes: int) -> float:
    """The factor of the step for a parent of that loss and accuracy."""
    return {"none": 1.0, "error": 1 - accuracy, "loss": loss / math.log(classes)}[kind]


class RandomGradients:
    """`accept` best: all members descend from one parent, and the best replaces it if it is better.
    `accept` chain: one member after another, a better one becomes the parent at once."""

    def __init__(self, config: Evolution, classes: int) -> None:
        self.config = config
        self.classes = classes

    def phase(self, run_seed: int, generation: int) -> Phase:
        seed_K = member_seeds(run_seed, generation, self.config.population)
        yield Gradient()
        parent = yield from self._race(PARENT)
        return (yield from (self._best if self.config.accept == "best" else self._chain)(seed_K, generation, parent))

    def _members(self, seed_K: NDArray[np.uint64], generation: int, parent: Scores) -> Members:
        """The members that descend from a parent of these scores: u = middle + half * noise."""
        config = self.config
        assert config.lr, "resolved before"
        step = decayed(config.lr, config.lr_decay, generation, config.every)
        step *= temperature(config.temperature, parent.loss_K[0], parent.accuracy_K[0], self.classes)
        middle, half = (config.high + config.low) / 2, (config.high - config.low) / 2
        return noisy(seed_K, -step * middle, -step * half)

    def _best(self, seed_K: NDArray[np.uint64], generation: int, parent: Scores) -> Phase:
        config = self.config
        before = float(parent.fitness_K(config.fitness)[0])
        members = self._members(seed_K, generation, parent)
        scores = yield from self._race(members, before)
        fitness_K = scores.fitness_K(config.fitness)
        outcome = Outcome(members, fitness_K, scores.images_K, np.zeros(len(members)), before, before)
        lost_K = scores.images_K < (scores.images_K.max() if config.racing else 0)
        best = int(np.argmax(np.where(np.isnan(fitness_K) | lost_K, -np.inf, fitness_K)))
        if not is_better(before, fitness_K[best]):
            return outcome.stay(NONE_BETTER)
        winner = members[best : best + 1]
        if config.confirm:
            outcome.confirm = yield from confirm(winner, config.fitness)
            if not is_better(*outcome.confirm):
                return outcome.stay(NOT_CONFIRMED)
        yield Take(winner)
        outcome.weight_K[best], outcome.chosen, outcome.after = 1, best, float(fitness_K[best])
        return outcome

    def _race(self, members: Members, bar: float = -math.inf) -> Generator[Request, Scores, Scores]:
        """The members' scores. With `racing` all are scored on the first part of the images, the better half on the
        next part too, and so on; one that is left has its means over the parts that it saw, and there is no bar."""
        rounds = parts(self.config.racing)
        if len(rounds) == 1:
            return (yield Score(members, bar=bar))
        scores = yield Score(members, part=rounds[0])
        racing_R = np.arange(len(members))
        for part in rounds[1:]:
            fitness_R = scores[racing_R].fitness_K(self.config.fitness)
            best_first_R = np.argsort(np.where(np.isnan(fitness_R), np.inf, -fitness_R), kind="stable")
            racing_R = np.sort(racing_R[best_first_R[: -(-len(racing_R) // 2)]])
            both = pooled(scores[racing_R], (yield Score(members[racing_R], part=part)))
            for column_K, column_R in zip(vars(scores).values(), vars(both).values(), strict=True):
                column_K[racing_R] = column_R
        return scores

    def _chain(self, seed_K: NDArray[np.uint64], generation: int, parent: Scores) -> Phase:
        """In waves: the members of a wave descend from one parent; those after the first better one are
        discarded and drawn again from it. What is kept is the same for waves of every length."""
        config = self.config
        assert isinstance(config.wave, int), "resolved before"
        before = current = float(parent.fitness_K(config.fitness)[0])
        kept: list[tuple[Members, Scores]] = []
        accepted: list[int] = []
        checks: list[tuple[float, float]] = []
        on_confirm = None  # the parent's fitness on the confirm images
        discarded = start = 0
        while start < config.population:
            wave = self._members(seed_K[start : start + config.wave], generation, parent)
            scores: Scores = yield Score(wave, bar=current)
            fitness_W, end = scores.fitness_K(config.fitness), len(wave)
            for place in np.flatnonzero(fitness_W > current).tolist():
                better = wave[place : place + 1]
                if config.confirm:
                    on_confirm, after = yield from confirm(better, config.fitness, on_confirm)
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
            discarded += int(scores.images_K[end:].sum())
            start += end
        scores = joined(*(scores for _, scores in kept))
        weight_K = np.zeros(config.population)
        weight_K[accepted] = 1
        outcome = Outcome(
            joined(*(members for members, _ in kept)),
            scores.fitness_K(config.fitness),
            scores.images_K,
            weight_K,
            before,
            current,
            discarded_images=discarded,
        )
        if checks:  # of the whole chain, or of the last candidate where none was taken
            taken = [after for before, after in checks if is_better(before, after)]
            outcome.confirm = (checks[0][0], (taken or checks[-1])[-1])
        if not accepted:
            return outcome.stay(NOT_CONFIRMED if checks else NONE_BETTER)
        outcome.chosen = accepted[-1]
        return outcome
