"""Averages of the parent's weights over its last epochs or steps, with matching BatchNorm statistics.

Shapes: D parameters."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator

import torch

from spartan_ray.engine.flat import FlatModel, mean


class Average:
    """An average of the parent's weights.

    epochs:m     mean of the weights at the ends of the last m epochs (Izmailov et al., arXiv 1803.05407)
    ema:decay    average = decay * average + (1 - decay) * weights, after each step of gradient descent
    soup:m       greedy soup of the last m epochs: start with the one of the highest `accuracy`, then add each next one
                 that does not lower the `accuracy` of the mean (Wortsman et al., arXiv 2203.05482)

    `recalibrate` fits BatchNorm's statistics to the network's current weights; `accuracy` scores the network."""

    def __init__(
        self, kind: str, number: float, model: FlatModel, recalibrate: Callable[[], None], accuracy: Callable[[], float]
    ) -> None:
        self.kind, self.number, self.model = kind, number, model
        self.recalibrate, self.accuracy = recalibrate, accuracy
        self.theta_D = model.theta_D.clone()
        self.last: deque[tuple[float, torch.Tensor]] = deque(maxlen=self.epochs)

    @property
    def epochs(self) -> int:
        """Number of last epochs that it averages; 0 for ema, which averages steps."""
        return 0 if self.kind == "ema" else int(self.number)

    def after_step(self) -> None:
        """Update the average after a step of gradient descent."""
        if self.kind == "ema":
            self.theta_D.lerp_(self.model.theta_D, 1 - self.number)

    def after_epoch(self) -> None:
        """Update the average after an epoch."""
        if self.kind == "ema":
            return
        accuracy = self.accuracy() if self.kind == "soup" else 0.0
        self.last.append((accuracy, self.model.theta_D.clone()))
        if self.kind == "epochs":
            self.theta_D = mean([theta_D for _, theta_D in self.last])
        else:
            self._stir()

    def _stir(self) -> None:
        chosen, best = list[torch.Tensor](), -math.inf
        for _, theta_D in sorted(self.last, key=lambda one: -one[0]):
            mixed_D = mean([*chosen, theta_D])
            with self._as(mixed_D):
                accuracy = self.accuracy()
            if accuracy >= best:
                best, self.theta_D = accuracy, mixed_D
                chosen.append(theta_D)

    def become(self) -> Callable[[], None]:
        """Load the average into the network. Return a function that restores the parent."""
        theta_D, buffers = self.model.theta_D.clone(), [buffer.clone() for buffer in self.model.buffers]

        def restore() -> None:
            self.model.theta_D.copy_(theta_D)
            self.model.load_buffers(buffers)

        self.model.theta_D.copy_(self.theta_D)
        self.recalibrate()
        return restore

    def as_network(self) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the network holds the average."""
        return self._as(self.theta_D)

    @contextlib.contextmanager
    def _as(self, theta_D: torch.Tensor) -> Iterator[None]:
        own_D, self.theta_D = self.theta_D, theta_D
        try:
            restore = self.become()
        finally:
            self.theta_D = own_D
        try:
            yield
        finally:
            restore()
