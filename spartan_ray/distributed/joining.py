"""The information that a worker sends when it joins, and its comparison with the driver's own."""

from __future__ import annotations

import functools
import importlib.metadata
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from spartan_ray.noise.contract import NoiseKind
from spartan_ray.noise.fingerprint import fingerprint_agrees
from spartan_ray.origin import sources


@dataclass(frozen=True)
class WorkerInfo:
    """The information that a worker sends when it joins."""

    host: str
    node: str  # Ray's ID of the node
    pid: int
    device: str
    threads: int
    fingerprint: NDArray[np.float32]
    versions: dict[str, str]

    def record(self) -> dict[str, str | int]:
        """Return the entry of this worker in environment.json."""
        return {"host": self.host, "pid": self.pid, "device": self.device, "threads": self.threads}

    def __str__(self) -> str:
        return f"worker {self.pid} on {self.host} ({self.device})"


@functools.cache
def versions() -> dict[str, str]:
    """Return the versions that the bits of a score may depend on. The version of this package is a digest of its
    sources, because a node may have another copy installed."""
    found = {name: importlib.metadata.version(name) for name in ("torch", "numpy", "numba")}
    return found | {"spartan-ray": f"sources {sources()}"}


def objections(info: WorkerInfo, noise: NoiseKind) -> str:
    """Return why a worker would compute differently from this process; empty if it would not."""
    ours = versions()
    odd = [f"{name} {info.versions[name]}, here {ours[name]}" for name in ours if info.versions[name] != ours[name]]
    if not fingerprint_agrees(noise, info.fingerprint):
        odd.append("its noise fingerprint differs")
    return "; ".join(odd)
