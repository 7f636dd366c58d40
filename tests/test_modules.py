"""docs/modules.md says what each module is for, in the words of its docstring."""

from __future__ import annotations

import ast
import re
from pathlib import Path

from whole_runs import ROOT

PACKAGE = ROOT / "spartan_ray"


def job(path: Path) -> str:
    """The first sentence of a module's docstring."""
    text = (ast.get_docstring(ast.parse(path.read_text())) or "").split("\n\n")[0]
    return re.split(r"(?<=[a-z)`\"])\. (?=[A-Z])", " ".join(text.split()))[0].rstrip(".")


def table() -> str:
    """The rooms and their modules."""
    lines = ["# The modules", "", "Imports run downward: a room uses those above it.", ""]
    rooms = ["", "noise", "engine", "engine/strategies", "vision", "distributed", "run", "report", "study", "cli"]
    for room in rooms:
        lines += [f"## spartan_ray/{room}".rstrip("/"), "", "| module | its job |", "| --- | --- |"]
        paths = sorted(path for path in (PACKAGE / room).glob("*.py") if path.name != "__init__.py" or not room)
        lines += [f"| `{path.name}` | {job(path)} |" for path in paths] + [""]
    return "\n".join(lines)


def test_the_docs_say_what_each_module_is_for() -> None:
    assert (ROOT / "docs" / "modules.md").read_text() == table()
