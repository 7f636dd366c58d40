"""The noise kernels as integer tensor operations of torch, for devices without a kernel of their own.

They compute the same numbers as the definition in `contract.py` on any device (gaussian to 1e-6). They are slower than
a fused kernel, because every operation of the generator is a pass over memory. Shapes: S elements of a slice, K
members, N blocks of four elements.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from numpy.typing import NDArray

from spartan_ray.noise.contract import KEY_STEPS, MULTIPLIERS, ROUNDS, NoiseKind, split_key

# Elements generated at once. It limits the temporary tensors to a few hundred megabytes.
TILE = 1 << 22
LOW_32 = 0xFFFFFFFF


def _words(seed: int, first_block: int, end_block: int, device: torch.device) -> torch.Tensor:
    """Return Philox4x32-10 of consecutive blocks, N x 4, as int64.

    A product of two words may overflow to a negative int64. Its halves are extracted with masks, which is exact in
    two's complement."""
    block_N = torch.arange(first_block, end_block, dtype=torch.int64, device=device)
    c0, c1 = block_N & LOW_32, block_N >> 32
    c2 = c3 = torch.zeros_like(block_N)
    k0, k1 = split_key(seed)
    for _ in range(ROUNDS):
        product0, product1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            ((product1 >> 32) & LOW_32) ^ c1 ^ k0,
            product1 & LOW_32,
            ((product0 >> 32) & LOW_32) ^ c3 ^ k1,
            product0 & LOW_32,
        )
        k0, k1 = (k0 + KEY_STEPS[0]) & LOW_32, (k1 + KEY_STEPS[1]) & LOW_32
    return torch.stack([c0, c1, c2, c3], dim=1)


class PortableKernel:
    """`noise.kernels.Kernel` for tensors on any device."""

    def __init__(self, kind: NoiseKind, device: torch.device) -> None:
        self.kind = kind
        self.device = device

    def _noise(self, seed: int, start: int, stop: int) -> torch.Tensor:
        first_block, end_block = start // 4, -(-stop // 4)
        word_N4 = _words(int(seed), first_block, end_block, self.device)
        fraction_N4 = (word_N4 & 0xFFFFFF).to(torch.float32) * 2.0**-24
        if self.kind == "uniform":
            noise_N4 = 2 * fraction_N4 - 1
        elif self.kind == "rademacher":
            noise_N4 = 1 - 2 * (word_N4 >> 31).to(torch.float32)
        else:
            fraction_N4 = fraction_N4.double()
            radius_N2 = torch.sqrt(-2 * torch.log(fraction_N4[:, 0::2] + 2.0**-24))
            angle_N2 = 2 * math.pi * fraction_N4[:, 1::2]
            pairs_N22 = torch.stack([radius_N2 * torch.cos(angle_N2), radius_N2 * torch.sin(angle_N2)], dim=2)
            noise_N4 = pairs_N22.reshape(-1, 4).float()
        offset = start - 4 * first_block
        return noise_N4.reshape(-1)[offset : offset + stop - start]

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
        # Round the factors to float32, as every kernel does. Do one operation at a time, because a fused multiply-add
        # would skip one rounding.
        offset, gain = float(np.float32(float(offset))), float(np.float32(float(gain)))
        for done in range(0, theta_S.numel(), TILE):
            part = slice(done, min(done + TILE, theta_S.numel()))
            perturbation = self._noise(int(seed) % 2**64, start + part.start, start + part.stop).mul_(gain).add_(offset)
            if scale_S is not None:
                perturbation.mul_(scale_S[part])
            torch.add(theta_S[part], perturbation, out=out_S[part])

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
        out_S = torch.zeros(stop - start, dtype=torch.float32, device=self.device)
        for done in range(0, stop - start, TILE):
            part = slice(done, min(done + TILE, stop - start))
            for seed, weight in zip(seed_K, weight_K, strict=True):
                out_S[part] += self._noise(int(seed), start + part.start, start + part.stop).mul_(float(weight))
        return out_S
