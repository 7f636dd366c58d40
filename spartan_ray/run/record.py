"""Writes the records of a run folder: configuration, environment, metrics, log."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import math
import os
import platform
import time
import uuid
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spartan_ray import __version__, origin
from spartan_ray.engine.strategies.requests import Outcome
from spartan_ray.errors import RunError
from spartan_ray.run.checkpoint import MetricsState
from spartan_ray.run.config import Config, Run
from spartan_ray.run.files import write_whole
from spartan_ray.run.loading import dump_config
from spartan_ray.run.loggers import Logger

PACKAGES = ("ray", "torch", "torchvision", "numpy", "numba", "pandas")


Row = dict[str, Any]


class RunFolder:
    """A run folder that this process writes. Use `create` or `reopen` to make one."""

    def __init__(self, path: Path, loggers: Sequence[tuple[str, Logger]], note: Callable[[str], None]) -> None:
        self.path = path
        self.loggers, self.note = list(loggers), note
        self.rows: list[Row] = []
        self.began, self.seconds_before = time.monotonic(), 0.0  # run time before this process
        self.metrics_bytes = 0
        self.metrics_hash = hashlib.sha256()

    @classmethod
    def create(
        cls,
        path: Path,
        config: Config,
        devices: dict[str, Any],
        loggers: Sequence[tuple[str, Logger]] = (),
        note: Callable[[str], None] = print,
        id: str | None = None,
    ) -> RunFolder:
        """Start the record of a new run in an empty folder.

        `devices` describes the driver and the workers for environment.json. `note` takes one-line messages. `id` is the
        unique identifier of the run (default: a new one)."""
        folder = cls(path, loggers, note)
        folder._describe(config, {"id": id or uuid.uuid4().hex} | environment() | devices)
        return folder

    @classmethod
    def reopen(
        cls,
        path: Path,
        config: Config,
        devices: dict[str, Any],
        epoch: int,
        metrics: bytes,
        loggers: Sequence[tuple[str, Logger]] = (),
        note: Callable[[str], None] = print,
    ) -> RunFolder:
        """Continue the record of a run after an epoch. `metrics` is the content of metrics.jsonl at that epoch."""
        folder = cls(path, loggers, note)
        folder.metrics_hash.update(metrics)
        folder.metrics_bytes = len(metrics)
        folder.rows = [json.loads(line) for line in metrics.splitlines()]
        folder.seconds_before = folder.rows[-1].get("run_seconds", 0.0) if folder.rows else 0.0
        write_whole(path / "metrics.jsonl", metrics)
        try:
            before = dict(json.loads((path / "environment.json").read_text()))
            earlier = list(before.pop("resumed", []))
        except (OSError, ValueError, TypeError, RecursionError):  # environment.json is informative only
            before, earlier = {}, []
        resumed = [*earlier, {"epoch": epoch} | environment() | devices]
        folder._describe(config, before | {"resumed": resumed})
        return folder

    def _describe(self, config: Config, environment: dict[str, Any]) -> None:
        write_whole(self.path / "config.yaml", dump_config(config).encode())
        write_whole(self.path / "environment.json", (json.dumps(environment, indent=2) + "\n").encode())

    def append(self, row: Row) -> Row:
        """Append a row to metrics.jsonl and pass it to the loggers. Return it as written: with the time and the seconds
        of the run so far, and with None for numbers that are not finite, which JSON does not have. Raises RunError if
        it cannot be written."""
        row = {key: _finite(value) for key, value in row.items()}
        row |= {"time": now(), "run_seconds": self.seconds_before + time.monotonic() - self.began}
        line = (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            with open(self.path / "metrics.jsonl", "ab") as lines:
                lines.write(line)
                lines.flush()
                os.fsync(lines.fileno())
        except OSError as error:
            raise RunError(f"{self.path}: the record cannot be written: {error.strerror}") from None
        self.metrics_hash.update(line)
        self.metrics_bytes += len(line)
        self.rows.append(row)
        for name, logger in list(self.loggers):
            self._attempt(name, functools.partial(logger.log, row), logger)
        return row

    def _attempt(self, name: str, action: Callable[[], None], logger: Logger) -> None:
        """Call a logger. If it fails, drop it with a note; the run continues."""
        try:
            action()
        except Exception as error:
            self.loggers.remove((name, logger))
            self.note(f"{name} gets no more rows: {type(error).__name__}: {error}")

    def log(self, text: str) -> None:
        """Append a message with the time to log.txt. Errors are ignored: on a full disk, the writes that must succeed
        report it."""
        with contextlib.suppress(OSError), open(self.path / "log.txt", "a") as lines:
            lines.write(f"{now()} {text}\n")

    def metrics_state(self) -> MetricsState:
        """Return the size and digest of metrics.jsonl, for a checkpoint."""
        return MetricsState(bytes=self.metrics_bytes, sha256=self.metrics_hash.hexdigest())

    def close(self) -> None:
        for name, logger in list(self.loggers):
            self._attempt(name, logger.close, logger)


def run_id(folder: Path) -> str:
    """Return the unique identifier of the run in a folder, or a new one if it has none."""
    try:
        return str(json.loads((folder / "environment.json").read_text())["id"])
    except (OSError, ValueError, TypeError, KeyError, RecursionError):
        return uuid.uuid4().hex


def best_epoch(rows: list[Row]) -> int:
    """Return the epoch with the highest validation accuracy, the earliest if several are equal."""
    return int(max(rows, key=lambda row: (row["validation_accuracy"], -row["epoch"]))["epoch"])


def is_over(rows: list[Row], run: Run) -> bool:
    """Return whether a run with these rows is finished, by its epochs or its patience."""
    epoch = len(rows)
    return epoch >= run.epochs or bool(run.patience and rows and epoch - best_epoch(rows) >= run.patience)


def phase_row(outcome: Outcome) -> Row:
    """Return the metrics of an evolve phase."""
    scored, cases_K = outcome.cases_scored, outcome.cases_K
    finite_K = outcome.fitness_K[np.isfinite(outcome.fitness_K)]
    # For the maximum, count only members scored on the most images: one dropped early in a race was scored on few.
    furthest_K = outcome.fitness_K[np.isfinite(outcome.fitness_K) & (cases_K == cases_K.max())]
    return {
        "images_per_second": scored / outcome.seconds["scoring"],
        "population": len(outcome.members) // max(1, len(outcome.generations)),
        "generations": max(1, len(outcome.generations)),
        "fitness_images": outcome.cases,
        **{
            f"fitness_{name}": float(getattr(finite_K, name)()) if len(finite_K) else math.nan
            for name in ("min", "mean", "std")
        },
        "fitness_max": float(furthest_K.max()) if len(furthest_K) else math.nan,
        "fitness_nonfinite": len(outcome.fitness_K) - len(finite_K),
        "parent_fitness_before": outcome.before,
        "parent_fitness_after": outcome.after,
        "accepted": outcome.accepted > 0,
        "accepted_members": outcome.accepted,
        "chosen_member": outcome.chosen,
        "note": outcome.note,
        "confirm_fitness_before": outcome.confirm[0] if outcome.confirm else None,
        "confirm_fitness_after": outcome.confirm[1] if outcome.confirm else None,
        "search_ratios": outcome.search[0] if outcome.search else None,
        "search_fitness": outcome.search[1] if outcome.search else None,
        "step_ratio": outcome.step_ratio,
        **_diagnostics(outcome),
        "generation_fitness": [_mean(one.fitness_K) for one in outcome.generations] or None,
        "generation_lengths": [one.length if one.accepted else 0.0 for one in outcome.generations] or None,
        "images_scored": scored - outcome.discarded_cases,
        "images_saved": int((outcome.cases - cases_K[cases_K > 0]).sum()),
        "images_discarded": outcome.discarded_cases,
        **{f"{name}_seconds": seconds for name, seconds in outcome.seconds.items()},
        **outcome.counts,
        "workers": outcome.workers,
    }


def _mean(fitness_K: NDArray[np.float64]) -> float:
    """Return the mean of the finite fitnesses, NaN if there are none."""
    finite_K = fitness_K[np.isfinite(fitness_K)]
    return float(finite_K.mean()) if len(finite_K) else math.nan


def _signal_to_noise(outcome: Outcome) -> float | None:
    """Return the signal-to-noise ratio of mirrored pairs, or None without such pairs: the variance of half the
    difference of a pair, its slope along the noise, divided by the variance of the pair's mean, everything else."""
    seed_K, fitness_K = outcome.members.seed_K, outcome.fitness_K
    if len(seed_K) % 2 or not np.array_equal(seed_K[0::2], seed_K[1::2]):
        return None
    pair_P2 = fitness_K.reshape(-1, 2)
    pair_P2 = pair_P2[np.isfinite(pair_P2).all(1)]
    noise = float(pair_P2.mean(1).var()) if len(pair_P2) else 0.0
    return float((pair_P2[:, 0] - pair_P2[:, 1]).var()) / 4 / noise if noise else None


