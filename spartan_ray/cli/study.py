"""`spartan study`: the runs of a study that are missing, and its tables and pictures."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path

from spartan_ray.cli.flags import given_fields, with_absolute_paths
from spartan_ray.errors import InputError
from spartan_ray.run.checkpoint import write_whole
from spartan_ray.run.config import Config
from spartan_ray.study.plan import Planned, Study, load_study, planned_runs
from spartan_ray.study.rows import Rows


def run_study(arguments: argparse.Namespace) -> int:
    """Run what is missing, and write what there is; 1 if a run failed."""
    study = load_study(arguments.file)
    runs = [
        replace(run, config=with_absolute_paths(run.config)) for run in planned_runs(study, given_fields(arguments))
    ]
    folder: Path = arguments.folder or arguments.file.with_suffix("")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {folder}: cannot be made: {error.strerror}") from None
    rows = Rows(folder / "rows.csv")
    missing = [run for run in runs if not rows.has(run)]
    print(f"{len(runs)} runs, {len(missing)} to do: {folder / 'runs'}", flush=True)
    failed: list[str] = []
    try:
        if missing and not arguments.tables:
            failed = _run(study, missing, rows, folder / "runs", runs[0].config)
    finally:  # also of a study that was interrupted
        write_tables(study, runs, rows, folder)
    print(f"{folder / 'README.md'}", flush=True)
    for line in failed:
        print(f"failed: {line}", flush=True)
    return 1 if failed else 0


def _run(study: Study, missing: list[Planned], rows: Rows, folder: Path, config: Config) -> list[str]:
    import ray

    from spartan_ray.distributed.start import join_ray
    from spartan_ray.report.reading import read_run
    from spartan_ray.study.runner import Runner

    def ended(run: Planned, place: Path) -> None:
        rows.add(run, read_run(place), place)

    leave = None if ray.is_initialized() else join_ray(config.cluster.address)
    try:
        return Runner(folder.absolute(), study.at_once, ended, lambda text: print(text, flush=True)).run(missing)
    finally:
        if leave:
            leave()


def write_tables(study: Study, runs: list[Planned], rows: Rows, folder: Path) -> None:
    """README.md and the pictures, from the rows that there are."""
    from spartan_ray.study.pictures import draw
    from spartan_ray.study.tables import write_up

    frame = rows.of(runs)
    write_whole(folder / "README.md", write_up(study, runs, frame, folder.name).encode())
    for picture in study.pictures:
        draw(frame, picture, folder / f"{picture.name}.png")
