"""Compares scoring many small networks in one pass with EvoTorch's vectorised problem: 4,940 parameters, one core.

Prints the microseconds per member of a whole generation (noise, scores, update): median, minimum and maximum.

    python benchmarks/small_networks.py      EvoTorch is optional
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable

import numpy as np
import torch
from torch import nn
from torch.func import functional_call, vmap

from spartan_ray.engine.population import Population
from spartan_ray.engine.strategies.es import EvolutionStrategies

MEMBERS, ROUNDS, SIGMA = 2048, 9, 0.01


def policy() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 12))


def closeness(network: nn.Module, inputs_NI: torch.Tensor) -> torch.Tensor:
    output_NO: torch.Tensor = network(inputs_NI)
    return -(output_NO - 1).square().mean(1)


def ours(inputs_NI: torch.Tensor, batch_members: int) -> Callable[[], object]:
    def fitness(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        return closeness(network, inputs_NI[case_N])

    population = Population(policy(), fitness, cases=len(inputs_NI), batch_members=batch_members)
    strategy = EvolutionStrategies(MEMBERS, sigma=SIGMA, lr=0.0001, mirrored=True, shaping="centered-rank")
    return lambda: population.step(strategy)


def evotorchs(inputs_NI: torch.Tensor) -> Callable[[], object]:
    """Use PGPE with a fixed standard deviation and plain SGD, the same method as ours, on a vectorised problem."""
    from evotorch import Problem
    from evotorch.algorithms import PGPE

    network = policy()
    shapes = {name: parameter.shape for name, parameter in network.named_parameters()}

    def one(vector_D: torch.Tensor) -> torch.Tensor:
        parts = vector_D.split([shape.numel() for shape in shapes.values()])
        named = {name: part.view(shape) for (name, shape), part in zip(shapes.items(), parts, strict=True)}
        output_NO: torch.Tensor = functional_call(network, named, (inputs_NI,))
        return -(output_NO - 1).square().mean()

    problem = Problem(
        "max", vmap(one), solution_length=sum(shape.numel() for shape in shapes.values()),
        initial_bounds=(-0.1, 0.1), vectorized=True, num_actors=0,
    )  # fmt: skip
    searcher = PGPE(
        problem, popsize=MEMBERS, center_learning_rate=0.0001, stdev_learning_rate=0.0, stdev_init=SIGMA,
        ranking_method="centered", optimizer="sgd",
    )  # fmt: skip
    step: Callable[[], object] = searcher.step
    return step


def main() -> None:
    torch.set_num_threads(1)
    for cases in (1, 64):
        inputs_NI = torch.randn(cases, 64)
        steps = {f"batch_members={size}": ours(inputs_NI, size) for size in (1, 16, 64, 256)}
        try:
            steps["EvoTorch, vectorised"] = evotorchs(inputs_NI)
        except ImportError:
            print("EvoTorch is not installed")
        seconds: dict[str, list[float]] = {name: [] for name in steps}
        for number, name in itertools.product(range(ROUNDS + 1), steps):  # alternate between the ways
            started = time.perf_counter()
            with torch.no_grad():
                steps[name]()
            if number:  # the first compiles
                seconds[name].append((time.perf_counter() - started) / MEMBERS * 1e6)
        slowest = float(np.median(seconds["batch_members=1"]))
        for name, times in seconds.items():
            median = float(np.median(times))
            print(
                f"{cases:2} inputs  {name:22} {median:7.1f} us per member ({min(times):.1f} to {max(times):.1f}), "
                f"{slowest / median:.1f} times as fast as one at a time"
            )


if __name__ == "__main__":
    main()
