"""Evolve phases in this process, without Ray. One evaluator has the interface of the pool."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from sklearn.linear_model import RidgeClassifier
from torch import nn

from spartan_ray.engine.evaluator import EvaluatorSpec, ParentState, Scale
from spartan_ray.engine.executor import LocalExecutor
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.strategies.requests import WHOLE, CaseSet, Members, Outcome, Part, Scores
from spartan_ray.noise.contract import noise
from spartan_ray.run.config import Config, Evolution, Run
from spartan_ray.run.record import Row, phase_row
from spartan_ray.run.setup import make_fitness, make_population, make_strategy
from spartan_ray.vision.classification import Normaliser, Result, recalibrate, score
from spartan_ray.vision.config import Data, Parent
from spartan_ray.vision.data import Images, Splits, load_splits
from spartan_ray.vision.folding import Folding
from spartan_ray.vision.models import build_model, initial_model

CPU = torch.device("cpu")
PARENT = Parent(model="convnet", threads=1)
SPLITS = load_splits(Data(name="digits", sgd_images=600, evolution_images=600), 0)
NORMALISE = Normaliser(SPLITS.mean_C, SPLITS.std_C, CPU)


def scored(module: nn.Module, images: Images, normalise: Normaliser = NORMALISE) -> Result:
    """Return the score of a network with BatchNorm folded in. Its bits are the same as on the workers."""
    with Folding(module, normalise(images.pixels_NHWC[:1]))(torch.float32):
        return score(module, images, normalise)


def make_spec(splits: Splits = SPLITS, network: Parent = PARENT, **evolution: Any) -> EvaluatorSpec:
    """Return the specification from which a run's evaluators are made."""
    make_network = functools.partial(build_model, network, len(splits.classes))
    return EvaluatorSpec(make_network, make_fitness(Evolution(**evolution), splits), "uniform", threads=1)


class WatchedPool(LocalExecutor):
    """A local pool that records its calls.

    If `fitness` has a function for a case set, the function computes the fitness of a descendant from its parameters,
    and the cases are not used."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        super().__init__(spec, CPU, print)
        self.fitness: dict[CaseSet, Callable[[NDArray[np.float32]], float]] = {}
        self.broadcasts: list[ParentState] = []
        self.scales: list[Scale] = []
        self.asked: list[tuple[int, str]] = []

    def broadcast(self, parent: ParentState) -> None:
        """Broadcast a read-only copy, as in Ray's shared memory."""
        buffers = [buffer.copy() for buffer in parent.buffers]
        parent = replace(parent, theta_D=parent.theta_D.copy(), buffers=buffers)
        parent.theta_D.flags.writeable = False
        self.broadcasts.append(parent)
        super().broadcast(parent)

    def broadcast_scale(self, scale: Scale) -> None:
        if scale is not None:
            scale = scale.copy()
            scale.flags.writeable = False
        self.scales.append(scale)
        super().broadcast_scale(scale)

    def evaluate(
        self,
        members: Members,
        cases: CaseSet = "fitness",
        threshold: float = -math.inf,
        part: Part = WHOLE,
        own: int | None = None,
    ) -> Scores:
        self.asked.append((len(members), cases))
        if cases not in self.fitness:
            return super().evaluate(members, cases, threshold, part, own)
        fitness_K = np.empty(len(members))
        for k, (seed, offset, gain) in enumerate(zip(members.seed_K, members.offset_K, members.gain_K, strict=True)):
            self.evaluator.descend(int(seed), offset, gain)
            fitness_K[k] = self.fitness[cases](self.evaluator.model.theta_D.numpy())
        cases_K = np.full(len(members), len(self.evaluator.cases.sets[cases]))
        return Scores(np.stack([fitness_K, fitness_K], axis=1), fitness_K, cases_K)


@functools.cache
def _trained_state() -> dict[str, torch.Tensor]:
    model = FlatModel(initial_model(PARENT, 10, 0)[0], CPU)
    *filters, classifier = model.module.children()
    images_NCHW = NORMALISE(SPLITS.sgd.pixels_NHWC)
    recalibrate(model.module, images_NCHW)
    with torch.no_grad():
        fitted = RidgeClassifier(alpha=10).fit(nn.Sequential(*filters)(images_NCHW).double(), SPLITS.sgd.labels_N)
        for parameter, value in zip(classifier.parameters(), (fitted.coef_, fitted.intercept_), strict=True):
            parameter.copy_(torch.from_numpy(value))
    model.theta_D += torch.from_numpy(0.012 * noise("uniform", 2, 0, len(model.theta_D)))
    return model.state_dict()


def trained() -> FlatModel:
    """Return a trained parent that can still become better.

    Its filters are random, its classifier is fitted in closed form, and then all parameters are mutated. Gradient
    descent would give a different parent on each processor, because rounding differs."""
    module = initial_model(PARENT, 10, 0)[0]
    module.load_state_dict(_trained_state())
    return FlatModel(module, CPU)


class Phase:
    """The evolve phases of one parent. `evolve` runs the next phase."""

    def __init__(self, splits: Splits = SPLITS, **evolution: Any) -> None:
        self.config = Evolution(**{"every": 1, "population": 12, "fitness_images": 100} | evolution).resolved(2)
        strategy = make_strategy(self.config, 10)
        assert strategy
        self.strategy = strategy
        run = Config(run=Run(seed=7), parent=PARENT, evolution=self.config)
        self.model = trained()
        self.population = make_population(run, splits, self.model, print, WatchedPool)
        self.population.here = None  # the pool computes all scores
        assert isinstance(self.population.executor, WatchedPool)
        self.pool: WatchedPool = self.population.executor
        self.generation = 0

    def evolve(self) -> tuple[Outcome, Row]:
        self.generation += 1
        outcome = self.population.step(self.strategy, self.generation)
        return outcome, phase_row(outcome)

    @property
    def case_sets(self) -> dict[CaseSet, NDArray[np.int64]]:
        """Return the case sets of the last phase."""
        return self.population.case_sets

    def score(self, cases: CaseSet = "fitness") -> Result:
        """Return the score of the current parent on the images of the last phase, with its current statistics."""
        return scored(self.model.module, SPLITS.evolution[torch.from_numpy(self.case_sets[cases])])

    @property
    def theta_D(self) -> NDArray[np.float32]:
        return self.model.theta_D.numpy().copy()
