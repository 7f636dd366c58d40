"""BatchNorm folded into the convolutions before it, for scoring."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

from spartan_ray.vision.layers import FoldedBatchNorm2d, LiveConv2d


class Call(NamedTuple):
    """A convolution or a BatchNorm layer at work."""

    layer: nn.Module
    input_NCHW: torch.Tensor
    output_NCHW: torch.Tensor


class _Uses(TorchFunctionMode):
    """Counts the computations that go on from certain tensors, which are kept meanwhile, by their identities."""

    def __init__(self) -> None:
        super().__init__()
        self.of: dict[int, int] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, arguments: Any = (), named: dict[str, Any] | None = None
    ) -> Any:
        result = function(*arguments, **named or {})
        if isinstance(result, torch.Tensor | tuple | list) and not isinstance(result, torch.Size):
            given = [*arguments, *(named or {}).values()]
            given += [item for value in given if isinstance(value, tuple | list) for item in value]
            for tensor in {id(value) for value in given} & self.of.keys():
                self.of[tensor] += 1
        return result


@torch.inference_mode()
def calls(module: nn.Module, image_NCHW: torch.Tensor) -> tuple[list[Call], dict[int, int]]:
    """The convolutions and BatchNorm layers of a network in the order in which they are used, and how many computations
    go on from each output, by its identity."""
    found: list[Call] = []
    uses = _Uses()

    def note(layer: nn.Module, inputs: tuple[torch.Tensor], output: torch.Tensor) -> None:
        found.append(Call(layer, inputs[0], output))
        uses.of[id(output)] = 0

    kinds = (LiveConv2d, FoldedBatchNorm2d)
    hooks = [layer.register_forward_hook(note) for layer in module.modules() if isinstance(layer, kinds)]
    try:
        with uses:
            module.eval()(image_NCHW)
    finally:
        for hook in hooks:
            hook.remove()
    return found, uses.of


class Folding:
    """Folds the BatchNorm layers of a network into the convolutions whose output goes nowhere else, for scoring.

    With its own statistics BatchNorm is a factor and a shift of each channel, which the convolution before it can do
    on the way: the same function to rounding, in a tenth less time. `with folding(dtype):` folds the weights as
    they are then. `image_NCHW` shows which convolution feeds which layer, and the sizes of the maps."""

    def __init__(self, module: nn.Module, image_NCHW: torch.Tensor) -> None:
        seen, uses = calls(module, image_NCHW)
        times = Counter(call.layer for call in seen)
        self.pairs = [
            (conv, norm, input_NCHW.shape[2:])
            for conv, input_NCHW, output_NCHW in seen
            for norm, normalised_NCHW, _ in seen
            if isinstance(conv, LiveConv2d) and isinstance(norm, FoldedBatchNorm2d) and normalised_NCHW is output_NCHW
            if uses[id(output_NCHW)] == times[conv] == times[norm] == 1
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
        gain_O = norm.weight * (norm.running_var + norm.eps).rsqrt()
        weight = conv.arranged(size)
        gain_R = gain_O.repeat(len(weight) // len(gain_O)).view(-1, *[1] * (weight.dim() - 1))
        # A matrix of taps is a copy, and may be changed in place.
        weight = weight * gain_R if weight.dim() == 4 else weight.mul_(gain_R)
        shift_O = norm.bias - norm.running_mean * gain_O
        if conv.bias is not None:
            shift_O = shift_O + conv.bias * gain_O
        return weight.to(dtype), shift_O.to(dtype)
