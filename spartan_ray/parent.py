"""Gradient training of the parent. Shapes: N images of a batch, C colours."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F

from spartan_ray.config import Parent as ParentConfig
from spartan_ray.data import Images, permutation, random_key
from spartan_ray.fitness import Normaliser
from spartan_ray.model import FlatModel

# Purposes of the keys of `permutation` and of torch's generators, beside the seed.
ORDER_OF_EPOCH = 1 << 32
AUGMENTATION_OF_EPOCH = 1 << 34
CROP_MARGIN = 4


def make_optimizer(config: ParentConfig, parameters: list[torch.nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of the configuration over all parameters."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay)


class Trainer:
    """Trains a FlatModel in place. An epoch's batches are a function of (seed, epoch) alone."""

    def __init__(
        self, config: ParentConfig, model: FlatModel, images: Images, normalise: Normaliser, seed: int, augment: bool
    ) -> None:
        self.config = config
        self.model = model
        self.images = images
        self.normalise = normalise
        self.seed = seed
        self.augment = augment
        self.optimizer = make_optimizer(config, list(model.module.parameters()))

    def train_epoch(self, epoch: int, on_batch: Callable[[int], None]) -> int:
        """One pass over the images in a new order; calls on_batch(images of the batch) after each step.
        A last batch of a single image is dropped, since BatchNorm has no variance for it.
        Returns the number of images trained on."""
        module, device = self.model.module, self.images.labels_N.device
        module.train()
        order_N = torch.from_numpy(permutation(len(self.images), self.seed, ORDER_OF_EPOCH + epoch)).to(device)
        random = torch.Generator().manual_seed(random_key(self.seed, AUGMENTATION_OF_EPOCH + epoch))
        trained = 0
        for index_N in order_N.split(self.config.batch_size):
            if len(index_N) == 1:
                continue
            batch = self.images[index_N]
            pixels_NHWC = shift_and_flip(batch.pixels_NHWC, random) if self.augment else batch.pixels_NHWC
            with torch.autocast(device.type, torch.bfloat16, enabled=self.config.precision == "bf16"):
                logits_NC = module(self.normalise(pixels_NHWC))
            loss = F.cross_entropy(logits_NC.float(), batch.labels_N)
            self.optimizer.zero_grad(set_to_none=True)
            loss.backward()
            self.optimizer.step()
            trained += len(index_N)
            on_batch(len(index_N))
        return trained


def shift_and_flip(pixels_NHWC: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Each image flipped left to right half of the time and shifted by up to 4 pixels, zeros outside."""
    count, height, width, _ = pixels_NHWC.shape
    device = pixels_NHWC.device
    shift_2N = torch.randint(0, 2 * CROP_MARGIN + 1, (2, count), generator=random).to(device)
    flip_N = torch.randint(0, 2, (count,), generator=random).bool().to(device)
    padded = F.pad(pixels_NHWC, (0, 0, CROP_MARGIN, CROP_MARGIN, CROP_MARGIN, CROP_MARGIN))
    row_NH = shift_2N[0, :, None] + torch.arange(height, device=device)
    column_NW = shift_2N[1, :, None] + torch.arange(width, device=device)
    column_NW = torch.where(flip_N[:, None], column_NW.flip(1), column_NW)
    image_N11 = torch.arange(count, device=device)[:, None, None]
    return padded[image_N11, row_NH[:, :, None], column_NW[:, None, :]]
