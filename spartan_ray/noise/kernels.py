"""The fused operations on noise, and which of their kernels a device gets. Shapes: K members, B rows, S elements of a
slice, R ranges."""

from __future__ import annotations

import contextlib
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from spartan_ray.errors import InputError
from spartan_ray.noise.contract import RMS, NoiseKind


class Kernel(Protocol):
    """The fused operations on noise. Those with a `start` take any slice, it is its first element."""

    def descend(
        self,
        theta_S: torch.Tensor,
        scale_S: torch.Tensor | None,
        seed: int | torch.Tensor,
        offset: float | torch.Tensor,
        gain: float | torch.Tensor,
        out_S: torch.Tensor,
        start: int = 0,
        needed_R2: NDArray[np.int64] | None = None,
    ) -> None:
        """out = theta + scale * (offset + gain * noise) in float32, one rounding an operation; no scale
        is a scale of 1. Seed, as int64, and factors may be tensors of one element on the device. Elements of the slice
        outside the needed ranges, R of [first, end), may be left as they are."""

    def descend_rows(
        self,
        theta_S: torch.Tensor,
        scale_S: torch.Tensor | None,
        seed_B: NDArray[np.uint64],
        offset_B: NDArray[np.float32],
        gain_B: NDArray[np.float32],
        out_BS: torch.Tensor,
        needed_R2: NDArray[np.int64] | None = None,
    ) -> None:
        """`descend` for several members of whole vectors, a row each."""

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> torch.Tensor:
        """sum_k weight_k * noise_k over [start, stop): float32, added in the order of k, so that
        every element has the same bits in whatever slice it is computed."""


def kernel_for(kind: NoiseKind, device: torch.device) -> Kernel:
    """The fastest kernel for the device: numba on CPU, Triton on CUDA, integer tensor operations elsewhere
    and where PyTorch came without Triton."""
    if kind not in RMS:
        raise InputError(f"noise ({kind!r}) must be one of {', '.join(RMS)}")
    if device.type == "cpu":
        from spartan_ray.noise.cpu import CpuKernel

        return CpuKernel(kind)
    if device.type == "cuda":
        with contextlib.suppress(ImportError):
            from spartan_ray.noise.cuda import CudaKernel

            return CudaKernel(kind, device)
    from spartan_ray.noise.portable import PortableKernel

    return PortableKernel(kind, device)
