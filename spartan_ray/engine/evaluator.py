"""The evaluator: scores members on one device (parent + seed -> descendant -> fitness) and sums slices of the update.

Does not depend on Ray; a worker is the Ray actor around one evaluator. Shapes: D parameters, K members, B members of a
pass, N cases, M statistics, R ranges of parameters.
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

# Errors that are not the fault of the fitness: another process may not raise them, or this process is now broken.
DEVICE_ERRORS = (MemoryError, torch.OutOfMemoryError, torch.AcceleratorError)


# A NumPy array. It is a tensor if it stays in this process, or if NumPy does not have its type.
Sent = Any


@dataclass(frozen=True)
class ParentState:
    """The parent as it is broadcast, and what its descendants are scored on."""

    theta_D: Sent
    buffers: list[Sent]
    case_sets: dict[CaseSet, NDArray[np.int64]]
    """The cases on which members are scored."""
    seed: int = 0
    """Seed of torch's random numbers while a member is scored."""


# Seed, offset or gain of a member: a number, or a tensor of one element in device memory.
Number = Any
# What multiplies noise and offset: one factor per parameter tensor, or per element; None means 1.
Scale = Sent | None


@dataclass(frozen=True)
class EvaluatorSpec:
    """The parts from which a worker builds its evaluator. Sent to each worker once.

    `network` is a network to copy, or a function that builds one. `layout` is the layout of the parent's parameters,
    which the network must match. Raises InputError in `make` if it does not."""

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
        """Return a copy of the network and of the fitness, for one evaluator."""
        network = copy.deepcopy(self.network) if isinstance(self.network, nn.Module) else self.network()
        return network, copy.copy(self.fitness)


