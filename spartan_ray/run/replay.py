"""Rebuilds the descendants and the next parents of a run from its journal and checkpoints."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from spartan_ray.engine.executor import LocalExecutor
from spartan_ray.engine.process import threads
from spartan_ray.engine.strategies.es import EvolutionStrategies
from spartan_ray.engine.strategies.requests import (
    DrawCases,
    Members,
    Score,
    Scores,
    SetScale,
    Take,
    line,
    merge_seeds,
    parts,
)
from spartan_ray.errors import InputError
from spartan_ray.naming import is_named
from spartan_ray.run.checkpoint import (
    be_after_epoch,
    load_evolution,
    save_weights,
)
from spartan_ray.run.journal import Journal
from spartan_ray.run.recorded import CPU, Recorded
from spartan_ray.run.setup import epochs_behind, make_average, make_population, make_strategy
from spartan_ray.vision.averaging import Average
from spartan_ray.vision.classification import Normaliser


class Replay(Recorded):
    """Replays the evolve phases of a run folder, in this process and on a device of the type that the run used.

    `note` takes one-line messages. Raises InputError if the folder does not belong to a run with evolve phases."""

    def __init__(self, run: Path, note: Callable[[str], None], device: torch.device = CPU) -> None:
        super().__init__(run, note, device)
        self.average: Average | None = None
        self.normalise = Normaliser(self.splits.mean_C, self.splits.std_C, device)
        self.population = make_population(self.config, self.splits, self.model, note)
        assert self.population.here
        self.executor: LocalExecutor = self.population.here
        strategy = make_strategy(self.config.evolution, len(self.splits.classes))
        assert strategy, "or there were no generations"
        self.strategy = strategy

    def descendant(self, generation: int, member: int, file: Path) -> tuple[float, float]:
        """Write the weights of a member to a file. Return its recorded fitness and the one it gets now."""
        journal = self._begin(generation)
        self.refuse_member(member, generation, journal)
        evolution = self.config.evolution
        fitness_K = journal["fitness"]
        population = len(fitness_K) // len(journal["rate"])
        if is_named(evolution.strategy):
            scored = self._score_again(journal, generation, member)
            return self._write(journal, member, file, scored)
        threshold = float(journal["before"])
        if evolution.accept == "chain":
            for earlier in np.flatnonzero(journal["weight"][:member]):
                self._take(journal, int(earlier))
                threshold = float(fitness_K[earlier])
        if evolution.strategy == "es" or evolution.racing or not evolution.early_rejection:
            threshold = -math.inf
        if evolution.strategy == "es":
            for draw in range(member // population):
                self._update(journal, draw)
            self._set_out(member // population)
        own = evolution.fitness_images if evolution.cases == "own" else None
        members = _members(journal)[member : member + 1]
        with threads(self.config.parent.threads):
            self.population.broadcast()
        cases = len(self.population.case_sets["fitness"])
        scores: Scores | None = None
        for part in parts(evolution.racing):
            if part[0] * cases < max(1, journal["images"][member]):
                answer = self.population.answer(Score(members, threshold=threshold, part=part, onto=scores, own=own))
                assert isinstance(answer, Scores)
                scores = answer
        assert scores, "there is a first part"
        return self._write(journal, member, file, float(scores.fitness_K[0]))

    def _write(self, journal: Journal, member: int, file: Path, scored: float) -> tuple[float, float]:
        """Write a member's weights, including those that never reach the output. Return its recorded fitness and
        `scored`."""
        evaluator = self.executor.evaluator
        evaluator.descend(int(journal["seed"][member]), journal["offset"][member], journal["gain"][member])
        save_weights(file, evaluator.model.state_dict(), self.description)
        return float(journal["fitness"][member]), scored

    def _score_again(self, journal: Journal, generation: int, member: int) -> float:
        """Repeat a phase of the user's own strategy up to the request that scores a member. Return its fitness. Raises
        InputError if the strategy no longer scores it."""
        wanted = [journal[name][member] for name in ("seed", "offset", "gain")]
        phase, answer = self.strategy.generation(self.config.run.seed, generation), None
        with threads(self.config.parent.threads):
            while True:
                try:
                    request = phase.send(answer)
                except StopIteration:
                    raise InputError(f"{self.config.evolution.strategy} no longer scores member {member}") from None
                answer = self.population.answer(request)
                if isinstance(request, Score) and isinstance(answer, Scores):
                    members = request.members
                    for k, one in enumerate(zip(members.seed_K, members.offset_K, members.gain_K, strict=True)):
                        if list(one) == wanted:
                            return float(answer.fitness_K[k])

    def verify(self, generation: int) -> bool:
        """Rebuild the next parent of a phase from its journal. Return whether its bits match the recorded ones. A
        strategy of the user's own has to run its phase again instead."""
        journal = self._begin(generation)
        moved = np.flatnonzero(journal["weight"])
        if is_named(self.config.evolution.strategy):
            with threads(self.config.parent.threads):
                self.population.step(self.strategy, generation)
        elif self.config.evolution.strategy == "es":
            for draw in range(len(journal["rate"])):
                self._update(journal, draw)
        else:
            for member in moved:
                self._take(journal, int(member))
        agrees = self.model.digest() == str(journal["next_parent"])
        moves = f"{len(moved)} of {len(journal['member'])} members have weight"
        self.note(f"generation {generation}: {moves}; {'agrees' if agrees else 'DIFFERS from the recorded parent'}")
        return agrees

    def _begin(self, generation: int) -> Journal:
        """Load the parent, or its average, and the optimizer as they were before a phase. Return the journal. Raises
        InputError if they do not fit together."""
        path, journal, checkpoint = self.read(generation)
        checkpoints = self.run / "checkpoints"
        if self.config.evolution.of == "average":
            self.average = make_average(self.config, self.model, self.splits.to(self.device), self.normalise)
        if self.population.subspace:
            self.population.subspace.trajectory.clear()
        with threads(self.config.parent.threads):
            be_after_epoch(self.model.module, checkpoint, checkpoints, epochs_behind(self.config)[1], self._remember)
            if self.average:
                if self.average.kind == "ema":
                    self.average.theta_D.copy_(checkpoint.tensors["average"]["theta"])
                self.average.become()
        if self.model.digest() != str(journal["parent"]):
            raise InputError(f"{path}: the journal of another parent than the checkpoint's")
        evolution = self.config.evolution
        load_evolution(self.population, checkpoint)
        self.population.begin(self.strategy.case_sets, generation)
        if evolution.strategy == "random-gradients":
            self.population.answer(SetScale("gradient"))
        return journal

    def _remember(self, epoch: int) -> None:
        if self.population.subspace and self.population.subspace.kind == "trajectory":
            self.population.remember()
        if self.average and epoch:
            self.average.after_epoch()

    def _set_out(self, draw: int) -> None:
        """Draw the cases and set the scale, as at the start of a generation of an es phase."""
        if draw:
            self.population.answer(DrawCases(draw))
        if self.config.evolution.sigma_scale == "relative":
            self.population.answer(SetScale("rms"))

    def _update(self, journal: Journal, draw: int) -> None:
        """Move the parent and update the optimizer's moments as a generation of es did."""
        population = len(journal["weight"]) // len(journal["rate"])
        rows = slice(draw * population, (draw + 1) * population)
        taken = bool(journal["weight"][rows].any())
        weight_K = journal["weight" if taken else "estimate"][rows]
        if not weight_K.any():
            return
        self._set_out(draw)
        seed_U, weight_U = merge_seeds(_members(journal)[rows], weight_K)
        with threads(self.config.parent.threads):
            assert isinstance(self.strategy, EvolutionStrategies)
            wanted = self.strategy.direction(seed_U, weight_U, float(journal["rate"][draw]))
            self.population.answer(replace(wanted, ratio=None))
            assert self.population.scale is not None, "the update"
            if taken:
                self.population.scale = self.population.scale * float(journal["factor"][draw])
                self.population.answer(Take(line(float(journal["length"][draw]))))

    def _take(self, journal: Journal, member: int) -> None:
        """Make a member of random-gradients the parent, as the run did."""
        with threads(self.config.parent.threads):
            self.population.take_gradient()  # the members' directions come from the current parent's gradient
            self.population.answer(Take(_members(journal)[member : member + 1]))


def _members(journal: Journal) -> Members:
    return Members(journal["seed"], journal["offset"], journal["gain"])
