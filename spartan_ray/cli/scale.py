"""`spartan scale`: measure how much larger populations improve trained parents."""

from __future__ import annotations

import argparse
import signal
from pathlib import Path
from typing import Any

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
        from spartan_ray.study.scale import ScaleRows

        rows = ScaleRows(folder / "rows.jsonl")
        rows.read()
        write_tables(rows.rows, folder)
    print(folder / "README.md", flush=True)
    return 0


def _score(arguments: argparse.Namespace, folder: Path) -> None:
    from spartan_ray.distributed.start import join_ray
    from spartan_ray.engine.process import set_up
    from spartan_ray.study.scale import WAYS, ScaleRows, Scaling

    unknown = [name for name in arguments.ways or () if name not in WAYS]
    if unknown:
        raise InputError(f"--ways {unknown[0]!r}: one of {', '.join(WAYS)}")
    set_up(threads=arguments.threads)
    ways = {name: WAYS[name] for name in arguments.ways or WAYS}
    rows = ScaleRows(folder / "rows.jsonl")

    def of(run: Path) -> Scaling:
        return Scaling(run, rows, arguments.populations, arguments.draws, lambda text: print(text, flush=True))

    parents, levels = [of(run) for run in arguments.runs], [of(run) for run in arguments.levels]
    for level in levels:
        if level.about["seed"] not in [parent.about["seed"] for parent in parents]:
            raise InputError(f"--levels {level.name}: no parent has its run.seed ({level.about['seed']})")
    for parent in parents:
        for name, way in ways.items():
            parent.refuse_unfit(name, way)
    try:
        (folder / "scores").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {folder}: cannot be made: {error.strerror}") from None
    with lock_folder(folder / "scores"):
        rows.read()
        rows.refuse_others(parents)
        leave = join_ray(arguments.address)
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # replaces Ray's handler
        try:
            for parent in parents:
                parent.baselines([level for level in levels if level.about["seed"] == parent.about["seed"]])
                for name, way in ways.items():
                    parent.way(name, way, arguments.workers)
                    write_tables(rows.rows, folder)
        finally:
            leave()


def write_tables(rows: list[dict[str, Any]], folder: Path) -> None:
    """Write README.md and the pictures. Raises InputError if there are no rows."""
    from spartan_ray.study.scale_tables import draw, write_up

    if not rows:
        raise InputError(f"-o {folder}: rows.jsonl is empty")
    frame = pd.DataFrame(rows)
    write_whole(folder / "README.md", write_up(frame, folder.name).encode())
    # An interrupted measurement may have no update yet.
    for fitness in ("accuracy", "loss") if "fitness" in frame else ():
        draw(frame, fitness, folder / f"{fitness}.png")
