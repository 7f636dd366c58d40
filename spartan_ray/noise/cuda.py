"""The noise kernels for CUDA devices, in Triton: equal to the definition in `contract.py`, gaussian to 1e-6.

Each operation is one kernel launch, and the noise is never written to device memory. A Triton program handles a tile of
whole Philox blocks. It masks elements outside the slice, so that a slice may start anywhere. Shapes: S elements of a
slice, K members, B rows, N blocks of a tile, T = 4 N elements of a tile.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import torch
import triton
import triton.language as tl
from numpy.typing import NDArray

from spartan_ray.noise.contract import NoiseKind

BLOCKS = 256
TWO_PI = tl.constexpr(2 * math.pi)


@triton.jit
def _box_muller(word_N, other_N):  # type: ignore[no-untyped-def]
    """Do Box-Muller in float64. In float32, an error of two units in the last place of 5.8, the largest radius, would
    already be 1e-6."""
    u_N = ((word_N & 0xFFFFFF) + 1).to(tl.float64) * 2.0**-24
    angle_N = TWO_PI * ((other_N & 0xFFFFFF).to(tl.float64) * 2.0**-24)
    radius_N = tl.sqrt(-2.0 * tl.log(u_N))
    return (radius_N * tl.cos(angle_N)).to(tl.float32), (radius_N * tl.sin(angle_N)).to(tl.float32)


@triton.jit
def _uniform_or_sign(word_N, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    if KIND == "uniform":
        noise_N = 2.0 * ((word_N & 0xFFFFFF).to(tl.float32) * 2.0**-24) - 1.0
    else:
        noise_N = 1.0 - 2.0 * (word_N >> 31).to(tl.float32)
    return noise_N


@triton.jit
def _noise(seed, block_N, KIND: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the noise of N blocks as four vectors, one per element of a block."""
    zero_N = tl.zeros_like(block_N).to(tl.uint32)
    a_N, b_N, c_N, d_N = tl.philox(seed, block_N.to(tl.uint32), (block_N >> 32).to(tl.uint32), zero_N, zero_N)
    if KIND == "gaussian":
        a_N, b_N = _box_muller(a_N, b_N)
        c_N, d_N = _box_muller(c_N, d_N)
    else:
        a_N, b_N = _uniform_or_sign(a_N, KIND), _uniform_or_sign(b_N, KIND)
        c_N, d_N = _uniform_or_sign(c_N, KIND), _uniform_or_sign(d_N, KIND)
    return a_N, b_N, c_N, d_N


@triton.jit
def _in_order(a_N, b_N, c_N, d_N):  # type: ignore[no-untyped-def]
    """Return the elements in memory order, so that neighbouring threads access neighbouring addresses."""
    return tl.interleave(tl.interleave(a_N, c_N), tl.interleave(b_N, d_N))


@triton.jit
def _tile(start, size, BLOCKS: tl.constexpr):  # type: ignore[no-untyped-def]
    """Return the blocks of this program, the positions of their elements in the slice, and the mask of those inside."""
    first_block = start // 4 + tl.program_id(0).to(tl.int64) * BLOCKS
    place_T = 4 * first_block - start + tl.arange(0, 4 * BLOCKS)
    return first_block + tl.arange(0, BLOCKS), place_T, (place_T >= 0) & (place_T < size)


@triton.jit
def _move(  # type: ignore[no-untyped-def]
    out_S, start, size, theta_S, scale_S, seed, offset, gain, KIND: tl.constexpr, BLOCKS: tl.constexpr
):
    block_N, place_T, inside_T = _tile(start, size, BLOCKS)
    a_N, b_N, c_N, d_N = _noise(seed, block_N, KIND)
    perturbation_T = offset + gain * _in_order(a_N, b_N, c_N, d_N)
    if scale_S is not None:
        perturbation_T *= tl.load(scale_S + place_T, inside_T)
    tl.store(out_S + place_T, tl.load(theta_S + place_T, inside_T) + perturbation_T, inside_T)


