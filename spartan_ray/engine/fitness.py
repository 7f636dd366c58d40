"""`Fitness`: the interface of the functions that score a network on numbered cases.

Shapes: N cases, M statistics, K members, R ranges of parameters.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spartan_ray.engine.flat import FlatModel
from spartan_ray.errors import InputError


class Fitness:
    """The fitness of a network over numbered cases, such as images, seeds of episodes, or prompts. Higher is better.

    A subclass sets `cases` and defines `__call__`; everything else has a default. The object is pickled and sent to
    each worker once. Networks are scored in evaluation mode and under `torch.inference_mode`; wrap code in
    `torch.inference_mode(False)` if it needs gradients. Random numbers from torch's global generator are the same for
    all members of a generation."""

    cases: int
    """Number of cases. A case is an integer from 0 to cases - 1."""
    batch: int | None = None
    """Maximum number of cases per call. None means all cases in one call. The bits of a score may depend on it."""
    best: NDArray[np.float64] | None = None
    """Highest possible value of each statistic for one case, shape (M,). `value` must not fall if a statistic rises. A
    strategy can then stop scoring a member that can no longer win. None: members are scored on all cases."""

    vmap: bool = False
    """Whether `torch.func.vmap` can run `ready` and `__call__` over stacked parameters, which `batch_members` needs.
    They must do the same operations for every member, never call `item()`, and not change the network in place."""

    graphs: bool = False
    """Whether a CUDA graph can replay `ready` and `__call__` for one member after another. They must do the same
    operations on the same memory, not wait for the device, draw no random numbers, and not change the network's
    buffers. `prepare` must then return tensors and hashable values."""

    def __call__(self, network: nn.Module, batch: Any) -> torch.Tensor:
        """Score a network on a batch of cases.

        Args:
            network: The network, in evaluation mode.
            batch: The result of `prepare` for N cases; by default their numbers, shape (N,).

        Returns:
            One number per case, shape (N,), or M statistics per case, shape (N, M).
        """
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(network, batch)")

    def value(self, mean_M: NDArray[np.float64]) -> float:
        """Return the fitness of a network from the means of its statistics. Default: the first mean.

        Args:
            mean_M: Mean of each statistic over the cases, shape (M,).

        Returns:
            The fitness. Higher is better.
        """
        return float(mean_M[0])

    def to(self, device: torch.device) -> None:
        """Move the data of the cases to a device. Called once per evaluator. Default: do nothing."""

    def prepare(self, case_N: torch.Tensor) -> Any:
        """Prepare a batch for `__call__`, once for all members that are scored on it. Default: the case numbers.

        Args:
            case_N: Case numbers on the device of the evaluator, shape (N,).

        Returns:
            The second argument of `__call__`.
        """
        return case_N

    def ready(self, network: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Return a context manager around `__call__`, entered after the network has the member's parameters.

        It is entered once each time a member is scored, or once per call of `__call__` with `batch_members`. Default:
        do nothing."""
        return contextlib.nullcontext()

    def loss(self, network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        """Return the mean loss of the cases, differentiable. Needed for gradients only, as by `RandomGradients`.

        Args:
            network: The network.
            case_N: Case numbers, shape (N,).

        Returns:
            A tensor of one element. Lower is better.

        Raises:
            InputError: The subclass does not define a loss.
        """
        raise InputError(f"{type(self).__name__} has no loss(network, case_N), which gradients need")

    def moved(self, network: nn.Module) -> None:
        """React to a parent that evolution has moved. Called after each move. Default: do nothing."""

    def needed(self, model: FlatModel) -> NDArray[np.int64] | None:
        """Return the parameters that can change the output, so that noise for the others can be left out.

        Args:
            model: The network and its parameter vector, theta_D.

        Returns:
            Ranges [first, end) of theta_D, shape (R, 2), or None for all parameters.
        """
        return None


class FunctionFitness(Fitness):
    """A fitness that calls a plain function of a network and case numbers."""

    vmap = True  # whoever sets `batch_members` vouches for it

    def __init__(self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor], cases: int) -> None:
        self.function = function
        self.cases = cases

    def __call__(self, network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return self.function(network, batch)


def as_fitness(fitness: Fitness | Callable[[nn.Module, torch.Tensor], torch.Tensor], cases: int | None) -> Fitness:
    """Return a `Fitness` object for an object or a function. Raises InputError if the number of cases is unknown or
    contradictory."""
    if isinstance(fitness, type):
        raise InputError(f"{fitness.__name__} is a class: give an object, {fitness.__name__}()")
    if not isinstance(fitness, Fitness):
        if cases is None:
            raise InputError("cases: a function does not say how many cases there are: give cases=")
        fitness = FunctionFitness(fitness, cases)
    elif not hasattr(fitness, "cases"):
        raise InputError(f"{type(fitness).__name__} does not say how many cases there are: it needs `cases`")
    elif cases is not None and cases != fitness.cases:
        raise InputError(f"cases ({cases}): the fitness has {fitness.cases}")
    if fitness.cases < 1:
        raise InputError(f"cases ({fitness.cases}) must be at least 1")
    return fitness
