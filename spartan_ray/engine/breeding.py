"""Networks that are trained side by side and selected together, as evolutionary SGD does: what it takes on one device,
and what is made of it. Knows nothing of Ray. Shapes: D parameters, N cases, P parents, K offspring, C = P + K."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spartan_ray.engine.draws import random_key
from spartan_ray.engine.evaluator import Evaluator, EvaluatorSpec, ParentState, packed, unpacked
from spartan_ray.engine.executor import given_up
from spartan_ray.engine.fitness import Fitness
from spartan_ray.engine.flat import FlatModel, mean
from spartan_ray.engine.process import as_in_a_worker
from spartan_ray.engine.strategies.esgd import EvolutionarySGD, Offspring, Settings
from spartan_ray.engine.strategies.requests import PARENT, Members, Outcome, noisy
from spartan_ray.errors import RunError
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

    def become(self, model: FlatModel) -> None:
        """Make a network this one."""
        device = model.theta_D.device
        model.theta_D.copy_(unpacked(self.theta_D, device))
        model.write()
        model.load_buffers([unpacked(buffer, device) for buffer in self.buffers])


class Course(Protocol):
    """Trains a network for an epoch, whatever that is; picklable."""

    def to(self, device: torch.device) -> None:
        """Move what it trains on to a device."""

    def __call__(
        self, model: FlatModel, settings: Settings, state: OptimizerState | None, seed: int, epoch: int
    ) -> OptimizerState:
        """Train in place; what the optimizer remembers then. A function of what it is given alone."""


@dataclass(frozen=True)
class Trained:
    """What became of an individual: what it is now, or None where it backs off to what it was, the fitness that it has,
    and the one that training led to."""

    individual: Individual | None
    fitness: float
    found: float


@dataclass(frozen=True)
class Scored:
    """The fitness of an offspring, NaN with the reason where it could not be scored."""

    fitness: float
    reason: str = ""


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

    def train(self, items: Sequence[tuple[Individual, Settings, int, int]]) -> list[Trained]:
        """Train individuals with settings, a seed and the number of an epoch each. One whose fitness falls backs off to
        what it was."""
        return [self._train(*item) for item in items]

    def _train(self, individual: Individual, settings: Settings, seed: int, epoch: int) -> Trained:
        before = self._fitness_of(individual) if individual.fitness is None else individual.fitness
        individual.become(self.model)
        state = self.course(self.model, settings, individual.optimizer, seed, epoch)
        self.model.read()
        self.fitness.moved(self.model.module)
        trained = self._individual(state)
        after = self._fitness_of(trained)
        return Trained(replace(trained, fitness=after) if after >= before else None, max(before, after), after)

    def score(self, offspring: Sequence[Offspring], parents: Sequence[Individual]) -> list[Scored]:
        """The fitness of offspring, each a table of one row."""
        found = []
        for one in offspring:
            self._load_mean(one, parents)
            scores, failed = self.evaluate(noisy(one.seed_K, 0.0, float(one.gain_K[0])), "fitness", -math.inf)
            found.append(Scored(float(scores.fitness_K[0]), failed.get(0, "")))
        return found

    def make(self, offspring: Sequence[Offspring], parents: Sequence[Individual]) -> list[Individual]:
        """Offspring as individuals, of a fitness that `score` knows."""
        made = []
        for one in offspring:
            self._load_mean(one, parents)
            self.descend(int(one.seed_K[0]), 0.0, float(one.gain_K[0]))
            self.model.load_buffers(self.parent_buffers)
            self.fitness.moved(self.model.module)
            made.append(self._individual(None))
        return made

    def _load_mean(self, one: Offspring, parents: Sequence[Individual]) -> None:
        """Take the mean of the parents of a row of offspring for the parent. What is not trained is the same in all."""
        chosen = [parents[place] for place in one.parent_KR[0]]
        theta_D = mean([unpacked(parent.theta_D, self.device) for parent in chosen])
        buffers = chosen[0].buffers.copy()
        for place in range(len(list(self.model.module.buffers()))):
            buffers[place] = mean([unpacked(parent.buffers[place], self.device) for parent in chosen])
        self._load(theta_D, buffers)

    def _load(self, theta_D: Any, buffers: list[Any]) -> None:
        self.load(ParentState(theta_D, buffers, {"fitness": self.case_N}), same_cases=True)

    def _fitness_of(self, individual: Individual) -> float:
        """Raises what the fitness raised: without a score nothing can be compared with it."""
        self._load(individual.theta_D, individual.buffers)
        scores, failed = self.evaluate(PARENT, "fitness", -math.inf)
        if failed:
            raise RunError(failed[0])
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

    def share(self, value: Any) -> Any:
        """What stands for a value among the arguments of `each`: it is sent to each node once."""

    def each(
        self,
        method: str,
        items: Sequence[Any],
        *shared: Any,
        cases: int = 0,
        at_once: int | None = None,
        is_finite: Callable[[Any], bool] = lambda answer: True,
        give_up: Callable[[str], Any] | None = None,
    ) -> list[Any]:
        """What `method(items, *shared)` of a breeder answers for each of some items, in their order. Each forwards so
        many cases; a breeder gets so many items `at_once`, or as many as it does of members. An answer that is not
        finite is asked of a second breeder too; what no breeder can answer has the answer that `give_up` makes of the
        reason, or ends the run."""

    def could_not_score(self, member: Members, reason: str) -> None:
        """Say that an offspring is the worst, or end the run, as the configuration says."""


class LocalBreeders:
    """One breeder in this process, with the bits of a worker."""

    workers = 1

    def __init__(self, spec: BreederSpec, device: torch.device, note: Callable[[str], None]) -> None:
        self.breeder, self.threads, self.note = spec.make(device), spec.threads, note
        self.counts: dict[str, float] = {"retries": 0, "members_failed": 0}

    def share(self, value: Any) -> Any:
        return value

    def each(self, method: str, items: Sequence[Any], *shared: Any, **_: Any) -> list[Any]:
        with as_in_a_worker(self.threads, self.breeder.device):
            answers: list[Any] = getattr(self.breeder, method)(items, *shared)
            return answers

    def could_not_score(self, member: Members, reason: str) -> None:
        self.counts["members_failed"] += 1
        self.note(given_up(member, 0, 1, reason))


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
        answers: list[Trained] = self.breeders.each(
            "train", items, cases=cases, at_once=1, is_finite=lambda answer: math.isfinite(answer.found)
        )
        self.individuals = [
            answer.individual or replace(individual, fitness=answer.fitness)
            for individual, answer in zip(self.individuals, answers, strict=True)
        ]
        return sum(answer.individual is None for answer in answers)

    def evolve(self, generation: int) -> tuple[Outcome, dict[str, NDArray[Any]]]:
        """The selection of a generation; its account, of the offspring, and what the journal needs beside it."""
        before_P, parents = self.fitness_P, self._shared()
        offspring = self.strategy.offspring(self.seed, generation)
        count = len(offspring)
        started = time.perf_counter()
        answers: list[Scored] = self.breeders.each(
            "score",
            offspring.rows(range(count)),
            parents,
            cases=self.cases,
            is_finite=lambda answer: math.isfinite(answer.fitness),
            give_up=lambda reason: Scored(math.nan, reason),
        )
        scored = time.perf_counter()
        members = Members(offspring.seed_K, np.zeros(count, np.float32), offspring.gain_K)
        for k, answer in enumerate(answers):
            if answer.reason:
                self.breeders.could_not_score(members[k : k + 1], answer.reason)
        fitness_K = np.array([answer.fitness for answer in answers])
        order_P = self.strategy.select(np.concatenate([before_P, fitness_K]), self.seed, generation)
        self.become(offspring, fitness_K, order_P, parents)
        weight_K = np.zeros(count)
        weight_K[order_P[order_P >= len(before_P)] - len(before_P)] = 1
        best = int(order_P[0]) - len(before_P)
        outcome = Outcome(
            members,
            fitness_K,
            np.full(count, self.cases),
            weight_K,
            before=float(before_P.max()),
            after=float(self.fitness_P.max()),
            chosen=best if best >= 0 else None,
            note=None if best >= 0 else "no offspring is better than the best parent",
            cases=self.cases,
            cases_scored=count * self.cases,
            seconds={"scoring": scored - started, "update": time.perf_counter() - scored},
        )
        return outcome, {"parents": offspring.parent_KR, "parent_fitness": before_P, "order": order_P}

    def become(
        self, offspring: Offspring, fitness_K: NDArray[np.float64], order_P: NDArray[np.int64], parents: Any = None
    ) -> None:
        """Make the candidates of these numbers the parents: the parents come first, then the offspring. Their
        optimizers are fresh. `parents` are the parents as they were shared."""
        count = len(self.individuals)
        taken = [place - count for place in order_P.tolist() if place >= count]
        shared = parents or self._shared()
        made = iter(self.breeders.each("make", offspring.rows(taken), shared, at_once=1) if taken else [])
        self.individuals = [
            replace(next(made), fitness=float(fitness_K[place - count]))
            if place >= count
            else replace(self.individuals[place], optimizer=None)
            for place in order_P.tolist()
        ]

    def _shared(self) -> Any:
        """The parents as breeders need them, without their optimizers."""
        return self.breeders.share([replace(one, optimizer=None) for one in self.individuals])

    def digest(self) -> str:
        """SHA-256 of the parameters and buffers of all parents, in their order."""
        digest = hashlib.sha256()
        for individual in self.individuals:
            for array in (individual.theta_D, *individual.buffers):
                tensor = unpacked(array, torch.device("cpu")).contiguous()
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
