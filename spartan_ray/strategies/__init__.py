"""Strategies turn fitnesses into the next parent: pure maths, no Ray and no model."""

from __future__ import annotations

from spartan_ray.config import Evolution
from spartan_ray.strategies.base import Aim, Gradient, Members, Outcome, Score, Scores, Strategy, Take, merge_seeds
from spartan_ray.strategies.es import EvolutionStrategies
from spartan_ray.strategies.random_gradients import RandomGradients

__all__ = [
    "Aim",
    "Gradient",
    "Members",
    "Outcome",
    "Score",
    "Scores",
    "Strategy",
    "Take",
    "make_strategy",
    "merge_seeds",
]


def make_strategy(config: Evolution, classes: int) -> Strategy | None:
    """The strategy that the configuration names; None where every epoch is SGD."""
    if config.strategy == "none":
        return None
    if config.strategy == "es":
        return EvolutionStrategies(config.resolved())
    return RandomGradients(config.resolved(), classes)
