"""`fold.Fold` for CPUs, in numba, with one thread.

Shapes: S weights, C channels, G runs, F folded weights, T weights of a tile."""

from __future__ import annotations

import numpy as np
import torch
from numba import uint16, uint32

from spartan_ray.noise.cpu import TILE, jit

# Bit patterns to round a float32 to bfloat16, which is the upper half of its bits.
HALF, ODD, NAN = np.uint32(0x7FFF), np.uint32(1), np.uint16(0x7FC0)


@jit
def _fold(weight_S, gain_C, run_G4, out_F):  # type: ignore[no-untyped-def]
    for run in range(run_G4.shape[0]):
        first, start, length, channel = run_G4[run]
        weight_T, out_T, gain = weight_S[first : first + length], out_F[start : start + length], gain_C[channel]
        for i in range(out_T.size):
            out_T[i] = weight_T[i] * gain


@jit
def _fold_to_bfloat16(weight_S, gain_C, run_G4, out_F):  # type: ignore[no-untyped-def]
    """Round products to the nearest bfloat16, ties to even: add just under a half, plus the lowest kept bit, and
    truncate."""
    product_T = np.empty(TILE, np.float32)
    bits_T = product_T.view(np.uint32)
    for run in range(run_G4.shape[0]):
        first, start, length, channel = run_G4[run]
        gain = gain_C[channel]
        for done in range(0, length, TILE):
            end = min(done + TILE, length)
            weight_T, out_T = weight_S[first + done : first + end], out_F[start + done : start + end]
            for i in range(out_T.size):
                product_T[i] = weight_T[i] * gain
            for i in range(out_T.size):
                bits = bits_T[i]
                rounded = uint16((bits + HALF + ((bits >> uint32(16)) & ODD)) >> uint32(16))
                out_T[i] = rounded if product_T[i] == product_T[i] else NAN


def fold(weight_S: torch.Tensor, gain_C: torch.Tensor, run_G4: torch.Tensor, out_F: torch.Tensor) -> None:
    given = weight_S.detach().numpy(), gain_C.numpy(), run_G4.numpy()
    if out_F.dtype == torch.bfloat16:
        _fold_to_bfloat16(*given, out_F.view(torch.uint16).numpy())
    else:
        _fold(*given, out_F.numpy())
