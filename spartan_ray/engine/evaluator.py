"""Scores members on one device: parent + seed -> descendant -> fitness, and its slice of the update.

Knows nothing of Ray; a worker is the Ray actor around one evaluator. Shapes: D parameters, K members, N cases,
M statistics, R ranges of parameters.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spartan_ray.engine.fitness import Fitness
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.strategies.requests import WHOLE, CaseSet, Members, Part, Scores
from spartan_ray.errors import one_line
from spartan_ray.noise.contract import NoiseKind
from spartan_ray.noise.kernels import kernel_for

# What a fitness may raise through no fault of its own: another process would not, or this one is broken from now on.
DEVICE_ERRORS = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


@dataclass(frozen=True)
class ParentState:
    """The parent as it is broadcast, with the cases that its descendants are scored on."""

    theta_D: NDArray[np.float32]
    buffers: list[torch.Tensor]
    case_sets: dict[CaseSet, NDArray[np.int64]]


# What multiplies noise and offset: one factor per parameter tensor, or per element; None means 1.
Scale = NDArray[np.float32] | None


@dataclass(frozen=True)
class EvaluatorSpec:
    """What an evaluator is made from; sent to each worker once. A function makes the network, or it is copied."""

    network: nn.Module | Callable[[], nn.Module]
    fitness: Fitness
    noise: NoiseKind
    threads: int | None = None

    def make(self, device: torch.device) -> Evaluator:
        network = copy.deepcopy(self.network) if isinstance(self.network, nn.Module) else self.network()
        return Evaluator(network, copy.copy(self.fitness), self.noise, device)


class Evaluator:
    """Builds descendants in place in its own network, always from the pristine parent."""

    def __init__(self, network: nn.Module, fitness: Fitness, noise: NoiseKind, device: torch.device) -> None:
        self.model = FlatModel(network.eval(), device)
        self.fitness = fitness
        self.fitness.to(device)
        self.device = device
        self.kernel = kernel_for(noise, device)
        self.needed_R2 = fitness.needed(self.model)
        self.theta_D = self.model.theta_D
        self.scale_D: torch.Tensor | None = None
        self.case_sets: dict[CaseSet, NDArray[np.int64]] = {}
        self.prepared: dict[tuple[CaseSet, Part], tuple[int, list[Any]]] = {}

    @property
    def device_name(self) -> str:
        """What the bits of a score may depend on."""
        if self.device.type == "cuda":
            return torch.cuda.get_device_name(self.device)
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"

    def load(self, parent: ParentState) -> None:
        """Take a new parent. On a CPU its parameters stay where they are, shared with other workers."""
        self.theta_D = _tensor(parent.theta_D, self.device)
        self.model.load_buffers(parent.buffers)
        self.case_sets = parent.case_sets
        self.prepared.clear()

    def load_scale(self, scale: Scale) -> None:
        """Take a new scale. On a CPU one of D elements stays where it is."""
        self.scale_D = None if scale is None else _tensor(scale, self.device)
        if self.scale_D is not None and len(self.scale_D) != len(self.theta_D):
            self.scale_D = self.model.spread(self.scale_D)

    def _batches(self, cases: CaseSet, part: Part) -> tuple[int, list[Any]]:
        """A part of a set of cases: their number, and the batches, prepared once for all members."""
        if (cases, part) not in self.prepared:
            case_N = self.case_sets[cases]
            start, stop = (int(share * len(case_N)) for share in part)
            chosen_N = torch.from_numpy(case_N[start:stop].copy()).to(self.device)
            batches = [
                (len(batch_N), self.fitness.prepare(batch_N)) for batch_N in batched(chosen_N, self.fitness.batch)
            ]
            self.prepared[cases, part] = stop - start, batches
        return self.prepared[cases, part]

    def evaluate(
        self, members: Members, cases: CaseSet, threshold: float, part: Part = WHOLE
    ) -> tuple[Scores, dict[int, str]]:
        """Score each member on a part of the cases; one that can no longer exceed the threshold is left. What is not
        finite in any statistic has NaN for all of them, and for its fitness. So has a member for which the fitness
        raised an error, and its text is in the second answer by the member's place."""
        count, batches = self._batches(cases, part)
        sums: list[torch.Tensor | None] = []
        failed: dict[int, str] = {}
        cases_K = np.zeros(len(members), np.int64)
        for k, (seed, offset, gain) in enumerate(zip(members.seed_K, members.offset_K, members.gain_K, strict=True)):
            self.descend(int(seed), offset, gain, self.needed_R2)
            try:
                with torch.inference_mode(), self.fitness.ready(self.model.module):
                    sum_M, cases_K[k] = self._sum(batches, count, threshold)
                sums.append(sum_M)
            except DEVICE_ERRORS:  # the worker's fault, or that of what runs beside it
                raise
            except Exception as error:
                sums.append(None)
                failed[k] = one_line(f"{type(error).__name__}: {error}")
        nothing_M = next((torch.full_like(sum_M, torch.nan) for sum_M in sums if sum_M is not None), torch.empty(0))
        # One wait for the device a call.
        sum_KM = torch.stack([nothing_M if sum_M is None else sum_M for sum_M in sums]).cpu().numpy()
        mean_KM = sum_KM / np.maximum(cases_K, 1)[:, None]
        mean_KM[~np.isfinite(mean_KM).all(1)] = np.nan
        return Scores(mean_KM, values(self.fitness, mean_KM), cases_K), failed

    def _sum(self, batches: Sequence[tuple[int, Any]], count: int, threshold: float) -> tuple[torch.Tensor, int]:
        """The sums of a network's statistics over the cases, M in float64 and in a fixed order, and how many they
        were. Ends once the fitness cannot exceed the threshold; its means up to there do not exceed it either.
        Without a threshold nothing waits for the device."""
        fitness, scored = self.fitness, 0
        total_M: torch.Tensor | None = None
        for size, batch in batches:
            statistic_NM = fitness(self.model.module, batch)
            if statistic_NM.shape[:1] != (size,) or statistic_NM.dim() > 2:
                raise ValueError(f"the fitness of {size} cases is {tuple(statistic_NM.shape)}: expected a row a case")
            sum_M = statistic_NM.reshape(size, -1).double().sum(0)
            total_M = sum_M if total_M is None else total_M + sum_M
            scored += size
            if threshold > -np.inf and fitness.best is not None:
                # The same division as at the end, so that rounding rejects nobody who would have won.
                most_M = (total_M.cpu().numpy() + (count - scored) * fitness.best) / count
                if not fitness.value(most_M) > threshold:
                    break
        assert total_M is not None, "a set of cases is not empty"
        return total_M, scored

    def descend(self, seed: int, offset: float, gain: float, needed_R2: NDArray[np.int64] | None = None) -> None:
        """Make the network a descendant of the parent, or as much of it as is needed."""
        self.kernel.descend(self.theta_D, self.scale_D, seed, offset, gain, self.model.theta_D, needed_R2=needed_R2)
        self.model.write()

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        """Elements [start, stop) of sum_k weight_k * noise_k."""
        return self.kernel.accumulate(seed_K, weight_K, start, stop).cpu().numpy()


def values(fitness: Fitness, mean_KM: NDArray[np.float64]) -> NDArray[np.float64]:
    """The fitness of each member, K, from its mean statistics; NaN where they are not finite."""
    fitness_K = np.full(len(mean_KM), np.nan)
    for k in np.flatnonzero(np.isfinite(mean_KM).all(1)) if mean_KM.shape[1] else ():
        fitness_K[k] = fitness.value(mean_KM[k])
    return fitness_K


def batched(case_N: torch.Tensor, largest: int | None) -> Iterator[torch.Tensor]:
    """Cases in batches of equal size (to one), so that no small remainder has statistics of its own."""
    passes = -(-len(case_N) // largest) if largest else 1
    for start, stop in pairwise(len(case_N) * number // passes for number in range(passes + 1)):
        yield case_N[start:stop]


def _tensor(array: NDArray[np.float32], device: torch.device) -> torch.Tensor:
    """Memory that is shared is read-only, and so is what is done with the tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
        return torch.from_numpy(array).to(device)


@contextmanager
def threads(count: int | None) -> Iterator[None]:
    """torch with so many threads, None as it is: its bits depend on them."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield
    finally:
        torch.set_num_threads(before)
