"""How a process shows that its kernel computes the contract. Needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from spartan_ray.noise.contract import NoiseKind, noise

if TYPE_CHECKING:
    from spartan_ray.noise.kernels import Kernel

FINGERPRINT_SEED = 0x0123456789ABCDEF
FINGERPRINT_SLICES = ((0, 61), (11_000_003, 11_000_064))


def fingerprint(kernel: Kernel) -> NDArray[np.float32]:
    """A sample of what a kernel computes, which a worker shows when it joins."""
    seed_1, weight_1 = np.array([FINGERPRINT_SEED], np.uint64), np.ones(1, np.float32)
    slices = [kernel.accumulate(seed_1, weight_1, start, stop).cpu().numpy() for start, stop in FINGERPRINT_SLICES]
    return np.concatenate(slices)


def fingerprint_agrees(kind: NoiseKind, sample: NDArray[np.float32]) -> bool:
    """Whether a sample is the definition's: to the bit, for gaussian to 1e-6."""
    expected = np.concatenate([noise(kind, FINGERPRINT_SEED, start, stop) for start, stop in FINGERPRINT_SLICES])
    if sample.shape != expected.shape:
        return False
    tolerance = 1e-6 if kind == "gaussian" else 0.0
    return bool(np.all(np.abs(sample - expected) <= tolerance))
