"""The base class of typed configuration sections, and helpers for their fields.

A section is frozen. An unknown name or an invalid value raises InputError, which names the field as the flags do:
`section.field`."""

from __future__ import annotations

import difflib
import re
import reprlib
from collections.abc import Iterable
from typing import Annotated, Any, ClassVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spartan_ray.errors import InputError

PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Decay = Annotated[float, Field(gt=0, le=1)]


def is_url(path: str) -> bool:
    """Return whether the text is a URL. Used as a path, it would name a folder such as `s3:`."""
    return re.match(r"[a-z][a-z0-9+.-]*://", path, re.IGNORECASE) is not None


def place_of(text: str) -> str:
    """Normalise a path or URL: turn a `file://` URL into a path, and strip trailing slashes from a URL."""
    text = re.sub(r"^file://(localhost)?(?=/)", "", text, flags=re.IGNORECASE)
    return text.rstrip("/") if is_url(text) else text


def no_url(name: str, path: str) -> str:
    """Return the path given for the field `name`. Raises InputError if it is a URL."""
    if is_url(path):
        raise InputError(f"{name} ({path}) is a URL: give the path where it is mounted")
    return path


def perhaps(name: str, known: Iterable[str]) -> str:
    """Return a hint with the known name closest to an unknown one, or an empty text."""
    near = difflib.get_close_matches(name, known, 1)
    return f" (perhaps {near[0]}?)" if near else ""


def _one_line(section: type[Section], error: ValidationError) -> str:
    problem = error.errors()[0]
    name = "".join(str(part) for part in problem["loc"][:1])[:80]
    path = f"{section.prefix}.{name}".strip(".")
    if problem["type"] == "extra_forbidden":
        return f"{path}: unknown field{perhaps(name, section.model_fields)}"
    if problem["type"] == "value_error":
        return problem["msg"].removeprefix("Value error, ")
    # Shorten the value: a few lines of YAML can expand to gigabytes.
    if problem["type"] == "string_pattern_mismatch":
        return f"{path}: letters, digits, '.', '_' and '-' only (got {reprlib.repr(problem['input'])})"
    wrong = problem["msg"].removeprefix("Input ").split(", unable")[0]
    return f"{path}: {wrong} (got {reprlib.repr(problem['input'])})"


class Section(BaseModel):
    """Base class of configuration sections. `prefix` is the section's name in messages."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)
    prefix: ClassVar[str]

    def __init__(self, /, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(_one_line(type(self), error)) from None
