"""`Stack`: scores several small networks in one forward pass.

Shapes: B members, D parameters, N cases, M statistics.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.func import functional_call, vmap

from spartan_ray.engine.fitness import Fitness
from spartan_ray.engine.flat import FlatModel


class Stack:
    """B descendants as rows of one tensor, scored together by `torch.func.vmap`.

    A pass always has B rows, so that the bits of a member depend only on B, not on the other members of the pass."""

    def __init__(self, model: FlatModel, fitness: Fitness, size: int) -> None:
        self.size = size
        # The initial values are never read, because each pass writes all rows first.
        self.theta_BD = model.theta_D.repeat(size, 1)
        self.views = model.views(self.theta_BD)
        self.dtypes = [parameter.dtype for parameter in model.parameters]
        self.scoring = _Scoring(model.module, fitness)
        self.names = [f"network.{name}" for name in model.names]

    def score(self, batch: Any, own: bool = False) -> torch.Tensor:
        """Return the statistics of each row on a batch of cases, shape (B, N) or (B, N, M).

        With `own`, the batch has a leading dimension of B rows too. Random numbers are the same for all rows, as they
        are for members that are scored one after another."""

        def score_one(batch: Any, *parameters: torch.Tensor) -> torch.Tensor:
            named = dict(zip(self.names, parameters, strict=True))
            statistic_NM: torch.Tensor = functional_call(self.scoring, named, (batch,))
            return statistic_NM

        parameters = [view.to(dtype) for view, dtype in zip(self.views, self.dtypes, strict=True)]
        in_dims = (0 if own else None, *(0 for _ in parameters))
        statistic_BNM: torch.Tensor = vmap(score_one, in_dims, randomness="same")(batch, *parameters)
        return statistic_BNM


class _Scoring(nn.Module):
    """The fitness as a module around the network, so that `functional_call` can replace its parameters."""

    def __init__(self, network: nn.Module, fitness: Fitness) -> None:
        super().__init__()
        self.network, self.fitness = network, fitness

    def forward(self, batch: Any) -> torch.Tensor:
        with self.fitness.ready(self.network):
            return self.fitness(self.network, batch)
