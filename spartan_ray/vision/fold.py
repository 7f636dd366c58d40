"""The kernel that folds BatchNorm: multiply runs of weights by the factors of their channels; one per device type.

Shapes: S weights of a memory, C channels, G runs, F folded weights, P weights of all runs."""

from __future__ import annotations

import contextlib
from typing import Protocol

import torch


class Fold(Protocol):
    def __call__(self, weight_S: torch.Tensor, gain_C: torch.Tensor, run_G4: torch.Tensor, out_F: torch.Tensor) -> None:
        """Compute out[start + i] = weight[first + i] * gain[channel] for i < length, for each run (first, start,
        length, channel). Each element is one float32 product, rounded to out's type. Runs must not overlap in `out`;
        elements between them are not changed."""


def fold_for(device: torch.device) -> Fold:
    """Return the fastest kernel for the device: numba on CPUs, Triton on CUDA, and tensor operations on other devices
    or if PyTorch was installed without Triton."""
    if device.type == "cpu":
        from spartan_ray.vision.fold_cpu import fold

        return fold
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            from spartan_ray.vision.fold_cuda import fold as triton_fold

            return triton_fold
    return portable_fold


def portable_fold(weight_S: torch.Tensor, gain_C: torch.Tensor, run_G4: torch.Tensor, out_F: torch.Tensor) -> None:
    """`Fold` in tensor operations: compute the place of each weight, then gather, multiply and scatter."""
    first_G, start_G, length_G, channel_G = run_G4.unbind(1)
    place_P = torch.repeat_interleave(length_G.cumsum(0) - length_G, length_G)
    place_P = torch.arange(len(place_P), device=place_P.device) - place_P
    first_P, start_P, channel_P = (part.repeat_interleave(length_G) for part in (first_G, start_G, channel_G))
    out_F[start_P + place_P] = (weight_S[first_P + place_P] * gain_C[channel_P]).to(out_F.dtype)
