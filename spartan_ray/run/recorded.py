"""Reads the evolve phases of a run folder for replay."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch

from spartan_ray.engine.flat import FlatModel
from spartan_ray.errors import InputError
from spartan_ray.run.checkpoint import REPLAY_PARTS, Checkpoint, CheckpointError, epochs_kept, load_checkpoint
from spartan_ray.run.journal import Journal, read_journal
from spartan_ray.run.loading import load_run_config, refuse_links
from spartan_ray.vision.data import load_splits
from spartan_ray.vision.models import build_model, describe

CPU = torch.device("cpu")


def ran_on_gpu(run: Path) -> bool:
    """Return whether environment.json says that the driver of a run used a GPU. The file is informative only."""
    try:
        return "cuda" in str(json.loads((run / "environment.json").read_text())["driver"]["device"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


class Recorded:
    """The evolve phases of a run folder, to be replayed on a device of the type that the run used.

    `note` takes one-line messages. Raises InputError if the folder does not belong to a run with evolve phases."""

    def __init__(self, run: Path, note: Callable[[str], None], device: torch.device = CPU) -> None:
        self.run = run
        self.note = note
        self.device = device
        refuse_links(run)
        self.config = load_run_config(run)
        strategy_name = self.config.evolution.strategy
        # All phases that the run has had, even if their journals are gone.
        last = max(epochs_kept(run / "checkpoints"), default=0)
        every = self.config.evolution.every
        self.generations = list(range(every, last + 1, every)) if strategy_name != "none" else []
        if not self.generations:
            raise InputError(f"{run}: has had no evolve phase (evolution.strategy {strategy_name})")
        self.splits = splits = load_splits(self.config.data, self.config.run.seed, note)
        self.data_digest = splits.digest()
        self.description = describe(self.config.parent, splits)
        self.model = FlatModel(build_model(self.config.parent, len(splits.classes)), device)

    def read(self, generation: int) -> tuple[Path, Journal, Checkpoint]:
        """Return the path and content of a phase's journal, and the checkpoint before the phase. `generation` is the
        epoch of the phase. Raises InputError if one of them is missing, or if the images have changed."""
        if generation not in self.generations:
            raise InputError(f"--generation {generation}: {self.run} has {', '.join(map(str, self.generations))}")
        path, checkpoints = self.run / "journal" / f"{generation:06d}.npz", self.run / "checkpoints"
        journal = read_journal(path)
        try:
            checkpoint = load_checkpoint(checkpoints, generation - 1, REPLAY_PARTS)
        except CheckpointError as error:
            if self.config.run.keep_parents:
                raise InputError(f"the parent before generation {generation} is missing: {error}") from None
            kept = ", ".join(map(str, epochs_kept(checkpoints)))
            raise InputError(
                f"{self.run}: the parent before generation {generation} was not kept (run.keep_parents is false; "
                f"there are checkpoints of the epochs {kept})"
            ) from None
        if checkpoint.loop.data != self.data_digest:
            raise InputError(f"{self.run}: data.root: the images are not those that the run had")
        return path, journal, checkpoint

    def refuse_member(self, member: int, generation: int, journal: Journal) -> None:
        """Raise InputError if a generation does not have this member."""
        if not 0 <= member < len(journal["member"]):
            raise InputError(
                f"--member {member}: generation {generation} has the members 0 to {len(journal['member']) - 1}"
            )
