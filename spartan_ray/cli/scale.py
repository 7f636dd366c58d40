"""`spartan scale`: what larger populations make of saved parents."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

from spartan_ray.errors import InputError
from spartan_ray.run.checkpoint import write_whole


def scale(arguments: argparse.Namespace) -> int:
    """Score what is missing, and write what there is."""
    folder: Path = arguments.folder
    for population in arguments.populations:
        if population < 2 or population % 2:
            raise InputError(f"--populations {population}: mirrored pairs: even, and at least 2")
    if arguments.draws < 1:
        raise InputError(f"--draws {arguments.draws}: at least 1")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {folder}: cannot be made: {error.strerror}") from None
    try:
        if not arguments.tables:
            _score(arguments, folder)
    finally:  # also of what was interrupted
        rows = folder / "rows.jsonl"
        if rows.exists():
            write_tables(rows, folder)
    if not rows.exists():
        raise InputError(f"-o {folder}: has no rows.jsonl yet")
    print(folder / "README.md", flush=True)
    return 0


def _score(arguments: argparse.Namespace, folder: Path) -> None:
    from spartan_ray.distributed.start import join_ray
    from spartan_ray.engine.process import set_up
    from spartan_ray.study.scale import WAYS, Scaling

    unknown = [name for name in arguments.ways or () if name not in WAYS]
    if unknown:
        raise InputError(f"--ways {unknown[0]!r}: one of {'; '.join(WAYS)}")
    set_up(threads=arguments.threads)
    leave = join_ray(arguments.address)
    try:
        for run in arguments.runs:
            scaling = Scaling(run, folder, arguments.populations, arguments.draws, lambda text: print(text, flush=True))
            scaling.baselines()
            for name in arguments.ways or WAYS:
                scaling.way(name, WAYS[name], arguments.workers)
    finally:
        leave()


def write_tables(rows_path: Path, folder: Path) -> None:
    """README.md and pictures, from rows.jsonl."""
    from spartan_ray.study.scale_tables import draw, write_up

    rows = pd.read_json(rows_path, lines=True)
    write_whole(folder / "README.md", write_up(rows, folder.name).encode())
    for fitness in ("accuracy", "loss"):
        draw(rows, fitness, folder / f"{fitness}.png")
