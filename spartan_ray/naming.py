"""What a configuration names `package.module:Name`: a network's or a strategy's class, or a function that makes one."""

from __future__ import annotations

import importlib
import math
import re
from typing import Any

from spartan_ray.errors import InputError, one_line


def is_named(text: str) -> bool:
    """Whether it names an object of a module, and not one of the package's own."""
    return ":" in text


def checked_name(field: str, known: tuple[str, ...], text: str) -> str:
    """The value of a field that is one of those known, or names an object. Raises InputError for another."""
    if text not in known and not re.fullmatch(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*", text):
        raise InputError(f"{field} ({text!r}): expected {', '.join(known)}, or package.module:Name")
    return text


LOGGERS = ("tensorboard", "mlflow", "wandb")


def logger_names(text: str) -> list[str]:
    """The loggers that a value such as `tensorboard,mlflow` names."""
    return [name.strip() for name in text.split(",") if name.strip() not in ("", "none")]


def checked_loggers(field: str, text: str) -> str:
    """The value of a field that names loggers. Raises InputError for another."""
    for name in logger_names(text):
        checked_name(field, LOGGERS, name)
    return text


def imported(field: str, text: str) -> Any:
    """The object that a field names. Raises InputError when there is none."""
    module, name = text.split(":")
    try:
        found = importlib.import_module(module)
    except Exception as error:  # whatever the module does when it is imported
        raise InputError(
            f"{field} ({text}): cannot import {module}: {one_line(f'{type(error).__name__}: {error}')}"
        ) from error
    if not hasattr(found, name):
        raise InputError(f"{field} ({text}): {module} has no {name}")
    return getattr(found, name)


# Kinds of subspaces, with the most directions: each is a vector of parameters in the memory of every node.
SUBSPACES = {"random": 1000, "trajectory": 1000, "guided": 1000}


def kind_and_number(
    field: str, text: str, counts: dict[str, int], shares: tuple[str, ...] = ()
) -> tuple[str, float] | None:
    """The kind and the number of a value such as `random:8`, None of `none`. `counts` are the kinds that take a whole
    number, with the largest, `shares` those that take one between 0 and 1. Raises InputError for anything else."""
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
    """Optimizers with the ranges of their learning rates, such as `sgd:0.003..0.03,adam:1e-4..1e-3`. Raises InputError
    for anything else."""
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
    """The value of a field that `optimizer_ranges` can read. Raises InputError for another."""
    optimizer_ranges(field, text)
    return text


def checked_kind(field: str, counts: dict[str, int], shares: tuple[str, ...], text: str) -> str:
    """The value of a field that `kind_and_number` can read. Raises InputError for another."""
    kind_and_number(field, text, counts, shares)
    return text
