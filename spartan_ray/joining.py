"""What a worker says of itself when it joins, and what must agree with the driver's."""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import spartan_ray
from spartan_ray.config import NoiseKind
from spartan_ray.noise import fingerprint_agrees


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


def objections(info: WorkerInfo, noise: NoiseKind) -> str:
    """Why a worker would not compute as this process does; nothing if it would."""
    ours = versions()
    odd = [f"{name} {info.versions[name]}, here {ours[name]}" for name in ours if info.versions[name] != ours[name]]
    if not fingerprint_agrees(noise, info.fingerprint):
        odd.append("its noise fingerprint differs")
    return "; ".join(odd)
