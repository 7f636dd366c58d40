"""What a configuration names `package.module:Name`: a network's or a strategy's class, or a function that makes one."""

from __future__ import annotations

import importlib
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
