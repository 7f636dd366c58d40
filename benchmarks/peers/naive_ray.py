"""A first, naive version of evolution strategies on Ray: the driver makes every descendant and sends it whole.

The driver draws float32 noise for each member and keeps it for the update. It calls the actors in turn with the state
dict of a member's parameters; they return its fitness. The state dicts are NumPy arrays, which Ray passes through
shared memory without copying them on arrival. Fitnesses are z-scored; the update is that of thread_pool_es.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from work import LR, SIGMA, Fitness, initial_network, measure, parse_arguments, start_ray, zscore

State = dict[str, torch.Tensor]  # parameters, or one member's noise, by name
Arrays = dict[str, NDArray[np.float32]]


class Worker:
    """Scores one descendant after another."""

    def __init__(self, fitness: Fitness) -> None:
        self.network, self.fitness = initial_network(), fitness

    def score(self, descendant: Arrays) -> float:
        state = {name: torch.from_numpy(array) for name, array in descendant.items()}
        self.network.load_state_dict(state, strict=False)  # keeps the buffers
        return self.fitness(self.network)


def sample(parent: State) -> State:
    """Draw the normal noise of one member."""
    return {name: torch.randn_like(tensor) for name, tensor in parent.items()}


def descend(parent: State, noise: State, sigma: float) -> Arrays:
    """Return the parent plus sigma * noise."""
    return {name: torch.add(tensor, noise[name], alpha=sigma).numpy() for name, tensor in parent.items()}


def update(parent: State, noise_K: list[State], fitness_K: list[float], lr: float, sigma: float) -> None:
    """Add lr / (K sigma) * sum of score * noise to the parent."""
    rate = lr / (len(noise_K) * sigma)
    for noise, score in zip(noise_K, zscore(fitness_K), strict=True):
        for name, tensor in parent.items():
            tensor.add_(noise[name], alpha=rate * score)


def main() -> None:
    arguments = parse_arguments(__doc__)
    parent = {name: tensor.detach() for name, tensor in initial_network().named_parameters()}
    start_ray(arguments.workers)
    actor: Any = ray.remote(num_cpus=1)(Worker)
    workers = [actor.remote(Fitness(arguments.images)) for _ in range(arguments.workers)]

    def generation() -> None:
        noise_K, calls = [], []
        for member in range(arguments.population):  # drawing overlaps with scoring
            noise_K.append(sample(parent))
            calls.append(workers[member % len(workers)].score.remote(descend(parent, noise_K[member], SIGMA)))
        update(parent, noise_K, ray.get(calls), LR, SIGMA)

    measure("naive_ray", ["ray", "torch", "numpy"], arguments, generation)
    ray.shutdown()


if __name__ == "__main__":
    main()
