"""What an optimizer makes of the gradient that a generation estimates. Shapes: D parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch

from spartan_ray.engine.strategies.requests import OptimizerKind

# The kind of an optimizer, and its state dict.
Moments = tuple[OptimizerKind, dict[str, Any]]


class Updates:
    """Makes updates of estimated gradients with an optimizer of torch. Its moments are of all estimates, whether their
    update was taken or not."""

    def __init__(self, theta_D: torch.Tensor) -> None:
        self.theta_D = theta_D
        self.kind: OptimizerKind | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def optimizer_of(self, kind: OptimizerKind) -> torch.optim.Optimizer:
        """The optimizer of a kind: a new one where the last was of another kind."""
        if self.optimizer is None or self.kind != kind:
            # It moves a vector of zeros, so that the update can be had alone.
            update_D = torch.zeros_like(self.theta_D)
            if kind == "adam":
                self.optimizer = torch.optim.Adam([update_D])
            else:
                self.optimizer = torch.optim.SGD([update_D], momentum=0.9 if kind == "momentum" else 0.0)
            self.kind = kind
        return self.optimizer

    def make(self, estimate_D: torch.Tensor, kind: OptimizerKind, rate: float) -> torch.Tensor:
        """The update, D, for an estimate of the gradient, D, which is overwritten, at a learning rate. It holds until
        the next one is made."""
        optimizer = self.optimizer_of(kind)
        (group,) = optimizer.param_groups
        (update_D,) = group["params"]
        group["lr"] = rate
        update_D.zero_()
        update_D.grad = estimate_D.neg_()
        optimizer.step()
        update_D.grad = None
        moved_D: torch.Tensor = update_D
        return moved_D

    def moments(self) -> Moments | None:
        """What the next updates depend on, copied; None before the first one."""
        return (self.kind, copy.deepcopy(self.optimizer.state_dict())) if self.kind and self.optimizer else None

    def load_moments(self, moments: Moments | None) -> None:
        """Go on where `moments` was taken."""
        self.kind = self.optimizer = None
        if moments:
            self.optimizer_of(moments[0]).load_state_dict(moments[1])
