"""Strategies, which turn fitnesses into the next parent, and the requests that they yield.

Only mathematics on seeds and numbers lives here. Ray, torch and networks must not: they belong to the object that
answers the requests, such as a Population.
"""
