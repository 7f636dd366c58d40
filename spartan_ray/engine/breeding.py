"""Networks that are trained side by side and selected together, as evolutionary SGD does: what it takes on one device,
and what is made of it. Knows nothing of Ray. Shapes: D parameters, N cases, P parents, K offspring, C = P + K."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spartan_ray.engine.draws import random_key
from spartan_ray.engine.evaluator import Evaluator, EvaluatorSpec, ParentState, packed, unpacked
from spartan_ray.engine.fitness import Fitness
from spartan_ray.engine.flat import FlatModel, mean
from spartan_ray.engine.process import as_in_a_worker
from spartan_ray.engine.strategies.esgd import EvolutionarySGD, Offspring, Settings
from spartan_ray.engine.strategies.requests import Members, Outcome, noisy
from spartan_ray.noise.contract import NoiseKind

# Beside the seed: what a parent's data order and the like are drawn by.
ORDER_OF_PARENT = 1 << 41

# An optimizer's state as it is sent: its tensors as `packed` has them, and the rest.
OptimizerState = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Individual:
    """A whole network, with what its optimizer remembers; None is a fresh optimizer. The arrays may be shared: they are
    never written to."""

    theta_D: NDArray[np.float32]
    buffers: list[Any]
    optimizer: OptimizerState | None = None
    fitness: float | None = None  # None: not known yet


class Course(Protocol):
    """Trains a network for an epoch, whatever that is; picklable."""

    def to(self, device: torch.device) -> None:
        """Move what it trains on to a device."""

    def __call__(
        self, model: FlatModel, settings: Settings, state: OptimizerState | None, seed: int, epoch: int
    ) -> OptimizerState:
        """Train in place; what the optimizer remembers then. A function of what it is given alone."""


class Breeder(Evaluator):
    """What is done with individuals on one device. They are scored on the same cases in the whole run."""

    def __init__(
        self,
        network: nn.Module,
        fitness: Fitness,
        noise: NoiseKind,
        device: torch.device,
        course: Course,
        case_N: NDArray[np.int64],
    ) -> None:
        super().__init__(network, fitness, noise, device)
        self.course = course
        self.course.to(device)
        self.case_N = case_N

    def train(self, items: Sequence[tuple[Individual, Settings, int, int]]) -> list[tuple[Individual | None, float]]:
        """Train individuals with settings, a seed and the number of an epoch each. What became of each, or None where
        its fitness fell and it backs off to what it was, and the fitness that it has."""
        return [self._train(*item) for item in items]

    def _train(
        self, individual: Individual, settings: Settings, seed: int, epoch: int
    ) -> tuple[Individual | None, float]:
        before = self._fitness_of(individual) if individual.fitness is None else individual.fitness
        self.model.theta_D.copy_(unpacked(individual.theta_D, self.device))
        self.model.write()
        self.model.load_buffers([unpacked(buffer, self.device) for buffer in individual.buffers])
        state = self.course(self.model, settings, individual.optimizer, seed, epoch)
        self.model.read()
        trained = self._individual(state)
        after = self._fitness_of(trained)
        return (replace(trained, fitness=after), after) if after >= before else (None, before)

    def score(self, offspring: Sequence[Offspring], parents: Sequence[Individual]) -> list[float]:
        """The fitness of offspring, each a table of one row."""
        return [self._mixed(one, parents) for one in offspring]

    def make(self, offspring: Sequence[Offspring], parents: Sequence[Individual]) -> list[Individual]:
        """Offspring as individuals, with the fitness that `score` gives them."""
        made = []
        for one in offspring:
            fitness = self._mixed(one, parents)
            self.descend(int(one.seed_K[0]), 0.0, float(one.gain_K[0]))
            self.model.load_buffers(self.parent_buffers)
            self.fitness.moved(self.model.module)
            made.append(replace(self._individual(None), fitness=fitness))
        return made

    def _mixed(self, one: Offspring, parents: Sequence[Individual]) -> float:
        """The fitness of a row of offspring; the mean of its parents is loaded then."""
        chosen = [parents[place] for place in one.parent_KR[0]]
        theta_D = mean([unpacked(parent.theta_D, self.device) for parent in chosen])
        buffers = [
            mean([unpacked(buffer, self.device) for buffer in buffers])
            for buffers in zip(*(parent.buffers for parent in chosen), strict=True)
        ]
        return self._fitness(theta_D, buffers, noisy(one.seed_K, 0.0, float(one.gain_K[0])))

    def _fitness_of(self, individual: Individual) -> float:
        return self._fitness(individual.theta_D, individual.buffers, noisy(np.zeros(1, np.uint64), 0.0, 0.0))

    def _fitness(self, theta_D: Any, buffers: list[Any], member: Members) -> float:
        """The fitness of a member of a network. Raises what the fitness raised."""
        self.load(ParentState(theta_D, buffers, {"fitness": self.case_N}))
        scores, failed = self.evaluate(member, "fitness", -math.inf)
        if failed:
            raise RuntimeError(failed[0])
        return float(scores.fitness_K[0])

    def _individual(self, state: OptimizerState | None) -> Individual:
        """The network as it is."""
        buffers = [packed(buffer.clone()) for buffer in self.model.buffers]
        return Individual(packed(self.model.theta_D.clone()), buffers, state)


@dataclass(frozen=True, kw_only=True)
class BreederSpec(EvaluatorSpec):
    """What a breeder is made from; sent to each worker once."""

    course: Course
    case_N: NDArray[np.int64]

    def make(self, device: torch.device) -> Breeder:
        network, fitness = self.parts()
        return Breeder(network, fitness, self.noise, device, self.course, self.case_N)


class Breeders(Protocol):
    """What does the work of breeders: a pool of workers, or this process."""

    counts: dict[str, float]
    """What happened so far, by name."""

    @property
    def workers(self) -> int:
        """How many breeders there are now."""

    def each(self, method: str, items: Sequence[Any], *shared: Any, cases: int = 0) -> list[Any]:
        """What `method(items, *shared)` of a breeder answers for each of some items, in their order. Each takes so many
        cases."""


class LocalBreeders:
    """One breeder in this process, with the bits of a worker."""

    workers = 1

    def __init__(self, spec: BreederSpec, device: torch.device) -> None:
        self.breeder, self.threads = spec.make(device), spec.threads
        self.counts: dict[str, float] = {"retries": 0}

    def each(self, method: str, items: Sequence[Any], *shared: Any, cases: int = 0) -> list[Any]:
        with as_in_a_worker(self.threads, self.breeder.device):
            answers: list[Any] = getattr(self.breeder, method)(items, *shared)
            return answers


class Breeding:
    """The parents of evolutionary SGD, and what becomes of them. The same bits whoever does the work."""

    def __init__(self, strategy: EvolutionarySGD, breeders: Breeders, seed: int, model: FlatModel, cases: int) -> None:
        """All parents begin as one network. `cases` is how many score an individual."""
        self.strategy, self.breeders, self.seed, self.cases = strategy, breeders, seed, cases
        self.individuals = [
            Individual(packed(model.theta_D.clone()), [packed(buffer.clone()) for buffer in model.buffers])
            for _ in range(strategy.parents)
        ]

    @property
    def fitness_P(self) -> NDArray[np.float64]:
        """NaN where it is not known yet."""
        known = [math.nan if one.fitness is None else one.fitness for one in self.individuals]
        return np.array(known)

    @property
    def best(self) -> int:
        """The place of the fittest parent, the first of equals."""
        fitness_P = self.fitness_P
        return int(np.nanargmax(fitness_P)) if np.isfinite(fitness_P).any() else 0

    def train(self, epoch: int, generation: int, cases: int) -> int:
        """Train each parent for an epoch of so many cases, with its settings up to a generation; how many backed off,
        since their fitness fell."""
        settings = self.strategy.settings(self.seed, generation)
        items = [
            (individual, settings[place], random_key(self.seed, ORDER_OF_PARENT + place), epoch)
            for place, individual in enumerate(self.individuals)
        ]
        answers = self.breeders.each("train", items, cases=cases)
        self.individuals = [
            replace(individual, fitness=fitness) if trained is None else trained
            for individual, (trained, fitness) in zip(self.individuals, answers, strict=True)
        ]
        return sum(trained is None for trained, _ in answers)

    def evolve(self, generation: int) -> tuple[Outcome, dict[str, NDArray[Any]]]:
        """The selection of a generation; its account, of the offspring, and what the journal needs beside it."""
        before_P = self.fitness_P
        offspring = self.strategy.offspring(self.seed, generation)
        rows = [offspring[k : k + 1] for k in range(len(offspring))]
        fitness_K = np.array(self.breeders.each("score", rows, self.individuals, cases=self.cases))
        order_P = self.strategy.select(np.concatenate([before_P, fitness_K]), self.seed, generation)
        self.become(offspring, order_P)
        taken = order_P[order_P >= len(before_P)] - len(before_P)
        count = len(offspring)
        weight_K = np.zeros(count)
        weight_K[taken] = 1
        outcome = Outcome(
            Members(offspring.seed_K, np.zeros(count, np.float32), offspring.gain_K),
            fitness_K,
            np.full(count, self.cases),
            weight_K,
            before=float(before_P.max()),
            after=float(self.fitness_P.max()),
            chosen=int(taken[0]) if len(taken) else None,
            note=None if len(taken) else "no offspring was among those selected",
            cases=self.cases,
            cases_scored=count * self.cases,
        )
        return outcome, {"parents": offspring.parent_KR, "parent_fitness": before_P, "order": order_P}

    def become(self, offspring: Offspring, order_P: NDArray[np.int64]) -> None:
        """Make the candidates of these numbers the parents: the parents come first, then the offspring. Their
        optimizers are fresh."""
        count = len(self.individuals)
        rows = [offspring[place - count : place - count + 1] for place in order_P.tolist() if place >= count]
        made = iter(self.breeders.each("make", rows, self.individuals) if rows else [])
        self.individuals = [
            next(made) if place >= count else replace(self.individuals[place], optimizer=None)
            for place in order_P.tolist()
        ]

    def digest(self) -> str:
        """SHA-256 of the parameters and buffers of all parents, in their order."""
        digest = hashlib.sha256()
        for individual in self.individuals:
            for array in (individual.theta_D, *individual.buffers):
                tensor = unpacked(array, torch.device("cpu")).contiguous()
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
