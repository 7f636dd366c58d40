"""The parents of a run by evolutionary SGD: what the record, the journal and the checkpoints have of them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch

from spartan_ray.engine.breeding import Breeders, Breeding, Individual
from spartan_ray.engine.evaluator import packed, unpacked
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.moments import TensorDict
from spartan_ray.engine.strategies.esgd import EvolutionarySGD
from spartan_ray.errors import InputError
from spartan_ray.run.journal import write_journal
from spartan_ray.run.record import Row, phase_row

CPU = torch.device("cpu")


class Parents:
    """The parents of a run; the network of the driver is the fittest of them after each epoch."""

    def __init__(
        self, strategy: EvolutionarySGD, breeders: Breeders, seed: int, model: FlatModel, cases: int, images: int
    ) -> None:
        """`cases` is how many images score a network, `images` how many train it."""
        self.breeding = Breeding(strategy, breeders, seed, model, cases)
        self.every, self.seed, self.model, self.images = strategy.every, seed, model, images

    def train(self, epoch: int) -> Row:
        """An epoch of each parent."""
        started, counts = time.perf_counter(), dict(self.breeding.breeders.counts)
        generation = -(-epoch // self.every) * self.every
        backed_off = self.breeding.train(epoch, generation, self.images)
        seconds = time.perf_counter() - started
        self._show_best()
        settings = self.breeding.strategy.settings(self.seed, generation)[self.breeding.best]
        return {
            "kind": "sgd",
            "lr": settings.lr,
            "optimizer": settings.optimizer,
            "seconds": seconds,
            "images_per_second": len(self.breeding.individuals) * self.images / seconds,
            "backed_off": backed_off,
            **self._fitness(),
            **self._since(counts),
        }

    def evolve(self, generation: int, journal: Path) -> Row:
        """A selection, which goes into the journal."""
        started, counts = time.perf_counter(), dict(self.breeding.breeders.counts)
        before = self.breeding.digest()
        outcome, more = self.breeding.evolve(generation)
        outcome.counts, outcome.workers = self._since(counts), self.breeding.breeders.workers
        outcome.seconds = {"scoring": time.perf_counter() - started, "update": 0.0, "gradient": 0.0}
        self._show_best()
        write_journal(journal, generation, outcome, before, self.breeding.digest(), more)
        return {"kind": "evolve", "seconds": time.perf_counter() - started} | phase_row(outcome) | self._fitness()

    def _fitness(self) -> Row:
        fitness_P = self.breeding.fitness_P
        return {"parents": len(fitness_P)} | {
            f"parents_fitness_{name}": float(getattr(fitness_P, name)()) for name in ("min", "mean", "max")
        }

    def _since(self, counts: dict[str, float]) -> Row:
        """What the breeders counted since then."""
        return {name: value - counts[name] for name, value in self.breeding.breeders.counts.items()}

    def _show_best(self) -> None:
        best, device = self.breeding.individuals[self.breeding.best], self.model.theta_D.device
        self.model.theta_D.copy_(unpacked(best.theta_D, device))
        self.model.write()
        self.model.load_buffers([unpacked(buffer, device) for buffer in best.buffers])

    def state(self) -> tuple[TensorDict, dict[str, Any]]:
        """What a checkpoint has of the parents: tensors, named `3.theta` for parent 3, and what JSON can hold."""
        tensors: TensorDict = {}
        rest = []
        for place, one in enumerate(self.breeding.individuals):
            named = {"theta": one.theta_D} | {f"buffer.{number}": buffer for number, buffer in enumerate(one.buffers)}
            moments, others = one.optimizer or ({}, None)
            named |= {f"optimizer.{name}": value for name, value in moments.items()}
            tensors |= {f"{place}.{name}": unpacked(value, CPU) for name, value in named.items()}
            rest.append({"fitness": one.fitness, "optimizer": others})
        return tensors, {"kind": "esgd", "parents": rest}

    def load(self, tensors: TensorDict, rest: dict[str, Any]) -> None:
        """Be what `state` was taken of. Raises InputError for the state of others."""
        try:
            if rest["kind"] != "esgd" or len(rest["parents"]) != len(self.breeding.individuals):
                raise ValueError("other parents")
            individuals = []
            for place, known in enumerate(rest["parents"]):
                prefix = f"{place}.optimizer."
                moments = {
                    name.removeprefix(prefix): packed(value)
                    for name, value in tensors.items()
                    if name.startswith(prefix)
                }
                theta_D = tensors[f"{place}.theta"]
                buffers = [tensors[f"{place}.buffer.{number}"] for number in range(len(self.model.buffers))]
                for given, own in zip((theta_D, *buffers), (self.model.theta_D, *self.model.buffers), strict=True):
                    if given.shape != own.shape or given.dtype != own.dtype:
                        raise ValueError(f"{tuple(given.shape)} instead of {tuple(own.shape)}")
                optimizer = None if known["optimizer"] is None else (moments, known["optimizer"])
                fitness = None if known["fitness"] is None else float(known["fitness"])
                packed_buffers = [packed(buffer) for buffer in buffers]
                individuals.append(Individual(packed(theta_D), packed_buffers, optimizer, fitness))
        except (KeyError, ValueError, TypeError) as error:
            raise InputError(f"the checkpoint is of other parents: {error}") from None
        self.breeding.individuals = individuals
