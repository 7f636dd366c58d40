"""BatchNorm folded into the convolutions before it, for scoring."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch
from torch import nn

from spartan_ray.vision.layers import FoldedBatchNorm2d, LiveConv2d

Call = tuple[nn.Module, torch.Tensor, torch.Tensor]


@torch.inference_mode()
def calls(module: nn.Module, image_NCHW: torch.Tensor) -> list[Call]:
    """The convolutions and BatchNorm layers of a network in the order in which they are used, with the input and the
    output of each."""
    found: list[Call] = []

    def note(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found.append((layer, inputs[0], output))

    kinds = (LiveConv2d, FoldedBatchNorm2d)
    hooks = [layer.register_forward_hook(note) for layer in module.modules() if isinstance(layer, kinds)]
    try:
        module.eval()(image_NCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return found


class Folding:
    """Folds the BatchNorm layers of a network of `build_model` into their convolutions, for scoring.

    With its own statistics BatchNorm is a factor and a shift of each channel, which the convolution before it can do
    on the way: the same function to rounding, in a tenth less time. `with folding(dtype):` folds the weights as
    they are then. `image_NCHW` shows which convolution feeds which layer, and the sizes of the maps."""

    def __init__(self, module: nn.Module, image_NCHW: torch.Tensor) -> None:
        seen = calls(module, image_NCHW)
        self.pairs = [
            (conv, norm, input_NCHW.shape[2:])
            for conv, input_NCHW, output_NCHW in seen
            for norm, normalised_NCHW, _ in seen
            if isinstance(conv, LiveConv2d) and isinstance(norm, FoldedBatchNorm2d) and normalised_NCHW is output_NCHW
        ]

    @contextlib.contextmanager
    def __call__(self, dtype: torch.dtype) -> Iterator[None]:
        try:
            with torch.inference_mode():
                for conv, norm, size in self.pairs:
                    conv.folded, norm.folded = self._folded(conv, norm, size, dtype), True
            yield
        finally:
            for conv, norm, _ in self.pairs:
                conv.folded, norm.folded = None, False

    @staticmethod
    def _folded(
        conv: LiveConv2d, norm: FoldedBatchNorm2d, size: torch.Size, dtype: torch.dtype
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The convolution's weight, arranged, and its bias with those of the layer after it."""
        assert norm.running_mean is not None
        assert norm.running_var is not None
        assert conv.bias is None, "one more would be nothing but a part of BatchNorm's mean"
        gain_O = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = conv.arranged(size)
        gain_R = gain_O.repeat(len(weight) // len(gain_O)).view(-1, *[1] * (weight.dim() - 1))
        # A matrix of taps is a copy, and may be changed in place.
        weight = weight * gain_R if weight.dim() == 4 else weight.mul_(gain_R)
        return weight.to(dtype), (norm.bias - norm.running_mean * gain_O).to(dtype)
