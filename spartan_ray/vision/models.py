"""The networks of a configuration, with their initial weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import nn

from spartan_ray.errors import InputError, one_line
from spartan_ray.naming import imported
from spartan_ray.vision.config import Parent
from spartan_ray.vision.data import Splits
from spartan_ray.vision.layers import FoldedBatchNorm2d, LiveConv2d, hasten
from spartan_ray.vision.resnet import ResNet18
from spartan_ray.vision.weights import imagenet_file, load_weights, read_weights


def build_model(config: Parent, classes: int) -> nn.Module:
    """The network of the configuration with torch's current random state as its initial weights.

    Raises InputError when it cannot be made."""
    if config.model == "resnet18":
        return ResNet18(classes, config.stem, config.width)
    if config.model == "convnet":
        return _convnet(classes)
    make, said = imported("parent.model", config.model), f"parent.model ({config.model})"
    try:
        network = make(num_classes=classes)
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise InputError(f"{said}: cannot be made with num_classes={classes}: {reason}") from error
    if not isinstance(network, nn.Module):
        raise InputError(f"{said}: made a {type(network).__name__}: expected an nn.Module")
    hasten(network)
    network.register_forward_hook(_logits)
    return network


def _logits(network: nn.Module, inputs: Any, output: Any) -> Any:
    """Of what a network in training returns with auxiliary classifiers, its own logits."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def refuse_unfit(network: nn.Module, config: Parent, size: int, classes: int) -> None:
    """Raises InputError for a network that does not turn images of a size into logits."""
    try:
        shape = tuple(network.eval()(torch.zeros(2, 3, size, size)).shape)
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise InputError(
            f"parent.model ({config.model}): cannot take images of {size} x {size} pixels (data.image_size): {reason}"
        ) from error
    if any(parameter.dtype != torch.float32 for parameter in network.parameters() if parameter.requires_grad):
        raise InputError(f"parent.model ({config.model}): is in half precision: that is parent.precision's to say")
    if shape != (2, classes):
        raise InputError(f"parent.model ({config.model}): returns {shape} for 2 images: expected (2, {classes})")


def _convnet(classes: int) -> nn.Module:
    def block(channels_in: int, channels_out: int) -> list[nn.Module]:
        convolution = LiveConv2d(channels_in, channels_out, 3, stride=2, padding=1, bias=False)
        return [convolution, FoldedBatchNorm2d(channels_out), nn.ReLU()]

    return nn.Sequential(
        *block(3, 16), *block(16, 32), *block(32, 64), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, classes)
    )


def initial_model(config: Parent, classes: int, seed: int) -> tuple[nn.Module, list[str]]:
    """The parent at the start of a run, and what is to be said of its weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_model(config, classes)
    if config.weights == "none":
        return network, []
    path = imagenet_file(config) if config.weights == "imagenet" else Path(config.weights)
    return network, load_weights(network, path, read_weights(path))


def describe(config: Parent, splits: Splits) -> str:
    """What a file of weights says of itself, as JSON: how to build its network and to normalise its images."""
    about = {name: getattr(config, name) for name in ("model", "stem", "width")}
    images = {name: getattr(splits, name) for name in ("classes", "image_size")}
    return json.dumps(about | images | {"mean": splits.mean_C, "std": splits.std_C})
