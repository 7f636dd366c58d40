"""Scores members on one device: parent + seed -> descendant -> fitness, and its slice of the update.

Knows nothing of Ray; a worker is the Ray actor around one evaluator. Shapes: D parameters, K members, N cases,
M statistics, R ranges of parameters.
"""

from __future__ import annotations

import copy
import functools
import math
import traceback
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn
from torch.utils._pytree import tree_leaves

from spartan_ray.engine.cases import Batch, PreparedCases
from spartan_ray.engine.fitness import Fitness
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.recorder import Recorder
from spartan_ray.engine.stack import Stack
from spartan_ray.engine.strategies.requests import WHOLE, CaseSet, Members, Part, Scores
from spartan_ray.engine.subspace import Basis, add_rows
from spartan_ray.errors import InputError, one_line
from spartan_ray.noise.contract import NoiseKind
from spartan_ray.noise.kernels import kernel_for
from spartan_ray.noise.portable import PortableKernel

# What a fitness may raise through no fault of its own: another process would not, or this one is broken from now on.
DEVICE_ERRORS = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


# An array, or where it stays in this process, or numpy has no such type, a tensor.
Sent = Any


@dataclass(frozen=True)
class ParentState:
    """The parent as it is broadcast, with the cases that its descendants are scored on, and the seed of the random
    numbers that their fitness may draw from torch."""

    theta_D: Sent
    buffers: list[Sent]
    case_sets: dict[CaseSet, NDArray[np.int64]]
    seed: int = 0


# Of a member: as it is, or a tensor of one element in a device's memory.
Number = Any
# What multiplies noise and offset: one factor per parameter tensor, or per element; None means 1.
Scale = Sent | None


@dataclass(frozen=True)
class EvaluatorSpec:
    """What an evaluator is made from; sent to each worker once. A function makes the network, or it is copied; the
    layout is the parent's."""

    network: nn.Module | Callable[[], nn.Module]
    fitness: Fitness
    noise: NoiseKind
    threads: int | None = None
    batch_members: int = 1
    mutate: str = "all"
    layout: dict[str, str] | None = None

    def make(self, device: torch.device) -> Evaluator:
        network, fitness = self.parts()
        evaluator = Evaluator(network, fitness, self.noise, device, self.batch_members, self.mutate)
        if self.layout:
            there = {name: said.rpartition(" on ")[0] for name, said in self.layout.items()}
            here = {name: said.rpartition(" on ")[0] for name, said in evaluator.model.layout.items()}
            if here != there:
                raise InputError("factory: makes a network with other trainable parameters than the population's")
        return evaluator

    def parts(self) -> tuple[nn.Module, Fitness]:
        """A network and a fitness of an evaluator's own."""
        network = copy.deepcopy(self.network) if isinstance(self.network, nn.Module) else self.network()
        return network, copy.copy(self.fitness)


