"""Checkpoints: all that the rest of a run depends on, as safetensors and JSON.

    epoch-000010.safetensors             the network's state dict
    epoch-000010.optimizer.safetensors   the tensors of the state dict of the parent's optimizer
    epoch-000010.evolution.safetensors   those of the optimizer that makes updates of the estimated gradient
    epoch-000010.average.safetensors     the moving average of the weights, if there is one
    epoch-000010.json                    the rest of both, and of the run
    epoch-000010.sha256                  the checksums of these files, as sha256sum has them

A checkpoint is its checksums, written last: without them, or when one is wrong, there is none. There are no states of
random generators to keep: every draw is a function of the seed and a counter (epoch, step), which the JSON has.
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

from spartan_ray.engine.moments import TensorDict, load_optimizer
from spartan_ray.engine.population import Population
from spartan_ray.errors import InputError, RunError
from spartan_ray.run.config import Config

PARTS = ("network", "optimizer", "evolution", "average")
# Without these a checkpoint still serves replay; only a resume needs the parent's optimizer.
REPLAY_PARTS = ("network", "evolution", "average")


class CheckpointError(Exception):
    """A checkpoint is missing, torn or changed; one line that names the file."""


class MetricsState(BaseModel):
    """metrics.jsonl as it was."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Loop(BaseModel):
    """What a checkpoint's JSON says."""

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
    optimizers: dict[str, dict[str, Any]]
    """What the state dicts of the optimizers have beside tensors."""
    metrics: MetricsState
    config: Config


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
    lines = ""

    def write(part: str, content: bytes) -> str:
        path = _path(folder, checkpoint.epoch, part)
        write_whole(path, content)
        return f"{hashlib.sha256(content).hexdigest()}  {path.name}\n"

    for part in PARTS:
        lines += write(part, save(checkpoint.tensors[part]))
    lines += write("loop", (json.dumps(checkpoint.loop.model_dump(), indent=1) + "\n").encode())
    write("checksums", lines.encode())


def load_checkpoint(folder: Path, epoch: int, parts: tuple[str, ...] = PARTS) -> Checkpoint:
    """Read and verify the checkpoint of an epoch. Raises CheckpointError."""
    checksums, path = _path(folder, epoch, "checksums"), _path(folder, epoch, "loop")
    lines = _read(checksums).decode(errors="replace").splitlines()

    def verified(path: Path) -> bytes:
        content = _read(path)
        if f"{hashlib.sha256(content).hexdigest()}  {path.name}" not in lines:
            raise CheckpointError(f"{path}: torn or changed: not what {checksums.name} says")
        return content

    try:
        loop = Loop.model_validate(json.loads(verified(path)))
        if loop.epoch != epoch:
            raise CheckpointError(f"{path}: of epoch {loop.epoch}")
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        raise CheckpointError(f"{path}: not a checkpoint of this version: {where}: {problem['msg']}") from None
    except (ValueError, RecursionError, InputError) as error:  # the last of the configuration in it
        raise CheckpointError(f"{path}: not a checkpoint of this version: {error}") from None
    tensors = {}
    for part in parts:
        content = verified(_path(folder, epoch, part))
        try:
            tensors[part] = load(content)
        except SafetensorError as error:
            raise CheckpointError(f"{_path(folder, epoch, part)}: not safetensors: {error}") from None
    return Checkpoint(tensors, loop)


def latest_checkpoint(
    run: Path, warn: Callable[[str], None], behind: Callable[[Config], int] = lambda config: 1
) -> tuple[Checkpoint, bytes]:
    """The last checkpoint of a run folder that is intact, and metrics.jsonl as it was then; `warn` takes a
    line for each that is not. `behind` says of how many epochs the networks are needed, the checkpoint's the last.

    Raises InputError when there is none."""
    for epoch in reversed(epochs_kept(run / "checkpoints")):
        try:
            checkpoint = load_checkpoint(run / "checkpoints", epoch)
            for earlier in range(max(0, epoch - behind(checkpoint.loop.config) + 1), epoch):
                load_checkpoint(run / "checkpoints", earlier, ("network",))
            return checkpoint, _load_metrics(run / "metrics.jsonl", checkpoint)
        except CheckpointError as error:
            warn(f"{error}; trying the one before it")
    raise InputError(f"{run}: no intact checkpoint to go on from")


