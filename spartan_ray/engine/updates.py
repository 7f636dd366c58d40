"""`Updates`: turns the gradient that a generation estimates into an update. Shapes: D parameters."""

from __future__ import annotations

import copy
from typing import Any

import torch

from spartan_ray.engine.strategies.requests import OptimizerKind

# The kind of an optimizer, and its state dict.
Moments = tuple[OptimizerKind, dict[str, Any]]


class Updates:
    """Turns estimated gradients into updates, with an optimizer of torch.

    The moments of the optimizer contain every estimate, whether its update was taken or not."""

    def __init__(self, theta_D: torch.Tensor) -> None:
        self.theta_D = theta_D
        self.kind: OptimizerKind | None = None
        self.optimizer: torch.optim.Optimizer | None = None

    def optimizer_of(self, kind: OptimizerKind) -> torch.optim.Optimizer:
        """Return the optimizer of a kind. It is a new one if the last one was of another kind."""
        if self.optimizer is None or self.kind != kind:
            # It moves a vector of zeros, which then is the update.
            update_D = torch.zeros_like(self.theta_D)
            if kind == "adam":
                self.optimizer = torch.optim.Adam([update_D])
            else:
                self.optimizer = torch.optim.SGD([update_D], momentum=0.9 if kind == "momentum" else 0.0)
            self.kind = kind
        return self.optimizer

    def make(self, estimate_D: torch.Tensor, kind: OptimizerKind, rate: float) -> torch.Tensor:
        """Return the update for an estimated gradient.

        Args:
            estimate_D: Estimated gradient of the fitness, shape (D,). It is overwritten.
            kind: Kind of the optimizer.
            rate: Learning rate.

        Returns:
            The update, shape (D,). The next call overwrites it.
        """
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
        """Return a copy of the state that the next updates depend on; None before the first update."""
        return (self.kind, copy.deepcopy(self.optimizer.state_dict())) if self.kind and self.optimizer else None

    def load_moments(self, moments: Moments | None) -> None:
        """Restore a state that `moments` returned."""
        self.kind = self.optimizer = None
        if moments:
            self.optimizer_of(moments[0]).load_state_dict(moments[1])
