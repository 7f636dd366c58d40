"""The cases of a generation in batches, as the fitness prepares them. Shapes: N cases, B seeds, K members."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils._pytree import tree_map

from spartan_ray.engine.draws import own_cases
from spartan_ray.engine.fitness import Fitness
from spartan_ray.engine.strategies.requests import CaseSet, Part

# Number of members whose own cases are copied to the device at once.
TOGETHER = 256
# The number of cases, and the result of `Fitness.prepare` for them.
Batch = tuple[int, Any]


class PreparedCases:
    """The sets of cases of a generation, prepared on one device.

    `kept(name, value)` returns a prepared value, or a copy of it at the address that belongs to the name."""

    def __init__(self, fitness: Fitness, device: torch.device, kept: Callable[[Hashable, Any], Any]) -> None:
        self.fitness, self.device, self.kept = fitness, device, kept
        self.sets: dict[CaseSet, NDArray[np.int64]] = {}
        self.prepared: dict[tuple[CaseSet, Part], list[Batch]] = {}
        self.own: dict[int, torch.Tensor] = {}  # own cases by seed, for the next members
        self.last: tuple[int | None, list[Batch]] = None, []  # the last seed and its batches, shared by a mirrored pair

    def load(self, sets: dict[CaseSet, NDArray[np.int64]], same: bool) -> None:
        """Replace the sets. With `same`, they are equal to the present ones, and prepared batches are kept."""
        self.sets = sets
        if not same:
            self.prepared.clear()

    def of(self, cases: CaseSet, part: Part) -> list[Batch]:
        """Return a part of a set in batches, prepared once for all members."""
        if (cases, part) not in self.prepared:
            case_N = self.sets[cases]
            start, stop = (int(share * len(case_N)) for share in part)
            chosen_N = torch.from_numpy(case_N[start:stop].copy()).to(self.device)
            self.prepared[cases, part] = self.kept((cases, part), self._prepare(chosen_N))
        return self.prepared[cases, part]

    def draw(self, cases: CaseSet, own: int, seed_K: NDArray[np.uint64]) -> None:
        """Let each seed draw `own` cases of a set. The draw happens when `drawn` needs it."""
        self.drawing = self.sets[cases], own, seed_K
        self.own, self.last = {}, (None, [])

    def drawn(self, seed_B: NDArray[np.uint64]) -> list[Batch]:
        """Return the batches of the cases that each seed drew.

        For one seed they are as the fitness prepared them. For several, the tensors are stacked, one row per seed."""
        rows: dict[int, list[Batch]] = {}
        for seed in seed_B.tolist():
            if seed not in rows:
                last, known = self.last
                if last != seed:
                    known = self.kept("own", self._prepare(self._own(seed)))
                rows[seed] = known
                self.last = seed, known
        if len(seed_B) == 1:
            return rows[seed]
        batches_B = [rows[seed] for seed in seed_B.tolist()]
        return [
            (same[0][0], tree_map(lambda *row: torch.stack(row), *(batch for _, batch in same)))
            for same in zip(*batches_B, strict=True)
        ]

    def _own(self, seed: int) -> torch.Tensor:
        """Return the cases of a seed on the device.

        The cases of the seeds that follow are copied with them, because the host waits for each copy."""
        if seed not in self.own:
            case_N, own, seed_K = self.drawing
            place = int(np.argmax(seed_K == np.uint64(seed)))
            seeds = list(dict.fromkeys(seed_K[place : place + TOGETHER].tolist()))
            drawn = np.stack([own_cases(case_N, own, one) for one in seeds])
            self.own = dict(zip(seeds, torch.from_numpy(drawn).to(self.device), strict=True))
        return self.own[seed]

    def _prepare(self, case_N: torch.Tensor) -> list[Batch]:
        return [(len(batch_N), self.fitness.prepare(batch_N)) for batch_N in batched(case_N, self.fitness.batch)]


def batched(case_N: torch.Tensor, largest: int | None) -> Iterator[torch.Tensor]:
    """Split cases into batches of at most `largest`, whose sizes differ by at most one.

    Otherwise a small remainder would form a batch with its own statistics."""
    passes = -(-len(case_N) // largest) if largest else 1
    for start, stop in pairwise(len(case_N) * number // passes for number in range(passes + 1)):
        yield case_N[start:stop]
