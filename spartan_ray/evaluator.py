"""Scores members on one device: parent + seed -> descendant -> fitness, and its slice of the update.

Knows nothing of Ray; a worker is the Ray actor around one evaluator. Shapes: D parameters, K members,
N images of a generation.
"""

from __future__ import annotations

import math
import os
import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spartan_ray.config import Config, Evolution, ImageSet, Parent
from spartan_ray.data import Images, Splits
from spartan_ray.fitness import Normaliser, recalibrate, score
from spartan_ray.model import FlatModel, build_model
from spartan_ray.noise import kernel_for
from spartan_ray.strategies.base import Members, Scores

# SGD images that recalibrate BatchNorm: the same ones in the whole run.
REFERENCE_IMAGES = 512


def repeatable_gpu() -> torch.device:
    """The first GPU of this process, set up so that the same work has the same bits."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", 0)


def reference_images(splits: Splits) -> Images:
    """The SGD images whose statistics BatchNorm is given by recalibration."""
    return splits.sgd[slice(0, REFERENCE_IMAGES)]


@dataclass(frozen=True)
class ParentState:
    """The parent as it is broadcast, with what its descendants are made and scored by."""

    theta_D: NDArray[np.float32]
    buffers: list[NDArray[np.generic]]
    scale: NDArray[np.float32] | None  # a number a parameter tensor, or an element; None: 1
    image_sets: dict[ImageSet, NDArray[np.int64]]  # indices into the evolution split


class Evaluator:
    """Builds descendants in place in its own module, always from the pristine parent.

    `reference` are the images that recalibrate BatchNorm for each descendant."""

    def __init__(
        self,
        config: Evolution,
        module: nn.Module,
        images: Images,
        reference: Images,
        normalise: Normaliser,
        device: torch.device,
    ) -> None:
        self.config = config
        self.model = FlatModel(module, device)
        self.split = images.to(device)
        self.reference = reference.to(device)
        self.normalise = normalise
        self.device = device
        self.kernel = kernel_for(config.noise, device)
        self.theta_D = self.model.theta_D
        self.scale_D: torch.Tensor | None = None
        self.image_sets: dict[ImageSet, Images] = {}

    def load(self, parent: ParentState) -> None:
        """Take a new parent. On a CPU its parameters stay where they are, shared with other workers."""
        with warnings.catch_warnings():
            # Shared memory is read-only, and so is what is done with theta_D.
            warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
            self.theta_D = torch.from_numpy(parent.theta_D).to(self.device)
            scale = None if parent.scale is None else torch.from_numpy(parent.scale).to(self.device)
        self.scale_D = scale if scale is None or len(scale) == len(self.theta_D) else self.model.spread(scale)
        self.model.load_buffers([torch.from_numpy(buffer.copy()) for buffer in parent.buffers])
        self.image_sets = {
            name: self.split[torch.from_numpy(image_N.copy()).to(self.device)]
            for name, image_N in parent.image_sets.items()
        }

    def evaluate(self, members: Members, images: ImageSet, bar: float) -> Scores:
        """Score each member; one that can no longer exceed the bar is left."""
        rows = []
        for seed, offset, gain in zip(members.seed_K, members.offset_K, members.gain_K, strict=True):
            self.kernel.descend(self.theta_D, self.scale_D, int(seed), offset, gain, self.model.theta_D)
            if self.config.batchnorm == "recalibrate":
                recalibrate(self.model.module, self.normalise(self.reference.pixels_NHWC))
            part = self.image_sets[images]
            rows.append(score(self.model.module, part, self.normalise, self.config.batchnorm, self.config.fitness, bar))
        loss_K, accuracy_K, images_K = zip(*rows, strict=True)
        return Scores(np.array(loss_K), np.array(accuracy_K), np.array(images_K))

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        """Elements [start, stop) of sum_k weight_k * noise_k."""
        return self.kernel.accumulate(seed_K, weight_K, start, stop).cpu().numpy()


@dataclass(frozen=True)
class EvaluatorSpec:
    """What an evaluator of a run is made from; sent to each worker once."""

    parent: Parent
    evolution: Evolution
    images: Images  # the evolution split
    reference: Images  # SGD images that recalibrate BatchNorm
    classes: int
    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    threads: int

    @classmethod
    def of(cls, config: Config, splits: Splits) -> EvaluatorSpec:
        return cls(
            config.parent,
            config.evolution,
            splits.evolution,
            reference_images(splits),
            len(splits.classes),
            splits.mean_C,
            splits.std_C,
            config.cluster.cpus_per_worker,
        )

    def make(self, device: torch.device) -> Evaluator:
        module = build_model(self.parent, self.classes)
        normalise = Normaliser(self.mean_C, self.std_C, device)
        return Evaluator(self.evolution, module, self.images, self.reference, normalise, device)


class LocalPool:
    """A pool's work done in this process by one evaluator, in the order of the members."""

    def __init__(self, evaluator: Evaluator) -> None:
        self.evaluator = evaluator
        self.counts: dict[str, float] = {"retries": 0}
        self.infos: list[None] = []

    def broadcast(self, parent: ParentState) -> None:
        self.evaluator.load(parent)

    def evaluate(self, members: Members, images: ImageSet = "fitness", bar: float = -math.inf) -> Scores:
        return self.evaluator.evaluate(members, images, bar)

    def weighted_sum(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], size_D: int
    ) -> NDArray[np.float32]:
        return self.evaluator.accumulate(seed_K, weight_K, 0, size_D)
