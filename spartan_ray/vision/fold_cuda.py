"""`fold.Fold` for CUDA devices, in Triton, with one launch for all runs.

Shapes: S weights, C channels, G runs, F folded weights, T weights of a tile."""

from __future__ import annotations

import torch
import triton
import triton.language as tl

TILE = 1024


@triton.jit
def _fold(out_F, weight_S, gain_C, run_G4, TILE: tl.constexpr):  # type: ignore[no-untyped-def]
    """One program per run."""
    run = run_G4 + 4 * tl.program_id(0)
    first, start, length, channel = tl.load(run), tl.load(run + 1), tl.load(run + 2), tl.load(run + 3)
    gain = tl.load(gain_C + channel)
    for done in range(0, length, TILE):
        place_T = done + tl.arange(0, TILE)
        inside_T = place_T < length
        product_T = tl.load(weight_S + first + place_T, inside_T) * gain
        tl.store(out_F + start + place_T, product_T.to(out_F.dtype.element_ty), inside_T)


def fold(weight_S: torch.Tensor, gain_C: torch.Tensor, run_G4: torch.Tensor, out_F: torch.Tensor) -> None:
    with torch.cuda.device_of(out_F):
        _fold[(len(run_G4),)](out_F, weight_S, gain_C, run_G4, TILE=TILE)
