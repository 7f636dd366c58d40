"""The fused operations on noise, which of their kernels a device gets, and how a process shows that its kernel
computes the contract. Shapes: K members, B rows, S elements of a slice, R ranges."""

from __future__ import annotations

import contextlib
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from spartan_ray.errors import InputError
from spartan_ray.noise.contract import RMS, NoiseKind, noise


class Kernel(Protocol):
    """The fused operations on noise. Those with a `start` take any slice, it is its first element."""

    def descend(
        self,
        theta_S: torch.Tensor,
        scale_S: torch.Tensor | None,
        seed: int,
        offset: float,
        gain: float,
        out_S: torch.Tensor,
        start: int = 0,
        needed_R2: NDArray[np.int64] | None = None,
    ) -> None:
        """out = theta + scale * (offset + gain * noise) in float32, one rounding an operation; no scale
        is a scale of 1. Elements of the slice outside the needed ranges, R of [first, end), may be left as they are."""

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


FINGERPRINT_SEED = 0x0123456789ABCDEF
FINGERPRINT_SLICES = ((0, 61), (11_000_003, 11_000_064))


def fingerprint(kernel: Kernel) -> NDArray[np.float32]:
    """A sample of what a kernel computes, which a worker shows when it joins."""
    seed_1, weight_1 = np.array([FINGERPRINT_SEED], np.uint64), np.ones(1, np.float32)
    slices = [kernel.accumulate(seed_1, weight_1, start, stop).cpu().numpy() for start, stop in FINGERPRINT_SLICES]
    return np.concatenate(slices)


def fingerprint_agrees(kind: NoiseKind, sample: NDArray[np.float32]) -> bool:
    """Whether a sample is the definition's: to the bit, for gaussian to 1e-6."""
    expected = np.concatenate([noise(kind, FINGERPRINT_SEED, start, stop) for start, stop in FINGERPRINT_SLICES])
    if sample.shape != expected.shape:
        return False
    tolerance = 1e-6 if kind == "gaussian" else 0.0
    return bool(np.all(np.abs(sample - expected) <= tolerance))
