"""The command line, `spartan`. Exit codes: 0 done, 2 bad configuration or input, 130 stopped by the
user, 1 anything else."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spartan_ray.config import Config, InputError, load_config, preset_names

DESCRIPTION = """Spartan training: SGD alternated with evolution, the population scored on Ray."""
REFRESH_SECONDS = 0.5
# Seconds between plain lines within a phase, and seconds that a stopping run may take.
LINE_SECONDS = 15.0
STOP_SECONDS = 30.0
# Seconds to wait for a Ray to answer.
REACH_SECONDS = 5.0


def main() -> None:
    """Parse the command line, run the command, exit with its code."""
    parser = argparse.ArgumentParser(prog="spartan", description=DESCRIPTION)
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", add_help=False, help="train a network; its flags: spartan train --help")
    report = commands.add_parser("report", help="tables and pictures of one run, or of several compared")
    report.add_argument("runs", nargs="+", type=Path, metavar="RUN", help="a run folder")
    report.add_argument(
        "-o",
        dest="folder",
        type=Path,
        metavar="DIR",
        help="where to write (default: RUN/report; for several runs, ./report)",
    )
    arguments, rest = parser.parse_known_args()
    if rest and arguments.command != "train":
        parser.error(f"unknown arguments: {' '.join(rest)}")
    try:
        code = train(rest) if arguments.command == "train" else write_report(arguments.runs, arguments.folder)
    except InputError as error:
        print(f"spartan: {error}", file=sys.stderr)
        code = 2
    except KeyboardInterrupt:  # before there was a run to stop
        code = 130
    sys.exit(code)


def parse_config(arguments: list[str]) -> Config:
    """The configuration of `spartan train`'s arguments: --config NAME|FILE, and flags that override it."""
    base = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    base.add_argument("--config")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            chosen, flags = base.parse_known_args(arguments)
    except SystemExit:
        raise InputError("--config: expected the name of a preset or a file") from None
    default = load_config(chosen.config) if chosen.config else Config()
    description = (
        f"Train a network. --config NAME|FILE is the base, flags override it. Presets: {', '.join(preset_names())}."
    )
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(Config, default=default, args=flags, prog="spartan train", description=description)
    except SystemExit as end:
        if end.code == 0:
            raise
        raise InputError(_first_sentence(errors.getvalue())) from None


def with_absolute_paths(config: Config) -> Config:
    """The paths of a configuration as they are here: the driver may run in another directory."""
    run, data, parent = config.run, config.data, config.parent
    run = run.model_copy(update={"out": str(Path(run.out).absolute())})
    if data.name != "digits":
        data = data.model_copy(update={"root": str(Path(data.root or f"data/{data.name}").absolute())})
    if parent.weights not in ("none", "imagenet"):
        parent = parent.model_copy(update={"weights": str(Path(parent.weights).absolute())})
    return config.model_copy(update={"run": run, "data": data, "parent": parent})


def _first_sentence(box: str) -> str:
    """The message of tyro's error box without the box, and the flag that it proposes."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    rule = next((number for number, line in enumerate(lines) if line.startswith("───")), len(lines))
    message = " ".join(lines[:rule]).split(" Got errors", 1)[0]
    proposed = [line.split()[0].rstrip(",") for line in lines[rule:] if line.startswith("--")]
    if message.startswith("Unrecognized") and proposed:
        message += f" (perhaps {proposed[0]}?)"
    return message or " ".join(box.split())


def train(arguments: list[str]) -> int:
    """`spartan train`: run the driver on Ray and show its progress."""
    config = with_absolute_paths(parse_config(arguments))
    print("starting Ray", flush=True)
    # Ray takes seconds to import; a bad flag is answered before.
    import ray
    from ray.exceptions import RayError, RayTaskError

    from spartan_ray.driver import start_driver
    from spartan_ray.pool import PoolError

    # It warns of what protects the user: a local Ray takes nobody in without its token.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    address = config.cluster.address or os.environ.get("RAY_ADDRESS") or "local"
    _check_reachable(address)
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, logging_level=logging.WARNING, log_to_driver=False)
        else:
            ray.init(address=address, logging_level=logging.WARNING, log_to_driver=False)
    except (ConnectionError, ValueError, RuntimeError) as error:
        raise InputError(f"cluster.address {address}: no Ray answers there: {error}") from None
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    driver = None
    try:
        driver = start_driver(config)
        run: Any = driver.run.remote()
        try:
            follow(driver, run)
            ray.get(run)
        except KeyboardInterrupt:
            print("stopping", flush=True)
            ray.get(driver.stop.remote())
            ray.wait([run], timeout=STOP_SECONDS)
            folder = ray.get(driver.look.remote(0, 0)).folder
            print(
                f"stopped: {folder or 'nothing'} holds the record of the epochs that ended, and no weights", flush=True
            )
            return 130
        summarise(ray.get(driver.look.remote(0, 0)))
        return 0
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        print(f"spartan: {error.cause}" if isinstance(error.cause, PoolError) else error, file=sys.stderr)
        return 1
    except RayError as error:
        print(f"spartan: the driver was lost: {error}", file=sys.stderr)
        return 1
    finally:
        if driver:
            ray.kill(driver)
        ray.shutdown()


def _check_reachable(address: str) -> None:
    """Ray itself retries a dead address for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon:
        return
    try:
        socket.create_connection((host, int(port)), timeout=REACH_SECONDS).close()
    except (OSError, ValueError, OverflowError) as error:
        raise InputError(f"cluster.address {address}: no Ray answers there: {error}") from None


