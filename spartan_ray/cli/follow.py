"""Shows the progress of a run."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.5
# Seconds between two plain lines within a phase.
LINE_SECONDS = 15.0


# Called with each row of metrics.jsonl.
Callback = Callable[[dict[str, Any]], object]


def follow(supervisor: Any, console: Console, callbacks: Sequence[Callback] = ()) -> None:
    """Show the run's progress until it ends: a live bar in a terminal or notebook, plain lines elsewhere. Call each of
    `callbacks` with every new row of metrics.jsonl."""
    show = _live_bar(console) if console.is_terminal or _in_notebook(console) else _plain_lines(console)
    with show as update:
        ended = False
        while not ended:
            ended, state = supervisor.watch(REFRESH_SECONDS)
            say(console, supervisor, callbacks)
            update(state)


def say(console: Console, supervisor: Any, callbacks: Sequence[Callback] = ()) -> None:
    """Print the lines and rows that the run has sent. Remove each only once it is printed, so that an interrupt loses
    none."""
    while supervisor.unsaid:
        said = supervisor.unsaid[0]
        line = said if isinstance(said, str) else row_line(said, supervisor.config.run.epochs)
        print_line(console, line)
        supervisor.unsaid.popleft()
        for callback in callbacks if isinstance(said, dict) else ():
            callback(said)


def print_line(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def row_line(row: Mapping[Any, Any], epochs: int) -> str:
    from spartan_ray.report.tables import effect, number

    line = (
        f"epoch {row['epoch']}/{epochs} {row['kind']:6} train loss {number(row['train_loss'])}  "
        f"validation {number(row['validation_accuracy'])}  test {number(row['test_accuracy'])}  "
        f"{row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s"
    )
    if row.get("backed_off"):
        line += f"  {row['backed_off']} of {row['parents']} parents backed off"
    if row["kind"] == "evolve":
        before, after = number(row["parent_fitness_before"]), number(row["parent_fitness_after"])
        line += f"  parent {before} -> {after} {effect(row)}"
        line += f"  step ratio {number(row['step_ratio'], 2)}" if row["accepted"] and "selected" not in row else ""
        line += f"  {row['selected']} of {row['parents']} parents are offspring" if "selected" in row else ""
    return line


@contextlib.contextmanager
def _live_bar(console: Console) -> Iterator[Any]:
    """Show one bar for the run and one for its current phase."""
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


def _in_notebook(console: Console) -> bool:
    """Return whether this is a notebook that can show a live bar."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None


@contextlib.contextmanager
def _plain_lines(console: Console) -> Iterator[Any]:
    """Print a line every LINE_SECONDS, for logs."""
    last = time.monotonic()

    def update(state: Any) -> None:
        nonlocal last
        if time.monotonic() - last < LINE_SECONDS or not state.done:
            return
        last = time.monotonic()
        left = (time.time() - state.started) / state.done * (state.total - state.done)
        rate = f", {_rate(state):.0f} images/s" if state.images else ""
        print_line(
            console,
            f"epoch {state.epoch}/{state.epochs} {state.phase}: {state.done}/{state.total} {state.unit}{rate}, "
            f"{left:.0f} s left",
        )

    yield update


def _rate(state: Any) -> float:
    return float(state.images / max(time.time() - state.started, 1e-9))


def summarise(state: Any) -> None:
    """Print the final table of a finished run and the path of its folder."""
    import pandas as pd

    from spartan_ray.report.tables import SHORT, final_table, markdown

    print("\n" + markdown(final_table({Path(state.folder).name: pd.DataFrame(state.rows)})[SHORT]))
    print(f"run folder: {state.folder}\npictures:   spartan report {state.folder}", flush=True)
