"""Averages of the parent's weights over its last epochs or steps, with BatchNorm's statistics to match. Shapes: D
parameters."""

from __future__ import annotations

import contextlib
import math
from collections import deque
from collections.abc import Callable, Iterator

import torch

from spartan_ray.engine.flat import FlatModel, mean


class Average:
    """An average of the parent's weights.

    epochs:m     the mean of those at the ends of the last m epochs (Izmailov et al., arXiv 1803.05407)
    ema:decay    average = decay * average + (1 - decay) * weights after each step of gradient descent
    soup:m       of the last m epochs those that help: from the best on, each that makes the mean no worse by `accuracy`
                 (Wortsman et al., arXiv 2203.05482)

    `recalibrate` fits BatchNorm's statistics to the weights that the network has, `accuracy` scores the network."""

    def __init__(
        self, kind: str, number: float, model: FlatModel, recalibrate: Callable[[], None], accuracy: Callable[[], float]
    ) -> None:
        self.kind, self.number, self.model = kind, number, model
        self.recalibrate, self.accuracy = recalibrate, accuracy
        self.theta_D = model.theta_D.clone()
        self.last: deque[tuple[float, torch.Tensor]] = deque(maxlen=self.epochs)

    @property
    def epochs(self) -> int:
        """How many of the last epochs it is of; 0 where it is of steps."""
        return 0 if self.kind == "ema" else int(self.number)

    def after_step(self) -> None:
        """Take in the network after a step of gradient descent."""
        if self.kind == "ema":
            self.theta_D.lerp_(self.model.theta_D, 1 - self.number)

    def after_epoch(self) -> None:
        """Take in the network after an epoch."""
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
        """Make the network the average; what makes it the parent again."""
        theta_D, buffers = self.model.theta_D.clone(), [buffer.clone() for buffer in self.model.buffers]

        def restore() -> None:
            self.model.theta_D.copy_(theta_D)
            self.model.load_buffers(buffers)

        self.model.theta_D.copy_(self.theta_D)
        self.recalibrate()
        return restore

    def as_network(self) -> contextlib.AbstractContextManager[None]:
        """The network is the average for a while."""
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
