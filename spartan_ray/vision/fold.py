"""Weights times the factors of their channels, in runs: what folds BatchNorm, and which kernel a device gets.

Shapes: S weights of a memory, C channels, G runs, F folded weights."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch


class Fold(Protocol):
    def __call__(self, weight_S: torch.Tensor, gain_C: torch.Tensor, run_G4: torch.Tensor, out_F: torch.Tensor) -> None:
        """out[start + i] = weight[first + i] * gain[channel] for i below length, for each run (first, start, length,
        channel): one float32 product, rounded to out's type. The runs don't overlap in `out`, and what lies between
        them stays."""


def fold_for(device: torch.device) -> Fold:
    """The fastest kernel for the device: numba on CPU, Triton on CUDA, tensor operations elsewhere and where PyTorch
    came without Triton."""
    if device.type == "cpu":
        from spartan_ray.vision.fold_cpu import fold

        return fold
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            from spartan_ray.vision.fold_cuda import fold as triton_fold

            return triton_fold
    return portable_fold


def portable_fold(weight_S: torch.Tensor, gain_C: torch.Tensor, run_G4: torch.Tensor, out_F: torch.Tensor) -> None:
    """A place for each weight, and a gather."""
    first_G, start_G, length_G, channel_G = run_G4.unbind(1)
    place_P = torch.repeat_interleave(length_G.cumsum(0) - length_G, length_G)
    place_P = torch.arange(len(place_P), device=place_P.device) - place_P
    first_P, start_P, channel_P = (part.repeat_interleave(length_G) for part in (first_G, start_G, channel_G))
    out_F[start_P + place_P] = (weight_S[first_P + place_P] * gain_C[channel_P]).to(out_F.dtype)
