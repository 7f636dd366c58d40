"""Spartan Ray: SGD alternated with evolution, the population scored on a Ray cluster."""
