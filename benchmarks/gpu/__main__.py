"""Everything about this machine's GPU in one sitting of some eight minutes: the tests that need one; kernels, scoring
and gradient descent beside their limits and torchvision's module; whole runs whose bytes must agree. It needs this
source tree and a Python with torch, numba and torchvision; the tests and the whole runs need what the package does, Ray
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

# What each phase runs, and seconds that it may take.
PHASES = {
    "tests": (["-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider", "tests"], 150),
    "bits": (["-m", "gpu.measure", "bits"], 60),
    "kernels": (["-m", "gpu.measure", "kernels"], 60),
    "scoring": (["-m", "gpu.measure", "scoring"], 270),
    "training": (["-m", "gpu.measure", "training"], 120),
    "whole": (["-m", "gpu.whole"], 240),
}


def run(command: list[str], limit: float) -> tuple[str, str]:
    """How a program ended, nothing when well, and what it printed, which is shown as it comes."""
    lines: list[str] = []
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert process.stdout
    late: list[bool] = []

    def end(*_: object) -> None:
        late.append(True)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)

    signal.signal(signal.SIGALRM, end)
    signal.setitimer(signal.ITIMER_REAL, limit)
    with process:
        for line in process.stdout:
            lines.append(line.rstrip())
            print("   ", line, end="", flush=True)
    signal.setitimer(signal.ITIMER_REAL, 0)
    code = process.returncode
    last = " | ".join(lines[-3:])
    ended = "" if code == 0 else f"killed after {limit:.0f} s: {last}" if late else f"{code}: {last}"
    return ended, "\n".join(lines)


def phase(name: str, folder: Path, rehearse: bool) -> dict[str, Any]:
    """One phase in a process of its own, since a device that has failed stays failed."""
    command, limit = PHASES[name]
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
            # As it goes, so that an end from outside leaves what was found.
            (folder / "gpu.json").write_text(json.dumps(results, indent=1) + "\n")
    text = table(results)
    (folder / "gpu.md").write_text(text + "\n")
    print(text)
    try:
        draw(results, folder / "gpu.png")
    except ImportError as error:
        print(f"no picture: {error}")
    if any(one["ended"] != "well" for one in results["phases"].values()):
        sys.exit(1)


if __name__ == "__main__":
    main()