# The types are given and the values are not specialised on, so that a new seed or start does not recompile a kernel.
@triton.jit(do_not_specialize=["start", "size", "seed"])
def _descend(  # type: ignore[no-untyped-def]
    out_S, start: tl.int64, size: tl.int64, theta_S, scale_S, seed: tl.uint64, offset, gain,
    KIND: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    _move(out_S, start, size, theta_S, scale_S, seed, offset, gain, KIND, BLOCKS)


@triton.jit(do_not_specialize=["start", "size"])
def _descend_from(  # type: ignore[no-untyped-def]
    out_S, start: tl.int64, size: tl.int64, theta_S, scale_S, seed_1, offset_1, gain_1,
    KIND: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """Do the work of `_descend` with a seed, an offset and a gain that are in device memory."""
    seed = tl.load(seed_1).to(tl.uint64, bitcast=True)
    _move(out_S, start, size, theta_S, scale_S, seed, tl.load(offset_1), tl.load(gain_1), KIND, BLOCKS)


@triton.jit(do_not_specialize=["start", "size", "count"])
def _accumulate(  # type: ignore[no-untyped-def]
    out_S, start: tl.int64, size: tl.int64, seed_K, weight_K, count: tl.int32, KIND: tl.constexpr, BLOCKS: tl.constexpr
):
    block_N, place_T, inside_T = _tile(start, size, BLOCKS)
    # Keep one sum per element of a block. Putting the noise in memory order for every member would cost passes through
    # shared memory.
    zero_N = tl.zeros([BLOCKS], tl.float32)
    sum_a_N, sum_b_N, sum_c_N, sum_d_N = zero_N, zero_N, zero_N, zero_N
    for k in range(count):
        weight = tl.load(weight_K + k)
        a_N, b_N, c_N, d_N = _noise(tl.load(seed_K + k), block_N, KIND)
        sum_a_N += weight * a_N
        sum_b_N += weight * b_N
        sum_c_N += weight * c_N
        sum_d_N += weight * d_N
    tl.store(out_S + place_T, _in_order(sum_a_N, sum_b_N, sum_c_N, sum_d_N), inside_T)


class CudaKernel:
    """`noise.kernels.Kernel` for contiguous tensors in the memory of a CUDA device."""

    def __init__(self, kind: NoiseKind, device: torch.device) -> None:
        self.kind = kind
        self.device = device

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
        assert all(tensor is None or tensor.is_contiguous() for tensor in (theta_S, scale_S, out_S))
        if isinstance(seed, torch.Tensor):
            self._launch(_descend_from, out_S, start, theta_S, scale_S, seed, offset, gain)
        else:
            self._launch(_descend, out_S, start, theta_S, scale_S, seed, float(offset), float(gain))

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
        for seed, offset, gain, out_S in zip(seed_B, offset_B, gain_B, out_BS, strict=True):
            self.descend(theta_S, scale_S, int(seed), float(offset), float(gain), out_S)

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> torch.Tensor:
        out_S = torch.empty(stop - start, dtype=torch.float32, device=self.device)
        # Pass the bits of the seeds as int64: Philox splits them anyway, and torch supports signed integers better.
        seeds, weights = (torch.tensor(array, device=self.device) for array in (seed_K.view(np.int64), weight_K))
        self._launch(_accumulate, out_S, start, seeds, weights, len(seed_K))
        return out_S

    def _launch(self, kernel: Any, out_S: torch.Tensor, start: int, *arguments: object) -> None:
        size = out_S.numel()
        grid = (triton.cdiv(start % 4 + size, 4 * BLOCKS),)
        with torch.cuda.device_of(out_S):
            # A fused multiply-add would skip one rounding of the definition.
            kernel[grid](out_S, start, size, *arguments, KIND=self.kind, BLOCKS=BLOCKS, enable_fp_fusion=False)
