"""Subspaces that evolution moves in: a few directions, alone or beside the whole space. Shapes: D parameters, M
directions."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray

from spartan_ray.engine.flat import dot, norm
from spartan_ray.errors import InputError
from spartan_ray.naming import SUBSPACES, kind_and_number

# Guided ES' share of the whole space in the variance of a mutation, 1/2 in the paper.
GUIDED_WHOLE = 0.5
# Elements that are added at once: they stay in the second-level cache while the directions pass by.
BLOCK = 1 << 16


@dataclass(frozen=True)
class Basis:
    """What noise is made of: whole * noise[0:D] + sum_m noise[D + m] * row_m, of the noise vector of a seed, which has
    as many elements as one asks for."""

    rows_MD: NDArray[np.float32]
    whole: float = 0.0

    @property
    def elements(self) -> tuple[int, int]:
        """Those of a noise vector that count, from and to."""
        count, size = self.rows_MD.shape
        return (0 if self.whole else size), size + count

    def combine(self, sum_S: torch.Tensor) -> torch.Tensor:
        """What these elements of a sum of noise vectors make, D."""
        rows_MD = torch.from_numpy(self.rows_MD).to(sum_S.device)
        count, size = rows_MD.shape
        out_D = sum_S[:size] * self.whole if self.whole else torch.zeros(size, device=sum_S.device)
        add_rows(out_D, rows_MD, sum_S[-count:].cpu().numpy())
        return out_D

    def norm(self) -> float:
        """That of a mutation over the root mean square of noise."""
        size = self.rows_MD.shape[1]
        return math.sqrt(self.whole**2 * size + sum(norm(torch.from_numpy(row_D)) ** 2 for row_D in self.rows_MD))


class Subspace:
    """The directions that the members of a phase differ in.

    random        as many random directions
    trajectory    the steps between the parents that were remembered, as long as they are
    guided        gradients, each on cases of its own, and the whole space (Maheswaranathan et al., arXiv 1806.10230)

    Random and guided mutations are as long as those in the whole space."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count
        self.trajectory: deque[torch.Tensor] = deque(maxlen=count + 1)

    def basis(self, random: Callable[[int], torch.Tensor], gradient: Callable[[int], torch.Tensor]) -> Basis:
        """That of a phase. `random` makes a direction of unit variance and `gradient` a gradient, D, by number."""
        if self.kind == "trajectory":
            if len(self.trajectory) < 2:
                raise InputError("subspace trajectory: fewer than two parents have been remembered")
            return Basis(differences(self.trajectory).cpu().numpy())
        rows_MD = torch.stack([(random if self.kind == "random" else gradient)(m) for m in range(self.count)])
        if self.kind == "random":
            return Basis(rows_MD.div_(math.sqrt(self.count)).cpu().numpy())
        rows_MD = orthonormal(rows_MD)
        if not len(rows_MD):
            raise InputError("subspace guided: the gradients are zero")
        count, size = rows_MD.shape
        rows_MD *= math.sqrt((1 - GUIDED_WHOLE) * size / count)
        return Basis(rows_MD.cpu().numpy(), math.sqrt(GUIDED_WHOLE))


def parse_subspace(text: str) -> Subspace | None:
    """What `random:8` says; None of `none`. Raises InputError for anything else."""
    found = kind_and_number("subspace", text, SUBSPACES)
    return Subspace(found[0], int(found[1])) if found else None


def add_rows(out_D: torch.Tensor, rows_MD: torch.Tensor, weight_M: NDArray[np.float32]) -> None:
    """out += sum_m weight_m * row_m in place, in the order of m, to the same bits for any number of threads."""
    block = BLOCK if out_D.device.type == "cpu" else out_D.numel()
    for start in range(0, out_D.numel(), block):
        out_B = out_D[start : start + block]
        for row_D, weight in zip(rows_MD, weight_M.tolist(), strict=True):
            out_B.add_(row_D[start : start + block], alpha=weight)


def differences(theta: Iterable[torch.Tensor]) -> torch.Tensor:
    """The steps from each of several vectors to the next, M x D, the last one first."""
    vectors = list(theta)
    return torch.stack([after - before for before, after in pairwise(vectors)][::-1])


def orthonormal(rows_MD: torch.Tensor) -> torch.Tensor:
    """Orthonormal directions of the same span, in place, by Gram and Schmidt; those that add nothing are left out."""
    kept: list[torch.Tensor] = []
    for row_D in rows_MD:
        length = norm(row_D)
        for _ in range(2):  # the second time for what rounding left
            for other_D in kept:
                row_D.sub_(other_D, alpha=dot(row_D, other_D))
        if norm(row_D) > 1e-4 * length > 0:
            kept.append(row_D.div_(norm(row_D)))
    return rows_MD if len(kept) == len(rows_MD) else torch.stack(kept) if kept else rows_MD[:0]
