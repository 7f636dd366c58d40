"""An evolve phase in this process: the pool's interface around one evaluator, without Ray."""

from __future__ import annotations

import functools
import math
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spartan_ray.config import Data, Evolution, ImageSet, Parent
from spartan_ray.data import Images, load_splits
from spartan_ray.evaluator import Evaluator, LocalPool, ParentState, Scale, reference_images
from spartan_ray.evolve import Evolver
from spartan_ray.fitness import Normaliser, Result, score
from spartan_ray.model import FlatModel, Folding, initial_model
from spartan_ray.parent import Trainer
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
    """Keeps what it was asked."""

    def __init__(self, evaluator: Evaluator) -> None:
        super().__init__(evaluator)
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
        return super().evaluate(members, images, bar, part)


@functools.cache
def _trained_state(epochs: int) -> dict[str, torch.Tensor]:
    model = FlatModel(initial_model(PARENT, 10, 0)[0], CPU)
    config = PARENT.model_copy(update={"lr": 0.05, "batch_size": 32})
    trainer = Trainer(config, model, SPLITS.sgd, NORMALISE, 0, augment=False)
    for epoch in range(epochs):
        trainer.train_epoch(epoch + 1, lambda count: None)
    return model.state_dict()


def trained(epochs: int = 3) -> FlatModel:
    """A parent that learned for some epochs."""
    module = initial_model(PARENT, 10, 0)[0]
    module.load_state_dict(_trained_state(epochs))
    return FlatModel(module, CPU)


class Phase:
    """Evolve phases of one parent; `evolve` runs the next one."""

    def __init__(self, model: FlatModel | None = None, **evolution: Any) -> None:
        self.config = Evolution(**{"every": 1, "population": 12, "fitness_images": 100} | evolution).resolved(2)
        self.model = model or trained()
        evaluator = Evaluator(
            self.config, initial_model(PARENT, 10, 9)[0], SPLITS.evolution, reference_images(SPLITS), NORMALISE, CPU
        )
        self.pool = WatchedPool(evaluator)
        strategy = make_strategy(self.config, 10)
        assert strategy
        self.evolver = Evolver(self.config, 7, strategy, self.model, SPLITS, NORMALISE, self.pool)
        self.generation = 0

    def evolve(self) -> tuple[Outcome, Row]:
        self.generation += 1
        return self.evolver.evolve(self.generation)

    def score(self, images: ImageSet = "fitness") -> Result:
        """The parent as it is now on the images of the last phase, by the statistics it has."""
        index_N = torch.from_numpy(self.evolver.image_sets[images])
        return scored(self.model.module, SPLITS.evolution[index_N])

    @property
    def theta_D(self) -> NDArray[np.float32]:
        return self.model.theta_D.numpy().copy()