def _diagnostics(outcome: Outcome) -> Row:
    """Return measures of the quality and gain of a phase, or none unless `evolution.diagnostics` is on."""
    if outcome.cosine is None:
        return {}
    weight_K = np.abs(outcome.weight_K)
    squares = float((weight_K**2).sum())
    last = (outcome.generations or [outcome])[-1]
    return {
        "cosine": outcome.cosine,
        "cosine_expected": outcome.cosine_expected,
        "noise_share": 1 - outcome.cosine**2,
        "effective_population": float(weight_K.sum()) ** 2 / squares if squares else 0.0,
        "signal_to_noise": _signal_to_noise(last),
        "gain_per_million": (outcome.after - outcome.before) / outcome.cases_scored * 1e6,
    }


def environment() -> dict[str, Any]:
    """Return what the bits of a run may depend on apart from its configuration: versions, sources and processor."""
    return {
        "python": platform.python_version(),
        "versions": {"spartan-ray": __version__} | {name: importlib.metadata.version(name) for name in PACKAGES},
        "git_commit": origin.commit(),
        "sources": origin.sources(),
        "processor": _processor(),
    }


def now() -> str:
    """Return the current UTC time as ISO 8601, to the second."""
    return datetime.now(UTC).isoformat(timespec="seconds")


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
