"""The Ray workers: dispatch, retry, replacement. Shapes: D parameters, K members.

Both things that workers do cover a range with tasks: members 0..K-1 with chunks to score, elements
0..D-1 with slices of the update. `_cover` is the one engine for both. A worker that dies costs what
was queued on it, which others do again; since a task's result depends on nothing but its range, the
outcome is the same to the bit.
"""

from __future__ import annotations

import itertools
import math
import os
import socket
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.actor import ActorHandle
from ray.exceptions import RayError, RayTaskError

from spartan_ray.config import Cluster, Evolution, ImageSet, InputError, Parent
from spartan_ray.data import Images
from spartan_ray.evaluator import Evaluator, ParentState
from spartan_ray.fitness import Normaliser
from spartan_ray.model import build_model
from spartan_ray.noise import fingerprint, fingerprint_agrees
from spartan_ray.strategies.base import Members, Scores, joined

# Tasks on a worker: one that runs and one that is ready when it ends.
QUEUED_PER_WORKER = 2
# Length of an automatic chunk: long against Ray's overhead of a task, short against a generation.
CHUNK_SECONDS = 2.0
# Workers that may die in a row, for each worker of the pool, before the run is given up.
DEATHS_PER_WORKER = 3
# After so long a start the user is told what is waited for.
SLOW_START_SECONDS = 30.0
# How long to wait for a result before looking whether the run is to stop.
POLL_SECONDS = 0.5


class PoolError(Exception):
    """The workers cannot do the work; the message says why."""


@dataclass(frozen=True)
class WorkerSpec:
    """What a worker needs to build its evaluator; sent once."""

    parent: Parent
    evolution: Evolution
    images: Images  # the evolution split
    reference: Images  # SGD images that recalibrate BatchNorm
    classes: int
    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]
    threads: int


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says of itself when it joins."""

    host: str
    pid: int
    device: str
    threads: int
    fingerprint: NDArray[np.float32]

    def record(self) -> dict[str, str | int]:
        """What goes into environment.json."""
        return {"host": self.host, "pid": self.pid, "device": self.device, "threads": self.threads}

    def __str__(self) -> str:
        return f"worker {self.pid} on {self.host} ({self.device})"


def claim_device(threads: int) -> torch.device:
    """The device that Ray assigned to this process, set up for repeatable results."""
    torch.set_num_threads(threads)
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return torch.device("cpu")
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(True)
    torch.backends.cudnn.benchmark = False
    torch.backends.cudnn.allow_tf32 = False
    return torch.device("cuda", 0)


class Worker:
    """The actor around one evaluator."""

    def __init__(self, spec: WorkerSpec) -> None:
        self.device = claim_device(spec.threads)
        self.evaluator = Evaluator(
            spec.evolution,
            build_model(spec.parent, spec.classes),
            spec.images,
            spec.reference,
            Normaliser(spec.mean_C, spec.std_C, self.device),
            self.device,
        )
        self.parent_key: int | None = None

    def join(self) -> WorkerInfo:
        sample = fingerprint(self.evaluator.kernel)
        name = torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else "cpu"
        return WorkerInfo(socket.gethostname(), os.getpid(), name, torch.get_num_threads(), sample)

    def evaluate(
        self, key: int, parent: ParentState, members: Members, images: ImageSet, bar: float
    ) -> tuple[Scores, float, float]:
        """The members' scores, and the seconds it took to load the parent and to score them."""
        start = time.perf_counter()
        if key != self.parent_key:
            self.evaluator.load(parent)
            self.parent_key = key
        loaded = time.perf_counter()
        scores = self.evaluator.evaluate(members, images, bar)
        return scores, loaded - start, time.perf_counter() - loaded

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        return self.evaluator.accumulate(seed_K, weight_K, start, stop)


