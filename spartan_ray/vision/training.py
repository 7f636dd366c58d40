"""Gradient training of the parent.

Shapes: N images of a batch, C colours, D parameters, T parameter tensors."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F

from spartan_ray.engine.breeding import OptimizerState
from spartan_ray.engine.draws import permutation, random_key
from spartan_ray.engine.evaluator import packed, unpacked
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.moments import load_optimizer, optimizer_state, rescale_moments
from spartan_ray.engine.process import float32_products
from spartan_ray.engine.strategies.esgd import Settings
from spartan_ray.noise.kernels import kernel_for
from spartan_ray.vision.classification import Normaliser, mean_gradient
from spartan_ray.vision.data import Images
from spartan_ray.vision.leaves import Leaves

if TYPE_CHECKING:
    from spartan_ray.vision.config import Parent as ParentConfig

CPU = torch.device("cpu")
# Offsets that give each purpose its own keys of `permutation` and of the random generators.
ORDER_OF_EPOCH = 1 << 32
AUGMENTATION_OF_EPOCH = 1 << 34
NOISE_OF_STEP = 1 << 40
DROPOUT_OF_EPOCH = 1 << 36
# Augmentation shifts an image by at most its side divided by this number.
CROP_SHARE = 8
# Annealing exponent of the gradient noise, from the paper.
NOISE_DECAY = 0.55
# Number of SGD images whose gradient is used to rescale the optimizer's moments.
MOMENT_IMAGES = 512


def make_optimizer(config: ParentConfig, parameters: list[torch.Tensor]) -> torch.optim.Optimizer:
    """Make the configured optimizer over these parameters."""
    if config.optimizer == "sgd":
        return torch.optim.SGD(parameters, lr=config.lr, momentum=config.momentum, weight_decay=config.weight_decay)
    kind = torch.optim.Adam if config.optimizer == "adam" else torch.optim.AdamW
    return kind(parameters, lr=config.lr, betas=(config.momentum, 0.999), weight_decay=config.weight_decay)


def lr_factor(schedule: str, epoch: int, epochs: int) -> float:
    """Return the factor of the learning rate in an epoch, 1 <= epoch <= epochs. It is 1 in the first epoch."""
    return 1.0 if schedule == "constant" else (1 + math.cos(math.pi * (epoch - 1) / epochs)) / 2


def noise_deviation(eta: float, step: int) -> float:
    """Return the standard deviation of the gradient noise at a step, counted from 0. The variance is
    eta / (1 + step)^0.55 (Neelakantan et al., arXiv 1511.06807)."""
    return math.sqrt(eta / (1 + step) ** NOISE_DECAY)


class Trainer:
    """Trains a FlatModel in place. The batches of an epoch depend on (seed, epoch) alone."""

    def __init__(
        self,
        config: ParentConfig,
        model: FlatModel,
        images: Images,
        normalise: Normaliser,
        seed: int,
        augment: bool,
        epochs: int = 1,
    ) -> None:
        """`epochs` is the number of epochs of the run, for the learning rate schedule."""
        self.config = config
        self.epochs = epochs
        self.model = model
        self.images = images
        self.normalise = normalise
        self.seed = seed
        self.augment = augment
        self.leaves = Leaves(model, normalise(images.pixels_NHWC[:1]))
        self.optimizer = make_optimizer(config, self.leaves.tensors)
        self.steps = 0
        self.noise_kernel = kernel_for("gaussian", model.theta_D.device)

    def train_epoch(self, epoch: int, on_batch: Callable[[int], None]) -> int:
        """Train on all images once, in an order of this epoch's own. Call `on_batch` with the batch size after each
        step. Skip a last batch of a single image, for which BatchNorm has no variance. Return the number of images
        trained on."""
        module, device = self.model.module, self.images.labels_N.device
        module.train()
        order_N = torch.from_numpy(permutation(len(self.images), self.seed, ORDER_OF_EPOCH + epoch)).to(device)
        random = torch.Generator().manual_seed(random_key(self.seed, AUGMENTATION_OF_EPOCH + epoch))
        trained = 0
        for group in self.optimizer.param_groups:
            group["lr"] = self.config.lr * lr_factor(self.config.schedule, epoch, self.epochs)
        products = float32_products("tf32" if self.config.precision == "tf32" else "ieee")
        with self.leaves(), products, torch.random.fork_rng([device] if device.type == "cuda" else []):
            torch.manual_seed(random_key(self.seed, DROPOUT_OF_EPOCH + epoch))  # for dropout and the like
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
                self._add_noise()
                self.optimizer.step()
                self.steps += 1
                trained += len(index_N)
                on_batch(len(index_N))
        return trained

    def _add_noise(self) -> None:
        """Add annealed gaussian noise to the gradients; it depends on (seed, step) alone."""
        if self.config.gradient_noise is None:
            return
        seed_1 = np.array([random_key(self.seed, NOISE_OF_STEP + self.steps)], np.uint64)
        weight_1 = np.array([noise_deviation(self.config.gradient_noise, self.steps)], np.float32)
        noise_D = self.noise_kernel.accumulate(seed_1, weight_1, 0, self.model.theta_D.numel())
        for leaf, noise in zip(self.leaves.tensors, self.leaves.parts(noise_D), strict=True):
            if leaf.grad is not None:  # None if the loss does not depend on it
                leaf.grad += noise

    def gradient_norms(self) -> torch.Tensor:
        """Return the norm of each parameter tensor's gradient, T, for `rescale_moments` to compare. The SGD images are
        the same at each call, and BatchNorm uses the batch's statistics, as in training."""
        images = self.images[slice(0, MOMENT_IMAGES)]
        self.model.module.zero_grad(set_to_none=True)
        mean_gradient(self.model.module, images, self.normalise, "batch")
        gradient_D = self.model.gradient()
        self.model.module.zero_grad(set_to_none=True)
        return torch.stack([view.double().norm() for view in self.model.views(gradient_D)])

    def rescale_moments(self, before_T: torch.Tensor) -> None:
        """Rescale the optimizer's moments after evolution moved the parent. Multiply a tensor's first moment by the
        ratio of its gradient's norm now to the one before, and the second moment by the square of the ratio. Otherwise
        Adam divides the new parent's larger gradients by the root of the old parent's smaller second moments."""
        rescale_moments(self.optimizer, self.leaves.tensors, before_T, self.gradient_norms())

    def reset_moments(self) -> None:
        """Clear the moments: the optimizer starts anew."""
        self.optimizer.state.clear()