def is_empty(run: Path) -> bool:
    """Whether a run folder has nothing of a run: it was lost before its first checkpoint. Raises InputError for one
    that has had more, and has no checkpoint any more."""
    if epochs_kept(run / "checkpoints"):
        return False
    for name in ("metrics.jsonl", "final.safetensors"):
        if (run / name).exists() and (run / name).stat().st_size:
            raise InputError(f"{run}: has {name} and no checkpoint to go on from: give another run.name")
    return True


def epochs_kept(folder: Path) -> list[int]:
    """The epochs that have a checkpoint, in order."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"epoch-(\d{6,18})\.sha256", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in names if match)


def prune(folder: Path, epoch: int, keep: int, keep_for_replay: Callable[[int], bool]) -> None:
    """Delete all but the last `keep` checkpoints up to an epoch, and those after it, which a run that went on
    from there does not count on. Of one that replay needs only the parent's optimizer goes."""
    kept = epochs_kept(folder)
    older = [number for number in kept if number <= epoch][:-keep]
    for number in older + [number for number in kept if number > epoch]:
        parts = ("optimizer",) if number < epoch and keep_for_replay(number) else ("checksums", "loop", *PARTS)
        for part in parts:  # the checksums first, since a checkpoint is its checksums
            _path(folder, number, part).unlink(missing_ok=True)


def load_network(module: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Give a network the weights of a checkpoint. Raises InputError when they are another network's."""
    try:
        module.load_state_dict(checkpoint.tensors["network"])
    except RuntimeError as error:
        raise InputError(f"the checkpoint of epoch {checkpoint.epoch} is of another network: {error}") from None


def be_after_epoch(
    module: torch.nn.Module, checkpoint: Checkpoint, folder: Path, epochs: int, remember: Callable[[int], None]
) -> None:
    """Give a network the weights of a checkpoint, and before it those of the epochs that lead to it, `epochs` in all;
    `remember` is called with the number of each. Raises InputError when one of them is not there."""
    for epoch in range(max(0, checkpoint.epoch - epochs + 1), checkpoint.epoch):
        try:
            load_network(module, load_checkpoint(folder, epoch, ("network",)))
        except CheckpointError as error:
            raise InputError(f"the average or the trajectory needs epoch {epoch}: {error}") from None
        remember(epoch)
    load_network(module, checkpoint)
    remember(checkpoint.epoch)


def load_evolution(population: Population, checkpoint: Checkpoint) -> None:
    """Give a population the optimizer that makes its updates as it was at a checkpoint."""
    population.updates.load_moments(None)
    if rest := checkpoint.loop.optimizers.get("evolution"):
        load_optimizer(population.updates.optimizer_of(rest["kind"]), checkpoint.tensors["evolution"], rest)


def _path(folder: Path, epoch: int, part: str) -> Path:
    suffixes = {"network": ".safetensors", "loop": ".json", "checksums": ".sha256"}
    return folder / f"epoch-{epoch:06d}{suffixes.get(part, f'.{part}.safetensors')}"


def _read(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: not readable: {error.strerror}") from None


def _load_metrics(path: Path, checkpoint: Checkpoint) -> bytes:
    """The record up to a checkpoint; what came after it is computed again."""
    state = checkpoint.loop.metrics
    content = _read(path)[: state.bytes] if state.bytes else b""
    if hashlib.sha256(content).hexdigest() != state.sha256:
        raise CheckpointError(f"{path}: not the record of the checkpoint of epoch {checkpoint.epoch}")
    return content
