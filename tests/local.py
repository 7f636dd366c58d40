"""An evolve phase in this process: the pool's interface around one evaluator, without Ray."""

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

from spartan_ray.config import Data, Evolution, ImageSet, Parent
from spartan_ray.data import Images, Splits, load_splits
from spartan_ray.evaluator import Evaluator, LocalPool, ParentState, Scale, reference_images
from spartan_ray.evolve import Evolver
from spartan_ray.fitness import Normaliser, Result, recalibrate, score
from spartan_ray.model import FlatModel, Folding, initial_model
from spartan_ray.noise import noise
from spartan_ray.record import Row
from spartan_ray.strategies import Members, Outcome, make_strategy
from spartan_ray.strategies.base import WHOLE, Part, Scores

CPU = torch.device("cpu")
PARENT = Parent(model="convnet", threads=1)
SPLITS = load_splits(Data(name="digits", sgd_images=600, evolution_images=600), 0)
NORMALISE = Normaliser(SPLITS.mean_C, SPLITS.std_C, CPU)


def scored(module: nn.Module, images: Images, normalise: Normaliser = NORMALISE) -> Result:
    """A network's score to the bit as workers compute it, with BatchNorm folded in."""
    with Folding(module, normalise(images.pixels_NHWC[:1]))(torch.float32):
        return score(module, images, normalise)


class WatchedPool(LocalPool):
    """Keeps what it was asked. An image set in `fitness` is not looked at: a descendant has that fitness of its
    parameters, and NaN for the kind of fitness that the phase is not by."""

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__(evaluator)
        self.fitness: dict[ImageSet, Callable[[NDArray[np.float32]], float]] = {}
        self.broadcasts: list[ParentState] = []
        self.scales: list[Scale] = []
        self.asked: list[tuple[int, str]] = []

    def broadcast(self, parent: ParentState) -> None:
        """A copy that cannot be written to, as in Ray's shared memory."""
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
        self, members: Members, images: ImageSet = "fitness", bar: float = -math.inf, part: Part = WHOLE
    ) -> Scores:
        self.asked.append((len(members), images))
        if images not in self.fitness:
            return super().evaluate(members, images, bar, part)
        fitness_K = np.empty(len(members))
        for k, (seed, offset, gain) in enumerate(zip(members.seed_K, members.offset_K, members.gain_K, strict=True)):
            self.evaluator.descend(int(seed), offset, gain)
            fitness_K[k] = self.fitness[images](self.evaluator.model.theta_D.numpy())
        nan_K, images_K = (
            np.full_like(fitness_K, math.nan),
            np.full(len(members), len(self.evaluator.image_sets[images])),
        )
        by_loss = self.evaluator.config.fitness == "loss"
        return Scores(-fitness_K, nan_K, images_K) if by_loss else Scores(nan_K, fitness_K, images_K)


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
    """A parent that learned in closed form to classify what random filters see, and a mutation away from there, so that
    it can become better. Steps of gradient descent would make another parent of each processor's rounding."""
    module = initial_model(PARENT, 10, 0)[0]
    module.load_state_dict(_trained_state())
    return FlatModel(module, CPU)


class Phase:
    """Evolve phases of one parent; `evolve` runs the next one."""

    def __init__(self, splits: Splits = SPLITS, **evolution: Any) -> None:
        self.config = Evolution(**{"every": 1, "population": 12, "fitness_images": 100} | evolution).resolved(2)
        self.model = trained()
        evaluator = Evaluator(
            self.config, initial_model(PARENT, 10, 9)[0], splits.evolution, reference_images(splits), NORMALISE, CPU
        )
        self.pool = WatchedPool(evaluator)
        strategy = make_strategy(self.config, 10)
        assert strategy
        self.evolver = Evolver(self.config, 7, strategy, self.model, splits, NORMALISE, self.pool)
        self.generation = 0

    def evolve(self) -> tuple[Outcome, Row]:
        self.generation += 1
        return self.evolver.evolve(self.generation)

    def score(self, images: ImageSet = "fitness") -> Result:
        """The parent as it is now on the images of the last phase, by the statistics it has."""
        index_N = torch.from_numpy(self.evolver.image_sets[images])
        return scored(self.model.module, self.pool.evaluator.split[index_N])

    @property
    def theta_D(self) -> NDArray[np.float32]:
        return self.model.theta_D.numpy().copy()
