"""Configurations from presets, YAML files and run folders, and back."""

from __future__ import annotations

import errno
import math
import os
import reprlib
import stat
from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from spartan_ray.errors import InputError
from spartan_ray.naming import is_named, logger_names
from spartan_ray.run.config import Config
from spartan_ray.section import perhaps

PRESETS = resources.files("spartan_ray.run") / "presets"


def preset_names() -> list[str]:
    """The presets that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_file: str) -> Config:
    """The configuration of a preset, of a YAML file, or of a run folder."""
    if name_or_file in preset_names():
        text = (PRESETS / f"{name_or_file}.yaml").read_text()
    elif Path(name_or_file).is_dir():
        config = load_run_config(Path(name_or_file))
        refuse_code(Path(name_or_file), config, f"give {Path(name_or_file) / 'config.yaml'} if you trust it")
        return config
    else:
        try:
            text = Path(name_or_file).read_text()
        except (OSError, UnicodeDecodeError, ValueError) as error:
            presets = ", ".join(preset_names())
            raise InputError(f"--config {name_or_file}: no such preset ({presets}) or readable file: {error}") from None
    return _parse(text, name_or_file)


def load_run_config(folder: Path) -> Config:
    """The configuration of a run folder, but for `cluster.address`: a folder that came from elsewhere must not
    say which Ray is given the token and trusted with what it answers."""
    try:
        text = (folder / "config.yaml").read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder}: not a run folder: {error}") from None
    config = _parse(text, str(folder / "config.yaml"))
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": None})})


def refuse_code(folder: Path, config: Config, hint: str) -> None:
    """Raises InputError for a run folder whose configuration names code, since to read a folder runs none."""
    for _, name in named_code(config):
        raise InputError(f"{folder}: its configuration names code, {name}, which would be run: {hint}")


def named_code(config: Config) -> list[tuple[str, str]]:
    """The fields that name code of the user's own, and what they name."""
    fields = [("parent.model", config.parent.model), ("evolution.strategy", config.evolution.strategy)]
    fields += [("run.loggers", name) for name in logger_names(config.run.loggers)]
    return [(field, name) for field, name in fields if is_named(name)]


def _parse(text: str, source: str) -> Config:
    """The configuration of YAML. Raises InputError that begins with the name of its source."""
    try:
        sections = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as a date that there is not
        raise InputError(f"{source}: not YAML: {error}") from None
    try:
        return configuration(sections)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def configuration(sections: Any) -> Config:
    """The configuration of sections of fields, as YAML has them. Raises InputError by the name of the field."""
    if not isinstance(sections, dict):
        raise InputError(f"expected sections, got {type(sections).__name__}")
    values: dict[str, Any] = {}
    defaults = Config()
    for section, fields in sections.items():
        if section not in Config.model_fields:
            name = str(section)[:80]
            near = perhaps(name, Config.model_fields) or f" (one of {', '.join(Config.model_fields)})"
            raise InputError(f"{name}: unknown section{near}")
        if not isinstance(fields, dict) or not all(isinstance(field, str) for field in fields):
            raise InputError(f"{section}: expected field: value lines, got {reprlib.repr(fields)}")
        values[section] = type(getattr(defaults, section))(**fields)
    return Config(**values)


def override(base: Config, sections: dict[str, Any]) -> Config:
    """A configuration with fields of sections replaced."""
    changed: dict[str, Any] = {}
    for name, fields in sections.items():
        head, dot, field = name.partition(".")
        if dot and head in Config.model_fields:
            raise InputError(f'{name}: write {head}={{"{field}": ...}}')
        if name not in Config.model_fields:
            raise InputError(f"{name}: unknown section{perhaps(name, Config.model_fields)}")
        if not isinstance(fields, dict):
            raise InputError(f"{name}: expected fields and their values, got {reprlib.repr(fields)}")
        section = getattr(base, name)
        changed[name] = type(section)(**section.model_dump() | fields)
    return Config(**{name: getattr(base, name) for name in Config.model_fields} | changed)


def dump_config(config: Config) -> str:
    """YAML that `load_config` reads back to the same configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def refuse_links(folder: Path) -> None:
    """Raises InputError for what does not belong in a run folder: a link that leads out of it, as what is
    written there would be elsewhere, and pipes and devices, which may never end."""
    for entry in folder.rglob("*"):
        link = entry.is_symlink()
        if link and not Path(os.path.realpath(entry)).is_relative_to(os.path.realpath(folder)):
            raise InputError(f"{entry}: a link out of the run folder")
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if error.errno == errno.ENOENT and not link:  # its writer renamed or deleted it since it was listed
                continue
            mode = 0
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{entry}: neither a file nor a folder")


# What may change when a run goes on; the digest of the images is compared by itself. Where a run is, is no part of it.
MAY_CHANGE = {"run": {"epochs", "patience", "keep", "keep_best", "keep_parents", "loggers", "resume", "out", "name"}}
MAY_CHANGE["data"] = {"root", "download"}
# What is open, as none, until a run has begun.
DECIDED = {"parent": ("threads",), "evolution": ("accept", "lr", "wave")}


def refuse_changes(place: str, before: Config, now: Config) -> None:
    """Raises InputError where a run cannot go on with this configuration."""
    if changed := differences(before, _as_decided(before, now)):
        may = "cluster, data.root and run.keep, keep_best, keep_parents, loggers, epochs and patience"
        raise InputError(f"{place}: only {may} may change on resume: {'; '.join(changed)}")


def differences(before: Config, now: Config) -> list[str]:
    """The fields that change what a run has computed and differ. Epochs may be added where the learning rate does not
    depend on how many there are, and patience too."""
    found = []
    for section in ("run", "data", "parent", "evolution"):
        values, others = (
            getattr(config, section).model_dump(exclude=MAY_CHANGE.get(section)) for config in (before, now)
        )
        found += [
            f"{section}.{name} was {value} and is {others[name]}"
            for name, value in values.items()
            if value != others[name]
        ]
    for name in ("epochs", "patience"):
        value, other = getattr(before.run, name), getattr(now.run, name)
        if (other or math.inf) < (value or math.inf):
            found.append(f"run.{name} was {value} and is {other}: it can only be raised")
    if now.run.epochs > before.run.epochs and before.parent.schedule != "constant":
        found.append(f"run.epochs was {before.run.epochs}, and parent.schedule {before.parent.schedule} depends on it")
    return found


def _as_decided(before: Config, now: Config) -> Config:
    """A configuration with what it leaves open as a run has decided it."""
    sections = {}
    for section, fields in DECIDED.items():
        decided, values = getattr(before, section), getattr(now, section)
        open_ = [name for name in fields if getattr(values, name) is None]
        sections[section] = values.model_copy(update={name: getattr(decided, name) for name in open_})
    return now.model_copy(update=sections)
