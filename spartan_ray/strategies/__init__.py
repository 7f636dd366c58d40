"""Strategies turn fitnesses into the next parent: pure maths, no Ray and no model."""

from __future__ import annotations

from spartan_ray.config import Evolution
from spartan_ray.strategies.base import PARENT, Members, Move, Strategy, merge_seeds, with_parent
from spartan_ray.strategies.es import EvolutionStrategies

__all__ = ["PARENT", "Members", "Move", "Strategy", "make_strategy", "merge_seeds", "with_parent"]


def make_strategy(config: Evolution) -> Strategy | None:
    """The strategy that the configuration names; None where every epoch is SGD."""
    return EvolutionStrategies(config) if config.strategy == "es" else None
