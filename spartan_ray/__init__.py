"""Spartan Ray: alternate SGD with evolution, and score the population in this process or on a Ray cluster."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from spartan_ray.cli.from_python import Result, train
    from spartan_ray.distributed.population import Population
    from spartan_ray.engine.fitness import Fitness
    from spartan_ray.engine.optimizer import EvolutionOptimizer
    from spartan_ray.engine.strategies.es import EvolutionStrategies
    from spartan_ray.engine.strategies.random_gradients import RandomGradients
    from spartan_ray.engine.strategies.requests import Outcome, Strategy
    from spartan_ray.errors import InputError, RunError

__version__ = "0.2.0"
__all__ = [
    "EvolutionOptimizer",
    "EvolutionStrategies",
    "Fitness",
    "InputError",
    "Outcome",
    "Population",
    "RandomGradients",
    "Result",
    "RunError",
    "Strategy",
    "train",
]

# These names are imported on first use, because `spartan --help` must not import torch.
_HOMES = {
    "EvolutionOptimizer": "engine.optimizer",
    "EvolutionStrategies": "engine.strategies.es",
    "Fitness": "engine.fitness",
    "InputError": "errors",
    "Outcome": "engine.strategies.requests",
    "Population": "distributed.population",
    "RandomGradients": "engine.strategies.random_gradients",
    "Result": "cli.from_python",
    "RunError": "errors",
    "Strategy": "engine.strategies.requests",
    "train": "cli.from_python",
}


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'spartan_ray' has no attribute {name!r}")
    return getattr(importlib.import_module(f"spartan_ray.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted([*globals(), *_HOMES])