def resolve_cluster(cluster: Cluster, nodes: list[dict[str, float]]) -> Cluster:
    """The cluster section with every automatic value decided from what each node of the Ray has; the
    first node is preferred for the driver.

    Raises InputError when the workers that are asked for do not fit."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    gpus_per_worker, driver_gpus = cluster.gpus_per_worker, cluster.driver_gpus
    if gpus_per_worker is None:
        gpus_per_worker = 0.9 if gpus else 0.0
    if driver_gpus is None:
        driver_gpus = 0.1 if gpus else 0.0
    free = [_workers_on(node, cluster.cpus_per_worker, gpus_per_worker, 0, 0) for node in nodes]
    # The driver goes to the first node that has room for it.
    for number, node in enumerate(nodes):
        if node.get("CPU", 0) >= cluster.driver_cpus and node.get("GPU", 0) >= driver_gpus:
            free[number] = _workers_on(node, cluster.cpus_per_worker, gpus_per_worker, cluster.driver_cpus, driver_gpus)
            break
    else:
        free = [0]
    workers = max(sum(free), 1) if cluster.workers == "auto" else cluster.workers
    if workers > sum(free):
        cpus = sum(int(node.get("CPU", 0)) for node in nodes)
        raise InputError(
            f"cluster.workers ({cluster.workers}) of {cluster.cpus_per_worker} CPUs (cluster.cpus_per_worker) and "
            f"{gpus_per_worker:g} GPUs (cluster.gpus_per_worker) beside a driver of {cluster.driver_cpus} CPUs and "
            f"{driver_gpus:g} GPUs do not fit the {len(nodes)} nodes with {cpus} CPUs and {gpus} GPUs of this Ray"
        )
    return cluster.model_copy(
        update={"workers": workers, "gpus_per_worker": gpus_per_worker, "driver_gpus": driver_gpus}
    )


def _workers_on(node: dict[str, float], cpus_each: int, gpus_each: float, driver_cpus: int, driver_gpus: float) -> int:
    """How many workers fit a node beside a driver of that size (0 and 0: none)."""
    fit = int(node.get("CPU", 0) - driver_cpus) // cpus_each
    if not gpus_each:
        return fit
    gpus, tolerance = int(node.get("GPU", 0)), 1e-9
    if gpus_each > 1:
        return min(fit, int((gpus - driver_gpus + tolerance) // gpus_each))
    # A fraction of a GPU never spans two of them. The driver's share is of whole GPUs and one more.
    per_gpu = int((1 + tolerance) // gpus_each)
    untouched = gpus - math.ceil(driver_gpus)
    beside = int((math.ceil(driver_gpus) - driver_gpus + tolerance) // gpus_each)
    return min(fit, untouched * per_gpu + beside)


@dataclass
class _Slot:
    """A place in the pool and the worker that fills it."""

    worker: ActorHandle[Any]
    info: WorkerInfo | None = None  # None until it joined
    queued: int = 0


@dataclass
class _InFlight:
    slot: _Slot
    span: tuple[int, int] | None  # None: the worker is joining


class Pool:
    """The workers of a run. `note` takes one-line messages for the user, `advance` the members
    and images that are done as they come in; it may raise to end the run, after which the pool is to be closed."""

    def __init__(
        self, spec: WorkerSpec, cluster: Cluster, note: Callable[[str], None], advance: Callable[[int, int], None]
    ) -> None:
        assert isinstance(cluster.workers, int), "resolved before"
        self.spec = ray.put(spec)
        self.noise = spec.evolution.noise
        self.size = cluster.workers
        self.chunk = cluster.chunk
        self.note, self.advance = note, advance
        self.actor = ray.remote(Worker).options(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)
        self.slots: list[_Slot] = []
        self.in_flight: dict[Any, _InFlight] = {}
        self.parent_keys = itertools.count()
        self.parent: tuple[int, Any]  # the last broadcast and its key
        self.broadcast_seconds = 0.0
        self.retries = 0
        self.deaths_in_a_row = 0
        self.failed_starts = 0
        self.seconds_per_member: float | None = None
        for _ in range(self.size):
            self._start_worker()

    @property
    def infos(self) -> list[WorkerInfo]:
        """The workers that have joined."""
        return [slot.info for slot in self.slots if slot.info]

    def wait_until_joined(self) -> None:
        """Return when every worker has joined or was refused."""
        started, said = time.monotonic(), False
        while any(slot.info is None for slot in self.slots):
            self._collect()
            if not said and time.monotonic() - started > SLOW_START_SECONDS:
                self.note(f"{len(self.infos)} of {self.size} workers have started: is Ray busy with other work?")
                said = True

    def broadcast(self, parent: ParentState) -> None:
        """Make this the parent of the members that are evaluated from here on."""
        started = time.perf_counter()
        self.parent = (next(self.parent_keys), ray.put(parent))
        self.broadcast_seconds += time.perf_counter() - started

    def evaluate(self, members: Members, images: ImageSet = "fitness", bar: float = -math.inf) -> Scores:
        """The scores of every member; one that can no longer exceed the bar is left."""
        key, parent = self.parent
        parts: dict[int, Scores] = {}
        slowest_load = 0.0

        def submit(worker: ActorHandle[Any], start: int, stop: int) -> Any:
            return worker.evaluate.remote(key, parent, members[start:stop], images, bar)

        for (start, stop), result in self._cover(len(members), self._chunk_size, submit):
            parts[start], seconds_to_load, seconds = result
            slowest_load = max(slowest_load, seconds_to_load)
            self.seconds_per_member = seconds / (stop - start)
            self.advance(stop - start, int(parts[start].images_K.sum()))
        self.broadcast_seconds += slowest_load
        return joined(*(parts[start] for start in sorted(parts)))

    def weighted_sum(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], size_D: int
    ) -> NDArray[np.float32]:
        """sum_k weight_k * noise_k, D float32, computed by the workers in one slice each."""
        seed_ref, weight_ref = ray.put(seed_K), ray.put(weight_K)
        slice_size = -(-size_D // max(1, len(self.slots)))
        sum_D = np.empty(size_D, np.float32)

        def submit(worker: ActorHandle[Any], start: int, stop: int) -> Any:
            return worker.accumulate.remote(seed_ref, weight_ref, start, stop)

        for (start, stop), part in self._cover(size_D, lambda left: slice_size, submit):
            sum_D[start:stop] = part
        return sum_D

    def close(self) -> None:
        """End all workers."""
        for slot in self.slots:
            ray.kill(slot.worker)
        self.slots.clear()
        self.in_flight.clear()

    def _chunk_size(self, left: int) -> int:
        """Chunks shrink towards the end, so that the workers finish together."""
        if self.chunk != "auto":
            return self.chunk
        if self.seconds_per_member is None:
            return 1
        share = -(-left // (2 * QUEUED_PER_WORKER * self.size))
        return max(1, min(share, int(CHUNK_SECONDS / max(self.seconds_per_member, 1e-9))))

    def _cover(
        self, total: int, next_size: Callable[[int], int], submit: Callable[[ActorHandle[Any], int, int], Any]
    ) -> Iterator[tuple[tuple[int, int], Any]]:
        """Do 0..total-1 in spans of next_size(what is left), in any order; yield each span's result once."""
        waiting = deque([(0, total)])
        while waiting or any(task.span for task in self.in_flight.values()):
            self._top_up(waiting, next_size, submit)
            done, lost = self._collect()
            waiting.extendleft(lost)
            yield from done

    def _collect(self) -> tuple[list[tuple[tuple[int, int], Any]], list[tuple[int, int]]]:
        """Wait for something to end, or a moment; the spans done with their results, and those lost."""
        if not self.slots:
            raise PoolError("no workers are left")
        ready, _ = ray.wait(list(self.in_flight), num_returns=1, timeout=POLL_SECONDS)
        self.advance(0, 0)
        done, lost = [], []
        for ref in ready:
            task = self.in_flight.pop(ref)
            task.slot.queued -= 1
            try:
                result = ray.get(ref)
            except RayTaskError:
                raise  # the work itself failed, and would on any worker
            except RayError as error:  # died, out of memory, unreachable, its result lost with its node
                self._replace(task.slot, error)
                if task.span:
                    self.retries += 1
                    lost.append(task.span)
                continue
            if task.span:
                self.deaths_in_a_row = 0
                done.append((task.span, result))
            else:
                self._welcome(task.slot, result)
        return done, lost

    def _top_up(
        self,
        waiting: deque[tuple[int, int]],
        next_size: Callable[[int], int],
        submit: Callable[[ActorHandle[Any], int, int], Any],
    ) -> None:
        """Queue spans on the workers that have joined, the idle ones first."""
        for queued in range(QUEUED_PER_WORKER):
            for slot in self.slots:
                if not waiting:
                    return
                if slot.info is None or slot.queued > queued:
                    continue
                start, stop = waiting.popleft()
                middle = min(stop, start + next_size(sum(b - a for a, b in waiting) + stop - start))
                if middle < stop:
                    waiting.appendleft((middle, stop))
                ref = submit(slot.worker, start, middle)
                slot.queued += 1
                self.in_flight[ref] = _InFlight(slot, (start, middle))

    def _start_worker(self) -> None:
        worker: Any = self.actor.remote(self.spec)
        slot = _Slot(worker, queued=1)
        self.slots.append(slot)
        self.in_flight[slot.worker.join.remote()] = _InFlight(slot, None)

    def _welcome(self, slot: _Slot, info: WorkerInfo) -> None:
        if fingerprint_agrees(self.noise, info.fingerprint):
            slot.info = info
            self.failed_starts = 0
            return
        self.note(f"refused {info}: its noise fingerprint differs")
        self.slots.remove(slot)
        ray.kill(slot.worker)

    def _replace(self, slot: _Slot, error: Exception) -> None:
        """Put a new worker in the place of one that failed; its other tasks fail by themselves."""
        if slot not in self.slots:
            return
        self.slots.remove(slot)
        ray.kill(slot.worker)
        lines = (str(error).strip() or type(error).__name__).splitlines()
        if slot.info:
            self.deaths_in_a_row += 1
            reason = lines[0]
        else:
            self.failed_starts += 1
            reason = lines[-1]  # of the traceback
        limit = DEATHS_PER_WORKER * self.size
        if self.deaths_in_a_row > limit or (self.failed_starts > limit and not self.infos):
            raise PoolError(f"the workers die one after another; the last one: {reason}") from error
        if self.failed_starts > limit:
            self.note(f"a worker that failed to start is not replaced again: {reason}")
            return
        self.note(f"{slot.info or 'a worker that was starting'} was lost and is replaced: {reason}")
        self._start_worker()
