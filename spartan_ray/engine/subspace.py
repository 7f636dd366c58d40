"""Subspaces in which evolution moves: a few directions, alone or together with the whole space.

Shapes: D parameters, M directions, S elements of the noise in use, B elements of a block.
"""

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

# Share of the whole space in the variance of a Guided ES perturbation, 1/2 in the paper.
GUIDED_WHOLE = 0.5
# Number of elements added at once. They stay in the second-level cache while all directions are added.
BLOCK = 1 << 16


@dataclass(frozen=True)
class Basis:
    """The directions of the noise: whole * noise[0:D] + sum_m noise[D + m] * row_m.

    Here `noise` is the noise vector of a seed, which may have any number of elements."""

    rows_MD: NDArray[np.float32]
    whole: float = 0.0

    @property
    def elements(self) -> tuple[int, int]:
        """First and end of the elements of a noise vector that are used."""
        count, size = self.rows_MD.shape
        return (0 if self.whole else size), size + count

    def combine(self, sum_S: torch.Tensor) -> torch.Tensor:
        """Return the vector, shape (D,), for these elements of a noise vector or of a sum of noise vectors."""
        rows_MD = torch.from_numpy(self.rows_MD).to(sum_S.device)
        count, size = rows_MD.shape
        out_D = sum_S[:size] * self.whole if self.whole else torch.zeros(size, device=sum_S.device)
        add_rows(out_D, rows_MD, sum_S[-count:].cpu().numpy())
        return out_D

    def norm(self) -> float:
        """Return the expected norm of a perturbation with gain 1, divided by the RMS of the noise."""
        size = self.rows_MD.shape[1]
        return math.sqrt(self.whole**2 * size + sum(norm(torch.from_numpy(row_D)) ** 2 for row_D in self.rows_MD))


class Subspace:
    """The directions in which the members of a phase differ, by kind:

    random        `count` random directions
    trajectory    the last `count` steps between remembered parents, with their lengths
    guided        `count` gradients, each on its own cases, and the whole space (Guided ES, Maheswaranathan et al.,
                  arXiv 1806.10230)

    Random and guided perturbations are as long as those in the whole space."""

    def __init__(self, kind: str, count: int) -> None:
        self.kind, self.count = kind, count
        self.trajectory: deque[torch.Tensor] = deque(maxlen=count + 1)

    def basis(self, random: Callable[[int], torch.Tensor], gradient: Callable[[int], torch.Tensor]) -> Basis:
        """Return the basis of a phase.

        Args:
            random: A function from a number to a random direction of unit variance, shape (D,).
            gradient: A function from a number to a gradient, shape (D,).

        Raises:
            InputError: Fewer than two parents have been remembered, or all gradients are zero.
        """
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
    """Return the subspace of a text such as `random:8`, or None for `none`. Raises InputError for anything else."""
    found = kind_and_number("subspace", text, SUBSPACES)
    return Subspace(found[0], int(found[1])) if found else None


def add_rows(out_D: torch.Tensor, rows_MD: torch.Tensor, weight_M: NDArray[np.float32]) -> None:
    """Compute out += sum_m weight_m * row_m in place, in the order of m.

    The bits do not depend on the number of threads."""
    block = BLOCK if out_D.device.type == "cpu" else out_D.numel()
    for start in range(0, out_D.numel(), block):
        out_B = out_D[start : start + block]
        for row_D, weight in zip(rows_MD, weight_M.tolist(), strict=True):
            out_B.add_(row_D[start : start + block], alpha=weight)


def differences(theta: Iterable[torch.Tensor]) -> torch.Tensor:
    """Return the steps from each vector to the next, shape (M, D), the last step first."""
    vectors = list(theta)
    return torch.stack([after - before for before, after in pairwise(vectors)][::-1])


def orthonormal(rows_MD: torch.Tensor) -> torch.Tensor:
    """Orthonormalise directions in place by the Gram-Schmidt process.

    Directions that depend linearly on earlier ones are left out of the result."""
    kept: list[torch.Tensor] = []
    for row_D in rows_MD:
        length = norm(row_D)
        for _ in range(2):  # the second time removes what rounding left
            for other_D in kept:
                row_D.sub_(other_D, alpha=dot(row_D, other_D))
        if norm(row_D) > 1e-4 * length > 0:
            kept.append(row_D.div_(norm(row_D)))
    return rows_MD if len(kept) == len(rows_MD) else torch.stack(kept) if kept else rows_MD[:0]
