"""The noise kernels for CPUs, in numba: equal to the definition in `noise.py`, gaussian to 1e-6.

A tile of words is generated into a buffer that stays in the first-level cache, turned into noise and
used at once, so that a noise vector never exists. The loops are written for LLVM's vectoriser: no
branches, one pass each. Shapes: S elements of a slice, K members, T elements of a tile.
"""

from __future__ import annotations

import numpy as np
import torch
from numba import njit, uint32, uint64
from numpy.typing import NDArray

from spartan_ray.config import NoiseKind
from spartan_ray.noise import KEY_STEPS, MULTIPLIERS, ROUNDS

TILE = 4096
KIND_CODES: dict[NoiseKind, int] = {"uniform": 0, "gaussian": 1, "rademacher": 2}

M0, M1 = (np.uint64(multiplier) for multiplier in MULTIPLIERS)
W0, W1 = (np.uint32(step) for step in KEY_STEPS)
LOW_24 = np.uint32(0xFFFFFF)
TWO_TO_MINUS_24 = np.float32(2.0**-24)
ONE, TWO, HALF = np.float32(1), np.float32(2), np.float32(0.5)


@njit(cache=True, nogil=True)
def _fill_words(word_T, first_block, seed):  # type: ignore[no-untyped-def]
    """Philox4x32-10 of consecutive blocks."""
    for block in range(word_T.size // 4):
        counter = uint64(first_block) + uint64(block)
        c0, c1, c2, c3 = uint32(counter), uint32(counter >> uint64(32)), uint32(0), uint32(0)
        k0, k1 = uint32(seed), uint32(uint64(seed) >> uint64(32))
        for _ in range(ROUNDS):
            product0, product1 = M0 * uint64(c0), M1 * uint64(c2)
            c0, c1, c2, c3 = (
                uint32(product1 >> uint64(32)) ^ c1 ^ k0,
                uint32(product1),
                uint32(product0 >> uint64(32)) ^ c3 ^ k1,
                uint32(product0),
            )
            k0, k1 = uint32(k0 + W0), uint32(k1 + W1)
        word_T[4 * block] = c0
        word_T[4 * block + 1] = c1
        word_T[4 * block + 2] = c2
        word_T[4 * block + 3] = c3


@njit(cache=True, nogil=True)
def _fill_gaussian(word_T, noise_T):  # type: ignore[no-untyped-def]
    """Box-Muller in float64 with polynomials for log, cos and sin, since calls would not vectorise.

    log u: u = mantissa * 2**exponent with mantissa in [sqrt(1/2), sqrt(2)), log(mantissa) =
    2 atanh(t) with t = (mantissa - 1) / (mantissa + 1), |t| < 0.172, by its series to t**11.
    cos and sin of 2 pi v: v is folded to |f| <= 1/8 of a turn, Taylor to the 9th and 10th power.
    """
    for pair in range(word_T.size // 2):
        u = float(uint32(word_T[2 * pair] & LOW_24)) + 1.0
        v = float(uint32(word_T[2 * pair + 1] & LOW_24)) * 2.0**-24
        # u is an integer in 1..2**24, so its logarithm to base 2 rounds down to 0..24.
        exponent = 0.0
        mantissa = u
        for bit in (16, 8, 4, 2, 1):
            large = mantissa >= float(1 << bit)
            mantissa = mantissa * (2.0**-bit if large else 1.0)
            exponent += float(bit) if large else 0.0
        large = mantissa >= 1.4142135623730951
        mantissa = mantissa * (0.5 if large else 1.0)
        exponent += 1.0 if large else 0.0
        t = (mantissa - 1.0) / (mantissa + 1.0)
        t2 = t * t
        series = 1.0 + t2 * (1 / 3 + t2 * (1 / 5 + t2 * (1 / 7 + t2 * (1 / 9 + t2 * (1 / 11)))))
        log_u = 2.0 * t * series + (exponent - 24.0) * 0.6931471805599453
        radius = np.sqrt(max(0.0, -2.0 * log_u))

        quarter = np.floor(4.0 * v + 0.5)
        x = (v - 0.25 * quarter) * 6.283185307179586
        x2 = x * x
        sine = x * (1.0 - x2 / 6 * (1.0 - x2 / 20 * (1.0 - x2 / 42 * (1.0 - x2 / 72))))
        cosine = 1.0 - x2 / 2 * (1.0 - x2 / 12 * (1.0 - x2 / 30 * (1.0 - x2 / 56 * (1.0 - x2 / 90))))
        odd = quarter == 1.0 or quarter == 3.0
        a = -sine if odd else cosine
        b = cosine if odd else sine
        flip = -1.0 if quarter == 2.0 or quarter == 3.0 else 1.0
        noise_T[2 * pair] = np.float32(radius * a * flip)
        noise_T[2 * pair + 1] = np.float32(radius * b * flip)


@njit(cache=True, nogil=True)
def _fill_noise(kind, word_T, noise_T, first_block, seed):  # type: ignore[no-untyped-def]
    _fill_words(word_T, first_block, seed)
    if kind == 0:
        for i in range(word_T.size):
            noise_T[i] = TWO * (np.float32(word_T[i] & LOW_24) * TWO_TO_MINUS_24) - ONE
    elif kind == 1:
        _fill_gaussian(word_T, noise_T)
    else:
        for i in range(word_T.size):
            noise_T[i] = ONE - TWO * np.float32(word_T[i] >> uint32(31))


@njit(cache=True, nogil=True)
def _descend(kind, theta_S, scale_S, offset, gain, seed, start, out_S):  # type: ignore[no-untyped-def]
    """With an empty scale_S the scale is 1."""
    word_T, noise_T = np.empty(TILE, np.uint32), np.empty(TILE, np.float32)
    done = 0
    while done < theta_S.size:
        skip = (start + done) % 4
        count = min(TILE - skip, theta_S.size - done)
        _fill_noise(kind, word_T, noise_T, (start + done) // 4, seed)
        if scale_S.size:
            for i in range(count):
                out_S[done + i] = theta_S[done + i] + scale_S[done + i] * (offset + gain * noise_T[skip + i])
        else:
            for i in range(count):
                out_S[done + i] = theta_S[done + i] + (offset + gain * noise_T[skip + i])
        done += count


@njit(cache=True, nogil=True)
def _accumulate(kind, seed_K, weight_K, start, out_S):  # type: ignore[no-untyped-def]
    word_T, noise_T = np.empty(TILE, np.uint32), np.empty(TILE, np.float32)
    done = 0
    while done < out_S.size:
        skip = (start + done) % 4
        count = min(TILE - skip, out_S.size - done)
        for k in range(seed_K.size):
            _fill_noise(kind, word_T, noise_T, (start + done) // 4, seed_K[k])
            weight = weight_K[k]
            for i in range(count):
                out_S[done + i] += weight * noise_T[skip + i]
        done += count


class CpuKernel:
    """`noise.Kernel` on tensors in CPU memory, one thread."""

    def __init__(self, kind: NoiseKind) -> None:
        self.code = KIND_CODES[kind]

    def descend(
        self,
        theta_S: torch.Tensor,
        scale_S: torch.Tensor | None,
        seed: int,
        offset: float,
        gain: float,
        out_S: torch.Tensor,
        start: int = 0,
    ) -> None:
        scale = np.empty(0, np.float32) if scale_S is None else scale_S.numpy()
        offset_32, gain_32 = np.float32(offset), np.float32(gain)
        _descend(self.code, theta_S.numpy(), scale, offset_32, gain_32, np.uint64(seed), start, out_S.numpy())

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> torch.Tensor:
        out_S = np.zeros(stop - start, np.float32)
        _accumulate(self.code, seed_K, weight_K, start, out_S)
        return torch.from_numpy(out_S)