class Evaluator:
    """Scores descendants. Each is built in place in the evaluator's own network, always from the pristine parent."""

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
        # Without Triton, the host waits while noise is generated, which a CUDA graph cannot record.
        recordable = device.type == "cuda" and not self.stack and not isinstance(self.kernel, PortableKernel)
        self.record_with(Recorder(device) if fitness.graphs and recordable else None)

    @property
    def device_name(self) -> str:
        """Name of the device. The bits of a score may depend on it."""
        if self.device.type == "cuda":
            portable = isinstance(self.kernel, PortableKernel)
            return torch.cuda.get_device_name(self.device) + " without Triton, which is slow" * portable
        return f"cpu {torch.backends.cpu.get_cpu_capability()}"

    def record_with(self, recorder: Recorder | None) -> None:
        """Use this recorder to replay the work of members. None: do not record."""
        self.recorder = recorder
        # Not a method of this object: a reference cycle would keep GPU memory until the garbage collector runs.
        self.keep = recorder.keep if recorder else as_it_is
        self.cases = PreparedCases(self.fitness, self.device, self.keep)

    def load(self, parent: ParentState, same_cases: bool = False) -> None:
        """Set the parent and the cases. With `same_cases`, the cases are the present ones and stay prepared.

        On a CPU, the parameters are used without a copy, in memory that other workers share."""
        self.theta_D = self.keep("parent", unpacked(parent.theta_D, self.device))
        self.parent, self.buffers = parent, self.model.buffers
        self.versions, self.statistics = [-1] * len(self.buffers), len(list(self.model.module.buffers()))
        self.parent_buffers = [unpacked(buffer, self.device) for buffer in parent.buffers]
        self.random = torch.Generator().manual_seed(parent.seed).get_state()
        self.cases.load(parent.case_sets, same_cases)

    def load_scale(self, scale: Scale) -> None:
        """Set the scale. On a CPU, a scale of D elements is used without a copy."""
        self.scale_D = None if scale is None else unpacked(scale, self.device)
        if self.scale_D is not None and len(self.scale_D) != len(self.theta_D):
            self.scale_D = self.model.spread(self.scale_D)
        self.scale_D = self.keep("scale", self.scale_D)

    def load_basis(self, basis: Basis | None) -> None:
        """Set the subspace; None is the whole space. On a CPU, its directions are used without a copy."""
        self.basis = basis
        self.rows_MD = None if basis is None else unpacked(basis.rows_MD, self.device)

    def evaluate(
        self, members: Members, cases: CaseSet, threshold: float, part: Part = WHOLE, own: int | None = None
    ) -> tuple[Scores, dict[int, str]]:
        """Score members on a set of cases.

        A member with a statistic that is not finite gets NaN for all its statistics and for its fitness. A member for
        which the fitness raises an error gets the same.

        Args:
            members: The members, K rows.
            cases: Name of the set.
            threshold: Stop scoring a member once its fitness can no longer exceed this.
            part: Part of the set.
            own: Number of cases that each seed draws from the set, instead of a part. None: the part.

        Returns:
            The scores, and the texts of the errors by index of the member.

        Raises:
            MemoryError: Memory ran out, on the host or, as torch.OutOfMemoryError, on the device.
            torch.AcceleratorError: The device failed.
        """
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
                    # A pass always has `size` rows. The last member fills the rows that are left over.
                    rows = [*range(first, stop), *[stop - 1] * (first + size - stop)]
                    batches = self.cases.drawn(members.seed_K[rows]) if own else self.cases.of(cases, part)
                    sum_BM, cases_B = self._score(members, rows, batches, threshold, bool(own))
                    sums.append(sum_BM if size == 1 else sum_BM[: stop - first])
                    cases_K[first:stop] = cases_B[: stop - first]
                except DEVICE_ERRORS:  # caused by this process or by others on the device
                    raise
                except Exception as error:
                    if stop - first > 1:  # one of several raised it: score each by itself
                        passes += [(k, k + 1) for k in reversed(range(first, stop))]
                    else:
                        sums.append(None)
                        failed[first] = _said(error)
                        if self.stack:
                            failed[first] += f"; with batch_members={size} it runs under torch.func.vmap"
        known = next((sum_BM for sum_BM in sums if sum_BM is not None), torch.empty(1, 0))
        nothing_1M = torch.full_like(known[:1], torch.nan)
        # Wait for the device once per call.
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
        """Score the members of one pass.

        Return the sums of their statistics, B x M in float64, and the number of cases of each. B is 1, or the number of
        rows of the stack. With `own`, the batches have B rows too. Buffers, modes and random state are restored before
        each pass, so that members do not affect each other."""
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
        torch.clear_autocast_cache()  # a cached cast of a weight belongs to another member
        self._descend(seed, offset, gain, self.model.theta_D, self.needed_R2)
        self.model.write()
        with fitness.ready(network):
            return self._sum(lambda batch: _tensor_of(fitness(network, batch))[None], batches, threshold)

    def _load_changed_buffers(self) -> None:
        """Restore the buffers that the fitness has changed.

        BatchNorm changes its statistics without a new version, but its batch counter gets one. The network's own
        buffers are therefore restored all together, or not at all."""
        changed = [buffer._version != version for buffer, version in zip(self.buffers, self.versions, strict=True)]
        changed[: self.statistics] = [any(changed[: self.statistics])] * self.statistics
        for place in np.flatnonzero(changed):
            self.buffers[place].copy_(self.parent_buffers[place])
            self.versions[place] = self.buffers[place]._version

    def _sum(
        self, score: Callable[[Any], torch.Tensor], batches: Sequence[Batch], threshold: float
    ) -> tuple[torch.Tensor, list[int]]:
        """Return the sums of B members' statistics over the cases, B x M, and the number of cases of each member.

        Sums are in float64 and in a fixed order. Scoring of a member stops once its fitness cannot exceed the
        threshold; the fitness of its means so far does not exceed it either. Without a threshold, nothing waits for the
        device."""
        fitness, scored, count = self.fitness, 0, sum(size for size, _ in batches)
        total_BM: torch.Tensor | None = None
        lost: dict[int, int] = {}  # rows no longer scored, with their number of cases
        for size, batch in batches:
            statistic_BNM = score(batch)
            rows, *shape = statistic_BNM.shape
            if shape[:1] != [size] or len(shape) > 2:
                raise ValueError(f"the fitness of {size} cases has shape {tuple(shape)}: expected one row per case")
            sum_BM = statistic_BNM.reshape(rows, size, -1).sum(1, dtype=torch.float64)
            if lost:  # their sums stay unchanged
                sum_BM[list(lost)] = 0
            total_BM = sum_BM if total_BM is None else total_BM + sum_BM
            scored += size
            if threshold > -np.inf and fitness.best is not None:
                # Divide as at the end, so that rounding rejects no member that would have won.
                most_BM = (total_BM.cpu().numpy() + (count - scored) * fitness.best) / count
                for row, most_M in enumerate(most_BM):
                    if row not in lost and not fitness.value(most_M) > threshold:
                        lost[row] = scored
                if len(lost) == rows:
                    break
        assert total_BM is not None, "a set of cases is not empty"
        return total_BM, [lost.get(row, scored) for row in range(len(total_BM))]

    def descend(self, seed: int, offset: float, gain: float) -> None:
        """Make the network a descendant of the parent, including parameters that never reach the output."""
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
        assert self.scale_D is None, "a population with a subspace has no scale"
        size, count = len(self.theta_D), len(self.rows_MD)
        seed_1, gain_1 = np.array([seed], np.uint64), np.array([gain], np.float32)
        out_D.copy_(self.theta_D)
        add_rows(out_D, self.rows_MD, self.accumulate(seed_1, gain_1, size, size + count))
        if self.basis.whole or offset:
            self.kernel.descend(out_D, None, seed, offset, gain * self.basis.whole, out_D, needed_R2=needed_R2)

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        """Return elements [start, stop) of sum_k weight_k * noise_k."""
        return self.kernel.accumulate(seed_K, weight_K, start, stop).cpu().numpy()


