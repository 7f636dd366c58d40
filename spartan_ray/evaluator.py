"""Scores members on one device: parent + seed -> descendant -> fitness, and its slice of the update.

Knows nothing of Ray; a worker is the Ray actor around one evaluator. Shapes: D parameters, K members,
N images of a generation.
"""

from __future__ import annotations

import functools
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spartan_ray.config import Config, Evolution, ImageSet, Parent
from spartan_ray.data import Images, Splits
from spartan_ray.fitness import Batch, Normaliser, batches, recalibrate, tally
from spartan_ray.model import FlatModel, Folding, Leaves, build_model
from spartan_ray.noise import kernel_for
from spartan_ray.strategies.base import WHOLE, Members, Part, Scores

# SGD images that recalibrate BatchNorm: the same ones in the whole run.
REFERENCE_IMAGES = 512


def reference_images(splits: Splits) -> Images:
    """The SGD images whose statistics BatchNorm is given by recalibration."""
    return splits.sgd[slice(0, REFERENCE_IMAGES)]


@dataclass(frozen=True)
class ParentState:
    """The parent as it is broadcast, with what its descendants are made and scored by."""

    theta_D: NDArray[np.float32]
    buffers: list[NDArray[np.generic]]
    image_sets: dict[ImageSet, NDArray[np.int64]]  # indices into the evolution split


# What multiplies noise and offset: a number a parameter tensor, or an element; None: 1.
Scale = NDArray[np.float32] | None


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
        self.reference_NCHW = normalise(reference.to(device).pixels_NHWC)
        self.normalise = normalise
        self.device = device
        self.dtype = torch.bfloat16 if config.precision == "bf16" else torch.float32
        self.kernel = kernel_for(config.noise, device)
        self.folding = Folding(module, self.reference_NCHW[:1])
        self.needed_R2 = Leaves(self.model, self.reference_NCHW[:1]).ranges()
        self.theta_D = self.model.theta_D
        self.scale_D: torch.Tensor | None = None
        self.image_sets: dict[ImageSet, NDArray[np.int64]] = {}
        self.ready: dict[tuple[ImageSet, Part], list[Batch]] = {}

    @property
    def device_name(self) -> str:
        """What the bits of a score may depend on."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"

    def load(self, parent: ParentState) -> None:
        """Take a new parent. On a CPU its parameters stay where they are, shared with other workers."""
        self.theta_D = _tensor(parent.theta_D, self.device)
        self.model.load_buffers([torch.from_numpy(buffer.copy()) for buffer in parent.buffers])
        self.image_sets = parent.image_sets
        self.ready.clear()

    def load_scale(self, scale: Scale) -> None:
        """Take a new scale. On a CPU one of D elements stays where it is."""
        self.scale_D = None if scale is None else _tensor(scale, self.device)
        if self.scale_D is not None and len(self.scale_D) != len(self.theta_D):
            self.scale_D = self.model.spread(self.scale_D)

    def _batches(self, images: ImageSet, part: Part) -> list[Batch]:
        """Images as the network takes them, made once for all members."""
        if (images, part) not in self.ready:
            image_N = self.image_sets[images]
            start, stop = (int(share * len(image_N)) for share in part)
            chosen = self.split[torch.from_numpy(image_N[start:stop].copy()).to(self.device)]
            self.ready[images, part] = [
                Batch(images_NCHW.to(self.dtype), labels_N) for images_NCHW, labels_N in batches(chosen, self.normalise)
            ]
        return self.ready[images, part]

    def evaluate(self, members: Members, images: ImageSet, bar: float, part: Part = WHOLE) -> Scores:
        """Score each member on a part of the images; one that can no longer exceed the bar is left. What is not
        finite in any way has the loss and the accuracy NaN."""
        scored_batches = self._batches(images, part)
        count = sum(len(batch.labels_N) for batch in scored_batches)
        folding = nullcontext if self.config.batchnorm == "batch" else functools.partial(self.folding, self.dtype)
        loss_K = torch.empty(len(members), dtype=torch.float64, device=self.device)
        correct_K = torch.empty(len(members), dtype=torch.int64, device=self.device)
        images_K = np.empty(len(members), np.int64)
        for k, (seed, offset, gain) in enumerate(zip(members.seed_K, members.offset_K, members.gain_K, strict=True)):
            self.descend(int(seed), offset, gain, self.needed_R2)
            if self.config.batchnorm == "recalibrate":
                recalibrate(self.model.module, self.reference_NCHW)
            with folding(), torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32):
                one = tally(self.model.module, scored_batches, count, self.config.batchnorm, self.config.fitness, bar)
            loss_K[k], correct_K[k], images_K[k] = one
        # One wait for the device a call.
        scores = Scores(loss_K.cpu().numpy() / images_K, correct_K.cpu().numpy() / images_K, images_K)
        # Outputs that are not numbers are classified too, as class 0: a dead network has no accuracy either.
        dead_K = ~np.isfinite(scores.loss_K)
        scores.loss_K[dead_K] = scores.accuracy_K[dead_K] = math.nan
        return scores

    def descend(self, seed: int, offset: float, gain: float, needed_R2: NDArray[np.int64] | None = None) -> None:
        """Make the module a descendant of the parent, or as much of it as is needed."""
        self.kernel.descend(self.theta_D, self.scale_D, seed, offset, gain, self.model.theta_D, needed_R2=needed_R2)

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


def _tensor(array: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """Memory that is shared is read-only, and so is what is done with the tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
        return torch.from_numpy(array).to(device)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch with so many threads, None as it is: its bits depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)


class LocalPool:
    """A pool's work done in this process by one evaluator, in the order of the members."""

    def __init__(self, evaluator: Evaluator, threads: int | None = None) -> None:
        self.evaluator = evaluator
        self.threads = threads
        self.counts: dict[str, float] = {"retries": 0}
        self.infos: list[None] = []

    @property
    def devices(self) -> set[str]:
        """The names of the devices that score."""
        return {self.evaluator.device_name}

    def broadcast(self, parent: ParentState) -> None:
        self.evaluator.load(parent)

    def broadcast_scale(self, scale: Scale) -> None:
        self.evaluator.load_scale(scale)

    def evaluate(
        self, members: Members, images: ImageSet = "fitness", bar: float = -math.inf, part: Part = WHOLE
    ) -> Scores:
        with threads(self.threads):
            return self.evaluator.evaluate(members, images, bar, part)

    def weighted_sum(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], size_D: int
    ) -> NDArray[np.float32]:
        return self.evaluator.accumulate(seed_K, weight_K, 0, size_D)
