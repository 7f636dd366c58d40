"""Checkpoints: all that the rest of a run depends on, as safetensors and JSON.

    epoch-000010.safetensors             the network; a state dict of torchvision's resnet18
    epoch-000010.optimizer.safetensors   the state of the parent's optimizer
    epoch-000010.evolution.safetensors   the state of the optimizer of es
    epoch-000010.json                    the rest, with the SHA-256 of each file above and of itself

A checkpoint is its JSON, written last: without it, or when a checksum is wrong, there is none. There are no
states of random generators to keep: every draw is a function of the seed and a counter (epoch, step), which
the JSON has.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from spartan_ray.config import InputError, RunError

PARTS = ("network", "optimizer", "evolution")
# Without these a checkpoint still serves replay; only a resume needs the parent's optimizer.
REPLAY_PARTS = ("network", "evolution")
TensorDict = dict[str, torch.Tensor]


class CheckpointError(Exception):
    """A checkpoint is missing, torn or changed; one line that names the file."""


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after an epoch; 0 is its start. `loop` is what JSON can hold."""

    epoch: int
    tensors: dict[str, TensorDict]  # by part
    loop: dict[str, Any]


def write_whole(path: Path, content: bytes) -> None:
    """Write a file so that after a crash it is whole or as it was. Raises RunError when it cannot be written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def save_weights(path: Path, state: TensorDict, description: str) -> None:
    """Write a state dict. `description` becomes its metadata."""
    # One key, since safetensors writes several in any order and equal runs are equal files.
    write_whole(path, save(state, metadata={"spartan": description}))


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into the folder. Raises RunError, with the ones before it as they were."""
    files = {}
    for part in PARTS:
        path, content = _path(folder, checkpoint.epoch, part), save(checkpoint.tensors[part])
        write_whole(path, content)
        files[path.name] = hashlib.sha256(content).hexdigest()
    loop = {"epoch": checkpoint.epoch} | checkpoint.loop | {"files": files}
    write_whole(_path(folder, checkpoint.epoch, "loop"), _encode(loop))


def load_checkpoint(folder: Path, epoch: int, parts: tuple[str, ...] = PARTS) -> Checkpoint:
    """Read and verify the checkpoint of an epoch. Raises CheckpointError."""
    path = _path(folder, epoch, "loop")
    try:
        content = path.read_bytes()
        loop = json.loads(content)
        del loop["sha256"]
        intact = _encode(loop) == content and loop["epoch"] == epoch
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path}: torn or changed: its checksum is wrong")
    return Checkpoint(epoch, {part: _load_part(_path(folder, epoch, part), loop["files"]) for part in parts}, loop)


def latest_checkpoint(run: Path, warn: Callable[[str], None]) -> tuple[Checkpoint, bytes]:
    """The last checkpoint of a run folder that is intact, and metrics.jsonl as it was then; `warn` takes a
    line for each that is not.

    Raises InputError when there is none."""
    for epoch in reversed(epochs_kept(run / "checkpoints")):
        try:
            checkpoint = load_checkpoint(run / "checkpoints", epoch)
            return checkpoint, _load_metrics(run / "metrics.jsonl", checkpoint)
        except CheckpointError as error:
            warn(f"{error}; the checkpoint before it is used")
    raise InputError(f"{run}: no intact checkpoint to go on from")


def epochs_kept(folder: Path) -> list[int]:
    """The epochs that have a checkpoint, in order."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"epoch-(\d{6,18})\.json", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in names if match)


def prune(folder: Path, keep: int, keep_for_replay: Callable[[int], bool]) -> None:
    """Delete all but the last `keep` checkpoints. Of one that replay needs only the parent's optimizer goes."""
    for epoch in epochs_kept(folder)[:-keep]:
        parts = {"optimizer"} if keep_for_replay(epoch) else {"loop", *PARTS}
        # The JSON goes first, since a checkpoint is its JSON.
        for part in sorted(parts, key=lambda part: part != "loop"):
            _path(folder, epoch, part).unlink(missing_ok=True)


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> TensorDict:
    """The state of an optimizer's parameters, named `3.exp_avg` for the parameter number 3."""
    return {
        f"{number}.{name}": value.contiguous()
        for number, parameter in enumerate(_parameters(optimizer))
        for name, value in optimizer.state.get(parameter, {}).items()
        if isinstance(value, torch.Tensor)
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: TensorDict) -> None:
    """Give an optimizer the state that `optimizer_tensors` took. What has the shape of its parameter gets
    its layout in memory too, since torch rounds differently in another."""
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        parameter = parameters[int(number)]
        if value.shape == parameter.shape:
            value = torch.empty_like(parameter).copy_(value)
        optimizer.state[parameter][name] = value.detach()


def _parameters(optimizer: torch.optim.Optimizer) -> list[torch.Tensor]:
    return [parameter for group in optimizer.param_groups for parameter in group["params"]]


def _path(folder: Path, epoch: int, part: str) -> Path:
    suffix = {"network": ".safetensors", "loop": ".json"}.get(part, f".{part}.safetensors")
    return folder / f"epoch-{epoch:06d}{suffix}"


def _encode(loop: dict[str, Any]) -> bytes:
    """The JSON with its own checksum in front: no byte of it can change unseen."""
    checksum = hashlib.sha256(json.dumps(loop).encode()).hexdigest()
    return (json.dumps({"sha256": checksum} | loop, indent=1) + "\n").encode()


def _load_metrics(path: Path, checkpoint: Checkpoint) -> bytes:
    """The record up to a checkpoint; what came after it is computed again."""
    state = checkpoint.loop["metrics"]
    try:
        content = path.read_bytes()[: state["bytes"]] if state["bytes"] else b""
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != state["sha256"]:
        raise CheckpointError(f"{path}: not the record of the checkpoint of epoch {checkpoint.epoch}")
    return content


def _load_part(path: Path, checksums: dict[str, str]) -> TensorDict:
    try:
        content = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != checksums.get(path.name):
        raise CheckpointError(f"{path}: torn or changed: its checksum is wrong")
    try:
        return load(content)
    except SafetensorError as error:
        raise CheckpointError(f"{path}: not safetensors: {error}") from None
