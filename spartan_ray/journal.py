"""The per-generation record of (member, seed, offset, gain, fitness, images, weight), from which a
generation is replayed."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spartan_ray.strategies import Outcome


def write_journal(folder: Path, generation: int, outcome: Outcome) -> None:
    """Write `folder`/000005.npz for generation 5.

    A chosen member has the weight 1. Of an es update the estimated gradient is the sum of
    weight * gain * noise(seed); the optimizer makes the update of it at `rate`, which is rate times the
    estimate for plain sgd, and the parent moves by factor * length * update. With momentum, adam or weight
    decay the update depends on the generations before and on the parent too."""
    folder.mkdir(exist_ok=True)
    members = outcome.members
    np.savez(
        folder / f"{generation:06d}.npz",
        member=np.arange(len(members)),
        seed=members.seed_K,
        offset=members.offset_K,
        gain=members.gain_K,
        fitness=outcome.fitness_K,
        images=outcome.images_K,
        weight=outcome.weight_K,
        rate=np.float64(outcome.rate),
        factor=np.float64(outcome.factor),
        length=np.float64(outcome.length),
    )


def read_journal(path: Path) -> dict[str, NDArray[np.generic]]:
    """The columns of one generation. Never unpickles."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
