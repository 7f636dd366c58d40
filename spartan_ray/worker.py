"""The Ray actor around one evaluator."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import os
import socket
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import ray
import torch
from numpy.typing import NDArray

import spartan_ray
from spartan_ray.config import ImageSet
from spartan_ray.evaluator import EvaluatorSpec, ParentState, repeatable_gpu
from spartan_ray.noise import fingerprint
from spartan_ray.strategies.base import Members, Scores


@dataclass(frozen=True)
class WorkerInfo:
    """What a worker says of itself when it joins."""

    host: str
    node: str  # Ray's name of it
    pid: int
    device: str
    threads: int
    fingerprint: NDArray[np.float32]
    versions: dict[str, str]

    def record(self) -> dict[str, str | int]:
        """What goes into environment.json."""
        return {"host": self.host, "pid": self.pid, "device": self.device, "threads": self.threads}

    def __str__(self) -> str:
        return f"worker {self.pid} on {self.host} ({self.device})"


@functools.cache
def versions() -> dict[str, str]:
    """What the bits of a score may depend on: of the package itself a digest of its sources, since a node may
    have another one installed."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "numba")}
    sources = hashlib.sha256()
    for path in sorted(Path(spartan_ray.__file__).parent.rglob("*.py")):
        sources.update(path.read_bytes())
    return found | {"spartan-ray": f"sources {sources.hexdigest()[:12]}"}


def claim_device(threads: int) -> torch.device:
    """The device that Ray assigned to this process, set up for repeatable results."""
    torch.set_num_threads(threads)
    if not ray.get_runtime_context().get_accelerator_ids().get("GPU"):
        return torch.device("cpu")
    return repeatable_gpu()


class Worker:
    """The actor around one evaluator."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        self.device = claim_device(spec.threads)
        self.evaluator = spec.make(self.device)
        self.parent_key: int | None = None

    def join(self) -> WorkerInfo:
        sample = fingerprint(self.evaluator.kernel)
        if self.device.type == "cuda":
            name = torch.cuda.get_device_name(self.device)
        else:
            name = f"cpu {torch.backends.cpu.get_cpu_capability()}"
        node = ray.get_runtime_context().get_node_id()
        return WorkerInfo(socket.gethostname(), node, os.getpid(), name, torch.get_num_threads(), sample, versions())

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
