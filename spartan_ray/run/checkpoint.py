"""Checkpoints: everything that the rest of a run depends on, as safetensors and JSON.

    epoch-000010.safetensors             state dict of the network
    epoch-000010.optimizer.safetensors   tensors of the state dict of the parent's optimizer; esgd: of all parents'
    epoch-000010.evolution.safetensors   tensors of the state dict of the evolution optimizer; esgd: all parents
    epoch-000010.average.safetensors     moving average of the weights, if there is one
    epoch-000010.json                    the rest of the optimizers' state dicts, and of the state of the run
    epoch-000010.sha256                  checksums of these files, in the format of sha256sum

The checksums are written last. If they are missing or one is wrong, the checkpoint does not count. There is no state of
random generators to keep: every draw is a function of the seed and a counter (epoch, step), which is in the JSON.
"""

from __future__ import annotations

import hashlib
import json
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
from spartan_ray.errors import InputError
from spartan_ray.run.config import Config
from spartan_ray.run.files import write_whole

PARTS = ("network", "optimizer", "evolution", "average")
# The parts that replay needs. Only a resume needs the parent's optimizer.
REPLAY_PARTS = ("network", "evolution", "average")


class CheckpointError(Exception):
    """A checkpoint is missing, torn or changed. The message is one line that names the file."""


class MetricsState(BaseModel):
    """The size in bytes and the SHA-256 of metrics.jsonl at a checkpoint."""

    bytes: Annotated[int, Field(ge=0)]
    sha256: str


class Loop(BaseModel):
    """The content of a checkpoint's JSON file."""

    model_config = ConfigDict(strict=True)

    epoch: Annotated[int, Field(ge=0)]
    """Last finished epoch; 0 is the start of the run."""
    generation: int
    """Epoch of the last evolve phase; 0 if there was none."""
    steps: Annotated[int, Field(ge=0)]
    """Steps of gradient descent so far."""
    device: str
    """Device type of the driver, such as cpu or cuda. Bits differ between types."""
    data: str
    """Digest of all images, in order."""
    optimizers: dict[str, dict[str, Any]]
    """State dicts of the optimizers, without their tensors."""
    metrics: MetricsState
    config: Config


@dataclass(frozen=True)
class Checkpoint:
    """The state of a run after an epoch."""

    tensors: dict[str, TensorDict]  # by part, see PARTS
    loop: Loop

    @property
    def epoch(self) -> int:
        return self.loop.epoch


def save_weights(path: Path, state: TensorDict, description: str) -> None:
    """Write a state dict. `description` becomes its metadata."""
    # Use a single key: safetensors writes several in any order, and equal runs must give equal files.
    write_whole(path, save(state, metadata={"spartan": description}))


def save_checkpoint(folder: Path, checkpoint: Checkpoint) -> None:
    """Write a checkpoint into the folder. Raises RunError if it cannot be written; earlier checkpoints stay intact."""
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
    """Read and verify the checkpoint of an epoch. Raises CheckpointError if it is missing, torn or changed."""
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
    except (ValueError, RecursionError, InputError) as error:  # InputError comes from the configuration in it
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
    """Return the last intact checkpoint of a run folder, and the content of metrics.jsonl at that epoch.

    `behind` returns the number of latest epochs whose networks the run needs to continue, the checkpoint's included;
    they must be intact too. `warn` gets a message for each checkpoint that cannot be used. Raises InputError if there
    is no intact one."""
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
    """Return whether a run folder holds no results, because the run was lost before its first checkpoint. Raises
    InputError if it holds results but no checkpoint."""
    if epochs_kept(run / "checkpoints"):
        return False
    for name in ("metrics.jsonl", "final.safetensors"):
        if (run / name).exists() and (run / name).stat().st_size:
            raise InputError(f"{run}: has {name} and no checkpoint to go on from: give another run.name")
    return True


def epochs_kept(folder: Path) -> list[int]:
    """Return the epochs that have a checkpoint, in ascending order."""
    if not folder.is_dir():
        return []
    names = (re.fullmatch(r"epoch-(\d{6,18})\.sha256", path.name) for path in folder.iterdir())
    return sorted(int(match[1]) for match in names if match)


def prune(folder: Path, epoch: int, keep: int, keep_for_replay: Callable[[int], bool]) -> None:
    """Delete checkpoints that are no longer needed: all but the last `keep` up to `epoch`, and all after it, which are
    left over if a run continued from an earlier epoch. If replay needs an older checkpoint, delete only the tensors of
    the parent's optimizer."""
    kept = epochs_kept(folder)
    older = [number for number in kept if number <= epoch][:-keep]
    for number in older + [number for number in kept if number > epoch]:
        parts = ("optimizer",) if number < epoch and keep_for_replay(number) else ("checksums", "loop", *PARTS)
        for part in parts:  # the checksums first: without them the checkpoint does not count
            _path(folder, number, part).unlink(missing_ok=True)


def load_network(module: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Load the weights of a checkpoint into a network. Raises InputError if they belong to another network."""
    try:
        module.load_state_dict(checkpoint.tensors["network"])
    except RuntimeError as error:
        raise InputError(f"the checkpoint of epoch {checkpoint.epoch} is of another network: {error}") from None


def be_after_epoch(
    module: torch.nn.Module, checkpoint: Checkpoint, folder: Path, epochs: int, remember: Callable[[int], None]
) -> None:
    """Load the weights of the last `epochs` epochs into a network, one after another, ending with the checkpoint's.
    Call `remember` with the number of each epoch. Raises InputError if one is missing."""
    for epoch in range(max(0, checkpoint.epoch - epochs + 1), checkpoint.epoch):
        try:
            load_network(module, load_checkpoint(folder, epoch, ("network",)))
        except CheckpointError as error:
            raise InputError(f"the average or the trajectory needs epoch {epoch}: {error}") from None
        remember(epoch)
    load_network(module, checkpoint)
    remember(checkpoint.epoch)


def load_evolution(population: Population, checkpoint: Checkpoint) -> None:
    """Load the state of a population's update optimizer from a checkpoint."""
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
    """Return the content of metrics.jsonl up to a checkpoint. Later epochs are computed again. Raises CheckpointError
    if it has changed."""
    state = checkpoint.loop.metrics
    content = _read(path)[: state.bytes] if state.bytes else b""
    if hashlib.sha256(content).hexdigest() != state.sha256:
        raise CheckpointError(f"{path}: not the record of the checkpoint of epoch {checkpoint.epoch}")
    return content
