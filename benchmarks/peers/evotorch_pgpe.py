"""EvoTorch's PGPE on an NEProblem with one actor per core, as its documentation suggests for large populations.

`distributed=True` (default: False) is the faster of its two modes on idle cores: each actor draws its share of the
population and returns a gradient. In the other mode the driver draws all members and sends them. The results differ:
in the distributed mode fitnesses are ranked within each actor's share, so they depend on the number of actors. PGPE
also adapts a standard deviation for each parameter, which the other peers do not. Everything else is EvoTorch's
default: antithetic pairs, centered ranks, ClipUp. It runs in the environment that `setup` makes. With one worker
EvoTorch uses no actor.
"""

from __future__ import annotations

import logging

import ray
from evotorch.algorithms import PGPE
from evotorch.neuroevolution import NEProblem
from torch.nn.utils import parameters_to_vector
from work import LR, SIGMA, Fitness, initial_network, measure, parse_arguments, start_ray


def main() -> None:
    arguments = parse_arguments(__doc__)
    logging.getLogger("evotorch").setLevel(logging.WARNING)
    start_ray(arguments.workers)
    problem = NEProblem("max", initial_network, Fitness(arguments.images), num_actors=arguments.workers)
    searcher = PGPE(
        problem,
        popsize=arguments.population,
        center_init=parameters_to_vector(initial_network().parameters()).detach(),
        center_learning_rate=LR,
        stdev_init=SIGMA,
        stdev_learning_rate=0.1,
        distributed=True,
    )
    measure("evotorch_pgpe", ["evotorch", "ray", "torch", "numpy"], arguments, searcher.step)
    ray.shutdown()


if __name__ == "__main__":
    main()
