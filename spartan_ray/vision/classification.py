"""Image classification: the cross-entropy and accuracy of a network, as a fitness for the engine and on a split.

Shapes: N images, C colours, M = 2 statistics: minus the cross-entropy, and 1 if the class is right, else 0.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from typing import Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from spartan_ray.engine.cases import batched
from spartan_ray.engine.fitness import Fitness
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.mutate import BATCHNORMS
from spartan_ray.engine.process import float32_products
from spartan_ray.vision.data import Images
from spartan_ray.vision.folding import Folding
from spartan_ray.vision.leaves import Leaves

BatchNormKind = Literal["running", "batch", "recalibrate"]
Precision = Literal["fp32", "tf32", "bf16"]


class Result(NamedTuple):
    """The scores of a network on images."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # share of images classified correctly
    images: int  # number of images scored


class Normaliser:
    """Converts uint8 pixels to the network's float inputs: (pixel / 255 - mean) / std for each colour."""

    def __init__(self, mean_C: tuple[float, ...], std_C: tuple[float, ...], device: torch.device) -> None:
        self.scale_C = (1 / (255 * torch.tensor(std_C, dtype=torch.float64))).float().to(device)
        shift_C = torch.tensor(mean_C, dtype=torch.float64) / torch.tensor(std_C, dtype=torch.float64)
        self.shift_C = shift_C.float().to(device)

    def __call__(self, pixels_NHWC: torch.Tensor) -> torch.Tensor:
        """Return float images, N x C x H x W, in channels-last memory."""
        return (pixels_NHWC * self.scale_C).sub_(self.shift_C).permute(0, 3, 1, 2)


@contextlib.contextmanager
def statistics_of(module: nn.Module, kind: BatchNormKind) -> Iterator[None]:
    """Put the module in evaluation mode. Within the context and with kind batch, BatchNorm normalises by the statistics
    of the batch and does not store them; with another kind, by its running statistics."""
    module.eval()
    layers = batchnorms(module) if kind == "batch" else []
    for layer in layers:
        layer.training, layer.track_running_stats = True, False
    try:
        yield
    finally:
        for layer in layers:
            layer.training, layer.track_running_stats = False, True


def batchnorms(module: nn.Module) -> list[nn.modules.batchnorm._BatchNorm]:
    """Return the BatchNorm layers that track running statistics."""
    found = [layer for layer in module.modules() if isinstance(layer, BATCHNORMS)]
    return [layer for layer in found if layer.track_running_stats]


@torch.inference_mode()
def recalibrate(module: nn.Module, images_NCHW: torch.Tensor) -> None:
    """Replace BatchNorm's running statistics by those of the images."""
    module.eval()
    layers = batchnorms(module)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum, layer.training = 1.0, True
    try:
        module(images_NCHW)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum, layer.training = momentum, False


def largest_batch(device: torch.device) -> int:
    """Return the largest number of images per forward pass. The bits of a score depend on it, so it depends on the
    device type alone. 256 was the fastest on the CPU cores that were measured."""
    return 256 if device.type == "cpu" else 2048


