"""What a run says of its images and its network."""

from __future__ import annotations

from functools import partial
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, PositiveInt

from spartan_ray.naming import checked_kind, checked_name
from spartan_ray.section import Fraction, NonNegativeFloat, PositiveFloat, Section, no_url

# Kinds of averages, with the most epochs of those that are of epochs: each is a vector of parameters in memory.
AVERAGES = {"epochs": 1000, "soup": 1000}
Moments = Literal["keep", "reset", "rescale"]


class Data(Section):
    """The images and how they are split."""

    prefix = "data"

    name: Literal["cifar10", "fashion-mnist", "digits", "folder"] = "cifar10"
    """Data set; `folder` reads train/<class>/* and test/<class>/* under data.root."""
    root: Annotated[str, AfterValidator(partial(no_url, "data.root"))] | None = None
    """Where the data set lies or is downloaded to (default: data/NAME; `digits` needs none)."""
    classes: Annotated[str, Field(min_length=1)] = "all"
    """Only these classes, with commas, in this order: cat,dog (default: all)."""
    download: bool = True
    """Download a torchvision data set that is not under data.root."""
    sgd_images: PositiveInt | None = None
    """Training images that the gradient sees (default: 80 % of the training part)."""
    evolution_images: PositiveInt | None = None
    """Training images that score descendants (default: 10 %)."""
    validation_images: PositiveInt | None = None
    """Training images that only watch (default: 10 %)."""
    sgd_on_evolution: bool = False
    """Let SGD train on the evolution split too: the baseline that sees as many images as SGD + evolution."""
    image_size: Annotated[int, Field(ge=32, le=224)] = 32
    """Pixels a side, to which images are resized. All are held in memory: 3 kB an image at 32, 150 kB at 224."""
    augment: bool = False
    """Random flips and shifts of an eighth of the SGD images (do not use flips for digits)."""


class Parent(Section):
    """The parent network and its gradient training."""

    prefix = "parent"

    model: Annotated[str, AfterValidator(partial(checked_name, "parent.model", ("resnet18", "convnet")))] = "resnet18"
    """resnet18, convnet (small, to try the machinery), or package.module:Name, called with num_classes=N."""
    stem: Literal["imagenet", "cifar"] = "imagenet"
    """First layers of resnet18: imagenet (7x7 stride 2, pooling) or cifar (3x3, 16 times the work)."""
    width: Annotated[int, Field(ge=1, le=1024)] = 64
    """Channels of the first stage of resnet18; the fourth has eight times as many."""
    weights: Annotated[str, AfterValidator(partial(no_url, "parent.weights"))] = "none"
    """none, imagenet (of torchvision's models), or a FILE: a state dict as .pt, .pth or .safetensors."""
    optimizer: Literal["sgd", "adam", "adamw"] = "sgd"
    """Optimizer of the SGD epochs."""
    lr: PositiveFloat = 0.01
    """Learning rate of the first epoch."""
    schedule: Literal["constant", "cosine"] = "constant"
    """Learning rate over the run: constant, as in the article, or half a cosine to nearly 0 in the last epoch."""
    momentum: Fraction = 0.9
    """Momentum of sgd; adam and adamw take it as beta1."""
    weight_decay: NonNegativeFloat = 0.0
    """Weight decay: L2 for sgd and adam, decoupled for adamw."""
    batch_size: Annotated[int, Field(ge=2)] = 128
    """Images a gradient step."""
    gradient_noise: PositiveFloat | None = None
    """Gaussian noise on gradients: eta of its variance eta / (1 + step)^0.55, 0.01 to 1 in the paper (default: off)."""
    moments_after_evolution: Moments = "keep"
    """Optimizer's moments after a phase that moved the parent; rescale fits them to the new gradient's norm."""
    average: Annotated[str, AfterValidator(partial(checked_kind, "parent.average", AVERAGES, ("ema",)))] = "none"
    """Average of the weights, scored and saved beside the parent: epochs:m, ema:decay, soup:m (greedy), or none."""
    precision: Literal["fp32", "tf32", "bf16"] = "tf32"
    """Arithmetic of the SGD epochs: tf32 (fp32 but on GPUs), fp32, or bf16, which is autocast."""
    threads: PositiveInt | None = None
    """CPU threads of the driver (default: cluster.driver_cpus, else all cores). The bits depend on it."""
