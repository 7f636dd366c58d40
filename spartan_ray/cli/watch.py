"""`spartan watch`: show a run while it goes on, from its folder alone."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from spartan_ray.cli.follow import print_line, row_line
from spartan_ray.errors import InputError
from spartan_ray.report.reading import RunRecord, read_run, runs_in
from spartan_ray.report.tables import effect, number
from spartan_ray.run.place import is_written, reading
from spartan_ray.section import is_url

# Seconds between two looks at a folder, and at a URL.
LOOK_SECONDS, LOOK_SECONDS_URL = 1.0, 15.0
# Looks at a run that no process writes, after which it counts as ended. A lost driver takes less to be replaced.
UNWRITTEN_LOOKS = 60
# Epochs shown.
SHOWN = 12
# What a log says last of a run that did not fail.
ENDS = ("finished", "stopped by the user")
BARS = "▁▂▃▄▅▆▇█"
# Files that a watcher reads.
WATCHED = ("config.yaml", "environment.json", "metrics.jsonl", "log.txt")


def watch(place: str, console: Console | None = None) -> int:
    """Show a run until it ends: a live view in a terminal, a line per epoch elsewhere. Ctrl-C leaves the run alone.

    Return 1 if the run failed or no process writes it, else 0. Raises InputError if `place`, a folder or a URL, holds
    no run."""
    console, ended = console or Console(), None
    looks = _looks(place)
    try:
        if console.is_terminal:
            with Live(console=console, auto_refresh=False, transient=False) as live:
                for run, log, ended in looks:
                    live.update(view(place, run, log, ended), refresh=True)
        else:
            said = 0
            for run, _, ended in looks:
                rows = run.metrics.to_dict("records")[said:] if run else []
                for row in rows:
                    print_line(console, row_line(row, run.config.run.epochs))  # type: ignore[union-attr]
                said += len(rows)
                if ended:
                    print_line(console, ended)
    except KeyboardInterrupt:
        return 0
    return 0 if ended in ENDS else 1


def _looks(place: str) -> Iterator[tuple[RunRecord | None, list[str], str | None]]:
    """Yield the run, None before its first epoch ended, the lines of its log, and at the end how it ended."""
    unwritten = 0
    while True:
        with reading(place, lambda name: name in WATCHED) as folder:
            if not (folder / "config.yaml").exists():
                raise InputError(f"{place}: there is no run{runs_in(folder)}")
            path = folder / "log.txt"
            log = path.read_text(errors="replace").splitlines() if path.exists() else []
            metrics = folder / "metrics.jsonl"
            run = read_run(folder) if metrics.exists() and metrics.read_bytes().count(b"\n") else None
        # A process that writes has begun the run again, or is about to end.
        written = None if is_url(place) else is_written(Path(place))
        unwritten = unwritten + 1 if written is False else 0
        lost = f"no process writes this run; to continue it: spartan resume {place}"
        ended = None if written else end_of(log) or (lost if unwritten > UNWRITTEN_LOOKS else None)
        yield run, log, ended
        if ended:
            return
        time.sleep(LOOK_SECONDS_URL if is_url(place) else LOOK_SECONDS)


def end_of(log: list[str]) -> str | None:
    """Return what a log says about the end of the run. None if it has not ended, or went on afterwards."""
    for line in reversed(log):
        said = line.partition(" ")[2]
        if said in ENDS or said.startswith("ended by "):
            return said
        if said.startswith("going on after epoch "):
            return None
    return None


def view(place: str, run: RunRecord | None, log: list[str], ended: str | None = None) -> Group:
    """Return what a terminal shows of a run: progress or how it ended, the last epochs, and the last lines of the
    log."""
    if run is None:
        return Group(Text(place, style="bold"), Text(ended or "no epoch has ended yet"), *_log_lines(log))
    frame, epochs = run.metrics, run.config.run.epochs
    rows = frame.to_dict("records")
    evolution = run.config.evolution
    what = "SGD" if evolution.strategy == "none" else f"{evolution.strategy}, K = {evolution.population}"
    head = Text.assemble((place, "bold"), f"  {run.config.parent.model}, {run.config.data.name}, {what}")

    done, table = len(rows), Table(box=None, padding=(0, 2, 0, 0), header_style="dim")
    for name in ("epoch", "", "train loss", "validation", "test", "seconds", "parent on its images"):
        table.add_column(name, justify="left" if name in ("", "parent on its images") else "right")
    for row in rows[-SHOWN:]:
        change = ""
        if row["kind"] == "evolve":
            before, after = number(row["parent_fitness_before"]), number(row["parent_fitness_after"])
            change = f"{before} -> {after} {effect(row)}"
        table.add_row(
            str(row["epoch"]),
            row["kind"],
            number(row["train_loss"]),
            number(row["validation_accuracy"]),
            number(row["test_accuracy"]),
            f"{row['seconds']:.1f}",
            change,
            style="bold" if row["kind"] == "evolve" else "",
        )
    seconds = frame["seconds"] + frame["evaluation_seconds"]
    state = ended or f"about {_duration(seconds.tail(10).mean() * (epochs - done))} left"
    progress, bar = Table.grid(padding=(0, 2, 0, 0)), ProgressBar(total=epochs, completed=done, width=40)
    progress.add_row(f"epoch {done}/{epochs}", bar, Text(state), _age(rows[-1]))
    best = frame["validation_accuracy"].max()
    spark = Text.assemble(("validation ", "dim"), sparkline(list(frame["validation_accuracy"])), f"  best {best:.4f}")
    return Group(head, progress, spark, Text(), table, Text(), *_log_lines(log))


def sparkline(values: list[float], width: int = 60) -> str:
    """Return values as a line of blocks, the last `width` of them."""
    shown = values[-width:]
    low, high = min(shown), max(shown)
    scale = (len(BARS) - 1) / (high - low) if high > low else 0.0
    return "".join(BARS[round((value - low) * scale)] for value in shown)


def _log_lines(log: list[str]) -> list[Text]:
    return [Text(line, style="dim", overflow="ellipsis", no_wrap=True) for line in log[-4:]]


def _age(row: Mapping[Any, Any]) -> str:
    """Return how long ago an epoch ended, if that is known."""
    try:
        ago = datetime.now(UTC) - datetime.fromisoformat(str(row.get("time")))
    except (TypeError, ValueError):  # no time, or none with a zone
        return ""
    return f"(last epoch {_duration(max(0.0, ago.total_seconds()))} ago)"


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60} min"
