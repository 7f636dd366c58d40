"""`spartan study`: do the missing runs of a study and write its tables and pictures."""

from __future__ import annotations

import argparse
import contextlib
import signal
from dataclasses import replace
from pathlib import Path

from spartan_ray.cli.flags import given_fields, with_absolute_paths
from spartan_ray.cli.train import check_paths
from spartan_ray.distributed.address import ray_address
from spartan_ray.errors import InputError
from spartan_ray.run.files import write_whole
from spartan_ray.run.place import lock_folder
from spartan_ray.run.setup import make_strategy
from spartan_ray.study.plan import OF_STUDY, Planned, Study, load_study, planned_runs
from spartan_ray.study.rows import Rows


def run_study(arguments: argparse.Namespace) -> int:
    """Do the missing runs and write the tables and pictures. Return 1 if a run failed, else 0."""
    study, given = load_study(arguments.file), given_fields(arguments)
    for name in OF_STUDY & given.get("run", {}).keys():
        raise InputError(f"--run.{name}: a study gives each run its own")
    try:
        planned = planned_runs(study, given)
    except InputError as error:
        raise InputError(f"{arguments.file}: {error}") from None
    runs = [replace(run, config=with_absolute_paths(run.config)) for run in planned]
    folder: Path = arguments.folder or arguments.file.with_suffix("")
    try:
        (folder / "runs").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {folder}: cannot be made: {error.strerror}") from None
    failed: list[str] = []
    # Another study would write the same rows; tables may be written while it runs.
    with contextlib.nullcontext() if arguments.tables else lock_folder(folder / "runs"):
        rows = Rows(folder / "rows.csv")
        missing = [run for run in runs if not rows.has(run)]
        print(f"{len(runs) - len(missing)} of {len(runs)} runs are done: {folder}", flush=True)
        if missing and not arguments.tables:
            _check(missing)
            try:
                failed = _run(study, missing, rows, folder / "runs")
            finally:  # also when the study is interrupted
                write_tables(study, runs, rows, folder)
                count = sum(rows.has(run) for run in runs)
                others = "; repeat the command to do the others" if count < len(runs) else ""
                print(f"{count} of {len(runs)} runs are done{others}", flush=True)
        else:
            write_tables(study, runs, rows, folder)
    print(f"{folder / 'README.md'}", flush=True)
    for line in failed:
        print(f"failed: {line}", flush=True)
    return 1 if failed else 0


def _check(missing: list[Planned]) -> None:
    """Check the cells before Ray starts. Raises InputError, which begins with the cell's name, for a wrong one."""
    local = ray_address(missing[0].config.cluster.address)[0] == "local"
    seen = set()
    for run in missing:
        config = run.config
        try:
            make_strategy(config.evolution, classes=2)
            paths = (config.data.name, config.data.root, config.parent.weights, config.parent.model, config.run.loggers)
            if local and paths not in seen:
                seen.add(paths)
                check_paths(config, new=True)
        except InputError as error:
            raise InputError(f"{run.group}.{run.method}: {error}") from None


def _run(study: Study, missing: list[Planned], rows: Rows, folder: Path) -> list[str]:
    import ray

    from spartan_ray.distributed.start import join_ray
    from spartan_ray.report.reading import read_run
    from spartan_ray.study.runner import Runner

    def ended(run: Planned, place: Path) -> None:
        rows.add(run, read_run(place), place)

    leave = None if ray.is_initialized() else join_ray(missing[0].config.cluster.address)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # replaces Ray's handler
    try:
        return Runner(folder.absolute(), study.at_once, ended, lambda text: print(text, flush=True)).run(missing)
    finally:
        if leave:
            leave()


def write_tables(study: Study, runs: list[Planned], rows: Rows, folder: Path) -> None:
    """Write README.md and the pictures from the existing rows."""
    from spartan_ray.study.pictures import draw
    from spartan_ray.study.tables import write_up

    frame = rows.of(runs)
    write_whole(folder / "README.md", write_up(study, runs, frame, folder.name).encode())
    for picture in study.pictures:
        draw(frame, picture, folder / f"{picture.name}.png")
