"""Minimises three functions of 100 dimensions by equal numbers of evaluations, and compares with EvoTorch and pycma.

python benchmarks/functions.py      needs evotorch and cma
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import nn

from spartan_ray.engine.population import Population
from spartan_ray.engine.strategies.es import EvolutionStrategies

DIMENSIONS, EVALUATIONS, SEEDS, BOUND = 100, 100_000, 5, 5.12


def sphere(x_D: torch.Tensor) -> torch.Tensor:
    return x_D.square().sum(-1)


def rosenbrock(x_D: torch.Tensor) -> torch.Tensor:
    a_D, b_D = x_D[..., :-1], x_D[..., 1:]
    return (100 * (b_D - a_D**2) ** 2 + (1 - a_D) ** 2).sum(-1)


def rastrigin(x_D: torch.Tensor) -> torch.Tensor:
    return 10 * x_D.shape[-1] + (x_D**2 - 10 * torch.cos(2 * math.pi * x_D)).sum(-1)


Function = Callable[[torch.Tensor], torch.Tensor]


class Point(nn.Module):
    """A network whose only parameter is a point."""

    def __init__(self, x_D: torch.Tensor) -> None:
        super().__init__()
        self.x_D = nn.Parameter(x_D.clone())


def start(seed: int) -> torch.Tensor:
    return (torch.rand(DIMENSIONS, generator=torch.Generator().manual_seed(seed)) * 2 - 1) * BOUND


def ours(function: Function, seed: int, members: int = 100) -> float:
    """Use mirrored members, centered ranks and Adam. Sigma and the learning rate decay to a hundredth."""

    def fitness(network: Any, case_N: torch.Tensor) -> torch.Tensor:
        return -function(network.x_D).expand(len(case_N))

    population = Population(Point(start(seed)), fitness, cases=1, seed=seed, noise="gaussian", batch_members=members)
    generations = EVALUATIONS // (members + 2)  # the parent and the update are scored too
    decay = 0.01 ** (1 / generations)
    strategy = EvolutionStrategies(
        members, sigma=0.5, lr=0.2, mirrored=True, shaping="centered-rank", optimizer="adam",
        sigma_decay=decay, lr_decay=decay,
    )  # fmt: skip
    for _ in range(generations):
        outcome = population.step(strategy)
    return -outcome.after


def evotorchs(algorithm: str) -> Callable[[Function, int], float]:
    def run(function: Function, seed: int) -> float:
        from evotorch import Problem
        from evotorch.algorithms import PGPE, SNES

        problem = Problem(
            "min", function, solution_length=DIMENSIONS, initial_bounds=(-BOUND, BOUND), vectorized=True, seed=seed
        )
        if algorithm == "SNES":
            searcher = SNES(problem, popsize=100, stdev_init=1.0, center_init=start(seed))
        else:
            searcher = PGPE(
                problem, popsize=100, center_learning_rate=0.2, stdev_learning_rate=0.1, stdev_init=0.5,
                optimizer="adam", ranking_method="centered", center_init=start(seed),
            )  # fmt: skip
        searcher.run(EVALUATIONS // 100)
        return float(function(searcher.status["center"]))

    return run


def pycma(function: Function, seed: int) -> float:
    import cma

    options = {"seed": seed + 1, "maxfevals": EVALUATIONS, "verbose": -9, "popsize": 100}
    search = cma.CMAEvolutionStrategy(start(seed).double().numpy(), 1.0, options)
    while not search.stop() and search.countevals < EVALUATIONS:
        points = search.ask()
        search.tell(points, function(torch.from_numpy(np.array(points))).tolist())
    return float(function(torch.from_numpy(search.mean)))


def main() -> None:
    torch.set_num_threads(1)
    methods = {
        "EvolutionStrategies": ours,
        "EvoTorch PGPE": evotorchs("PGPE"),
        "EvoTorch SNES": evotorchs("SNES"),
        "pycma CMA-ES": pycma,
    }
    print(f"median (minimum to maximum) of {SEEDS} starts after {EVALUATIONS:,} evaluations, {DIMENSIONS} dimensions")
    for function in (sphere, rosenbrock, rastrigin):
        for name, method in methods.items():
            found = [method(function, seed) for seed in range(SEEDS)]
            print(
                f"{function.__name__:10} {name:20} {np.median(found):10.3g} ({min(found):.3g} to {max(found):.3g})",
                flush=True,
            )


if __name__ == "__main__":
    main()
