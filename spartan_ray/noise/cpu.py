"""The noise kernels for CPUs, in numba: equal to the definition in `contract.py`, gaussian to 1e-6.

The kernels generate a tile of words in a buffer that stays in the first-level cache, turn it into noise and use it at
once. A whole noise vector is never stored. The loops suit LLVM's vectoriser: no branches, one pass each. Shapes: S
elements of a slice, K members, B rows, R ranges, T elements of a tile, C elements of the slice in a tile, P pairs.
"""

from __future__ import annotations

import numba
import numpy as np
import torch
from numba import uint32, uint64
from numpy.typing import NDArray

from spartan_ray.noise.contract import KEY_STEPS, MULTIPLIERS, ROUNDS, NoiseKind

TILE = 4096
KIND_CODES: dict[NoiseKind, int] = {"uniform": 0, "gaussian": 1, "rademacher": 2}

M0, M1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
W0, W1 = (np.uint32(step) for step in KEY_STEPS)
LOW_24, LOW_32, BITS_32 = np.uint32(0xFFFFFF), np.uint64(0xFFFFFFFF), np.uint64(32)
BITS_OF_ROOT_HALF, EXPONENT_BITS = np.uint64(0x3FE6A09E667F3BCD), np.uint64(0xFFF << 52)
TWO_TO_MINUS_24 = np.float32(2.0**-24)
ONE, TWO = np.float32(1), np.float32(2)

# error_model="numpy" leaves out the check for division by zero, which would be a branch.
jit = numba.njit(cache=True, nogil=True, error_model="numpy")


