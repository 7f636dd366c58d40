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

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load, save

from spartan_ray.errors import InputError, RunError
from spartan_ray.run.config import Config

PARTS = ("network", "optimizer", "evolution")
# Without these a checkpoint still serves replay; only a resume needs the parent's optimizer.
REPLAY_PARTS = ("network", "evolution")
TensorDict = dict[str, torch.Tensor]


class CheckpointError(Exception):
    """A checkpoint is missing, torn or changed; one line that names the file."""


class MetricsState(BaseModel):
    """metrics.jsonl as it was."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Loop(BaseModel):
    """What a checkpoint's JSON says beside its checksums."""

    model_config = ConfigDict(strict=True)

    epoch: Annotated[int, Field(ge=0)]
    """That has ended; 0 is the start of the run."""
    generation: int
    """The last evolve phase."""
    steps: Annotated[int, Field(ge=0)]
    """Of gradient descent."""
    device: str
    """Kind of device that the driver has: bits differ between kinds."""
    data: str
    """Digest of all images in their order."""
    metrics: MetricsState
    config: Config


class _File(Loop):
    """The JSON as it is written."""

    files: dict[str, str]


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after an epoch."""

    tensors: dict[str, TensorDict]  # by part
    loop: Loop

    @property
    def epoch(self) -> int:
        return self.loop.epoch


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
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None


def save_weights(path: Path, state: TensorDict, description: str) -> None:
    """Write a state dict. `description` becomes its metadata."""
    # One key, since safetensors writes several in any order and equal runs are equal files.
    write_whole(path, save(state, metadata={"spartan": description}))


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into the folder. Raises RunError, with the ones before it as they were."""
    files, epoch = {}, checkpoint.epoch
    for part in PARTS:
        path, content = _path(folder, epoch, part), save(checkpoint.tensors[part])
        write_whole(path, content)
        files[path.name] = hashlib.sha256(content).hexdigest()
    write_whole(_path(folder, epoch, "loop"), _encode(checkpoint.loop.model_dump() | {"files": files}))


def load_checkpoint(folder: Path, epoch: int, parts: tuple[str, ...] = PARTS) -> Checkpoint:
    """Read and verify the checkpoint of an epoch. Raises CheckpointError."""
    path = _path(folder, epoch, "loop")
    try:
        content = path.read_bytes()
        values = json.loads(content)
        del values["sha256"]
        intact = _encode(values) == content and values["epoch"] == epoch
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror}") from None
    except (ValueError, KeyError, TypeError, RecursionError):
        intact = False
    if not intact:
        raise CheckpointError(f"{path}: torn or changed: its checksum is wrong")
    try:
        loop = _File.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(f"{path}: not a checkpoint of this version: {where}: {problem['msg']}") from None
    except InputError as error:  # of the configuration in it
        raise CheckpointError(f"{path}: not a checkpoint of this version: {error}") from None
    return Checkpoint({part: _load_part(_path(folder, epoch, part), loop.files) for part in parts}, loop)


def latest_checkpoint(run: Path, warn: Callable[[str], None]) -> tuple[Checkpoint, bytes]:
    """The last checkpoint of a run folder that is intact, and metrics.jsonl as it was then; `warn` takes a
    line for each that is not.

    Raises InputError when there is none."""
    for epoch in reversed(epochs_kept(run / "checkpoints")):
        try:
            checkpoint = load_checkpoint(run / "checkpoints", epoch)
            return checkpoint, _load_metrics(run / "metrics.jsonl", checkpoint)
        except CheckpointError as error:
            warn(f"{error}; trying the one before it")
    raise InputError(f"{run}: no intact checkpoint to go on from")


def epochs_kept(folder: Path) -> list[int]:
    """The epochs that have a checkpoint, in order."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"epoch-(\d{6,18})\.json", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in names if match)


def prune(folder: Path, epoch: int, keep: int, keep_for_replay: Callable[[int], bool]) -> None:
    """Delete all but the last `keep` checkpoints up to an epoch, and those after it, which a run that went on
    from there does not count on. Of one that replay needs only the parent's optimizer goes."""
    kept = epochs_kept(folder)
    older = [number for number in kept if number <= epoch][:-keep]
    for number in older + [number for number in kept if number > epoch]:
        parts = ("optimizer",) if number < epoch and keep_for_replay(number) else ("loop", *PARTS)
        for part in parts:  # the JSON first, since a checkpoint is its JSON
            _path(folder, number, part).unlink(missing_ok=True)


def load_network(module: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Give a network the weights of a checkpoint. Raises InputError when they are another network's."""
    try:
        module.load_state_dict(checkpoint.tensors["network"])
    except RuntimeError as error:
        raise InputError(f"the checkpoint of epoch {checkpoint.epoch} is of another network: {error}") from None


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
    its layout in memory too, since torch rounds differently in another. Raises InputError for another state."""
    parameters = _parameters(optimizer)
    optimizer.state.clear()
    for key, value in tensors.items():
        number, _, name = key.partition(".")
        if not number.isdecimal() or int(number) >= len(parameters):
            raise InputError(f"the checkpoint is of another optimizer: {key}")
        parameter = parameters[int(number)]
        if value.ndim and value.shape != parameter.shape:
            raise InputError(f"the checkpoint is of another optimizer: {key} is {tuple(value.shape)}")
        if value.ndim:
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
    state = checkpoint.loop.metrics
    try:
        content = path.read_bytes()[: state.bytes] if state.bytes else b""
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror}") from None
    if hashlib.sha256(content).hexdigest() != state.sha256:
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
