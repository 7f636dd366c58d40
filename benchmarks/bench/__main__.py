"""Measures scoring, update, dispatch and memory on this machine, in comparison with their limits and with peers.

Takes ten minutes, or half an hour with --full."""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from pathlib import Path

from bench.command import bench
from bench.figures import table
from spartan_ray.distributed.start import make_token, read_token_mode
from spartan_ray.errors import InputError


def main() -> None:
    """Measure what the flags select. Exit with code 2 if something cannot be read or written."""
    parser = argparse.ArgumentParser(prog="scripts/bench", description=__doc__)
    parser.add_argument("--full", action="store_true", help="also measure larger populations, and simulate a cluster")
    parser.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    parser.add_argument("--peers", type=Path, metavar="DIR", help="compare with the programs in benchmarks/peers")
    parser.add_argument(
        "--write-docs", action="store_true", help="write the tables into docs/benchmarks.md and docs/scaling.md"
    )
    parser.add_argument(
        "-o", dest="folder", type=Path, metavar="DIR", default=Path("bench"), help="output folder (default: bench)"
    )
    arguments = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    try:
        make_token()
        read_token_mode()
        results = bench(arguments.folder, arguments.full, arguments.peers, arguments.write_docs, say)
    except InputError as error:
        say(f"bench: {error}")
        sys.exit(2)
    print(json.dumps(results) if arguments.json else table(results))
    say(", ".join(str(arguments.folder / name) for name in ("results.json", "throughput.png", "scaling.png")))


if __name__ == "__main__":
    main()
