"""Values of configuration fields that are parsed from text: `package.module:Name`, loggers, `random:8`, optimizers."""

from __future__ import annotations

import importlib
import math
import re
from typing import Any

from spartan_ray.errors import InputError, one_line


def is_named(text: str) -> bool:
    """Return whether the text names an object as `package.module:Name`, rather than a built-in choice."""
    return ":" in text


def checked_name(field: str, known: tuple[str, ...], text: str) -> str:
    """Return `text` if it is a known value of the field or names an object. Raises InputError otherwise."""
    if text not in known and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        raise InputError(f"{field} ({text!r}): expected {', '.join(known)}, or package.module:Name")
    return text


LOGGERS = ("tensorboard", "mlflow", "wandb")


def logger_names(text: str) -> list[str]:
    """Return the names of the loggers in a value such as `tensorboard,mlflow`; `none` names no logger."""
    return [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]


def checked_loggers(field: str, text: str) -> str:
    """Return `text` if it names loggers. Raises InputError otherwise."""
    for name in logger_names(text):
        checked_name(field, LOGGERS, name)
    return text


def imported(field: str, text: str) -> Any:
    """Return the object that a field names as `package.module:Name`. Raises InputError if it cannot be imported."""
    module, name = text.split(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # importing a module can raise anything
        raise InputError(
            f"{field} ({text}): cannot import {module}: {one_line(f'{type(error).__name__}: {error}')}"
        ) from error
    if not hasattr(found, name):
        raise InputError(f"{field} ({text}): {module} has no {name}")
    return getattr(found, name)


# Kinds of subspaces, with the maximum number of directions. Each direction is a parameter vector in the memory of
# every node.
SUBSPACES = {"random": 1000, "trajectory": 1000, "guided": 1000}


def kind_and_number(
    field: str, text: str, counts: dict[str, int], shares: tuple[str, ...] = ()
) -> tuple[str, float] | None:
    """Return the kind and the number of a value such as `random:8`, or None for `none`.

    `counts` maps each kind that takes a whole number to its maximum. `shares` lists the kinds that take a number
    between 0 and 1. Raises InputError for any other value."""
    kind, _, number = text.partition(":")
    if text == "none":
        return None
    if kind in counts and re.fullmatch(r"[1-9]\d{0,9}", number) and int(number) <= counts[kind]:
        return kind, int(number)
    if kind in shares and re.fullmatch(r"0?\.\d+", number) and float(number):
        return kind, float(number)
    known = [f"{kind}:1 to {kind}:{largest}" for kind, largest in counts.items()] + [f"{kind}:0.9" for kind in shares]
    raise InputError(f"{field} ({text!r}): expected none, {', '.join(known)}")


OPTIMIZERS = ("sgd", "adam", "adamw")
NUMBER = r"\d+(?:\.\d*)?(?:e-?\d+)?|\.\d+(?:e-?\d+)?"


def optimizer_ranges(field: str, text: str) -> list[tuple[str, float, float]]:
    """Return (optimizer, lowest, highest learning rate) for each part of a value such as
    `sgd:0.003..0.03,adam:1e-4..1e-3`. Raises InputError for any other value."""
    found = []
    for part in text.split(","):
        match = re.fullmatch(rf"({'|'.join(OPTIMIZERS)}):({NUMBER})\.\.({NUMBER})", part.strip())
        low, high = (float(match[2]), float(match[3])) if match else (0.0, 0.0)
        if not match or not 0 < low <= high < math.inf:
            expected = (
                f"{' or '.join(OPTIMIZERS)}, each with a range of learning rates: sgd:0.003..0.03,adam:1e-4..1e-3"
            )
            raise InputError(f"{field} ({text!r}): expected {expected}")
        found.append((match[1], low, high))
    return found


def checked_ranges(field: str, text: str) -> str:
    """Return `text` if `optimizer_ranges` can read it. Raises InputError otherwise."""
    optimizer_ranges(field, text)
    return text


def checked_kind(field: str, counts: dict[str, int], shares: tuple[str, ...], text: str) -> str:
    """Return `text` if `kind_and_number` can read it. Raises InputError otherwise."""
    kind_and_number(field, text, counts, shares)
    return text
