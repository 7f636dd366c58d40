"""`spartan scale`: measure how much larger populations improve trained parents."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path

import pandas as pd

from spartan_ray.errors import InputError
from spartan_ray.run.files import write_whole
from spartan_ray.run.place import lock_folder


def scale(arguments: argparse.Namespace) -> int:
    """Score the missing members, write the tables and pictures, and return the exit code."""
    folder: Path = arguments.folder
    for population in arguments.populations:
        if population < 2 or population % 2:
            raise InputError(f"--populations {population}: must be even, for mirrored pairs, and at least 2")
    if arguments.draws < 1:
        raise InputError(f"--draws {arguments.draws}: must be at least 1")
    if not arguments.tables and not arguments.runs:
        raise InputError("scale: name a run, or give --tables")
    if not arguments.tables:
        _score(arguments, folder)
    elif not (folder / "rows.jsonl").exists():
        raise InputError(f"-o {folder}: has no rows.jsonl yet")
    else:
        write_tables(folder)
    print(folder / "README.md", flush=True)
    return 0


def _score(arguments: argparse.Namespace, folder: Path) -> None:
    from spartan_ray.distributed.start import join_ray
    from spartan_ray.engine.process import set_up
    from spartan_ray.study.scale import WAYS, Scaling

    unknown = [name for name in arguments.ways or () if name not in WAYS]
    if unknown:
        raise InputError(f"--ways {unknown[0]!r}: one of {', '.join(WAYS)}")
    set_up(threads=arguments.threads)
    ways = {name: WAYS[name] for name in arguments.ways or WAYS}
    parents = [
        Scaling(run, folder, arguments.populations, arguments.draws, lambda text: print(text, flush=True))
        for run in arguments.runs
    ]
    for parent in parents:
        for name, way in ways.items():
            parent.refuse_unfit(name, way)
    try:
        (folder / "scores").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {folder}: cannot be made: {error.strerror}") from None
    lock = lock_folder(folder / "scores")
    leave = join_ray(arguments.address)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # replaces Ray's handler
    try:
        for parent in parents:
            parent.baselines()
            for name, way in ways.items():
                parent.way(name, way, arguments.workers)
                write_tables(folder)
    finally:
        leave()
        lock.close()


def write_tables(folder: Path) -> None:
    """Write README.md and the pictures from rows.jsonl."""
    from spartan_ray.study.scale import read_rows
    from spartan_ray.study.scale_tables import draw, write_up

    rows = pd.DataFrame(read_rows(folder / "rows.jsonl"))
    write_whole(folder / "README.md", write_up(rows, folder.name).encode())
    for fitness in ("accuracy", "loss"):
        draw(rows, fitness, folder / f"{fitness}.png")
