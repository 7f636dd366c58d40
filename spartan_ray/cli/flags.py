"""Command-line flags: one per configuration field, which overrides the base configuration."""

from __future__ import annotations

import argparse
import types
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, NoReturn, Union, get_args, get_origin

from pydantic.fields import FieldInfo

from spartan_ray.errors import InputError
from spartan_ray.run.config import Config
from spartan_ray.run.loading import load_config, override, preset_names
from spartan_ray.section import Section, is_url, perhaps

DEST = "field "  # prefix of configuration fields among the parsed arguments


class Parser(argparse.ArgumentParser):
    """An argparse parser that reports errors as one-line InputErrors."""

    def __init__(self, **settings: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=_Help, **settings)

    def error(self, message: str) -> NoReturn:
        raise InputError(message)

    def _print_message(self, message: str, file: Any = None) -> None:
        """Print, and raise on a write error: argparse would ignore a closed pipe."""
        print(message, end="", file=file, flush=True)


class _Help(argparse.HelpFormatter):
    def __init__(self, prog: str) -> None:
        super().__init__(prog, max_help_position=40)


def add_fields(parser: argparse.ArgumentParser, shown: Iterable[str] = Config.model_fields) -> None:
    """Add a flag for every field. `--help` shows only the sections and fields named in `shown`."""
    default = Config()
    for section in Config.model_fields:
        values: Section = getattr(default, section)
        about = (section, (type(values).__doc__ or "").splitlines()[0])
        group = parser.add_argument_group(*about if any(name.split(".")[0] == section for name in shown) else ())
        for name, info in type(values).model_fields.items():
            flag, value = f"{section}.{name}".replace("_", "-"), getattr(values, name)
            options: dict[str, Any] = {"dest": f"{DEST}{section}.{name}", "default": argparse.SUPPRESS}
            said = _help(info, value, flag) if {section, f"{section}.{name}"} & set(shown) else argparse.SUPPRESS
            if isinstance(value, bool):
                group.add_argument(f"--{flag}", action="store_true", help=said, **options)
                group.add_argument(f"--{off(flag)}", action="store_false", help=argparse.SUPPRESS, **options)
            else:
                group.add_argument(f"--{flag}", metavar=metavar(info), help=said, **options)


def _help(info: FieldInfo, value: Any, flag: str) -> str:
    text = " ".join((info.description or "").split()).rstrip(".").replace("%", "%%")
    if isinstance(value, bool):
        return f"{text} (default: {f'on; --{off(flag)} turns it off' if value else 'off'})"
    return text if value is None or "(default" in text else f"{text} (default: {value})"


def off(flag: str) -> str:
    """Return the flag that turns a boolean field off."""
    section, name = flag.split(".")
    return f"{section}.no-{name}"


def metavar(info: FieldInfo) -> str:
    """Return the choices of a field, or the type of its value."""
    names: list[str] = []
    kinds = [info.annotation]
    while kinds:
        kind = kinds.pop(0)
        origin = get_origin(kind)
        if origin in (Union, types.UnionType):
            kinds = [*get_args(kind), *kinds]
        elif origin is Annotated:
            kinds.insert(0, get_args(kind)[0])
        elif origin is Literal:
            names += get_args(kind)
        elif kind is type(None):
            continue
        else:
            names.append("INT" if kind is int else "FLOAT" if kind is float else "TEXT")
    return "|".join(names)


def take_fields(base: Config, arguments: argparse.Namespace) -> Config:
    """Return `base` with the fields given as flags replaced. Raises InputError for an invalid value."""
    return override(base, given_fields(arguments))


def given_fields(arguments: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Return the fields given as flags, by section."""
    given: dict[str, dict[str, Any]] = {}
    for dest, value in vars(arguments).items():
        if dest.startswith(DEST):
            section, name = dest.removeprefix(DEST).split(".")
            fields = type(getattr(Config(), section)).model_fields
            # `none` clears a field that may be None, unless 'none' is one of its own values.
            none = value in ("none", "None") and _may_be_none(fields[name])
            given.setdefault(section, {})[name] = None if none else value
    return given


def _may_be_none(info: FieldInfo) -> bool:
    return type(None) in get_args(info.annotation) and "none" not in str(info.annotation)


def refuse_unknown(parser: argparse.ArgumentParser, unknown: list[str]) -> None:
    """Raises InputError for the first unknown argument and suggests the nearest known flag."""
    if not unknown:
        return
    first = unknown[0].split("=")[0]
    known = [flag for action in parser._actions for flag in action.option_strings]
    if first.startswith("-"):
        raise InputError(f"unknown option {first}{perhaps(first, known)}")
    if first in preset_names() or Path(first).is_file():
        raise InputError(f"unknown argument {first} (perhaps --config {first}?)")
    raise InputError(f"unknown argument {first}")


def add_config(parser: argparse.ArgumentParser) -> None:
    """Add --config, the base configuration, and a flag for every field that overrides it."""
    presets = ", ".join(preset_names())
    parser.add_argument("--config", metavar="NAME|FILE", help=f"base: preset ({presets}), YAML file or run folder")
    add_fields(parser)


def take_config(arguments: argparse.Namespace) -> Config:
    """Return the chosen base configuration with the fields given as flags replaced."""
    return take_fields(load_config(arguments.config) if arguments.config else Config(), arguments)


def with_absolute_paths(config: Config) -> Config:
    """Make the local paths of a configuration absolute, because the driver may run in another directory."""
    run, data, parent = config.run, config.data, config.parent
    if not is_url(run.out):
        run = run.model_copy(update={"out": str(Path(run.out).absolute())})
    if data.name != "digits":
        data = data.model_copy(update={"root": str(Path(data.root or f"data/{data.name}").absolute())})
    if parent.weights not in ("none", "imagenet"):
        parent = parent.model_copy(update={"weights": str(Path(parent.weights).absolute())})
    return config.model_copy(update={"run": run, "data": data, "parent": parent})
