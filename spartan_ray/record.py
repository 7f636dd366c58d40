"""The run folder as it is written: configuration, environment, a line an epoch, TensorBoard's events."""

from __future__ import annotations

import importlib.metadata
import json
import math
import platform
import subprocess
from pathlib import Path
from typing import Any

from torch.utils.tensorboard import SummaryWriter

from spartan_ray.config import Config, InputError, dump_config

PACKAGES = ("ray", "torch", "torchvision", "numpy", "numba", "pandas")

Row = dict[str, Any]


class RunFolder:
    """A new run folder. `devices` is what environment.json says of driver and workers."""

    def __init__(self, config: Config, devices: dict[str, Any]) -> None:
        self.path = make_run_folder(Path(config.run.out), config.run.name)
        (self.path / "config.yaml").write_text(dump_config(config))
        environment = {
            "python": platform.python_version(),
            "versions": {name: importlib.metadata.version(name) for name in PACKAGES},
            "git_commit": _git_commit(),
            "processor": _processor(),
        }
        (self.path / "environment.json").write_text(json.dumps(environment | devices, indent=2) + "\n")
        self.tensorboard = SummaryWriter(str(self.path / "tensorboard"))

    def append(self, row: Row) -> Row:
        """Append a line to metrics.jsonl; returns it as written: what is not finite becomes null, as
        JSON has no word for it."""
        row = {key: _finite(value) for key, value in row.items()}
        with open(self.path / "metrics.jsonl", "a") as lines:
            lines.write(json.dumps(row, allow_nan=False) + "\n")
        for key, value in row.items():
            if isinstance(value, (int, float)) and key != "epoch":
                self.tensorboard.add_scalar(key, value, row["epoch"])
        return row

    def close(self) -> None:
        self.tensorboard.close()


def _finite(value: Any) -> Any:
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def make_run_folder(out: Path, name: str) -> Path:
    """A new folder out/name, or out/name-2, ... when it is taken."""
    number = 1
    while True:
        folder = out / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError as error:
            if not folder.exists():  # it is `out` that is there, as a file
                raise InputError(f"run.out {out}: cannot make a run folder: {error}") from None
            number += 1
        except OSError as error:
            raise InputError(f"run.out {out}: cannot make a run folder: {error}") from None


def _git_commit() -> str | None:
    command = ["git", "-C", str(Path(__file__).parent), "rev-parse", "HEAD"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "")
