"""Tests of the imports between modules: they run downward, and only a few modules import Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import spartan_ray

PACKAGE = Path(spartan_ray.__file__).parent
# A room is a subpackage or a module of the package. It may import the rooms before it.
ROOMS = [
    "errors", "origin", "naming", "section", "noise", "engine", "strategies", "vision", "distributed", "run", "report",
    "study", "cli", "__main__",
]  # fmt: skip
APART = {("distributed", "vision")}  # both use the engine and must not import each other
KNOW_RAY = {"address", "examine", "nodes", "population", "relay", "relayed", "start", "transport", "worker"}
KNOW_RAY = {f"distributed.{name}" for name in KNOW_RAY} | {"run.supervisor", "run.telemetry", "study.runner"}
KNOW_RAY |= {f"cli.{name}" for name in ("doctor", "from_python", "study", "submit", "train")}
# Packages that a room must not need, not even through its imports.
WITHOUT = {
    "noise": {"ray", "pydantic", "torchvision"},
    "engine": {"ray", "pydantic", "torchvision"},
    "vision": {"ray"},
    "report": {"ray", "torch"},
}


def imports() -> dict[str, set[str]]:
    """Return the imports of each module, by the name of the module in the package."""
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = ".".join(path.relative_to(PACKAGE).with_suffix("").parts).removesuffix(".__init__")
        found[name] = set()
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                found[name] |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                found[name].add(str(node.module))
    return found


def test_imports_run_downward_from_room_to_room() -> None:
    for name, modules in imports().items():
        room = name.split(".")[0]
        for module in modules:
            if not module.startswith("spartan_ray.") or name == "__init__":
                continue
            used = module.split(".")[1]
            assert ROOMS.index(used) <= ROOMS.index(room), f"{name} imports {module}"
            assert (room, used) not in APART, f"{name} imports {module}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Imports inside functions count as well."""
    modules = {
        name: {used.removeprefix("spartan_ray.") for used in found if used.startswith("spartan_ray.")}
        for name, found in imports().items()
    }
    while modules:
        free = [name for name, used in modules.items() if not used & modules.keys() - {name}]
        assert free, f"a circle among {sorted(modules)}"
        for name in free:
            del modules[name]


def test_only_these_know_ray() -> None:
    know = {name for name, modules in imports().items() if any(m == "ray" or m.startswith("ray.") for m in modules)}
    assert know == KNOW_RAY


def test_each_room_can_be_imported_without_what_it_does_not_need() -> None:
    for room, others in WITHOUT.items():
        names = [name for name in imports() if name.split(".")[0] == room and not name.endswith(".cuda")]
        program = "import sys\n" + "\n".join(f"sys.modules[{other!r}] = None" for other in sorted(others))
        program += "\n" + "\n".join(f"import spartan_ray.{name}" for name in names)
        subprocess.run([sys.executable, "-c", program], check=True)
