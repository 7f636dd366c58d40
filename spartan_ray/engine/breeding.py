"""The parents of evolutionary SGD: training, scoring and selection of whole networks.

A `Breeder` does the work on one device; `Breeding` keeps the parents and selects the next ones. Does not depend on Ray.
Shapes: D parameters, N cases, P parents, K offspring, R parents of one offspring, C = P + K candidates.
"""

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

# Purpose of the key from which a parent's data order and other draws of its training are derived.
ORDER_OF_PARENT = 1 << 41

# The state of an optimizer as it is sent: its tensors, converted by `packed`, and the rest.
OptimizerState = tuple[dict[str, Any], dict[str, Any]]


@dataclass(frozen=True)
class Individual:
    """A whole network and the state of its optimizer. None means a fresh optimizer.

    The arrays may be shared and are never written to."""

    theta_D: NDArray[np.float32]
    buffers: list[Any]
    optimizer: OptimizerState | None = None
    fitness: float | None = None  # None: unknown so far

    def become(self, model: FlatModel) -> None:
        """Give a model the parameters and buffers of this individual."""
        device = model.theta_D.device
        model.theta_D.copy_(unpacked(self.theta_D, device))
        model.write()
        model.load_buffers([unpacked(buffer, device) for buffer in self.buffers])


class Course(Protocol):
    """Trains a network for an epoch. It is picklable, and defines what an epoch is."""

    def to(self, device: torch.device) -> None:
        """Move the training data to a device."""

    def __call__(
        self, model: FlatModel, settings: Settings, state: OptimizerState | None, seed: int, epoch: int
    ) -> OptimizerState:
        """Train the model in place and return the new state of its optimizer.

        The result depends only on the arguments and on the data."""


@dataclass(frozen=True)
class Trained:
    """The result of training one individual."""

    individual: Individual | None
    """The trained individual, or None if it backs off to what it was before."""
    fitness: float
    """Fitness of the individual that is kept."""
    found: float
    """Fitness after training, whether it is kept or not."""


@dataclass(frozen=True)
class Scored:
    """The fitness of an offspring, or NaN and the reason if it could not be scored."""

    fitness: float
    reason: str = ""


class Breeder(Evaluator):
    """Trains, scores and builds individuals on one device. All scores of a run use the same cases."""

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
        """Train individuals. Each item is an individual, its settings, a seed and the number of the epoch.

        An individual whose fitness falls backs off to what it was."""
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
        """Score offspring, each given as a table of one row."""
        found = []
        for one in offspring:
            self._load_mean(one, parents)
            scores, failed = self.evaluate(noisy(one.seed_K, 0.0, float(one.gain_K[0])), "fitness", -math.inf)
            found.append(Scored(float(scores.fitness_K[0]), failed.get(0, "")))
        return found

    def make(self, offspring: Sequence[Offspring], parents: Sequence[Individual]) -> list[Individual]:
        """Build offspring as individuals. Their fitness is left unset; the caller knows it from `score`."""
        made = []
        for one in offspring:
            self._load_mean(one, parents)
            self.descend(int(one.seed_K[0]), 0.0, float(one.gain_K[0]))
            self.model.load_buffers(self.parent_buffers)
            self.fitness.moved(self.model.module)
            made.append(self._individual(None))
        return made

    def _load_mean(self, one: Offspring, parents: Sequence[Individual]) -> None:
        """Load the mean of an offspring's parents as the parent of the evaluator.

        Parameters that are not trained are equal in all parents, and are taken from the first."""
        chosen = [parents[place] for place in one.parent_KR[0]]
        theta_D = mean([unpacked(parent.theta_D, self.device) for parent in chosen])
        buffers = chosen[0].buffers.copy()
        for place in range(len(list(self.model.module.buffers()))):
            buffers[place] = mean([unpacked(parent.buffers[place], self.device) for parent in chosen])
        self._load(theta_D, buffers)

    def _load(self, theta_D: Any, buffers: list[Any]) -> None:
        self.load(ParentState(theta_D, buffers, {"fitness": self.case_N}), same_cases=True)

    def _fitness_of(self, individual: Individual) -> float:
        """Return the fitness of an individual.

        Raises RunError if it cannot be scored, because training and selection need its fitness."""
        self._load(individual.theta_D, individual.buffers)
        scores, failed = self.evaluate(PARENT, "fitness", -math.inf)
        if failed:
            raise RunError(failed[0])
        return float(scores.fitness_K[0])

    def _individual(self, state: OptimizerState | None) -> Individual:
        """Return a copy of the network as it is now, with this optimizer state."""
        buffers = [packed(buffer.clone()) for buffer in self.model.buffers]
        return Individual(packed(self.model.theta_D.clone()), buffers, state)


