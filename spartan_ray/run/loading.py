"""Loads configurations from presets, YAML files and run folders, and writes them as YAML."""

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
    """Return the names of the presets that come with the package."""
    return sorted(entry.name.removesuffix(".yaml") for entry in PRESETS.iterdir() if entry.name.endswith(".yaml"))


def load_config(name_or_file: str) -> Config:
    """Load the configuration of a preset, a YAML file or a run folder. Raises InputError if there is none, if it is
    invalid, or if a run folder's configuration names code."""
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
            reason = "" if isinstance(error, FileNotFoundError) else f": {error}"
            hint = perhaps(name_or_file, preset_names()) or f" ({', '.join(preset_names())})"
            raise InputError(f"--config {name_or_file}: no such preset{hint} or readable file{reason}") from None
    return _parse(text, name_or_file)


def load_run_config(folder: Path) -> Config:
    """Load the configuration of a run folder, without `cluster.address`. Raises InputError if there is none.

    A folder from elsewhere must not choose the Ray cluster that gets the token and whose answers are trusted."""
    try:
        text = (folder / "config.yaml").read_text()
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"{folder}: not a run folder: {error}") from None
    config = _parse(text, str(folder / "config.yaml"))
    return config.model_copy(update={"cluster": config.cluster.model_copy(update={"address": None})})


def refuse_code(folder: Path, config: Config, hint: str) -> None:
    """Raise InputError if the configuration of a run folder names code. Reading a folder must not run code."""
    for _, name in named_code(config):
        raise InputError(f"{folder}: its configuration names code, {name}, which would be run: {hint}")


def named_code(config: Config) -> list[tuple[str, str]]:
    """Return the fields that name code of the user's own, each with the name."""
    fields = [("parent.model", config.parent.model), ("evolution.strategy", config.evolution.strategy)]
    fields += [("run.loggers", name) for name in logger_names(config.run.loggers)]
    return [(field, name) for field, name in fields if is_named(name)]


def _parse(text: str, source: str) -> Config:
    """Return the configuration in a YAML text. Raises InputError with `source` at the start of the message."""
    try:
        sections = yaml.safe_load(text) or {}
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # such as an impossible date
        raise InputError(f"{source}: not YAML: {error}") from None
    try:
        return configuration(sections)
    except InputError as error:
        raise InputError(f"{source}: {error}") from None


def configuration(sections: Any) -> Config:
    """Return the configuration from a dict of sections, each a dict of fields. Raises InputError that names the field
    or section."""
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
    """Return `base` with fields of sections replaced. Raises InputError that names an unknown or invalid field."""
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
    """Return the configuration as YAML, which `load_config` reads back to the same configuration."""
    return yaml.safe_dump(config.model_dump(), sort_keys=False)


def refuse_links(folder: Path) -> None:
    """Raise InputError for entries that do not belong in a run folder. These are links that lead out of it, because a
    write would land elsewhere, and pipes and devices, because a read may never end."""
    for entry in folder.rglob("*"):
        link = entry.is_symlink()
        if link and not Path(os.path.realpath(entry)).is_relative_to(os.path.realpath(folder)):
            raise InputError(f"{entry}: a link out of the run folder")
        try:
            mode = entry.stat().st_mode
        except OSError as error:
            if error.errno == errno.ENOENT and not link:  # renamed or deleted since it was listed
                continue
            mode = 0
        if not stat.S_ISREG(mode) and not stat.S_ISDIR(mode):
            raise InputError(f"{entry}: neither a file nor a folder")


# Fields that may differ when a run continues. The digest of the images is compared separately, and the location of the
# run folder does not matter.
MAY_CHANGE = {"run": {"epochs", "patience", "keep", "keep_best", "keep_parents", "loggers", "resume", "out", "name"}}
MAY_CHANGE["data"] = {"root", "download"}
# Fields that may be None until a run has started and decided them.
DECIDED = {"parent": ("threads",), "evolution": ("accept", "lr", "wave")}


def refuse_changes(place: str, before: Config, now: Config) -> None:
    """Raise InputError if a run with the configuration `before` cannot continue with the configuration `now`."""
    if changed := differences(before, _as_decided(before, now)):
        may = "cluster, data.root and run.keep, keep_best, keep_parents, loggers, epochs and patience"
        raise InputError(f"{place}: only {may} may change on resume: {'; '.join(changed)}")


def differences(before: Config, now: Config) -> list[str]:
    """Return one message for each field that differs and changes the results of a run.

    `run.epochs` and `run.patience` may be raised. With a schedule, `run.epochs` may not, because the learning rate
    depends on it."""
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
    """Return `now` with its open fields filled in as the run of `before` has decided them."""
    sections = {}
    for section, fields in DECIDED.items():
        decided, values = getattr(before, section), getattr(now, section)
        open_ = [name for name in fields if getattr(values, name) is None]
        sections[section] = values.model_copy(update={name: getattr(decided, name) for name in open_})
    return now.model_copy(update=sections)
