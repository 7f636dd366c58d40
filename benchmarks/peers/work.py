"""The work that every peer does, and its measurement.

The network is torchvision's ResNet18 with 10 classes and its initial weights, in evaluation mode and PyTorch's default
memory layout, in which no peer is slower than in channels-last. A descendant's fitness is minus its mean cross-entropy
on 32x32 images, the same for all peers. A worker computes with one thread. The driver may use as many threads as there
are workers, because the workers wait for it.

Shapes: K members, N images, C colours, H x W pixels.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from importlib.metadata import version

import numpy as np
import psutil
import ray
import torch
import torch.nn.functional as F
import torchvision
from numpy.typing import NDArray
from torch import nn

SIGMA = 0.01
LR = 0.0005
BATCH = 256


def parse_arguments(description: str | None) -> argparse.Namespace:
    """Parse the size of the work, and set the driver's threads to the number of workers."""
    parser = argparse.ArgumentParser(description=(description or "").partition("\n")[0])
    parser.add_argument("--workers", type=int, default=2, help="number of processes or threads, one per core")
    parser.add_argument("--population", type=int, default=16)
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--generations", type=int, default=3, help="number of timed generations, after one warm-up")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.workers)
    return arguments


def start_ray(workers: int) -> None:
    """Start a Ray for this program alone."""
    os.environ["OMP_NUM_THREADS"] = "1"  # for its workers; the driver's torch has read it already
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    ray.init(
        address="local", num_cpus=workers, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False
    )


def initial_network() -> nn.Module:
    """Return the parent, the same in every process. The state of torch's global generator does not change: EvoTorch's
    actors build the network and draw members from this generator."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network: nn.Module = torchvision.models.resnet18(num_classes=10)
    return network.eval()


class Fitness:
    """Fitness: minus the mean cross-entropy of a network on random images of a fixed seed."""

    def __init__(self, images: int) -> None:
        generator = torch.Generator().manual_seed(1)
        self.images_NCHW = torch.randn(images, 3, 32, 32, generator=generator)
        self.labels_N = torch.randint(10, (images,), generator=generator)

    @torch.inference_mode()
    def __call__(self, network: nn.Module) -> float:
        batches = zip(self.images_NCHW.split(BATCH), self.labels_N.split(BATCH), strict=True)
        loss = sum(F.cross_entropy(network(images), labels, reduction="sum").item() for images, labels in batches)
        return -loss / len(self.labels_N)


def zscore(fitness_K: list[float]) -> NDArray[np.float64]:
    """Return (f - mean) / std, with the standard deviation over the population (ddof = 0)."""
    score_K: NDArray[np.float64] = (np.array(fitness_K) - np.mean(fitness_K)) / np.std(fitness_K)
    return score_K


def measure(
    name: str, packages: list[str], arguments: argparse.Namespace, generation: Callable[[], float | None]
) -> None:
    """Time generations and print the result as JSON. A generation may return the seconds of its scoring, if that is a
    separate part.

    Memory is measured in one more generation, because watching it takes a tenth of a core."""
    generation()
    rates, scoring_rates = [], []
    for _ in range(arguments.generations):
        started = time.perf_counter()
        scoring_seconds = generation()
        rates.append(round(arguments.population / (time.perf_counter() - started), 3))
        if scoring_seconds is not None:
            scoring_rates.append(round(arguments.population / scoring_seconds, 3))
    peak_mb, peak_driver_mb = peak_memory_mb(generation)
    result = {
        "name": name,
        "version": {package: version(package) for package in packages},
        "members_per_second": rates,
        **({"scoring_members_per_second": scoring_rates} if scoring_rates else {}),
        "peak_mb": round(peak_mb),
        "peak_driver_mb": round(peak_driver_mb),
    }
    print(json.dumps(result))


def peak_memory_mb(work: Callable[[], object]) -> tuple[float, float]:
    """Do the work. Return the peak memory of this process with all its descendants, and of it alone, in 10^6 bytes."""
    peak_mb = peak_driver_mb = 0.0
    here, done = psutil.Process(), threading.Event()

    def watch() -> None:
        nonlocal peak_mb, peak_driver_mb
        while True:
            driver_mb, *others_mb = [pss_mb(process) for process in (here, *here.children(recursive=True))]
            peak_mb, peak_driver_mb = max(peak_mb, driver_mb + sum(others_mb)), max(peak_driver_mb, driver_mb)
            if done.wait(0.2):
                return

    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    work()
    done.set()
    watcher.join()
    return peak_mb, peak_driver_mb


def pss_mb(process: psutil.Process) -> float:
    """Return the memory of a process in 10^6 bytes (PSS: shared pages are divided equally). 0 if it has ended."""
    with suppress(psutil.NoSuchProcess):
        return float(process.memory_full_info().pss) / 1e6
    return 0.0
