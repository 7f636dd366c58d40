"""Checks whole runs with driver and worker on this machine's one GPU: `python -m gpu.whole FILE [--rehearse]`.

Two equal runs, one that is stopped and resumed, one with CUDA graphs, and a replay of every generation must end in the
same bytes."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Time limit of a program.
SECONDS = 150.0


class Runs:
    def __init__(self, folder: Path, rehearse: bool) -> None:
        self.folder = folder
        self.flags = [
            "--data.name", "digits", "--run.out", str(folder / "runs"),
            "--run.epochs", "4" if rehearse else "8", "--evolution.every", "2", "--evolution.fitness-images", "100",
            "--evolution.population", "4" if rehearse else "64", "--evolution.step", "search",
            "--parent.model", "convnet" if rehearse else "resnet18", "--cluster.workers", "1",
        ]  # fmt: skip

    def command(self, *arguments: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "spartan_ray", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def finish(self, process: subprocess.Popen[bytes], wanted: int = 0) -> str:
        """Return the output of a process. Raises RuntimeError, with its last lines, if its exit code is not
        `wanted`."""
        try:
            text = process.communicate(timeout=SECONDS)[0].decode()
        except subprocess.TimeoutExpired:
            process.kill()
            text = process.communicate()[0].decode() + f"\nkilled after {SECONDS:.0f} s"
        if process.returncode != wanted:
            raise RuntimeError(f"exit {process.returncode}: " + " | ".join(text.splitlines()[-6:]))
        return text

    def train(self, name: str, *flags: str) -> bytes:
        self.finish(self.command("train", "--run.name", name, *self.flags, *flags))
        return self.weights(name)

    def weights(self, name: str) -> bytes:
        return (self.folder / "runs" / name / "final.safetensors").read_bytes()

    def stopped(self, name: str) -> bytes:
        """Return the weights of a run that ends after half of its epochs and is resumed. It is not interrupted, because
        the place of an interrupt would depend on the speed of the machine."""
        epochs = int(self.flags[self.flags.index("--run.epochs") + 1])
        self.finish(self.command("train", "--run.name", name, *self.flags, "--run.epochs", str(epochs // 2)))
        self.finish(self.command("resume", str(self.folder / "runs" / name), "--run.epochs", str(epochs)))
        return self.weights(name)

    def compared(self, out: Path) -> None:
        """Check whether each way of running ends in the bytes of the first run. Write the findings to `out` one by
        one."""
        started = time.monotonic()
        first = self.train("first")
        seconds = time.monotonic() - started
        ways: dict[str, Callable[[], bool]] = {
            "a second run": lambda: self.train("second") == first,
            "stopped and resumed": lambda: self.stopped("stopped") == first,
            "every generation replayed": lambda: bool(
                self.finish(self.command("replay", "--verify", str(self.folder / "runs" / "first")))
            ),
            "by CUDA graphs": lambda: self.train("graphs", "--evolution.graphs") == first,
        }
        found: dict[str, Any] = {"seconds of a run": round(seconds, 1)}
        for name, way in ways.items():
            try:
                found[name] = "same bytes" if way() else "OTHER BYTES"
            except RuntimeError as error:
                found[name] = str(error)
            print(name, found[name], flush=True)
            out.write_text(json.dumps(found))
        if any(found[name] != "same bytes" for name in ways):
            sys.exit(1)


def main() -> None:
    parser = argparse.ArgumentParser(prog="gpu.whole", description=__doc__)
    parser.add_argument("out", type=Path, help="file for the findings")
    parser.add_argument("--rehearse", action="store_true", help="at a small size, without a GPU")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        Runs(Path(folder), arguments.rehearse).compared(arguments.out)


if __name__ == "__main__":
    main()
