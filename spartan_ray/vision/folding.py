"""Folds BatchNorm layers into the convolutions before them, for scoring.

Shapes: C channels of all BatchNorm layers, S weights of a memory, G runs of them, F folded weights, R biases."""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.overrides import TorchFunctionMode

from spartan_ray.vision.fold import fold_for
from spartan_ray.vision.layers import FoldedBatchNorm2d, LiveConv2d

# Each folded weight starts at a multiple of this many elements, so that vector loads are aligned.
ALIGNED = 64


class Source(NamedTuple):
    """A memory of float32 weights and the runs of them to fold. A row of `run_G4` is the run's start in this memory,
    its start in the folded memory, its length and its channel."""

    weight_S: torch.Tensor
    run_G4: torch.Tensor


class Memory(NamedTuple):
    """All folded weights and shifts in one precision, and each convolution's pair of them as views."""

    weight_F: torch.Tensor
    shift_R: torch.Tensor
    folded: list[tuple[torch.Tensor, torch.Tensor]]


class Call(NamedTuple):
    """One call of a convolution or BatchNorm layer."""

    layer: nn.Module
    input_NCHW: torch.Tensor
    output_NCHW: torch.Tensor


class _Uses(TorchFunctionMode):
    """Counts how many computations use each tensor whose id is in `of`. These tensors must stay alive meanwhile."""

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
    """Run a network on an image. Return the calls of its convolutions and BatchNorm layers in order, and how many
    computations use each output, by the output's id."""
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
    """Folds each BatchNorm layer of a network into the convolution before it, if nothing else uses that convolution's
    output. For scoring.

    With running statistics, BatchNorm is a factor and a shift per channel, which the convolution can apply itself: the
    same function up to rounding, in a tenth less time. `with folding(dtype):` folds the current weights of all layers
    at once, into memory that is allocated once. `image_NCHW` is an example input: it shows which convolution feeds
    which layer, and the sizes of the maps."""

    def __init__(self, module: nn.Module, image_NCHW: torch.Tensor) -> None:
        seen, uses = calls(module, image_NCHW)
        times = Counter(call.layer for call in seen)
        found = [
            (conv, norm, input_NCHW.shape[2:])
            for conv, input_NCHW, output_NCHW in seen
            for norm, normalised_NCHW, _ in seen
            if isinstance(conv, LiveConv2d) and isinstance(norm, FoldedBatchNorm2d) and normalised_NCHW is output_NCHW
            if uses[id(output_NCHW)] == times[conv] == times[norm] == 1 and conv.weight.dtype == torch.float32
        ]
        self.pairs = [(conv, norm) for conv, norm, _ in found]
        self.device = image_NCHW.device
        self.fold = fold_for(self.device)
        self.shapes: list[torch.Size] = []
        self.runs: list[NDArray[np.int64]] = []
        channel_R: list[int] = []
        self.size = channels = 0
        for conv, _, map_size in found:
            shape, run_G4 = conv.runs(map_size)
            self.shapes.append(shape)
            self.runs.append(run_G4 + np.array([0, self.size, 0, channels]))
            channel_R += [channels + output % conv.out_channels for output in range(shape[0])]
            self.size += -(-shape.numel() // ALIGNED) * ALIGNED
            channels += conv.out_channels
        self.channel_R = torch.tensor(channel_R, dtype=torch.int64, device=self.device)
        eps_C = [norm.eps for conv, norm in self.pairs for _ in range(conv.out_channels)]
        self.eps_C = torch.tensor(eps_C, device=self.device)
        self.places: list[tuple[int, int]] = []
        self.sources: list[Source] = []
        self.memories: dict[torch.dtype, Memory] = {}

    @contextlib.contextmanager
    def __call__(self, dtype: torch.dtype) -> Iterator[None]:
        try:
            folded = self._folded(dtype) if self.pairs else []
            for (conv, norm), weight_and_bias in zip(self.pairs, folded, strict=True):
                conv.folded, norm.folded = weight_and_bias, True
            yield
        finally:
            for conv, norm in self.pairs:
                conv.folded, norm.folded = None, False

    @torch.inference_mode()
    def _folded(self, dtype: torch.dtype) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Fold all layers. Return the arranged weight and the bias of each convolution."""
        weight_C, bias_C, mean_C, variance_C = (
            torch.cat([getattr(norm, name) for _, norm in self.pairs])
            for name in ("weight", "bias", "running_mean", "running_var")
        )
        gain_C = weight_C * (variance_C + self.eps_C).rsqrt()
        shift_C = bias_C - mean_C * gain_C
        if any(conv.bias is not None for conv, _ in self.pairs):
            biases = [torch.zeros_like(norm.bias) if conv.bias is None else conv.bias for conv, norm in self.pairs]
            shift_C += torch.cat(biases) * gain_C
        if dtype not in self.memories:
            self.memories[dtype] = self._memory(dtype)
        weight_F, shift_R, folded = self.memories[dtype]
        for weight_S, run_G4 in self._sources():
            self.fold(weight_S, gain_C, run_G4, weight_F)
        shift_R.copy_(shift_C[self.channel_R])
        return folded

    def _sources(self) -> list[Source]:
        """Return the memories that hold the weights: a single one if the weights are views of theta_D."""
        weights = [conv.weight.contiguous(memory_format=torch.channels_last) for conv, _ in self.pairs]
        places = [(weight.untyped_storage().data_ptr(), int(weight.storage_offset())) for weight in weights]
        if places != self.places:
            found: dict[int, tuple[torch.Tensor, list[NDArray[np.int64]]]] = {}
            for weight, (start, offset), run_G4 in zip(weights, places, self.runs, strict=True):
                flat_S = weight.new_empty(0).set_(weight.untyped_storage())
                found.setdefault(start, (flat_S, []))[1].append(run_G4 + np.array([offset, 0, 0, 0]))
            self.sources = [
                Source(flat_S, torch.tensor(np.concatenate(runs), device=self.device))
                for flat_S, runs in found.values()
            ]
            self.places = places
        return self.sources

    def _memory(self, dtype: torch.dtype) -> Memory:
        weight_F = torch.zeros(self.size, dtype=dtype, device=self.device)
        shift_R = torch.zeros(len(self.channel_R), dtype=dtype, device=self.device)
        folded, start, first = [], 0, 0
        for shape in self.shapes:
            weight = weight_F[start : start + shape.numel()].view(shape)
            weight = weight.permute(0, 3, 1, 2) if len(shape) == 4 else weight
            folded.append((weight, shift_R[first : first + shape[0]]))
            start, first = start + -(-shape.numel() // ALIGNED) * ALIGNED, first + shape[0]
        return Memory(weight_F, shift_R, folded)
