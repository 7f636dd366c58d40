"""Shows how far a run is."""

from __future__ import annotations

import contextlib
import importlib.util
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

REFRESH_SECONDS = 0.5
# Seconds between plain lines within a phase.
LINE_SECONDS = 15.0


# Is called with each row of metrics.jsonl.
Callback = Callable[[dict[str, Any]], object]


def follow(supervisor: Any, console: Console, callbacks: Sequence[Callback] = ()) -> None:
    """Show the run's progress until it ends: a live bar in a terminal, plain lines elsewhere."""
    show = _live_bar(console) if console.is_terminal or _in_notebook(console) else _plain_lines(console)
    with show as update:
        ended = False
        while not ended:
            ended, state = supervisor.watch(REFRESH_SECONDS)
            say(console, supervisor, callbacks)
            update(state)


def say(console: Console, supervisor: Any, callbacks: Sequence[Callback] = ()) -> None:
    """Print what the run has said, each line taken away when it is out: an interrupt loses none."""
    while supervisor.unsaid:
        said = supervisor.unsaid[0]
        line = said if isinstance(said, str) else _row_line(said, supervisor.config.run.epochs)
        _print(console, line)
        supervisor.unsaid.popleft()
        for callback in callbacks if isinstance(said, dict) else ():
            callback(said)


def _print(console: Console, line: str) -> None:
    console.print(line, highlight=False, markup=False, soft_wrap=True)


def _row_line(row: dict[str, Any], epochs: int) -> str:
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


def _in_notebook(console: Console) -> bool:
    """Whether a live bar can be shown in a notebook."""
    return console.is_jupyter and importlib.util.find_spec("ipywidgets") is not None


@contextlib.contextmanager
def _plain_lines(console: Console) -> Iterator[Any]:
    """A line now and then, for logs."""
    last = time.monotonic()

    def update(state: Any) -> None:
        nonlocal last
        if time.monotonic() - last < LINE_SECONDS or not state.done:
            return
        last = time.monotonic()
        left = (time.time() - state.started) / state.done * (state.total - state.done)
        rate = f", {_rate(state):.0f} images/s" if state.images else ""
        _print(
            console,
            f"epoch {state.epoch}/{state.epochs} {state.phase}: {state.done}/{state.total} {state.unit}{rate}, "
            f"{left:.0f} s left",
        )

    yield update


def _rate(state: Any) -> float:
    return float(state.images / max(time.time() - state.started, 1e-9))


def summarise(state: Any) -> None:
    """Print the table of a run that ended, and where it lies."""
    import pandas as pd

    from spartan_ray.report.tables import SHORT, final_table, markdown

    print("\n" + markdown(final_table({Path(state.folder).name: pd.DataFrame(state.rows)})[SHORT]))
    print(f"run folder: {state.folder}\npictures:   spartan report {state.folder}", flush=True)
