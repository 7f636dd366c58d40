"""The per-generation record of (member, seed, sign, fitness, weight): enough to replay a generation."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from spartan_ray.strategies.base import Members, Move


def write_journal(folder: Path, generation: int, members: Members, fitness_K: NDArray[np.float64], move: Move) -> None:
    """Write `folder`/000005.npz for generation 5; `scale` is the scale of the noise."""
    folder.mkdir(exist_ok=True)
    np.savez(
        folder / f"{generation:06d}.npz",
        member=np.arange(len(members)),
        seed=members.seed_K,
        sign=members.sign_K,
        fitness=fitness_K,
        weight=move.weight_K,
        scale=np.float64(members.scale),
    )


def read_journal(path: Path) -> dict[str, NDArray[np.generic]]:
    """The columns of one generation. Never unpickles."""
    with np.load(path, allow_pickle=False) as stored:
        return {name: stored[name] for name in stored.files}