class Evaluator:
    """Builds descendants in place in its own network, always from the pristine parent."""

    def __init__(
        self,
        network: nn.Module,
        fitness: Fitness,
        noise: NoiseKind,
        device: torch.device,
        batch_members: int = 1,
        mutate: str = "all",
    ) -> None:
        self.model = FlatModel(network.eval(), device, mutate=mutate)
        self.fitness = fitness
        self.fitness.to(device)
        self.device = device
        self.kernel = kernel_for(noise, device)
        self.needed_R2 = fitness.needed(self.model)
        self.stack = Stack(self.model, self.fitness, batch_members) if batch_members > 1 else None
        self.theta_D = self.model.theta_D
        self.scale_D: torch.Tensor | None = None
        self.basis: Basis | None = None
        self.random = torch.Generator().get_state()
        # Without Triton noise is made in steps that the host waits for, which no graph can hold.
        recordable = device.type == "cuda" and not self.stack and not isinstance(self.kernel, PortableKernel)
        self.record_with(Recorder(device) if fitness.graphs and recordable else None)

    @property
    def device_name(self) -> str:
        """What the bits of a score may depend on."""
        if self.device.type == "cuda":
            portable = isinstance(self.kernel, PortableKernel)
            return torch.cuda.get_device_name(self.device) + " without Triton, which is slow" * portable
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"

    def record_with(self, recorder: Recorder | None) -> None:
        """Repeat the work of members from recordings, or not."""
        self.recorder = recorder
        # Not a method of this object: in a cycle a GPU's memory would wait for the garbage collector.
        self.keep = recorder.keep if recorder else as_it_is
        self.cases = PreparedCases(self.fitness, self.device, self.keep)

    def load(self, parent: ParentState, same_cases: bool = False) -> None:
        """Take a new parent. On a CPU its parameters stay where they are, shared with other workers. With `same_cases`
        they stay prepared as they are."""
        self.theta_D = self.keep("parent", unpacked(parent.theta_D, self.device))
        self.parent, self.buffers = parent, self.model.buffers
        self.versions, self.statistics = [-1] * len(self.buffers), len(list(self.model.module.buffers()))
        self.parent_buffers = [unpacked(buffer, self.device) for buffer in parent.buffers]
        self.random = torch.Generator().manual_seed(parent.seed).get_state()
        self.cases.load(parent.case_sets, same_cases)

    def load_scale(self, scale: Scale) -> None:
        """Take a new scale. On a CPU one of D elements stays where it is."""
        self.scale_D = None if scale is None else unpacked(scale, self.device)
        if self.scale_D is not None and len(self.scale_D) != len(self.theta_D):
            self.scale_D = self.model.spread(self.scale_D)
        self.scale_D = self.keep("scale", self.scale_D)

    def load_basis(self, basis: Basis | None) -> None:
        """Take another subspace, or the whole space. On a CPU its directions stay where they are."""
        self.basis = basis
        self.rows_MD = None if basis is None else unpacked(basis.rows_MD, self.device)

    def evaluate(
        self, members: Members, cases: CaseSet, threshold: float, part: Part = WHOLE, own: int | None = None
    ) -> tuple[Scores, dict[int, str]]:
        """Score each member on a part of the cases, or on `own` of them, which its seed draws; one that can no longer
        exceed the threshold is left. What is not finite in any statistic has NaN for all of them, and for its fitness.
        So has a member for which the fitness raised an error, and its text is in the second answer by the member's
        place."""
        size = self.stack.size if self.stack else 1
        sums: list[torch.Tensor | None] = []
        failed: dict[int, str] = {}
        cases_K = np.zeros(len(members), np.int64)
        passes = [(first, min(first + size, len(members))) for first in range(0, len(members), size)][::-1]
        if self.recorder:
            self.recorder.upload(members)
        if own:
            self.cases.draw(cases, own, members.seed_K)
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            while passes:
                first, stop = passes.pop()
                try:
                    # A pass always has as many rows: the last member stands in those that are left.
                    rows = [*range(first, stop), *[stop - 1] * (first + size - stop)]
                    batches = self.cases.drawn(members.seed_K[rows]) if own else self.cases.of(cases, part)
                    sum_BM, cases_B = self._score(members, rows, batches, threshold, bool(own))
                    sums.append(sum_BM if size == 1 else sum_BM[: stop - first])
                    cases_K[first:stop] = cases_B[: stop - first]
                except DEVICE_ERRORS:  # the worker's fault, or that of what runs beside it
                    raise
                except Exception as error:
                    if stop - first > 1:  # one of them has raised it: each by itself
                        passes += [(k, k + 1) for k in reversed(range(first, stop))]
                    else:
                        sums.append(None)
                        failed[first] = _said(error)
                        if self.stack:
                            failed[first] += f"; with batch_members={size} it runs under torch.func.vmap"
        known = next((sum_BM for sum_BM in sums if sum_BM is not None), torch.empty(1, 0))
        nothing_1M = torch.full_like(known[:1], torch.nan)
        # One wait for the device a call.
        sum_KM = torch.cat([nothing_1M if sum_BM is None else sum_BM for sum_BM in sums]).cpu().numpy()
        mean_KM = sum_KM / np.maximum(cases_K, 1)[:, None]
        mean_KM[~np.isfinite(mean_KM).all(1)] = np.nan
        fitness_K = np.full(len(members), np.nan)
        for k in _finite(mean_KM):
            try:
                fitness_K[k] = _value(self.fitness, mean_KM[k])
            except Exception as error:
                mean_KM[k], failed[int(k)] = np.nan, _said(error)
        return Scores(mean_KM, fitness_K, cases_K), failed

    @torch.inference_mode()
    def _score(
        self,
        members: Members,
        rows: list[int],
        batches: Sequence[Batch],
        threshold: float,
        own: bool,
    ) -> tuple[torch.Tensor, list[int]]:
        """The sums of the statistics of B members, B x M in float64, and on how many cases; B is one, or as many as the
        stack has rows, and with `own` the batches are in as many rows.

        Whatever the fitness does to the network or draws, the next member finds what this one found."""
        if self.model.module.training:
            self.model.module.eval()
        if self.versions != [buffer._version for buffer in self.buffers]:
            self._load_changed_buffers()
        torch.default_generator.set_state(self.random)
        if self.device.type == "cuda":
            torch.cuda.manual_seed(self.parent.seed)
        if self.stack:
            factors = members.seed_K[rows], members.offset_K[rows], members.gain_K[rows]
            if self.basis is None:
                self.kernel.descend_rows(self.theta_D, self.scale_D, *factors, self.stack.theta_BD, self.needed_R2)
            else:
                for out_D, seed, offset, gain in zip(self.stack.theta_BD, *factors, strict=True):
                    self._descend(int(seed), offset, gain, out_D, self.needed_R2)
            return self._sum(functools.partial(self.stack.score, own=own), batches, threshold)
        if self.recorder and self.basis is None and threshold == -math.inf:
            read = [*tree_leaves(batches), self.theta_D, self.scale_D]
            seed_1, (offset_1, gain_1) = self.recorder.seed_1, self.recorder.factor_2.split(1)
            sum_1M = self.recorder.repeat(
                read, lambda: self._score_one(seed_1, offset_1, gain_1, batches, threshold)[0], rows[0]
            )
            return sum_1M, [sum(size for size, _ in batches)]
        seed, offset, gain = members.seed_K[rows[0]], members.offset_K[rows[0]], members.gain_K[rows[0]]
        return self._score_one(int(seed), offset, gain, batches, threshold)

    def _score_one(
        self, seed: Number, offset: Number, gain: Number, batches: Sequence[Batch], threshold: float
    ) -> tuple[torch.Tensor, list[int]]:
        fitness, network = self.fitness, self.model.module
        torch.clear_autocast_cache()  # a weight that is cast once for all would be another member's
        self._descend(seed, offset, gain, self.model.theta_D, self.needed_R2)
        self.model.write()
        with fitness.ready(network):
            return self._sum(lambda batch: _tensor_of(fitness(network, batch))[None], batches, threshold)

    def _load_changed_buffers(self) -> None:
        """Make those buffers the parent's that are no longer. BatchNorm writes its statistics without counting a
        version, and counts its batches: of the network's own buffers all are taken, or none."""
        changed = [buffer._version != version for buffer, version in zip(self.buffers, self.versions, strict=True)]
        changed[: self.statistics] = [any(changed[: self.statistics])] * self.statistics
        for place in np.flatnonzero(changed):
            self.buffers[place].copy_(self.parent_buffers[place])
            self.versions[place] = self.buffers[place]._version

    def _sum(
        self, score: Callable[[Any], torch.Tensor], batches: Sequence[Batch], threshold: float
    ) -> tuple[torch.Tensor, list[int]]:
        """The sums of B members' statistics over the cases, B x M in float64 and in a fixed order, and how many cases
        they were, B. A member is left once its fitness cannot exceed the threshold; its means up to there do not
        exceed it either. Without a threshold nothing waits for the device."""
        fitness, scored, count = self.fitness, 0, sum(size for size, _ in batches)
        total_BM: torch.Tensor | None = None
        lost: dict[int, int] = {}  # rows that are left, with the cases that they were scored on
        for size, batch in batches:
            statistic_BNM = score(batch)
            rows, *shape = statistic_BNM.shape
            if shape[:1] != [size] or len(shape) > 2:
                raise ValueError(f"the fitness of {size} cases is {tuple(shape)}: expected a row a case")
            sum_BM = statistic_BNM.reshape(rows, size, -1).sum(1, dtype=torch.float64)
            if lost:  # they keep what they had
                sum_BM[list(lost)] = 0
            total_BM = sum_BM if total_BM is None else total_BM + sum_BM
            scored += size
            if threshold > -np.inf and fitness.best is not None:
                # The same division as at the end, so that rounding rejects nobody who would have won.
                most_BM = (total_BM.cpu().numpy() + (count - scored) * fitness.best) / count
                for row, most_M in enumerate(most_BM):
                    if row not in lost and not fitness.value(most_M) > threshold:
                        lost[row] = scored
                if len(lost) == rows:
                    break
        assert total_BM is not None, "a set of cases is not empty"
        return total_BM, [lost.get(row, scored) for row in range(len(total_BM))]

    def descend(self, seed: int, offset: float, gain: float) -> None:
        """Make the network a descendant of the parent, whole."""
        self._descend(seed, offset, gain, self.model.theta_D)
        self.model.write()

    def _descend(
        self,
        seed: Number,
        offset: Number,
        gain: Number,
        out_D: torch.Tensor,
        needed_R2: NDArray[np.int64] | None = None,
    ) -> None:
        if self.basis is None or self.rows_MD is None or not gain:
            self.kernel.descend(self.theta_D, self.scale_D, seed, offset, gain, out_D, needed_R2=needed_R2)
            return
        assert self.scale_D is None, "the population has no other with a subspace"
        size, count = len(self.theta_D), len(self.rows_MD)
        seed_1, gain_1 = np.array([seed], np.uint64), np.array([gain], np.float32)
        out_D.copy_(self.theta_D)
        add_rows(out_D, self.rows_MD, self.accumulate(seed_1, gain_1, size, size + count))
        if self.basis.whole or offset:
            self.kernel.descend(out_D, None, seed, offset, gain * self.basis.whole, out_D, needed_R2=needed_R2)

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        """Elements [start, stop) of sum_k weight_k * noise_k."""
        return self.kernel.accumulate(seed_K, weight_K, start, stop).cpu().numpy()