class Course:
    """An epoch of gradient descent on a worker, with the optimizer and learning rate given at each call. `images` are
    packed arrays, so that the workers of a node share their memory."""

    def __init__(
        self,
        config: ParentConfig,
        images: tuple[Any, Any],
        mean_C: tuple[float, ...],
        std_C: tuple[float, ...],
        augment: bool,
        epochs: int,
    ) -> None:
        self.config, self.packed, self.mean_C, self.std_C = config, images, mean_C, std_C
        self.augment, self.epochs = augment, epochs

    def to(self, device: torch.device) -> None:
        self.images = Images(*(unpacked(part, device) for part in self.packed))
        self.normalise = Normaliser(self.mean_C, self.std_C, device)

    def __call__(
        self, model: FlatModel, settings: Settings, state: OptimizerState | None, seed: int, epoch: int
    ) -> OptimizerState:
        """Train `model` in place on all images, from the optimizer's `state` if given. Return the optimizer's new
        state."""
        config = self.config.model_copy(update={"optimizer": settings.optimizer, "lr": settings.lr})
        trainer = Trainer(config, model, self.images, self.normalise, seed, self.augment, self.epochs)
        if state:
            tensors, rest = state
            load_optimizer(trainer.optimizer, {name: unpacked(value, CPU) for name, value in tensors.items()}, rest)
        trainer.train_epoch(epoch, lambda count: None)
        model.module.zero_grad(set_to_none=True)
        tensors, rest = optimizer_state(trainer.optimizer)
        return {name: packed(tensor) for name, tensor in tensors.items()}, rest


def shift_and_flip(pixels_NHWC: torch.Tensor, random: torch.Generator) -> torch.Tensor:
    """Flip each image left to right with probability 1/2, and shift it by up to an eighth of its side (4 pixels at 32)
    in each direction. Fill with zeros."""
    count, height, width, _ = pixels_NHWC.shape
    margin = height // CROP_SHARE
    device = pixels_NHWC.device
    shift_2N = torch.randint(0, 2 * margin + 1, (2, count), generator=random).to(device)
    flip_N = torch.randint(0, 2, (count,), generator=random).bool().to(device)
    padded = F.pad(pixels_NHWC, (0, 0, margin, margin, margin, margin))
    row_NH = shift_2N[0, :, None] + torch.arange(height, device=device)
    column_NW = shift_2N[1, :, None] + torch.arange(width, device=device)
    column_NW = torch.where(flip_N[:, None], column_NW.flip(1), column_NW)
    image_N11 = torch.arange(count, device=device)[:, None, None]
    return padded[image_N11, row_NH[:, :, None], column_NW[:, None, :]]
