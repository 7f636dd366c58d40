"""Reads run folders. Nothing in them is trusted."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import pandas as pd
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from spartan_ray.errors import InputError
from spartan_ray.run.config import Config
from spartan_ray.run.journal import read_journal
from spartan_ray.run.loading import load_run_config, refuse_links

Count = Annotated[int, Field(ge=0, le=2**53)]
Real = Annotated[float, Field(allow_inf_nan=False)]
# A number that was not finite is null in JSON.
Number = Real | None
# Fields that a record has only together.
TOGETHER = {
    "average_test_accuracy": ("average_validation_accuracy", "average_test_loss"),
    "parents": ("parents_fitness_min", "parents_fitness_mean", "parents_fitness_max"),
}


class Epoch(BaseModel):
    """A line of metrics.jsonl. `train_loss` is measured on a fixed sample of the SGD split, in evaluation mode. There
    are also {evolution,validation,test}_{loss,accuracy}."""

    model_config = ConfigDict(strict=True)

    epoch: Annotated[int, Field(ge=1, le=2**53)]
    time: str | None = None
    """End of the epoch, in UTC."""
    run_seconds: Real | None = None
    """Seconds that the run has taken so far, without what an interrupted process did after its last checkpoint."""
    lr: Real | None = None
    """Learning rate of the parent's optimizer."""
    kind: Literal["sgd", "evolve"]
    train_loss: Number
    validation_accuracy: Real
    test_accuracy: Real
    test_loss: Number
    average_validation_accuracy: Real | None = None
    average_test_accuracy: Real | None = None
    average_test_loss: Number = None
    """Loss and accuracy of the average of the weights (parent.average)."""
    parents: Count | None = None
    parents_fitness_min: Number = None
    parents_fitness_mean: Number = None
    parents_fitness_max: Number = None
    """Fitness of the parents, if there are several (evolutionary SGD)."""
    backed_off: Count | None = None
    """Number of parents whose fitness fell in an SGD epoch, and which were restored."""
    images_scored: Count = 0
    seconds: Real
    evaluation_seconds: Real
    images_per_second: Real

    @model_validator(mode="after")
    def _whole(self) -> Self:
        """Refuse a field without those that belong to it."""
        for name, others in TOGETHER.items():
            for other in others if getattr(self, name) is not None else ():
                if other not in self.model_fields_set:
                    raise ValueError(f"{name} without {other}")
        return self


class EvolvePhase(Epoch):
    """A line of an evolve phase. Statistics are over the members. A member that was rejected early counts with the
    images that it was scored on. There are also fitness_{min,std}, broadcast_seconds and workers."""

    population: Count
    generations: Count = 1
    """Number of generations in the phase, each with `population` members."""
    fitness_images: Count
    fitness_mean: Number
    fitness_max: Number
    fitness_nonfinite: Count = 0
    """Number of members whose fitness was not finite. They count as the worst and are in none of these statistics."""
    parent_fitness_before: Number
    parent_fitness_after: Number
    """Fitness of the parent before and after the phase, on the same images."""
    accepted: bool
    """Whether the parent moved, for better or worse."""
    accepted_members: Count = 1
    """Number of members that became the parent; more than one in a chain."""
    chosen_member: Count | None = None
    """The last member that became the parent."""
    note: str | None
    """Reason why the parent stayed."""
    confirm_fitness_before: Number = None
    confirm_fitness_after: Number = None
    """Fitness on images that had no part in the choice."""
    search_ratios: list[Number] | None = None
    search_fitness: list[Number] | None = None
    """Lengths of the update, as step ratios, and the fitness of each."""
    generation_fitness: list[Number] | None = None
    generation_lengths: list[Number] | None = None
    """Mean fitness of the members and length of the update (0: none) of each generation, if a phase has several."""
    step_ratio: Number
    """Norm of the phase's move divided by the norm of one mutation."""
    selected: Count | None = None
    """Number of offspring among the next parents (evolutionary SGD)."""
    images_saved: Count = 0
    """Number of images that early rejection or racing saved."""
    images_discarded: Count = 0
    """Number of images scored for members of a wave that were drawn again. Depends on the wave."""
    scoring_seconds: Real
    gradient_seconds: Real = 0.0
    update_seconds: Real
    retries: Count
    """Number of tasks repeated because their worker was lost."""
    late_results: Count = 0
    """Number of answers that another worker had given before."""
    members_failed: Count = 0
    """Number of members that failed on several workers and count as the worst."""

    @model_validator(mode="after")
    def _search(self) -> Self:
        ratios, fitness = self.search_ratios, self.search_fitness
        if ratios is not None and not (ratios and len(ratios) == len(fitness or ())):
            raise ValueError("search_ratios and search_fitness must have the same length, at least 1")
        return self


