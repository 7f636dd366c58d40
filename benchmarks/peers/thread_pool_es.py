"""The ES code that the article uses (staturecrane/PyTorch-ES), rewritten from a description, not copied.

As in the original, float64 normal noise for all K members is drawn first and kept. A pool of threads scores, for each
member, a deep copy of the network plus sigma * noise. Rewards are z-scored. For each tensor the K noises are stacked
and multiplied by the scores, and lr / (K sigma) times the sum is added. Where the description leaves a choice, the
faster option is used: NumPy's newer generator, and a matrix-vector product for the sum."""

from __future__ import annotations

import copy
import time
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from work import LR, SIGMA, Fitness, initial_network, measure, parse_arguments, zscore

Noise = list[NDArray[np.float64]]  # one member's noise, by tensor


def sample(network: nn.Module, population: int, random: np.random.Generator) -> list[Noise]:
    """Draw normal noise for every parameter of every member."""
    shapes = [tuple(tensor.shape) for tensor in network.parameters()]
    return [[random.standard_normal(shape) for shape in shapes] for _ in range(population)]


@torch.no_grad()
def descend(network: nn.Module, noise: Noise, sigma: float) -> nn.Module:
    """Return a copy of the network plus sigma * noise."""
    descendant = copy.deepcopy(network)
    for tensor, unit in zip(descendant.parameters(), noise, strict=True):
        tensor.add_(torch.from_numpy(sigma * unit).float())
    return descendant


@torch.no_grad()
def update(network: nn.Module, noise_K: list[Noise], fitness_K: list[float], lr: float, sigma: float) -> None:
    """Add lr / (K sigma) * sum of score * noise to the network."""
    rate, score_K = lr / (len(noise_K) * sigma), zscore(fitness_K)
    for tensor, units in zip(network.parameters(), zip(*noise_K, strict=True), strict=True):
        tensor.add_(torch.from_numpy(rate * np.tensordot(score_K, np.stack(units), 1)).float())


def main() -> None:
    arguments = parse_arguments(__doc__)
    network, fitness = initial_network(), Fitness(arguments.images)
    random = np.random.default_rng(0)

    with ThreadPoolExecutor(arguments.workers, initializer=torch.set_num_threads, initargs=(1,)) as pool:

        def generation() -> float:
            noise_K = sample(network, arguments.population, random)
            started = time.perf_counter()
            fitness_K = list(pool.map(lambda noise: fitness(descend(network, noise, SIGMA)), noise_K))
            seconds = time.perf_counter() - started
            update(network, noise_K, fitness_K, LR, SIGMA)
            return seconds

        measure("thread_pool_es", ["torch", "numpy"], arguments, generation)


if __name__ == "__main__":
    main()
