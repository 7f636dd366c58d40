"""What a worker says of itself when it joins, and what must agree with the driver's."""

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
    return found | {"spartan-ray": f"sources {sources()}"}


def objections(info: WorkerInfo, noise: NoiseKind) -> str:
    """Why a worker would not compute as this process does; nothing if it would."""
    ours = versions()
    odd = [f"{name} {info.versions[name]}, here {ours[name]}" for name in ours if info.versions[name] != ours[name]]
    if not fingerprint_agrees(noise, info.fingerprint):
        odd.append("its noise fingerprint differs")
    return "; ".join(odd)