class Environment(BaseModel):
    """The parts of environment.json that a report uses."""

    versions: dict[str, str] = {}
    processor: str | None = None
    resumed: list[Any] = []


@dataclass(frozen=True)
class RunRecord:
    """The content of a run folder."""

    name: str
    config: Config
    metrics: pd.DataFrame
    environment: Environment
    members: dict[int, NDArray[np.float64]] = field(default_factory=dict)
    """Fitness of the members of each evolve phase that has a journal, by epoch."""


def runs_in(folder: Path) -> str:
    """Return a hint that names runs in a folder that is none."""
    inside = ", ".join(sorted(path.parent.name for path in folder.glob("*/metrics.jsonl"))[:5])
    return f"; it holds runs: {inside}" if inside else ""


def read_run(folder: Path, journals: bool = False) -> RunRecord:
    """Read a run folder, with the fitness of its members if `journals` is true. Raises InputError, which names the file
    that is missing or unreadable."""
    refuse_links(folder)
    path, rows = folder / "metrics.jsonl", []
    try:
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # it is still being written
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} is no record of an epoch")
            (EvolvePhase if row.get("kind") == "evolve" else Epoch).model_validate(row)
            rows.append(row)
        path = folder / "environment.json"
        environment = Environment.model_validate_json(path.read_text())
    except OSError as error:
        raise InputError(f"{folder}: not a run folder: {path.name}: {error.strerror}{runs_in(folder)}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        line_number = f" line {len(rows) + 1}:" if path.suffix == ".jsonl" else ""
        raise InputError(f"{path}:{line_number} {where}: {problem['msg']}") from None
    except (ValueError, RecursionError) as error:
        where = f"line {len(rows) + 1} is" if path.suffix == ".jsonl" else "is"
        raise InputError(f"{path}: {where} not JSON: {error}") from None
    if not rows:
        raise InputError(f"{folder / 'metrics.jsonl'}: no epoch has ended")
    config, frame = load_run_config(folder), pd.DataFrame(rows)
    frame.attrs["epochs"] = config.run.epochs
    members = {}
    for epoch in frame.loc[frame["kind"] == "evolve", "epoch"] if journals else ():
        path = folder / "journal" / f"{epoch:06d}.npz"
        if path.exists():
            members[int(epoch)] = read_journal(path)["fitness"]
    return RunRecord(folder.resolve().name, config, frame, environment, members)


def images_forwarded(metrics: pd.DataFrame) -> tuple[pd.Series[float], pd.Series[float]]:
    """Return the images that each epoch forwarded for gradients, and those to score networks."""
    trained = (metrics["images_per_second"] * metrics["seconds"]).round().where(metrics["kind"] == "sgd", 0)
    scored = metrics.reindex(columns=["images_scored", "images_discarded"]).astype(float).fillna(0).sum(axis=1)
    return trained, scored


def unique_frames(runs: list[RunRecord]) -> dict[str, pd.DataFrame]:
    """Return the metrics by run name. A number makes names unique."""
    frames: dict[str, pd.DataFrame] = {}
    for run in runs:
        name, number = run.name, 1
        while name in frames:
            number += 1
            name = f"{run.name} ({number})"
        frames[name] = run.metrics
    return frames
