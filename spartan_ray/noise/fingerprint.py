"""The fingerprint of a kernel, which proves that it computes the noise contract. Importing it needs no torch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from spartan_ray.noise.contract import NoiseKind, noise

if TYPE_CHECKING:
    from spartan_ray.noise.kernels import Kernel

FINGERPRINT_SEED = 0x0123456789ABCDEF
FINGERPRINT_SLICES = ((0, 61), (11_000_003, 11_000_064))
OFFSET, GAIN = 0.3, -0.7


def fingerprint(kernel: Kernel) -> NDArray[np.float32]:
    """Return a sample of the results of a kernel, which a worker sends when it joins.

    The sample has two slices of noise, and the descendants for which parent and scale are that noise. The seed and the
    factors are numbers for the first slice and tensors on the device for the second."""
    seed_1, weight_1 = np.array([FINGERPRINT_SEED], np.uint64), np.ones(1, np.float32)
    slices = []
    for number, (start, stop) in enumerate(FINGERPRINT_SLICES):
        noise_S = kernel.accumulate(seed_1, weight_1, start, stop)
        slices.append(noise_S.cpu().numpy().copy())
        factors: list[Any] = [FINGERPRINT_SEED, OFFSET, GAIN]
        if number:
            import torch

            factors = [torch.tensor([value], device=noise_S.device) for value in factors]
        seed, offset, gain = factors
        kernel.descend(noise_S, noise_S, seed, offset, gain, noise_S, start)
        slices.append(noise_S.cpu().numpy())
    return np.concatenate(slices)


def definition(kind: NoiseKind) -> tuple[NDArray[np.float32], NDArray[np.float64]]:
    """Return the sample as the contract defines it, and the tolerance of each element for gaussian noise."""
    expected, tolerance = [], []
    for start, stop in FINGERPRINT_SLICES:
        noise_S = noise(kind, FINGERPRINT_SEED, start, stop)
        expected += [noise_S, noise_S + noise_S * (np.float32(OFFSET) + np.float32(GAIN) * noise_S)]
        tolerance += [np.full(len(noise_S), 1e-6), np.full(len(noise_S), 1e-5)]
    return np.concatenate(expected), np.concatenate(tolerance)


def fingerprint_agrees(kind: NoiseKind, sample: NDArray[np.float32]) -> bool:
    """Return whether a sample agrees with the definition.

    Uniform and rademacher noise must agree to the bit, gaussian noise to 1e-6 and its descendants to 1e-5."""
    expected, tolerance = definition(kind)
    if sample.shape != expected.shape:
        return False
    return bool(np.all(np.abs(sample - expected) <= (tolerance if kind == "gaussian" else 0.0)))
