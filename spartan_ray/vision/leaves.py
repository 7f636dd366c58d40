"""The live part of a network: the parameters that can affect its output, which gradient descent trains.

Shapes: D parameters, R ranges of them."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Iterator

import numpy as np
import torch
from numpy.typing import NDArray

from spartan_ray.engine.flat import FlatModel
from spartan_ray.vision.folding import calls
from spartan_ray.vision.layers import LiveConv2d


class Leaves:
    """The tensors that gradient descent trains: the parameters, but only the live part of a convolution's weight with
    dead taps. The gradients of dead taps are zero, and storing and adding them would take a tenth of a step.

    `with leaves():` makes the network compute with these tensors, which share theta_D's memory. Dead taps never change,
    not even by weight decay. `image_NCHW` is an example input: it shows the sizes of the maps."""

    def __init__(self, model: FlatModel, image_NCHW: torch.Tensor) -> None:
        self.model = model
        self.live: dict[torch.Tensor, tuple[LiveConv2d, tuple[slice, slice]]] = {}
        seen, _ = calls(model.module, image_NCHW)
        times = Counter(call.layer.weight for call in seen)
        for conv, input_NCHW, _ in seen:
            if isinstance(conv, LiveConv2d) and times[conv.weight] == 1:
                rows, columns = conv.live_taps(input_NCHW.shape[2:])
                if (rows.stop - rows.start, columns.stop - columns.start) != conv.kernel_size:
                    self.live[conv.weight] = conv, (rows, columns)
        parameters = model.parameters
        self.tensors = [
            part.detach().requires_grad_() if parameter in self.live else parameter
            for parameter, part in zip(parameters, self.parts(model.theta_D), strict=True)
        ]

    def parts(self, vector_D: torch.Tensor) -> list[torch.Tensor]:
        """Split a vector with theta_D's layout into one tensor per leaf. The tensors share its memory."""
        parts = []
        for parameter, view in zip(self.model.parameters, self.model.views(vector_D), strict=True):
            if parameter in self.live:
                rows, columns = self.live[parameter][1]
                view = view.permute(0, 2, 3, 1)[:, rows, columns]
            parts.append(view)
        return parts

    def ranges(self) -> NDArray[np.int64]:
        """Return the elements of theta_D that can affect the output, as ranges [first, end), R x 2."""
        live_D = torch.zeros(len(self.model.theta_D) + 2, dtype=torch.int8)
        for part in self.parts(live_D[1:-1]):
            part.fill_(1)
        ends: NDArray[np.int64] = np.flatnonzero(np.diff(live_D.numpy())).reshape(-1, 2)
        return ends

    @contextlib.contextmanager
    def __call__(self) -> Iterator[None]:
        for parameter, leaf in zip(self.model.parameters, self.tensors, strict=True):
            if parameter in self.live:
                conv, (rows, columns) = self.live[parameter]
                conv.live = leaf, (rows.start, columns.start)
        try:
            yield
        finally:
            for conv, _ in self.live.values():
                conv.live = None
