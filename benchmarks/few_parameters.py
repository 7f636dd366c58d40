"""Costs of an evolve phase of ResNet18 that moves few parameters: `python benchmarks/few_parameters.py`.

Scoring is not included. One thread; medians of five repeats, with minimum and maximum."""

from __future__ import annotations

import functools
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch

from spartan_ray import Population
from spartan_ray.engine.process import set_up
from spartan_ray.engine.strategies.requests import Score, SetDirection, noisy
from spartan_ray.noise.contract import member_seeds
from spartan_ray.vision.config import Parent
from spartan_ray.vision.models import build_model

MEMBERS, TIMES = 1000, 5
WAYS = {
    "all": {},
    "no-batchnorm": {"mutate": "no-batchnorm"},
    "layer4": {"mutate": "layer4.*"},
    "batchnorm,classifier": {"mutate": "batchnorm,classifier"},
    "batchnorm": {"mutate": "batchnorm"},
    "random:16": {"subspace": "random:16"},
    "guided:2": {"subspace": "guided:2"},
}


def first_bias(network: torch.nn.Module, case_N: torch.Tensor) -> torch.Tensor:
    """A fitness that costs nothing."""
    return network.fc.bias[0].expand(len(case_N))  # type: ignore[index, union-attr]


def seconds(action: Callable[[], object]) -> str:
    action()
    found = []
    for _ in range(TIMES):
        started = time.perf_counter()
        action()
        found.append(time.perf_counter() - started)
    return f"{statistics.median(found):.4f} ({min(found):.4f} - {max(found):.4f})"


def main() -> None:
    set_up(1)
    print("| moved | parameters | noise elements | update of 1,000 members, s | a descendant, s | bytes of an update |")
    print("| --- | --- | --- | --- | --- | --- |")
    seed_K = member_seeds(0, 1, MEMBERS)
    weight_K = np.linspace(-1, 1, MEMBERS, dtype=np.float32)
    for name, settings in WAYS.items():
        network = build_model(Parent(), 10)

        def gradient(network: torch.nn.Module, generation: int) -> None:
            chance = torch.Generator().manual_seed(generation % 1009)  # any small seed
            for parameter in network.parameters():
                parameter.grad = torch.randn(parameter.shape, generator=chance)

        population = Population(network, first_bias, cases=1, gradient=gradient, **settings)  # type: ignore[arg-type]
        population.begin(("fitness",), 1)
        one = Score(noisy(seed_K[:1], 0.0, 0.01))
        population.answer(one)
        size = population.model.theta_D.numel()
        start, stop = population.basis.elements if population.basis else (0, size)
        update = seconds(functools.partial(population.answer, SetDirection(seed_K, weight_K, 1.0)))
        population.set_out(population.case_sets, 1)
        member = seconds(functools.partial(population.answer, one))
        print(f"| {name} | {size:,} | {stop - start:,} | {update} | {member} | {4 * (stop - start):,} |", flush=True)


if __name__ == "__main__":
    main()