def pooled(fitness: Fitness, first: Scores, second: Scores) -> Scores:
    """Combine two scores of the same members into their scores on the cases of both."""
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
    """Return the indices of members whose mean statistics are all finite."""
    return np.flatnonzero(np.isfinite(mean_KM).all(1) & (mean_KM.shape[1] > 0))


def _value(fitness: Fitness, mean_M: NDArray[np.float64]) -> float:
    value = fitness.value(mean_M)
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(f"value(mean_M) returned {value!r:.40}: expected a number") from None


def _said(error: Exception) -> str:
    """Return an error of the fitness as one line."""
    return f"{one_line(f'{type(error).__name__}: {error}')}{_where(error)}"


def _tensor_of(statistic_NM: Any) -> torch.Tensor:
    if not isinstance(statistic_NM, torch.Tensor):
        raise TypeError(f"the fitness returned a {type(statistic_NM).__name__}: expected a tensor, one row per case")
    return statistic_NM


def _where(error: Exception) -> str:
    """Return the file and line of the innermost user code in an error's traceback, in brackets, or an empty string."""
    lines = [
        frame
        for frame in traceback.extract_tb(error.__traceback__)
        if not any(part in frame.filename for part in ("site-packages", "spartan_ray/engine"))
    ]
    return f" ({Path(lines[-1].filename).name}:{lines[-1].lineno})" if lines else ""


def as_it_is(name: Any, values: Any) -> Any:
    """Return the values unchanged, without a copy at the address of their name."""
    return values


def packed(buffer: torch.Tensor) -> Any:
    """Return a tensor as it is sent: as a NumPy array if NumPy has its type, which takes a tenth of the time."""
    buffer = buffer.detach().cpu()
    return buffer if buffer.dtype == torch.bfloat16 else buffer.numpy()


def unpacked(array: Any, device: torch.device) -> torch.Tensor:
    """Return what was sent as a tensor on a device, without a copy if it is there already.

    Shared memory is read-only, so the tensor must not be written to."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
        return torch.as_tensor(array).to(device)
