"""The fused operations on noise, and the choice of a kernel for a device.

Shapes: K members, B rows, S elements of a slice, R ranges.
"""

from __future__ import annotations

import contextlib
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from spartan_ray.errors import InputError
from spartan_ray.noise.contract import RMS, NoiseKind


class Kernel(Protocol):
    """The fused operations on noise. Operations with a `start` work on any slice; `start` is its first element."""

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
        """Compute out = theta + scale * (offset + gain * noise) in float32, rounding after each operation.

        A scale of None means 1. The seed (as int64), the offset and the gain may be one-element tensors on the device.
        `needed_R2` holds R ranges [first, end) of the slice; elements outside them may be left unchanged."""

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
        """Do the work of `descend` for B members. Each row of `out_BS` receives one member's whole vector."""

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> torch.Tensor:
        """Return elements [start, stop) of sum_k weight_k * noise_k, in float32.

        The terms are added in the order of k, so that the bits of an element do not depend on the slice."""


def kernel_for(kind: NoiseKind, device: torch.device) -> Kernel:
    """Return the fastest kernel for a device: numba on CPUs, Triton on CUDA.

    Other devices, and CUDA without Triton, get integer tensor operations. Raises InputError for an unknown kind."""
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
