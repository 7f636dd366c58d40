"""Score a module on images: mean cross-entropy and accuracy. Shapes: N images, C colours."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from spartan_ray.config import FitnessKind
from spartan_ray.data import Images

# Images a forward pass. The bits of a score depend on it, so it is a constant of the device type;
# 256 is the fastest on the CPU cores that were measured.
BATCH_IMAGES = {"cpu": 256}
BATCH_IMAGES_ACCELERATOR = 2048


class Score(NamedTuple):
    """How a network does on a split."""

    loss: float  # mean cross-entropy, nats
    accuracy: float  # share of images classified correctly

    def fitness(self, kind: FitnessKind) -> float:
        """Higher is better."""
        return -self.loss if kind == "loss" else self.accuracy


class Normaliser:
    """uint8 pixels to the floats that the network sees: (pixel / 255 - mean) / std by colour."""

    def __init__(self, mean_C: tuple[float, ...], std_C: tuple[float, ...], device: torch.device) -> None:
        self.scale_C = (1 / (255 * torch.tensor(std_C, dtype=torch.float64))).float().to(device)
        shift_C = torch.tensor(mean_C, dtype=torch.float64) / torch.tensor(std_C, dtype=torch.float64)
        self.shift_C = shift_C.float().to(device)

    def __call__(self, pixels_NHWC: torch.Tensor) -> torch.Tensor:
        """Float images, N x C x H x W in channels-last memory."""
        return (pixels_NHWC * self.scale_C).sub_(self.shift_C).permute(0, 3, 1, 2)


@torch.inference_mode()
def score(module: nn.Module, images: Images, normalise: Normaliser) -> Score:
    """Score the module in evaluation mode, as it is. Waits for the device once, at the end."""
    device = images.labels_N.device
    batch = BATCH_IMAGES.get(device.type, BATCH_IMAGES_ACCELERATOR)
    module.eval()
    loss = torch.zeros((), dtype=torch.float64, device=device)
    correct = torch.zeros((), dtype=torch.int64, device=device)
    for start in range(0, len(images), batch):
        part = images[slice(start, start + batch)]
        logits_NC = module(normalise(part.pixels_NHWC))
        loss += F.cross_entropy(logits_NC, part.labels_N, reduction="sum")
        correct += (logits_NC.argmax(1) == part.labels_N).sum()
    return Score(loss.item() / len(images), correct.item() / len(images))
