"""The parents of an esgd run: their training and selection, with metrics, journal and checkpoints."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from spartan_ray.engine.breeding import Breeders, Breeding, Individual
from spartan_ray.engine.evaluator import packed, unpacked
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.moments import TensorDict
from spartan_ray.engine.strategies.esgd import EvolutionarySGD
from spartan_ray.errors import InputError, one_line
from spartan_ray.run.journal import write_journal
from spartan_ray.run.record import Row, phase_row

CPU = torch.device("cpu")


class Parents:
    """The parents of an esgd run. After each epoch, the driver's network is the fittest of them."""

    def __init__(
        self,
        strategy: EvolutionarySGD,
        breeders: Breeders,
        seed: int,
        model: FlatModel,
        cases: int,
        images: int,
        lr_factor: Callable[[int], float] = lambda epoch: 1.0,
    ) -> None:
        """`cases` is the number of images that score a network, and `images` the number that train it. `lr_factor`
        returns the learning rate of an epoch divided by that of the first."""
        self.breeding = Breeding(strategy, breeders, seed, model, cases)
        self.every, self.seed, self.model, self.images = strategy.every, seed, model, images
        self.lr_factor = lr_factor

    def train(self, epoch: int) -> Row:
        """Train each parent for one epoch. Return the metrics."""
        started, counts = time.perf_counter(), dict(self.breeding.breeders.counts)
        generation = -(-epoch // self.every) * self.every
        parents = len(self.breeding.individuals)
        unscored = int(np.isnan(self.breeding.fitness_P).sum())  # those of the start are scored before and after
        backed_off = self.breeding.train(epoch, generation, self.images)
        seconds = time.perf_counter() - started
        self._show_best()
        settings = self.breeding.strategy.settings(self.seed, generation)[self.breeding.best]
        return {
            "kind": "sgd",
            "lr": settings.lr * self.lr_factor(epoch),
            "optimizer": settings.optimizer,
            "seconds": seconds,
            "images_per_second": parents * self.images / seconds,
            "images_scored": (parents + unscored) * self.breeding.cases,
            "backed_off": backed_off,
            **self._fitness(),
            **self._since(counts),
        }

    def evolve(self, generation: int, journal: Path) -> Row:
        """Make offspring, select the next parents, and write the journal. Return the metrics."""
        started, counts = time.perf_counter(), dict(self.breeding.breeders.counts)
        before = self.breeding.digest()
        outcome, more = self.breeding.evolve(generation)
        outcome.counts, outcome.workers = self._since(counts), self.breeding.breeders.workers
        self._show_best()
        write_journal(journal, generation, outcome, before, self.breeding.digest(), more)
        selected = int(np.count_nonzero(outcome.weight_K))
        # In the metrics, the parent is the fittest one. It has moved if it is an offspring.
        moved = {"accepted": outcome.chosen is not None, "accepted_members": 1, "selected": selected}
        row = {"kind": "evolve", "lr": None, "seconds": time.perf_counter() - started}
        return row | phase_row(outcome) | moved | {"step_ratio": None} | self._fitness()

    def _fitness(self) -> Row:
        fitness_P = self.breeding.fitness_P
        return {"parents": len(fitness_P)} | {
            f"parents_fitness_{name}": float(getattr(fitness_P, name)()) for name in ("min", "mean", "max")
        }

    def _since(self, counts: dict[str, float]) -> Row:
        """Return what the breeders have counted since `counts`."""
        return {name: value - counts[name] for name, value in self.breeding.breeders.counts.items()}

    def _show_best(self) -> None:
        self.breeding.individuals[self.breeding.best].become(self.model)

    def state(self) -> tuple[TensorDict, TensorDict, dict[str, Any]]:
        """Return the state of the parents for a checkpoint: the tensors of the networks, named `3.theta` for parent 3,
        the tensors of their optimizers, and the rest as JSON values."""
        networks: TensorDict = {}
        moments: TensorDict = {}
        rest = []
        for place, one in enumerate(self.breeding.individuals):
            named = {"theta": one.theta_D} | {f"buffer.{number}": buffer for number, buffer in enumerate(one.buffers)}
            networks |= {f"{place}.{name}": unpacked(value, CPU).contiguous() for name, value in named.items()}
            tensors, others = one.optimizer or ({}, None)
            moments |= {f"{place}.{name}": unpacked(value, CPU).contiguous() for name, value in tensors.items()}
            rest.append({"fitness": one.fitness, "optimizer": others})
        return networks, moments, {"kind": "esgd", "parents": rest}

    def load(self, networks: TensorDict, moments: TensorDict | None, rest: dict[str, Any]) -> None:
        """Restore the parents from `state`. Without `moments`, restore only the networks and their fitness. Raises
        InputError if the state does not fit these parents."""
        try:
            if rest["kind"] != "esgd" or len(rest["parents"]) != len(self.breeding.individuals):
                raise ValueError("another number of parents")
            individuals = []
            for place, known in enumerate(rest["parents"]):
                theta_D = networks[f"{place}.theta"]
                buffers = [networks[f"{place}.buffer.{number}"] for number in range(len(self.model.buffers))]
                for given, own in zip((theta_D, *buffers), (self.model.theta_D, *self.model.buffers), strict=True):
                    if given.shape != own.shape or given.dtype != own.dtype:
                        raise ValueError(f"{tuple(given.shape)} instead of {tuple(own.shape)}")
                fitness = None if known["fitness"] is None else float(known["fitness"])
                if fitness is not None and not math.isfinite(fitness):
                    raise ValueError(f"the fitness {fitness}")
                state = None
                if moments is not None and known["optimizer"] is not None:
                    mine = {name: value for name, value in moments.items() if name.startswith(f"{place}.")}
                    state = {name.partition(".")[2]: packed(value) for name, value in mine.items()}, known["optimizer"]
                individuals.append(Individual(packed(theta_D), [packed(buffer) for buffer in buffers], state, fitness))
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"the checkpoint is of other parents: {one_line(str(error))}") from None
        self.breeding.individuals = individuals
