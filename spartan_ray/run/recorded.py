"""The evolve phases of a run folder, as they can be read again."""

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
    """Whether a run used a GPU, by its environment.json, which only informs."""
    try:
        return "cuda" in str(json.loads((run / "environment.json").read_text())["driver"]["device"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False


class Recorded:
    """The evolve phases of a run folder, on a device of the kind that the run used.

    `note` takes one-line messages. Raises InputError for a folder that is not of a run with evolve phases."""

    def __init__(self, run: Path, note: Callable[[str], None], device: torch.device = CPU) -> None:
        self.run = run
        self.note = note
        self.device = device
        refuse_links(run)
        self.config = load_run_config(run)
        strategy_name = self.config.evolution.strategy
        # Those that the run has had, whether their journals are still there or not.
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
        """The journal of a generation, with its path, and the checkpoint before it. Raises InputError when one is not
        there."""
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
        """Raises InputError for a member that a generation has not."""
        if not 0 <= member < len(journal["member"]):
            raise InputError(
                f"--member {member}: generation {generation} has the members 0 to {len(journal['member']) - 1}"
            )
