"""Measures the error of a fitness in bf16 and TF32: `python benchmarks/precision.py IMAGES FOLDER`.

IMAGES is a folder as for `data.name folder`. FOLDER holds a parent made by `benchmarks/methods.py --width 16`. Members
are scored in fp32, in bf16, and in fp32 with the operands of convolutions and products rounded to TF32's ten mantissa
bits. Prints a table of ratios: the standard deviation of the error of a score, divided by that of the members'
scores."""

from __future__ import annotations

import argparse
import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray

from spartan_ray.engine.evaluator import Evaluator, ParentState
from spartan_ray.engine.process import set_up
from spartan_ray.engine.strategies.requests import noisy
from spartan_ray.noise.contract import member_seeds
from spartan_ray.vision.classification import Classification, Precision
from spartan_ray.vision.config import Data
from spartan_ray.vision.data import Splits, load_splits
from spartan_ray.vision.resnet import ResNet18

WIDTH, MEMBERS, IMAGES = 16, 48, 1024
SIGMAS = (0.02, 0.002, 0.0002)
LOW_BITS = 13  # mantissa bits that float32 has and TF32 has not


def cut(tensor: torch.Tensor) -> torch.Tensor:
    """Round to ten mantissa bits, ties to even."""
    bits = tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)
    bits = bits.view(torch.int32)
    bits = (bits + (1 << (LOW_BITS - 1)) - 1 + ((bits >> LOW_BITS) & 1)) & -(1 << LOW_BITS)
    return bits.view(torch.float32)


@contextlib.contextmanager
def tf32() -> Iterator[None]:
    plain: Any = F.conv2d, F.linear
    F.conv2d = lambda input, weight, *rest: plain[0](cut(input), cut(weight), *rest)
    F.linear = lambda input, weight, *rest: plain[1](cut(input), cut(weight), *rest)
    try:
        yield
    finally:
        F.conv2d, F.linear = plain


def scores(splits: Splits, saved: Any, precision: Precision, sigma: float) -> NDArray[np.float64]:
    """Return minus the loss and the accuracy of the members, K x 2."""
    reference = splits.sgd[slice(0, 512)]
    fitness = Classification(splits.evolution, reference, splits.mean_C, splits.std_C, precision=precision)
    evaluator = Evaluator(ResNet18(len(splits.classes), "imagenet", WIDTH), fitness, "uniform", torch.device("cpu"))
    buffers = [buffer.numpy() for buffer in saved["buffers"]]
    evaluator.load(ParentState(saved["thetas"][-1].numpy(), buffers, {"fitness": np.arange(IMAGES)}))
    return evaluator.evaluate(noisy(member_seeds(0, 1, MEMBERS), 0.0, sigma), "fitness", -math.inf)[0].mean_KM


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", help="a folder with train/<class>/* and test/<class>/*")
    parser.add_argument("folder", type=Path, help="the FOLDER of benchmarks/methods.py --width 16")
    arguments = parser.parse_args()
    set_up(1)
    data = Data(name="folder", root=arguments.images, sgd_images=10_000, evolution_images=20_000)
    splits, saved = load_splits(data, 0), torch.load(arguments.folder / f"parent-0-{WIDTH}.pt")
    print("| sigma | TF32, by loss | by accuracy | bf16, by loss | by accuracy |\n|" + " --- |" * 5)
    for sigma in SIGMAS:
        exact_KM = scores(splits, saved, "fp32", sigma)
        with tf32():
            others = [scores(splits, saved, "fp32", sigma)]
        others.append(scores(splits, saved, "bf16", sigma))
        shares = [share for other_KM in others for share in (other_KM - exact_KM).std(0) / exact_KM.std(0)]
        print(f"| {sigma} | " + " | ".join(f"{share:.2g}" for share in shares) + " |", flush=True)


if __name__ == "__main__":
    main()
