"""The configuration of the images (`data`) and of the network and its gradient training (`parent`)."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from spartan_ray.naming import checked_kind, checked_name
from spartan_ray.section import Fraction, NonNegativeFloat, PositiveFloat, Section, no_url

# Averages over epochs, with the largest number of epochs: each epoch is a vector of parameters in memory.
AVERAGES = {"epochs": 1000, "soup": 1000}
Moments = Literal["keep", "reset", "rescale"]


class Data(Section):
    """The images and how they are split."""

    prefix = "data"

    name: Literal["cifar10", "fashion-mnist", "digits", "folder"] = "cifar10"
    """Data set. folder reads the images train/<class>/* and test/<class>/* under data.root."""
    root: Annotated[str, AfterValidator(partial(no_url, "data.root"))] | None = None
    """Folder of the data set, and where it is downloaded to (default: data/NAME). folder needs it; digits uses none."""
    classes: Annotated[str, Field(min_length=1)] = "all"
    """Classes to use, separated by commas, in the order of their labels: cat,dog. all uses every class."""
    download: bool = True
    """Download cifar10 or fashion-mnist if it is not under data.root."""
    sgd_images: PositiveInt | None = None
    """Size of the sgd split: training images for gradient descent (default: 80 % of the training part, or what the
    other splits leave of it)."""
    evolution_images: PositiveInt | None = None
    """Size of the evolution split: training images that score descendants (default: 10 % of the training part)."""
    validation_images: PositiveInt | None = None
    """Size of the validation split: training images that are scored each epoch and never trained on (default: 10 % of
    the training part)."""
    sgd_on_evolution: bool = False
    """Train SGD on the evolution split too: the baseline that uses as many images as SGD plus evolution."""
    image_size: Annotated[int, Field(ge=32, le=224)] = 32
    """Side in pixels to which all images are resized. They are held in memory: 3 kB per image at 32, 150 kB at 224."""
    augment: bool = False
    """Flip SGD images left to right at random, and shift them by up to an eighth of their side. Not for digits, which
    flips change."""


class Parent(Section):
    """The parent network and its gradient training."""

    prefix = "parent"

    model: Annotated[str, AfterValidator(partial(checked_name, "parent.model", ("resnet18", "convnet")))] = "resnet18"
    """Network: resnet18, convnet (small, for quick trials), or package.module:Name, called with num_classes=N."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of resnet18: imagenet (7x7 convolution with stride 2, max pooling) or cifar (3x3 convolution, 16
    times the work)."""
    width: Annotated[int, Field(ge=1, le=1024)] = 64
    """Channels of the first stage of resnet18; the fourth stage has eight times as many."""
    weights: Annotated[str, AfterValidator(partial(no_url, "parent.weights"))] = "none"
    """Initial weights: none (random), imagenet (for resnet18 and torchvision's models), or the path of a state dict,
    .pt, .pth or .safetensors."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimizer of the SGD epochs."""
    lr: PositiveFloat = 0.01
    """Learning rate of the SGD epochs, before the schedule."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run: constant, as in the article, or cosine, which falls to nearly 0 in the last epoch."""
    momentum: Fraction = 0.9
    """Momentum of sgd; beta1 of adam and adamw."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay: an L2 penalty for sgd and adam, decoupled for adamw."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Mini-batch size of the SGD epochs."""
    gradient_noise: PositiveFloat | None = None
    """Add annealed Gaussian noise with variance eta / (1 + step)^0.55 to the gradients. This is eta; the paper, arXiv
    1511.06807, uses 0.01 to 1 (default: off)."""
    moments_after_evolution: Moments = "keep"
    """Moments of the optimizer after an evolve phase that moved the parent: keep, reset (start anew), or rescale (fit
    to the new gradient's norm)."""
    average: Annotated[str, AfterValidator(partial(checked_kind, "parent.average", AVERAGES, ("ema",)))] = "none"
    """Average of the weights, scored and saved in addition to the parent: epochs:m (mean of the last m epochs), soup:m
    (greedy soup of the last m epochs), ema:decay (moving average over the steps), or none."""
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    """Arithmetic of the SGD epochs: fp32, tf32 (TF32 products on GPUs that have them, else fp32), or bf16
    (autocast)."""
    threads: PositiveInt | None = None
    """CPU threads of the driver (default: cluster.driver_cpus, or all cores if that is 0). The bits of the result
    depend on it."""
