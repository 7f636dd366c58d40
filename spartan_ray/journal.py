"""The per-generation record of (member, seed, offset, gain, fitness, images, weight), enough to replay a
generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spartan_ray.strategies import Outcome


def write_journal(folder: Path, generation: int, outcome: Outcome) -> None:
    """Write `folder`/000005.npz for generation 5. A weight counts what is in the parent: of an update it is
    times `rate` (the learning rate) and `length`."""
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
        length=np.float64(outcome.length),
    )


def read_journal(path: Path) -> dict[str, NDArray[np.generic]]:
    """The columns of one generation. Never unpickles."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
