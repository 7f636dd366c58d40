"""The noise contract: the definition of element i of a seed's noise vector, the same on every device.

    block     = i // 4
    word      = philox4x32_10(counter=(lo(block), hi(block), 0, 0), key=(lo(seed), hi(seed)))[i % 4]
    uniform_i = 2 * ((word & 0xFFFFFF) * 2**-24) - 1          in [-1, 1), exact in float32

Seeds have 64 bits. An element does not depend on the slice in which it is computed. This file is the definition in
plain NumPy: slow, readable, and the reference of the tests. The kernels in the neighbouring files compute the same
numbers and use them in the same pass; `kernels.py` picks one by device.

Source: Philox4x32-10 is from Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
Shapes: D parameters, K members, S elements of a slice.
"""

from __future__ import annotations

from typing import Literal

import numpy as np
from numpy.typing import NDArray

NoiseKind = Literal["uniform", "gaussian", "rademacher"]

# Root mean square of one element. The norm of a noise vector is RMS * sqrt(D), within a relative error of about
# 1 / sqrt(D).
RMS: dict[NoiseKind, float] = {"uniform": 3**-0.5, "gaussian": 1.0, "rademacher": 1.0}

MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
ROUNDS = 10
LOW_32 = np.uint64(0xFFFFFFFF)
# Words 2 and 3 of the counter are (0, 0) for noise, and (SEED_DOMAIN, 0) to derive the seeds of members.
SEED_DOMAIN = 0x5EED


def philox4x32_10(counter_4N: NDArray[np.uint64], key_2: tuple[int, int]) -> NDArray[np.uint64]:
    """Return Random123's philox4x32-10 of N counters: 4 x N words below 2**32, stored as uint64."""
    c0, c1, c2, c3 = (counter.astype(np.uint64) for counter in counter_4N)
    k0, k1 = key_2
    for _ in range(ROUNDS):
        product0, product1 = np.uint64(MULTIPLIERS[0]) * c0, np.uint64(MULTIPLIERS[1]) * c2
        c0, c1, c2, c3 = (
            (product1 >> np.uint64(32)) ^ c1 ^ np.uint64(k0),
            product1 & LOW_32,
            (product0 >> np.uint64(32)) ^ c3 ^ np.uint64(k1),
            product0 & LOW_32,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & 0xFFFFFFFF, (k1 + KEY_STEPS[1]) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3])


def split_key(seed: int) -> tuple[int, int]:
    """Return a 64-bit seed as the key of Philox: (low 32 bits, high 32 bits)."""
    return seed & 0xFFFFFFFF, seed >> 32


def noise(kind: NoiseKind, seed: int, start: int, stop: int) -> NDArray[np.float32]:
    """Return elements [start, stop) of the noise vector of `seed`, by kind:

    uniform     2 * u - 1 with u = (word & 0xFFFFFF) * 2**-24
    rademacher  +1 where the word's highest bit is clear, else -1
    gaussian    Box-Muller on the word pairs (0, 1) and (2, 3) of a block: with
                u = ((word_a & 0xFFFFFF) + 1) * 2**-24 and v = (word_b & 0xFFFFFF) * 2**-24,
                sqrt(-2 ln u) * (cos(2 pi v), sin(2 pi v)); kernels agree with it to 1e-6
    """
    first_block, end_block = start // 4, -(-stop // 4)
    block_N = np.arange(first_block, end_block, dtype=np.uint64)
    zero_N = np.zeros_like(block_N)
    counter_4N = np.stack([block_N & LOW_32, block_N >> np.uint64(32), zero_N, zero_N])
    word_N4 = philox4x32_10(counter_4N, split_key(seed)).T
    fraction_N4 = (word_N4 & np.uint64(0xFFFFFF)).astype(np.float64) * 2.0**-24
    if kind == "uniform":
        noise_N4 = 2 * fraction_N4 - 1
    elif kind == "rademacher":
        noise_N4 = 1.0 - 2.0 * (word_N4 >> np.uint64(31)).astype(np.float64)
    else:
        radius_N2 = np.sqrt(-2 * np.log(fraction_N4[:, 0::2] + 2.0**-24))
        angle_N2 = 2 * np.pi * fraction_N4[:, 1::2]
        noise_N4 = np.empty_like(fraction_N4)
        noise_N4[:, 0::2] = radius_N2 * np.cos(angle_N2)
        noise_N4[:, 1::2] = radius_N2 * np.sin(angle_N2)
    offset = start - 4 * first_block
    return noise_N4.reshape(-1)[offset : offset + stop - start].astype(np.float32)


def member_seeds(run_seed: int, generation: int, count: int) -> NDArray[np.uint64]:
    """Return the noise seeds of members 0..count-1.

    Args:
        run_seed: Seed of the run or the population.
        generation: Number of the generation.
        count: Number of members, K.

    Returns:
        Seeds, uint64, shape (K,). Each depends only on the run seed, the generation and the member's number.
    """
    member_K = np.arange(count, dtype=np.uint64)
    counter_4K = np.stack(
        [member_K, np.full_like(member_K, generation), np.full_like(member_K, SEED_DOMAIN), np.zeros_like(member_K)]
    )
    words_4K = philox4x32_10(counter_4K, split_key(run_seed))
    seed_K: NDArray[np.uint64] = words_4K[0] | (words_4K[1] << np.uint64(32))
    return seed_K