@dataclass(frozen=True, kw_only=True)
class BreederSpec(EvaluatorSpec):
    """The parts from which a worker builds its breeder. Sent to each worker once."""

    course: Course
    case_N: NDArray[np.int64]

    def make(self, device: torch.device) -> Breeder:
        network, fitness = self.parts()
        return Breeder(network, fitness, self.noise, device, self.course, self.case_N)


class Breeders(Protocol):
    """The interface to breeders, which run on a pool of workers or in this process."""

    counts: dict[str, float]
    """Counters since the start, by name, such as retries."""

    @property
    def workers(self) -> int:
        """The present number of breeders."""

    def share(self, value: Any) -> Any:
        """Send a value to each node once. Return its stand-in for the arguments of `each`."""

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
        """Call `method(items, *shared)` on breeders. Return one answer per item, in their order.

        Args:
            method: Name of a method of `Breeder`.
            items: The items. They are split among the breeders.
            shared: Further arguments of the method, such as results of `share`.
            cases: Number of cases that each item forwards.
            at_once: Number of items per call. None: as for members.
            is_finite: Whether an answer is finite. If not, a second breeder computes it too.
            give_up: The answer to an item that no breeder can answer, from the reason. None: the run ends.
        """

    def could_not_score(self, member: Members, reason: str) -> None:
        """Report that an offspring could not be scored and is the worst, or end the run if so configured."""


class LocalBreeders:
    """One breeder in this process. It gives the same bits as a worker."""

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
    """The parents of evolutionary SGD and their selection. The bits do not depend on which breeders do the work."""

    def __init__(self, strategy: EvolutionarySGD, breeders: Breeders, seed: int, model: FlatModel, cases: int) -> None:
        """Start all parents as copies of one network. `cases` is the number of cases that score an individual."""
        self.strategy, self.breeders, self.seed, self.cases = strategy, breeders, seed, cases
        self.individuals = [
            Individual(packed(model.theta_D.clone()), [packed(buffer.clone()) for buffer in model.buffers])
            for _ in range(strategy.parents)
        ]

    @property
    def fitness_P(self) -> NDArray[np.float64]:
        """Fitness of each parent, shape (P,). NaN if it is unknown so far."""
        known = [math.nan if one.fitness is None else one.fitness for one in self.individuals]
        return np.array(known)

    @property
    def best(self) -> int:
        """Index of the fittest parent; the first one if several are equal."""
        fitness_P = self.fitness_P
        return int(np.nanargmax(fitness_P)) if np.isfinite(fitness_P).any() else 0

    def train(self, epoch: int, generation: int, cases: int) -> int:
        """Train each parent for an epoch of `cases` cases, with its settings for the epochs up to `generation`.

        Return the number of parents that backed off because their fitness fell."""
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
        """Score the offspring of a generation and select the next parents.

        Return the outcome, whose members are the offspring, and the other arrays that the journal needs."""
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
        """Make the candidates at these indices the parents, each with a fresh optimizer.

        Args:
            offspring: The offspring, K rows.
            fitness_K: Fitness of the offspring.
            order_P: Indices of the next parents, in order. Candidates are the P parents, then the K offspring.
            parents: The stand-in for the present parents, if they were shared already.
        """
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
        """Share the parents, without the state of their optimizers. Return their stand-in."""
        return self.breeders.share([replace(one, optimizer=None) for one in self.individuals])

    def digest(self) -> str:
        """Return the SHA-256 of the parameters and buffers of all parents, in their order."""
        digest = hashlib.sha256()
        for individual in self.individuals:
            for array in (individual.theta_D, *individual.buffers):
                tensor = unpacked(array, torch.device("cpu")).contiguous()
                digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
        return digest.hexdigest()
