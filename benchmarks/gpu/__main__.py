"""Tests and measures this machine's GPU in at most eight minutes.

It runs the tests that need a GPU; measures kernels, scoring and gradient descent in comparison with their limits and
with torchvision's module; and checks that whole runs end in the same bytes. It needs this source tree, a C compiler,
and a Python with torch, numba and torchvision. The tests and the whole runs need all dependencies of the package,
including Ray. A phase that fails does not stop the others."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu.figures import draw, table

# The command of each phase and its time limit in seconds: eight minutes in total.
PHASES = {
    "tests": (["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"], 70),
    "bits": (["-m", "gpu.measure", "bits"], 30),
    "kernels": (["-m", "gpu.measure", "kernels"], 40),
    "scoring": (["-m", "gpu.measure", "scoring"], 130),
    "training": (["-m", "gpu.measure", "training"], 80),
    "whole": (["-m", "gpu.whole"], 130),
}
STOPPED = "stopped from outside"
# Factor of the time limits for a rehearsal on a CPU.
PATIENCE = 6


def run(command: list[str], limit: float) -> tuple[str, str]:
    """Run a program and show its output. Return its failure (empty if none) and its output. A SIGTERM ends it."""
    lines: list[str] = []
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout
    late: list[int] = []

    def end(number: int, _: object) -> None:
        late.append(number)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    before = {number: signal.signal(number, end) for number in (signal.SIGALRM, signal.SIGTERM)}
    signal.setitimer(signal.ITIMER_REAL, limit)
    with process:
        for line in process.stdout:
            lines.append(line.rstrip())
            print("   ", line, end="", flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    for number, handler in before.items():
        signal.signal(number, handler)
    code = process.returncode
    last = " | ".join(lines[-3:])
    if signal.SIGTERM in late:
        return STOPPED, ""
    ended = "" if code == 0 else f"killed after {limit:.0f} s: {last}" if late else f"{code}: {last}"
    return ended, "\n".join(lines)


def phase(name: str, folder: Path, rehearse: bool) -> dict[str, Any]:
    """Run one phase in a process of its own, because a device stays failed in a process after an error."""
    command, limit = PHASES[name]
    limit *= PATIENCE if rehearse else 1
    out, started = folder / f"{name}.json", time.monotonic()
    print(f"== {name}, {limit} s at most", flush=True)
    given = [] if name == "tests" else [str(out), *["--rehearse"] * rehearse]
    ended, text = run([*command, *given], limit)
    found: dict[str, Any] = {"seconds": round(time.monotonic() - started, 1), "ended": ended or "well"}
    if name == "tests":
        found["figures"] = {"tests": text.splitlines()[-1] if text else ""}
    elif out.exists():
        found["figures"] = json.loads(out.read_text())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/gpu", description=__doc__)
    parser.add_argument("--rehearse", action="store_true", help="run everything on a CPU, at a small size, as a check")
    parser.add_argument(
        "--phases", nargs="*", choices=list(PHASES), default=list(PHASES), help="phases to run (default: all)"
    )
    parser.add_argument("-o", dest="folder", type=Path, help="output folder (default: benchmarks)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path("gpu-rehearsal" if arguments.rehearse else "benchmarks")
    with tempfile.TemporaryDirectory() as scratch:
        about = Path(scratch) / "card.json"
        ended, _ = run(["-m", "gpu.measure", "card", str(about)], 60)
        if ended:
            sys.exit(1)
        card = json.loads(about.read_text())
        if not arguments.rehearse and card["device"] == "cpu":
            print("scripts/gpu: torch finds no GPU here; --rehearse runs everything on a CPU", file=sys.stderr)
            sys.exit(2)
        results = {"card": card, "rehearsal": arguments.rehearse, "phases": {}}
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.phases:
            results["phases"][name] = phase(name, Path(scratch), arguments.rehearse)
            text = write(results, folder)  # after each phase, so that a kill leaves the results so far
            if results["phases"][name]["ended"] == STOPPED:
                break
    print(text)
    if any(one["ended"] != "well" for one in results["phases"].values()):
        sys.exit(1)


def write(results: dict[str, Any], folder: Path) -> str:
    """Write the results so far as JSON, a table and a picture. Return the table."""
    text = table(results)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "gpu.md").write_text(text + "\n")
    with contextlib.suppress(ImportError):
        draw(results, folder / "gpu.png")
    return text


if __name__ == "__main__":
    main()
