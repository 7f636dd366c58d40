"""Convolution and BatchNorm layers that compute the same as torch's, in less time.

Shapes: weights O, H, W, I or O, I, H, W as named, W windows, N images, R rows of outputs, G runs of weights."""

from __future__ import annotations

import functools
import itertools
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn


class LiveConv2d(nn.Conv2d):
    """A convolution that computes only its live taps: the ones that meet the map and not just its padding.

    If a map has no more pixels than the kernel has taps, the convolution is computed as a product with a dense matrix
    from all pixels to all outputs. The function, the parameters and the gradients are the same (zero for taps that
    never meet the map), in a fraction of the time. On 32x32 images this covers most of the last two stages of ResNet18,
    where two thirds of the parameters are dead. A 1x1 convolution is computed as a product with the pixels that it
    meets."""

    def __init__(
        self, channels_in: int, channels_out: int, kernel: int, stride: int = 1, padding: int = 0, bias: bool = True
    ) -> None:
        super().__init__(channels_in, channels_out, kernel, stride, padding, bias=bias)

    # While `Folding` is active: the arranged weight and bias, with the following BatchNorm layer folded in.
    folded: tuple[torch.Tensor, torch.Tensor] | None = None
    # While `Leaves` is active: the part of the weight that holds the live taps, and its first row and column.
    live: tuple[torch.Tensor, tuple[int, int]] | None = None

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        size = input.shape[2:]
        weight, bias = self.folded or self.arranged(size)
        if weight.dim() == 4 and self.kernel_size == (1, 1) and self.padding == (0, 0):
            met_NHWI = input[:, :, :: self.stride[0], :: self.stride[1]].permute(0, 2, 3, 1)
            outputs_RO = F.linear(met_NHWI.flatten(0, 2), weight.flatten(1), bias)
            return outputs_RO.view(*met_NHWI.shape[:3], self.out_channels).permute(0, 3, 1, 2)
        if weight.dim() == 4:
            return F.conv2d(input, weight, bias, self.stride, self.padding)
        rows, columns = (len(windows) for windows in self._windows(size))
        outputs_NR = F.linear(input.permute(0, 2, 3, 1).flatten(1), weight, bias)
        return outputs_NR.view(len(input), rows, columns, self.out_channels).permute(0, 3, 1, 2)

    def arranged(self, size: torch.Size) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the weight and bias to use for maps of a size: unchanged, or a matrix from pixels to outputs, both in
        channels-last order, with a bias per output."""
        if not self._is_product(size):
            return self.weight, self.bias
        weight_OHWI, corner = self.live or (self.weight.permute(0, 2, 3, 1), (0, 0))
        windows = list(itertools.product(*self._windows(size, corner)))
        matrix: torch.Tensor = _Arrange.apply(weight_OHWI, size, windows)
        return matrix, None if self.bias is None else self.bias.repeat(len(windows))

    def runs(self, size: torch.Size) -> tuple[torch.Size, NDArray[np.int64]]:
        """Return the shape of the arranged weight, input channels last, and the runs of weights that fill it, G x 4:
        the run's start in the weight's memory, its start in the arranged weight, its length and its output channel. The
        arranged weight is zero between the runs."""
        outputs, inputs, taps, width = self.weight.shape
        channel_O = np.arange(outputs)
        if not self._is_product(size):
            length = taps * width * inputs
            whole_G4 = np.stack([channel_O * length, channel_O * length, np.full(outputs, length), channel_O], 1)
            return torch.Size((outputs, taps, width, inputs)), whole_G4
        found, seen = [], list(itertools.product(*self._windows(size)))
        for window, ((rows, above), (columns, beside)) in enumerate(seen):
            for row, pixel in zip(range(rows.start, rows.stop), range(above.start, above.stop), strict=True):
                first_O = ((channel_O * taps + row) * width + columns.start) * inputs
                start_O = (((window * outputs + channel_O) * size[0] + pixel) * size[1] + beside.start) * inputs
                length = (columns.stop - columns.start) * inputs
                found.append(np.stack([first_O, start_O, np.full(outputs, length), channel_O], 1))
        return torch.Size((len(seen) * outputs, size.numel() * inputs)), np.concatenate(found)

    def live_taps(self, size: torch.Size) -> tuple[slice, slice]:
        """Return the rows and columns of the kernel that meet maps of a size."""
        if not self._is_product(size):
            return slice(0, self.kernel_size[0]), slice(0, self.kernel_size[1])
        rows, columns = (
            slice(min(taps.start for taps, _ in windows), max(taps.stop for taps, _ in windows))
            for windows in self._windows(size)
        )
        return rows, columns

    def _is_product(self, size: torch.Size) -> bool:
        return size.numel() <= self.kernel_size[0] * self.kernel_size[1]

    def _windows(self, size: torch.Size, corner: tuple[int, int] = (0, 0)) -> list[list[Window]]:
        return [
            windows(size[axis], self.kernel_size[axis], self.stride[axis], int(self.padding[axis]), corner[axis])
            for axis in (0, 1)
        ]


class _Arrange(torch.autograd.Function):
    """Arranges taps in a matrix: each output gets its window of taps, and zeros for the pixels that they do not meet.

    It defines its own backward, because autograd would allocate a whole gradient for each slice and add them up."""

    @staticmethod
    def forward(
        ctx: Any, weight_OHWI: torch.Tensor, size: torch.Size, windows: list[tuple[Window, Window]]
    ) -> torch.Tensor:
        ctx.shape, ctx.size, ctx.windows = weight_OHWI.shape, size, windows
        outputs, _, _, inputs = weight_OHWI.shape
        whole = all(rows.stop - rows.start == size[0] and columns.stop - columns.start == size[1]
                    for (rows, _), (columns, _) in windows)  # fmt: skip
        matrix_WOHWI = (weight_OHWI.new_empty if whole else weight_OHWI.new_zeros)(len(windows), outputs, *size, inputs)
        for block_OHWI, window in zip(matrix_WOHWI, windows, strict=True):
            (rows, above), (columns, beside) = window
            block_OHWI[:, above, beside] = weight_OHWI[:, rows, columns]
        return matrix_WOHWI.flatten(2).flatten(0, 1)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None, None]:
        outputs, _, _, inputs = ctx.shape
        blocks_WOHWI = gradient.view(len(ctx.windows), outputs, *ctx.size, inputs)
        gradient_OHWI = gradient.new_zeros(ctx.shape)
        for block_OHWI, window in zip(blocks_WOHWI, ctx.windows, strict=True):
            (rows, above), (columns, beside) = window
            gradient_OHWI[:, rows, columns] += block_OHWI[:, above, beside]
        return gradient_OHWI, None, None


# On one axis: the taps that meet the map, and the pixels that they meet.
Window = tuple[slice, slice]


@functools.cache
def windows(size: int, taps: int, stride: int, padding: int, first_tap: int) -> list[Window]:
    """Return the window of each output of a convolution on one axis of the map. Output o meets pixel p with tap
    p - o * stride + padding. Taps are counted from `first_tap`."""
    found = []
    for output in range((size + 2 * padding - taps) // stride + 1):
        corner = output * stride - padding
        first, last = min(max(corner, 0), size), max(0, min(corner + taps, size))
        last, before = max(first, last), corner + first_tap
        found.append((slice(first - before, last - before), slice(first, last)))
    return found


class FoldedBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm that returns its input unchanged while it is folded into the convolution before it."""

    folded = False

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return input if self.folded else super().forward(input)


def hasten(network: nn.Module) -> None:
    """Turn torch's own Conv2d and BatchNorm2d layers of a network into these ones, in place, where they are
    equivalent."""
    for layer in network.modules():
        if type(layer) is nn.BatchNorm2d and layer.affine and layer.track_running_stats:
            layer.__class__ = FoldedBatchNorm2d
        elif type(layer) is nn.Conv2d:
            plain = layer.groups == 1 and layer.dilation == (1, 1) and layer.padding_mode == "zeros"
            own = "weight" in layer._parameters and not layer._forward_pre_hooks  # not a computed weight
            if plain and own and not isinstance(layer.padding, str):
                layer.__class__ = LiveConv2d
