"""The rows of a study in one CSV file, one per epoch of each run; tables need no run folders."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pandas as pd

from spartan_ray.errors import InputError
from spartan_ray.report.reading import RunRecord, images_forwarded
from spartan_ray.run.files import write_whole
from spartan_ray.study.plan import Planned

# Columns that identify the run of a row.
RUN = ["group", "method", "seed", "key"]
SPLITS = [f"{split}_{what}" for split in ("evolution", "validation", "test") for what in ("loss", "accuracy")]
NUMBERS = ["train_loss", *SPLITS, *(f"average_{name}" for name in SPLITS), "step_ratio"]
COLUMNS = [*RUN, "processor", "start", "weights", "epoch", "kind", *NUMBERS, "trained", "scored", "seconds"]


class Rows:
    """The rows of the finished runs."""

    def __init__(self, path: Path) -> None:
        """Read the file if it exists. Raises InputError if it is no table of rows."""
        self.path = path
        self.frame = pd.DataFrame({name: [] for name in COLUMNS})
        if path.exists():
            try:
                self.frame = _typed(pd.read_csv(path, dtype=str, keep_default_na=False, na_values=[""]))
            except KeyError as error:
                raise InputError(f"{path}: no rows of a study: column {error.args[0]} is missing") from None
            except (OSError, ValueError) as error:
                raise InputError(f"{path}: cannot be read: {error}") from None

    def has(self, run: Planned) -> bool:
        """Return whether a run is finished."""
        return bool(_of(self.frame, run).any())

    def add(self, run: Planned, record: RunRecord, folder: Path) -> None:
        """Add the rows of a finished run, and write the file."""
        metrics, new = record.metrics, pd.DataFrame(index=record.metrics.index)
        about: dict[str, Any] = {name: getattr(run, name) for name in RUN}
        about |= {"processor": record.environment.processor, "weights": _digest(folder / "final.safetensors")}
        start = run.config.parent.weights  # none for runs from scratch
        about["start"] = _digest(Path(start)) if start not in ("none", "imagenet") else start
        for name, value in about.items():
            new[name] = value
        for name in ("epoch", "kind", *NUMBERS, "seconds"):
            new[name] = metrics.get(name)
        new["trained"], new["scored"] = (images.astype(int) for images in images_forwarded(metrics))
        new = _typed(new)
        others = self.frame[~_of(self.frame, run)]
        self.frame = pd.concat([others, new], ignore_index=True) if len(others) else new
        write_whole(self.path, self.frame.to_csv(index=False).encode())

    def of(self, runs: list[Planned]) -> pd.DataFrame:
        """Return the rows of these runs, in the order of the runs."""
        parts = [self.frame[_of(self.frame, run)] for run in runs]
        return pd.concat(parts, ignore_index=True) if parts else self.frame[:0]


def _typed(text: pd.DataFrame) -> pd.DataFrame:
    """Convert columns of text to their types. Every number is exact, which pandas' own parser does not guarantee."""
    frame = pd.DataFrame({name: text[name] for name in COLUMNS})
    for name in NUMBERS:
        frame[name] = frame[name].astype(object).astype(float)
    frame["seconds"] = frame["seconds"].astype(object).astype(float)
    for name in ("seed", "epoch", "trained", "scored"):
        frame[name] = frame[name].astype(int)
    return frame


def _of(frame: pd.DataFrame, run: Planned) -> pd.Series[bool]:
    """Return which rows belong to a run. Rows with another key belong to an earlier version of the cell, and are
    kept."""
    mine = pd.Series(True, index=frame.index)
    for name in RUN:
        mine &= frame[name] == getattr(run, name)
    return mine


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]
