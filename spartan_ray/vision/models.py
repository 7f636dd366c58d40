"""The networks of a configuration, with their initial weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from spartan_ray.vision.config import Parent
from spartan_ray.vision.data import Splits
from spartan_ray.vision.layers import FoldedBatchNorm2d, LiveConv2d
from spartan_ray.vision.resnet import ResNet18
from spartan_ray.vision.weights import imagenet_file, load_weights, read_weights


def build_model(config: Parent, classes: int) -> nn.Module:
    """The network of the configuration with torch's current random state as its initial weights."""
    return ResNet18(classes, config.stem) if config.model == "resnet18" else _convnet(classes)


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
    about = {"model": config.model, "stem": config.stem, "classes": splits.classes}
    return json.dumps(about | {"mean": splits.mean_C, "std": splits.std_C})
