"""Spartan Ray: SGD alternated with evolution, the population scored on a Ray cluster."""

__version__ = "0.1.0"
