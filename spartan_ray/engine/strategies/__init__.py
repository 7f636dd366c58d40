"""Strategies turn fitnesses into the next parent: pure maths, no Ray, no torch and no network."""