def follow(driver: Any, run: Any) -> None:
    """Show the run's progress until it ends: a live bar in a terminal, plain lines elsewhere."""
    import ray

    console = Console()
    rows = notes = 0
    show = _live_bar(console) if console.is_terminal else _plain_lines()
    with show as update:
        ended = False
        while not ended:
            ended = bool(ray.wait([run], timeout=REFRESH_SECONDS)[0])
            state = ray.get(driver.look.remote(rows, notes))
            for row in state.rows:
                console.print(_row_line(row, state.epochs), highlight=False, markup=False, soft_wrap=True)
            for note in state.notes:
                console.print(note, highlight=False, markup=False, soft_wrap=True)
            rows, notes = rows + len(state.rows), notes + len(state.notes)
            update(state)


def _row_line(row: dict[str, Any], epochs: int) -> str:
    from spartan_ray.report import number

    line = (
        f"epoch {row['epoch']}/{epochs} {row['kind']:6} train loss {number(row['train_loss'])}  "
        f"validation {number(row['validation_accuracy'])}  test {number(row['test_accuracy'])}  "
        f"{row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s"
    )
    if row["kind"] == "evolve":
        line += f"  parent {number(row['parent_fitness_before'])} -> {number(row['parent_fitness_after'])}"
        line += f"  step ratio {number(row['step_ratio'], 2)}" if row["accepted"] else "  rejected"
    return line


@contextlib.contextmanager
def _live_bar(console: Console) -> Iterator[Any]:
    """A bar for the run and one for its phase."""
    columns = (
        TextColumn("{task.description:22}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        run = bar.add_task("epochs", total=None, rate="")
        phase = bar.add_task("starting", total=None, rate="")
        shown = (0, "")

        def update(state: Any) -> None:
            nonlocal shown
            bar.update(run, completed=max(0, state.epoch - 1), total=state.epochs)
            name = f"{state.phase} ({state.unit})" if state.unit else state.phase
            if shown != (state.epoch, state.phase):
                bar.reset(phase, total=state.total or None, description=name)
                shown = (state.epoch, state.phase)
            bar.update(phase, completed=state.done, rate=f"{_rate(state):.0f} images/s" if state.images else "")

        yield update


@contextlib.contextmanager
def _plain_lines() -> Iterator[Any]:
    """A line now and then, for logs."""
    last = time.monotonic()

    def update(state: Any) -> None:
        nonlocal last
        if time.monotonic() - last < LINE_SECONDS or not state.done:
            return
        last = time.monotonic()
        left = (time.time() - state.started) / state.done * (state.total - state.done)
        rate = f", {_rate(state):.0f} images/s" if state.images else ""
        print(
            f"epoch {state.epoch}/{state.epochs} {state.phase}: {state.done}/{state.total} {state.unit}{rate}, "
            f"{left:.0f} s left",
            flush=True,
        )

    yield update


def _rate(state: Any) -> float:
    return float(state.images / max(time.time() - state.started, 1e-9))


def summarise(state: Any) -> None:
    """Print the table of a run that ended, and where it lies."""
    import pandas as pd

    from spartan_ray.report import SHORT, final_table, markdown

    print("\n" + markdown(final_table({Path(state.folder).name: pd.DataFrame(state.rows)})[SHORT]))
    print(f"run folder: {state.folder}\npictures:   spartan report {state.folder}", flush=True)


def write_report(folders: list[Path], out: Path | None) -> int:
    """`spartan report`: tables and pictures."""
    from spartan_ray import report

    runs = [report.read_run(folder) for folder in folders]
    out = out or (folders[0] / "report" if len(folders) == 1 else Path("report"))
    paths = report.write_report(runs, out)
    print(report.markdown(report.final_table(report.unique_frames(runs))[report.SHORT]))
    for path in paths:
        print(path)
    return 0
