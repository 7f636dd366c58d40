"""Builds the network of a configuration, with its initial weights."""

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
    """Build the network of the configuration, with initial weights drawn from torch's global generator.

    Raises InputError if it cannot be built."""
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
    """Return the main logits of a network that also returns those of auxiliary classifiers in training."""
    return output[0] if isinstance(output, tuple) else output


@torch.no_grad()
def refuse_unfit(network: nn.Module, config: Parent, size: int, classes: int) -> None:
    """Raises InputError if the network does not turn images of this size into logits, or is not in float32."""
    try:
        shape = tuple(network.eval()(torch.zeros(2, 3, size, size)).shape)
    except Exception as error:
        reason = one_line(f"{type(error).__name__}: {error}")
        raise InputError(
            f"parent.model ({config.model}): cannot take images of {size} x {size} pixels (data.image_size): {reason}"
        ) from error
    if any(parameter.dtype != torch.float32 for parameter in network.parameters() if parameter.requires_grad):
        raise InputError(f"parent.model ({config.model}): has parameters that are not float32 (see parent.precision)")
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
    """Return the network at the start of a run, and notes on its weights for the user."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        network = build_model(config, classes)
    if config.weights == "none":
        return network, []
    path = imagenet_file(config) if config.weights == "imagenet" else Path(config.weights)
    return network, load_weights(network, path, read_weights(path))


def describe(config: Parent, splits: Splits) -> str:
    """Return the metadata of a file of weights as JSON: how to build its network and normalise its images."""
    about = {name: getattr(config, name) for name in ("model", "stem", "width")}
    images = {name: getattr(splits, name) for name in ("classes", "image_size")}
    return json.dumps(about | images | {"mean": splits.mean_C, "std": splits.std_C})
