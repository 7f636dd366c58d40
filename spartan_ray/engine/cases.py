"""Cases as a fitness prepares them, in batches. Shapes: N cases, B seeds."""

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

# How many cases, and what the fitness prepared of them.
Batch = tuple[int, Any]


class PreparedCases:
    """The sets of cases of a generation on one device. `kept` puts what is prepared where it is to be."""

    def __init__(self, fitness: Fitness, device: torch.device, kept: Callable[[Hashable, Any], Any]) -> None:
        self.fitness, self.device, self.kept = fitness, device, kept
        self.sets: dict[CaseSet, NDArray[np.int64]] = {}
        self.prepared: dict[tuple[CaseSet, Part], list[Batch]] = {}
        self.own: tuple[Any, list[Batch]] = None, []  # the last that a seed has drawn, which a mirrored pair shares

    def load(self, sets: dict[CaseSet, NDArray[np.int64]], same: bool) -> None:
        """Take other sets, or the same, which stay prepared as they are."""
        self.sets = sets
        if not same:
            self.prepared.clear()
            self.own = None, []

    def of(self, cases: CaseSet, part: Part) -> list[Batch]:
        """A part of a set, prepared once for all members."""
        if (cases, part) not in self.prepared:
            case_N = self.sets[cases]
            start, stop = (int(share * len(case_N)) for share in part)
            self.prepared[cases, part] = self.kept((cases, part), self._prepare(case_N[start:stop]))
        return self.prepared[cases, part]

    def drawn(self, cases: CaseSet, own: int, seed_B: NDArray[np.uint64]) -> list[Batch]:
        """The `own` cases of a set that each seed draws, of one as the fitness prepares them, of more stacked in
        rows."""
        rows: dict[int, list[Batch]] = {}
        for seed in seed_B.tolist():
            if seed not in rows:
                last, known = self.own
                if last != (cases, own, seed):
                    known = self.kept("own", self._prepare(own_cases(self.sets[cases], own, seed)))
                rows[seed] = known
                self.own = (cases, own, seed), known
        if len(seed_B) == 1:
            return rows[seed]
        batches_B = [rows[seed] for seed in seed_B.tolist()]
        return [
            (same[0][0], tree_map(lambda *row: torch.stack(row), *(batch for _, batch in same)))
            for same in zip(*batches_B, strict=True)
        ]

    def _prepare(self, case_N: NDArray[np.int64]) -> list[Batch]:
        chosen_N = torch.from_numpy(case_N.copy()).to(self.device)
        return [(len(batch_N), self.fitness.prepare(batch_N)) for batch_N in batched(chosen_N, self.fitness.batch)]


def batched(case_N: torch.Tensor, largest: int | None) -> Iterator[torch.Tensor]:
    """Cases in batches of equal size (to one), so that no small remainder has statistics of its own."""
    passes = -(-len(case_N) // largest) if largest else 1
    for start, stop in pairwise(len(case_N) * number // passes for number in range(passes + 1)):
        yield case_N[start:stop]
