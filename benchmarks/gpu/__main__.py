"""Everything about this machine's GPU in at most eight minutes: the tests that need one; kernels, scoring and gradient
descent beside their limits and torchvision's module; whole runs whose bytes must agree. It needs this source tree, a C
compiler, and a Python with torch, numba and torchvision; the tests and the whole runs need what the package does, Ray
too. A phase that fails does not stop the others."""

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

# What each phase runs, and seconds that it may take: eight minutes in all.
PHASES = {
    "tests": (["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"], 70),
    "bits": (["-m", "gpu.measure", "bits"], 30),
    "kernels": (["-m", "gpu.measure", "kernels"], 40),
    "scoring": (["-m", "gpu.measure", "scoring"], 130),
    "training": (["-m", "gpu.measure", "training"], 80),
    "whole": (["-m", "gpu.whole"], 130),
}
STOPPED = "stopped from outside"
# A CPU may take so many times as long for a rehearsal.
PATIENCE = 6


def run(command: list[str], limit: float) -> tuple[str, str]:
    """How a program ended, nothing when well, and what it printed, which is shown as it comes. A SIGTERM ends it."""
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
    """One phase in a process of its own, since a device that has failed stays failed."""
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
    parser.add_argument("--rehearse", action="store_true", help="all of it on a CPU, small: to see that it runs")
    parser.add_argument("--phases", nargs="*", choices=list(PHASES), default=list(PHASES), help="some of them")
    parser.add_argument("-o", dest="folder", type=Path, help="for gpu.json, gpu.md, gpu.png (default: benchmarks)")
    arguments = parser.parse_args()
    folder = arguments.folder or Path("gpu-rehearsal" if arguments.rehearse else "benchmarks")
    with tempfile.TemporaryDirectory() as scratch:
        about = Path(scratch) / "card.json"
        ended, _ = run(["-m", "gpu.measure", "card", str(about)], 60)
        if ended:
            sys.exit(1)
        card = json.loads(about.read_text())
        if not arguments.rehearse and card["device"] == "cpu":
            print("scripts/gpu: torch sees no GPU here; --rehearse does all of it on a CPU", file=sys.stderr)
            sys.exit(2)
        results = {"card": card, "rehearsal": arguments.rehearse, "phases": {}}
        folder.mkdir(parents=True, exist_ok=True)
        for name in arguments.phases:
            results["phases"][name] = phase(name, Path(scratch), arguments.rehearse)
            text = write(results, folder)  # as it goes, so that an end from outside leaves what was found
            if results["phases"][name]["ended"] == STOPPED:
                break
    print(text)
    if any(one["ended"] != "well" for one in results["phases"].values()):
        sys.exit(1)


def write(results: dict[str, Any], folder: Path) -> str:
    """What was found up to now, as JSON, a table, which it returns, and a picture."""
    text = table(results)
    (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    (folder / "gpu.md").write_text(text + "\n")
    with contextlib.suppress(ImportError):
        draw(results, folder / "gpu.png")
    return text


if __name__ == "__main__":
    main()
