"""Weights on disk, as safetensors."""

from __future__ import annotations

import os
from pathlib import Path

import torch
from safetensors.torch import save


def save_weights(path: Path, state: dict[str, torch.Tensor], description: str) -> None:
    """Write a state dict so that the file is whole or absent. `description` becomes its metadata."""
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        # One key, since safetensors writes several in any order and equal runs are equal files.
        file.write(save(state, metadata={"spartan": description}))
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)
