"""The configuration of a command line: a base and flags that override it."""

from __future__ import annotations

import argparse
import contextlib
import io
from pathlib import Path

import tyro

from spartan_ray.errors import InputError
from spartan_ray.run.config import Config
from spartan_ray.run.loading import load_config, preset_names


def parse_config(arguments: list[str]) -> Config:
    """The configuration of `spartan train`'s arguments: --config NAME|FILE, and flags that override it."""
    base = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    base.add_argument("--config")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            chosen, flags = base.parse_known_args(arguments)
    except SystemExit:
        raise InputError("--config: expected the name of a preset or a file") from None
    default = load_config(chosen.config) if chosen.config else Config()
    description = (
        f"Train a network. --config NAME|FILE is the base, flags override it. Presets: {', '.join(preset_names())}."
    )
    try:
        return with_flags(default, flags, "spartan train", description)
    except InputError as error:
        stray = next((flag for flag in flags if str(error) == f"Unrecognized options: {flag}"), "")
        if stray in preset_names() or Path(stray).is_file():
            raise InputError(f"{error} (perhaps --config {stray}?)") from None
        raise


def with_flags(default: Config, flags: list[str], prog: str, description: str) -> Config:
    """A configuration with the fields that flags name replaced."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(Config, default=default, args=flags, prog=prog, description=description)
    except SystemExit as end:
        if end.code == 0:
            raise
        raise InputError(_first_sentence(errors.getvalue())) from None


def with_absolute_paths(config: Config) -> Config:
    """The paths of a configuration as they are here: the driver may run in another directory."""
    run, data, parent = config.run, config.data, config.parent
    run = run.model_copy(update={"out": str(Path(run.out).absolute())})
    if data.name != "digits":
        data = data.model_copy(update={"root": str(Path(data.root or f"data/{data.name}").absolute())})
    if parent.weights not in ("none", "imagenet"):
        parent = parent.model_copy(update={"weights": str(Path(parent.weights).absolute())})
    return config.model_copy(update={"run": run, "data": data, "parent": parent})


def _first_sentence(box: str) -> str:
    """The message of tyro's error box without the box, and the flag that it proposes."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    rule = next((number for number, line in enumerate(lines) if line.startswith("───")), len(lines))
    message = " ".join(lines[:rule]).split(" Got errors", 1)[0]
    proposed = [line.split()[0].rstrip(",") for line in lines[rule:] if line.startswith("--")]
    if message.startswith("Unrecognized") and proposed:
        message += f" (perhaps {proposed[0]}?)"
    return message or " ".join(box.split())
