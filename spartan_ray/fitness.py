"""Score a module on images: mean cross-entropy and accuracy. Shapes: N images, C colours."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from spartan_ray.config import BatchNormKind, FitnessKind
from spartan_ray.data import Images


class Result(NamedTuple):
    """How a network does on images."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # share of images classified correctly
    images: int  # that it was scored on


class Normaliser:
    """uint8 pixels to the floats that the network sees: (pixel / 255 - mean) / std by colour."""

    def __init__(self, mean_C: tuple[float, ...], std_C: tuple[float, ...], device: torch.device) -> None:
        self.scale_C = (1 / (255 * torch.tensor(std_C, dtype=torch.float64))).float().to(device)
        shift_C = torch.tensor(mean_C, dtype=torch.float64) / torch.tensor(std_C, dtype=torch.float64)
        self.shift_C = shift_C.float().to(device)

    def __call__(self, pixels_NHWC: torch.Tensor) -> torch.Tensor:
        """Float images, N x C x H x W in channels-last memory."""
        return (pixels_NHWC * self.scale_C).sub_(self.shift_C).permute(0, 3, 1, 2)


@contextlib.contextmanager
def statistics_of(module: nn.Module, kind: BatchNormKind) -> Iterator[None]:
    """The module in evaluation mode; within it, with kind batch, BatchNorm normalises by the statistics of
    the batch and keeps nothing of them, else by its own."""
    module.eval()
    layers = _batchnorms(module) if kind == "batch" else []
    for layer in layers:
        layer.training, layer.track_running_stats = True, False
    try:
        yield
    finally:
        for layer in layers:
            layer.training, layer.track_running_stats = False, True


def _batchnorms(module: nn.Module) -> list[nn.BatchNorm2d]:
    return [layer for layer in module.modules() if isinstance(layer, nn.BatchNorm2d)]


@torch.inference_mode()
def recalibrate(module: nn.Module, images_NCHW: torch.Tensor) -> None:
    """Make BatchNorm's running statistics those of the images, whatever they were."""
    module.eval()
    layers = _batchnorms(module)
    momenta = [layer.momentum for layer in layers]
    for layer in layers:
        layer.reset_running_stats()
        layer.momentum, layer.training = 1.0, True
    try:
        module(images_NCHW)
    finally:
        for layer, momentum in zip(layers, momenta, strict=True):
            layer.momentum, layer.training = momentum, False


class Batch(NamedTuple):
    """Images as the network sees them, and their labels."""

    images_NCHW: torch.Tensor
    labels_N: torch.Tensor


class Tally(NamedTuple):
    """Sums over the images that were scored, where they were computed: reading them waits for the device."""

    loss: torch.Tensor  # float64
    correct: torch.Tensor  # int64
    images: int


def score(module: nn.Module, images: Images, normalise: Normaliser) -> Result:
    """Score the module in evaluation mode, as it is."""
    loss, correct, count = tally(module, batches(images, normalise), len(images))
    return Result(loss.item() / count, correct.item() / count, count)


@torch.inference_mode()
def tally(
    module: nn.Module,
    scored_batches: Iterable[Batch],
    count: int,
    batchnorm: BatchNormKind = "running",
    kind: FitnessKind = "loss",
    bar: float = -math.inf,
) -> Tally:
    """Sum loss and hits of the module over batches of `count` images; `batchnorm` batch takes each batch's
    statistics. Stops once its fitness of that kind can no longer exceed the bar; its means up to there do not
    exceed it either. Without a bar nothing waits for the device."""
    device = next(module.parameters()).device
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    scored = 0
    with statistics_of(module, batchnorm):
        for images_NCHW, labels_N in scored_batches:
            logits_NC = module(images_NCHW).float()
            loss += F.cross_entropy(logits_NC, labels_N, reduction="sum")
            correct += (logits_NC.argmax(1) == labels_N).sum()
            scored += len(labels_N)
            if bar > -math.inf:
                # No image has a negative loss, and none counts twice. The same division as at the end, so
                # that rounding rejects nobody who would have won.
                best = -loss.item() / count if kind == "loss" else (correct.item() + count - scored) / count
                if not best > bar:
                    break
    return Tally(loss, correct, scored)


def batches(images: Images, normalise: Normaliser) -> Iterator[Batch]:
    """The images in passes of equal size (to one), so that no small remainder has statistics of its own.

    The bits of a score depend on the size, so it is a constant of the device type; 256 is the fastest on
    the CPU cores that were measured."""
    largest = 256 if images.labels_N.device.type == "cpu" else 2048
    passes = -(-len(images) // largest)
    for start, stop in pairwise(len(images) * number // passes for number in range(passes + 1)):
        part = images[slice(start, stop)]
        yield Batch(normalise(part.pixels_NHWC), part.labels_N)