@jit
def _fill_words(word_T, first_block, seed):  # type: ignore[no-untyped-def]
    """Compute Philox4x32-10 of consecutive blocks; each uint64 holds the low and the high word of a pair.

    Between rounds, the bits above the low 32 of a word are not cleared, because the next multiplication uses only the
    low half. Clearing them would be a third of the work."""
    for block in range(word_T.size // 2):
        counter = uint64(first_block) + uint64(block)
        c0, c1, c2, c3 = counter, counter >> BITS_32, uint64(0), uint64(0)
        k0, k1 = uint32(seed), uint32(uint64(seed) >> BITS_32)
        for _ in range(ROUNDS):
            product0, product1 = M0 * (c0 & LOW_32), M1 * (c2 & LOW_32)
            c0, c1, c2, c3 = (
                (product1 >> BITS_32) ^ c1 ^ uint64(k0),
                product1,
                (product0 >> BITS_32) ^ c3 ^ uint64(k1),
                product0,
            )
            k0, k1 = uint32(k0 + W0), uint32(k1 + W1)
        word_T[2 * block] = (c0 & LOW_32) | (c1 << BITS_32)
        word_T[2 * block + 1] = (c2 & LOW_32) | (c3 << BITS_32)


@jit
def _fill_gaussian(pair_P, radius_P, noise_T):  # type: ignore[no-untyped-def]
    """Do Box-Muller in float64 with polynomials for log, cos and sin, because calls would not vectorise.

    log u: u = mantissa * 2**exponent with mantissa in [sqrt(1/2), sqrt(2)), both from the bits of u;
    log(mantissa) = 2 atanh(t) with t = (mantissa - 1) / (mantissa + 1), |t| < 0.172, by its series to t**11.
    cos and sin of 2 pi v: v is reduced to at most 1/8 of a turn; Taylor series to the 10th and 9th power.
    """
    bits_P = radius_P.view(np.uint64)
    for p in range(pair_P.size):
        radius_P[p] = float(uint32(pair_P[p]) & LOW_24) + 1.0
    for p in range(pair_P.size):
        above_root_half = bits_P[p] - BITS_OF_ROOT_HALF
        exponent = float(np.int32(np.int64(above_root_half) >> np.int64(52)))
        bits_P[p] -= above_root_half & EXPONENT_BITS
        t = (radius_P[p] - 1.0) / (radius_P[p] + 1.0)
        t2 = t * t
        series = 1.0 + t2 * (1 / 3 + t2 * (1 / 5 + t2 * (1 / 7 + t2 * (1 / 9 + t2 * (1 / 11)))))
        log_u = 2.0 * t * series + (exponent - 24.0) * 0.6931471805599453
        square = -2.0 * log_u
        radius_P[p] = np.sqrt(square if square > 0.0 else 0.0)
    for p in range(pair_P.size):
        v = float(uint32(pair_P[p] >> BITS_32) & LOW_24) * 2.0**-24
        quarter = np.floor(4.0 * v + 0.5)
        x = (v - 0.25 * quarter) * 6.283185307179586
        x2 = x * x
        sine = x * (1.0 - x2 * (1 / 6) * (1.0 - x2 * (1 / 20) * (1.0 - x2 * (1 / 42) * (1.0 - x2 * (1 / 72)))))
        cosine = 1.0 - x2 * (1 / 2) * (
            1.0 - x2 * (1 / 12) * (1.0 - x2 * (1 / 30) * (1.0 - x2 * (1 / 56) * (1.0 - x2 * (1 / 90))))
        )
        odd = (quarter == 1.0) | (quarter == 3.0)
        radius = -radius_P[p] if (quarter == 2.0) | (quarter == 3.0) else radius_P[p]
        noise_T[2 * p] = np.float32(radius * (-sine if odd else cosine))
        noise_T[2 * p + 1] = np.float32(radius * (cosine if odd else sine))


@jit
def _fill_noise(kind, pair_P, radius_P, noise_T, first_block, seed):  # type: ignore[no-untyped-def]
    _fill_words(pair_P, first_block, seed)
    word_T = pair_P.view(np.uint32)
    if kind == 0:
        for i in range(word_T.size):
            noise_T[i] = TWO * (np.float32(word_T[i] & LOW_24) * TWO_TO_MINUS_24) - ONE
    elif kind == 1:
        _fill_gaussian(pair_P, radius_P, noise_T)
    else:
        for i in range(word_T.size):
            noise_T[i] = ONE - TWO * np.float32(word_T[i] >> uint32(31))


@jit
def _descend(kind, theta_S, scale_S, offset, gain, seed, start, out_S, needed_R2):  # type: ignore[no-untyped-def]
    """Compute `Kernel.descend`. An empty scale_S means a scale of 1."""
    pair_P, radius_P, noise_T = np.empty(TILE // 2, np.uint64), np.empty(TILE // 2), np.empty(TILE, np.float32)
    for needed in range(needed_R2.shape[0]):
        done, stop = needed_R2[needed, 0], needed_R2[needed, 1]
        while done < stop:
            skip = (start + done) % 4
            end = min(done + TILE - skip, stop)
            blocks = (skip + end - done + 3) // 4
            _fill_noise(
                kind, pair_P[: 2 * blocks], radius_P[: 2 * blocks], noise_T[: 4 * blocks], (start + done) // 4, seed
            )
            # Indices into these slices need no check for negative values.
            theta_C, out_C, noise_C = theta_S[done:end], out_S[done:end], noise_T[skip:]
            if scale_S.size:
                scale_C = scale_S[done:end]
                for i in range(theta_C.size):
                    out_C[i] = theta_C[i] + scale_C[i] * (offset + gain * noise_C[i])
            else:
                for i in range(theta_C.size):
                    out_C[i] = theta_C[i] + (offset + gain * noise_C[i])
            done = end


@jit
def _descend_rows(  # type: ignore[no-untyped-def]
    kind, theta_S, scale_S, offset_B, gain_B, seed_B, out_BS, needed_R2
):
    for b in range(seed_B.size):
        _descend(kind, theta_S, scale_S, offset_B[b], gain_B[b], seed_B[b], 0, out_BS[b], needed_R2)


@jit
def _accumulate(kind, seed_K, weight_K, start, out_S):  # type: ignore[no-untyped-def]
    pair_P, radius_P, noise_T = np.empty(TILE // 2, np.uint64), np.empty(TILE // 2), np.empty(TILE, np.float32)
    done = 0
    while done < out_S.size:
        skip = (start + done) % 4
        end = min(done + TILE - skip, out_S.size)
        out_C, noise_C = out_S[done:end], noise_T[skip:]
        for k in range(seed_K.size):
            _fill_noise(kind, pair_P, radius_P, noise_T, (start + done) // 4, seed_K[k])
            weight = weight_K[k]
            for i in range(out_C.size):
                out_C[i] += weight * noise_C[i]
        done = end


class CpuKernel:
    """`noise.kernels.Kernel` for tensors in CPU memory, with one thread."""

    def __init__(self, kind: NoiseKind) -> None:
        self.code = KIND_CODES[kind]

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
        scale, needed = _scale(scale_S), _needed(theta_S, needed_R2)
        factors = np.float32(float(offset)), np.float32(float(gain)), np.uint64(int(seed) % 2**64)
        _descend(self.code, theta_S.numpy(), scale, *factors, start, out_S.numpy(), needed)

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
        scale, needed = _scale(scale_S), _needed(theta_S, needed_R2)
        _descend_rows(self.code, theta_S.numpy(), scale, offset_B, gain_B, seed_B, out_BS.numpy(), needed)

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> torch.Tensor:
        out_S = np.zeros(stop - start, np.float32)
        _accumulate(self.code, seed_K, weight_K, start, out_S)
        return torch.from_numpy(out_S)


def _scale(scale_S: torch.Tensor | None) -> NDArray[np.float32]:
    scale: NDArray[np.float32] = np.empty(0, np.float32) if scale_S is None else scale_S.numpy()
    return scale


def _needed(theta_S: torch.Tensor, needed_R2: NDArray[np.int64] | None) -> NDArray[np.int64]:
    return np.array([[0, theta_S.numel()]]) if needed_R2 is None else needed_R2