def pooled(fitness: Fitness, first: Scores, second: Scores) -> Scores:
    """The scores of the same members on the cases of both."""
    cases_K = first.cases_K + second.cases_K
    if first.mean_KM.shape != second.mean_KM.shape:  # none of them could be scored
        return Scores(first.mean_KM * math.nan, np.full(len(cases_K), math.nan), cases_K)
    sum_KM = first.mean_KM * first.cases_K[:, None] + second.mean_KM * second.cases_K[:, None]
    mean_KM = sum_KM / np.maximum(cases_K, 1)[:, None]
    fitness_K = np.full(len(cases_K), np.nan)
    for k in _finite(mean_KM):
        fitness_K[k] = _value(fitness, mean_KM[k])
    return Scores(mean_KM, fitness_K, cases_K)


def _finite(mean_KM: NDArray[np.float64]) -> NDArray[np.int64]:
    """The members whose mean statistics are all finite."""
    return np.flatnonzero(np.isfinite(mean_KM).all(1) & (mean_KM.shape[1] > 0))


def _value(fitness: Fitness, mean_M: NDArray[np.float64]) -> float:
    value = fitness.value(mean_M)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"value(mean_M) returned {value!r:.40}: expected a number") from None


def _said(error: Exception) -> str:
    """An error of the fitness, in one line."""
    return f"{one_line(f'{type(error).__name__}: {error}')}{_where(error)}"


def _tensor_of(statistic_NM: Any) -> torch.Tensor:
    if not isinstance(statistic_NM, torch.Tensor):
        raise TypeError(f"the fitness returned a {type(statistic_NM).__name__}: expected a tensor with a row a case")
    return statistic_NM


def _where(error: Exception) -> str:
    """The last line of the user's own code that an error came through."""
    lines = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in ("site-packages", "spartan_ray/engine"))
    ]
    return f" ({Path(lines[-1].filename).name}:{lines[-1].lineno})" if lines else ""


def as_it_is(name: Any, values: Any) -> Any:
    """Values, for whatever name."""
    return values


def packed(buffer: torch.Tensor) -> Any:
    """A tensor as it is sent: as an array if numpy has its type, which takes a tenth of the time."""
    buffer = buffer.detach().cpu()
    return buffer if buffer.dtype == torch.bfloat16 else buffer.numpy()


def unpacked(array: Any, device: torch.device) -> torch.Tensor:
    """What was sent as a tensor on a device, where it stays if it is there. Memory that is shared is read-only, and so
    is what is done with the tensor."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
        return torch.as_tensor(array).to(device)
