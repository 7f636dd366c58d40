"""Who may import whom: imports run downward, and few modules know Ray."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import spartan_ray

PACKAGE = Path(spartan_ray.__file__).parent
# A module may import what stands before it.
ORDER = [
    "origin", "config", "process", "noise", "kernels", "images", "data", "layers", "resnet", "model", "fitness",
    "strategies", "evaluator", "parent", "checkpoint", "journal", "record", "resources", "spans", "joining", "dispatch",
    "pool", "evolve", "replay", "worker", "transport", "driver", "supervisor", "plots", "report", "bench",
    "address", "cli", "__main__",
]  # fmt: skip
UPWARD = {("noise", "kernels")}  # the choice of a kernel, at the call
KNOW_RAY = {"worker", "transport", "supervisor", "bench", "address", "cli"}


def imports() -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for path in PACKAGE.rglob("*.py"):
        name = path.relative_to(PACKAGE).parts[0].removesuffix(".py")
        modules = found.setdefault(name, set())
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name for alias in node.names}
            elif isinstance(node, ast.ImportFrom):
                assert node.level == 0, f"{path}: relative import"
                modules.add(str(node.module))
    return found


def test_imports_run_downward() -> None:
    for name, modules in imports().items():
        if name == "__init__":
            assert not any(module.startswith("spartan_ray") for module in modules)
            continue
        for module in modules:
            if module.startswith("spartan_ray."):
                used = module.split(".")[1]
                allowed = ORDER.index(used) <= ORDER.index(name) or (name, used) in UPWARD
                assert allowed, f"{name} imports {used}"


def test_only_these_know_ray() -> None:
    know = {name for name, modules in imports().items() if any(m == "ray" or m.startswith("ray.") for m in modules)}
    assert know == KNOW_RAY


def test_all_but_those_modules_can_be_imported_without_ray() -> None:
    through_them = {"driver", "__main__"}
    names = [name for name in ORDER if name not in KNOW_RAY | through_them]
    program = "import sys; sys.modules['ray'] = None\n" + "\n".join(f"import spartan_ray.{name}" for name in names)
    subprocess.run([sys.executable, "-c", program], check=True)