def batches(images: Images, normalise: Normaliser) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield normalised images and their labels, in batches whose sizes differ by one at most."""
    device = images.labels_N.device
    for index_N in batched(torch.arange(len(images), device=device), largest_batch(device)):
        part = images[slice(int(index_N[0]), int(index_N[-1]) + 1)]
        yield normalise(part.pixels_NHWC), part.labels_N


def statistics(logits_NC: torch.Tensor, labels_N: torch.Tensor) -> torch.Tensor:
    """Return, for each image, minus its cross-entropy and 1 if its class is right, else 0: N x M. NaN outputs count as
    some class too; their cross-entropy shows that they are not finite."""
    logits_NC = logits_NC.float()
    log_likelihood_N1 = logits_NC.log_softmax(1).gather(1, labels_N[:, None])
    return torch.cat([log_likelihood_N1, (logits_NC.argmax(1) == labels_N)[:, None]], dim=1)


@torch.inference_mode()
def score(module: nn.Module, images: Images, normalise: Normaliser) -> Result:
    """Score the module in evaluation mode, with its current weights and running statistics."""
    module.eval()
    sum_M = torch.zeros(2, dtype=torch.float64, device=images.labels_N.device)
    for images_NCHW, labels_N in batches(images, normalise):
        sum_M += statistics(module(images_NCHW), labels_N).double().sum(0)
    minus_loss, accuracy = (sum_M / len(images)).tolist()
    return Result(-minus_loss, accuracy, len(images))


def mean_gradient(module: nn.Module, images: Images, normalise: Normaliser, batchnorm: BatchNormKind) -> None:
    """Add the gradient of the images' mean cross-entropy to the parameters' gradients. BatchNorm uses the statistics of
    each batch if `batchnorm` is batch, else its running statistics. The running statistics do not change."""
    with statistics_of(module, batchnorm):
        for images_NCHW, labels_N in batches(images, normalise):
            loss = F.cross_entropy(module(images_NCHW), labels_N, reduction="sum")
            (loss / len(images)).backward()


class Classification(Fitness):
    """Fitness of a network on images: minus its mean cross-entropy, or its accuracy.

    images        scored images; a case is an index into them
    reference     images that BatchNorm is recalibrated on
    mean_C        mean of each colour, of pixels in [0, 1]; std_C is their standard deviation
    by            loss (minus the mean cross-entropy) or accuracy
    batchnorm     statistics that a descendant's BatchNorm uses: running (the parent's, folded into the convolutions),
                  batch (the scored batch's) or recalibrate (its own, on the `reference` images)
    precision     fp32, tf32 (TF32 products on GPUs that have them, else fp32) or bf16 (autocast)
    graphs        replay a member's work from a CUDA graph; ignored with `batchnorm` recalibrate"""

    def __init__(
        self,
        images: Images,
        reference: Images,
        mean_C: tuple[float, ...],
        std_C: tuple[float, ...],
        by: Literal["loss", "accuracy"] = "loss",
        batchnorm: BatchNormKind = "running",
        precision: Precision = "tf32",
        graphs: bool = False,
    ) -> None:
        self.images, self.reference = images, reference
        self.mean_C, self.std_C = mean_C, std_C
        self.statistic = 0 if by == "loss" else 1
        self.batchnorm = batchnorm
        self.dtype = torch.bfloat16 if precision == "bf16" else torch.float32
        self.products: Literal["ieee", "tf32"] = "tf32" if precision == "tf32" else "ieee"
        # Recalibration writes to the network's buffers, which a CUDA graph must not do.
        self.graphs = graphs and batchnorm != "recalibrate"
        self.cases = len(images)
        # The most that an image can contribute: a cross-entropy of 0, and one right class.
        self.best = np.array([0.0, 1.0])

    def to(self, device: torch.device) -> None:
        self.images = self.images.to(device)
        self.batch = largest_batch(device)
        self.normalise = Normaliser(self.mean_C, self.std_C, device)
        self.reference_NCHW = self.normalise(self.reference.pixels_NHWC.to(device))
        self.folding: Folding | None = None

    def needed(self, model: FlatModel) -> NDArray[np.int64]:
        return Leaves(model, self.reference_NCHW[:1]).ranges()

    def prepare(self, case_N: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        images = self.images[case_N]
        return self.normalise(images.pixels_NHWC).to(self.dtype), images.labels_N

    @contextlib.contextmanager
    def ready(self, network: nn.Module) -> Iterator[None]:
        if self.batchnorm == "recalibrate":
            recalibrate(network, self.reference_NCHW)
        if self.folding is None:
            self.folding = Folding(network, self.reference_NCHW[:1])
        device = self.reference_NCHW.device.type
        folded = contextlib.nullcontext() if self.batchnorm == "batch" else self.folding(self.dtype)
        half = torch.autocast(device, self.dtype, enabled=self.dtype != torch.float32)
        with folded, statistics_of(network, self.batchnorm), half, float32_products(self.products):
            yield

    def __call__(self, network: nn.Module, batch: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        images_NCHW, labels_N = batch
        return statistics(network(images_NCHW), labels_N)

    def value(self, mean_M: NDArray[np.float64]) -> float:
        return float(mean_M[self.statistic])

    def loss(self, network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, for gradients. Unless `batchnorm` is running, BatchNorm uses the statistics of
        this batch: members do not use fixed statistics then, and fixed ones would give another function's gradient."""
        images = self.images[case_N]
        with statistics_of(network, "running" if self.batchnorm == "running" else "batch"):
            return F.cross_entropy(network(self.normalise(images.pixels_NHWC)), images.labels_N)

    def moved(self, network: nn.Module) -> None:
        if self.batchnorm != "running":
            recalibrate(network, self.reference_NCHW)


def error(mean_M: NDArray[np.float64]) -> float:
    """Temperature of random gradients: the share of images that the parent classifies wrongly."""
    return float(1 - mean_M[1])


class RelativeLoss:
    """Temperature of random gradients: the parent's cross-entropy divided by that of a uniform guess, ln(classes)."""

    def __init__(self, classes: int) -> None:
        self.classes = classes

    def __call__(self, mean_M: NDArray[np.float64]) -> float:
        return float(-mean_M[0] / math.log(self.classes))
