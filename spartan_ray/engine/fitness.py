"""What networks are scored by. Shapes: N cases, M statistics, K members, R ranges of parameters."""

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
    """What a network is scored by, over numbered cases: images, seeds of episodes, prompts. Higher is better.

    A subclass says how many `cases` there are and defines `__call__`; all else has a default. It is pickled and sent
    to each worker once. Networks are scored in evaluation mode, in `torch.inference_mode` (which
    `torch.inference_mode(False)` lifts within it); what it draws from torch's global generator is the same for all
    members of a generation.

    cases    how many there are; a case is a number below it
    batch    cases of a call at most (default: all at once)
    best     an array of the most that a case can have in each statistic, where `value` falls with none of them: a
             member that cannot win any more is then left early by strategies that ask for it (default: None, never)
    vmap     True where `torch.func.vmap` can run it, which `batch_members` needs
    graphs   True where a CUDA graph may repeat it (default: False)"""

    cases: int
    """How many there are; a case is a number below it."""
    batch: int | None = None
    """Cases of a call at most; None: all at once. The bits of a score may depend on it."""
    best: NDArray[np.float64] | None = None
    """The most that a case can have in each statistic, M, where `value` falls with none of them: a member that cannot
    win any more is then left early. None: every member is scored on all cases."""

    vmap: bool = False
    """Whether `torch.func.vmap` can run `ready` and `__call__` over stacked parameters, as `batch_members` needs: the
    same operations for every member, no `item()`, nothing of the network changed in place."""

    graphs: bool = False
    """Whether a CUDA graph may repeat `ready` and `__call__` for one member after another: the same operations on the
    same memory, which wait for nothing, draw nothing and leave the network's buffers as they are. `prepare` then
    returns tensors, and what can be a key of a dict."""

    def __call__(self, network: nn.Module, batch: Any) -> torch.Tensor:
        """One number a case (N), or M statistics a case (N x M). `batch` is what `prepare` made of case numbers."""
        raise NotImplementedError(f"{type(self).__name__} defines no __call__(network, batch)")

    def value(self, mean_M: NDArray[np.float64]) -> float:
        """The fitness of a network whose statistics have these means over the cases: by default the first of them."""
        return float(mean_M[0])

    def to(self, device: torch.device) -> None:
        """Move what the cases need to a device."""

    def prepare(self, case_N: torch.Tensor) -> Any:
        """What `__call__` gets for these cases, made once for all members that are scored on them."""
        return case_N

    def ready(self, network: nn.Module) -> contextlib.AbstractContextManager[Any]:
        """Entered once for each descendant that is scored, when it has its parameters."""
        return contextlib.nullcontext()

    def loss(self, network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        """The mean loss of the cases, differentiable: random gradients descend it."""
        raise InputError(f"{type(self).__name__} has no loss(network, case_N), which gradients need")

    def moved(self, network: nn.Module) -> None:
        """Called when evolution has moved the parent."""

    def needed(self, model: FlatModel) -> NDArray[np.int64] | None:
        """The parameters that reach the output, as R x 2 ranges [first, end) of theta_D; None: all."""
        return None


class FunctionFitness(Fitness):
    """A plain function of a network and case numbers as a fitness."""

    vmap = True  # who gives `batch_members` says so

    def __init__(self, function: Callable[[nn.Module, torch.Tensor], torch.Tensor], cases: int) -> None:
        self.function = function
        self.cases = cases

    def __call__(self, network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return self.function(network, batch)


def as_fitness(fitness: Fitness | Callable[[nn.Module, torch.Tensor], torch.Tensor], cases: int | None) -> Fitness:
    """A fitness of `cases` cases, whether an object or a function was given. Raises InputError when nobody says how
    many cases there are."""
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
