"""The report: charts, report.md and report.html."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from spartan_ray.errors import InputError
from spartan_ray.report.reading import RunRecord, unique_frames
from spartan_ray.report.settings import changed, differing
from spartan_ray.report.tables import SINGLE, evolve_table, final_table, markdown


@dataclass(frozen=True)
class Chart:
    """A chart of the report: its file's name, its title, what it shows, and what draws it."""

    name: str
    title: str
    about: str
    draw: Callable[[Any], None]


def charts(runs: list[RunRecord]) -> tuple[list[Chart], list[Chart]]:
    """Return the charts of the runs over their epochs, and those of their evolve phases."""
    from spartan_ray.report import plots

    frames = unique_frames(runs)
    for frame in frames.values():
        frame["overfitting"] = frame["test_loss"].astype(float) - frame["train_loss"].astype(float)
    epochs = [
        Chart(name, title, about, plots.draw_measure(frames, name, label))
        for name, title, label, about in (
            ("validation_accuracy", "Validation accuracy", "validation accuracy", "On images that nobody trained on."),
            ("test_accuracy", "Test accuracy", "test accuracy", "The test split chooses nothing."),
            ("train_loss", "Train loss", "train loss", "On a fixed sample of the SGD split."),
            ("overfitting", "Overfitting", "test loss - train loss", "Test loss minus train loss."),
        )
    ]
    budget = "The images that gradients and scores took, in millions."
    epochs.append(Chart("budget", "Test accuracy over images forwarded", budget, plots.draw_budget(frames)))

    phases = []
    colour = plots.colours(frames)
    for number, ((name, frame), run) in enumerate(zip(frames.items(), runs, strict=True), 1):
        if run.members:
            about = f"{name}: how the members of each phase scored, and the parent before (line) and after (dot)."
            draw = plots.draw_members(frame, run.members, colour[name])
            file = f"members-{number}-" + re.sub(r"[^\w.-]+", "-", name)
            phases.append(Chart(file, "Fitness of the members", about, draw))
    if any(_has(frame, "search_ratios") for frame in frames.values()):
        about = (
            "The gain in fitness for each length that step search tried, on images that did not choose the direction."
        )
        about += " Later phases are darker."
        phases.append(Chart("step_search", "Search along the update", about, plots.draw_search(frames)))
    if any(len(plots.other_images(frame)) for frame in frames.values()):
        about = "The gain of each phase on the images that scored its members (hollow) and on other images (filled)."
        phases.append(Chart("confirmed", "Scored and confirmed", about, plots.draw_confirmed(frames)))
    if any(_has(frame, "parents") for frame in frames.values()):
        about = "From the worst parent to the best; dashed is their mean."
        phases.append(Chart("parents", "Fitness of the parents", about, plots.draw_parents(frames)))
    return epochs, phases


def _has(frame: pd.DataFrame, column: str) -> bool:
    return column in frame and bool(frame[column].notna().any())


def write_report(runs: list[RunRecord], folder: Path) -> list[Path]:
    """Write the charts as PNG files, report.md and report.html, which needs no other file. Return their paths."""
    import jinja2

    from spartan_ray.report.plots import NARROW, WIDE, png, svg

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {folder}: not a folder to write to: {error.strerror}") from None
    over_epochs, of_phases = charts(runs)
    frames = unique_frames(runs)
    final, phases = final_table(frames), evolve_table(frames)
    pictures = []
    for chart in (*over_epochs, *of_phases):
        pictures.append(folder / f"{chart.name}.png")
        png(chart.draw, pictures[-1])

    def shown(charts: list[Chart]) -> str:
        return "\n\n".join(
            f"{chart.about.replace('<', '&lt;')}\n\n![{chart.title}]({chart.name}.png)" for chart in charts
        )

    differ = differing(dict(zip(frames, runs, strict=True)))
    text = f"# {', '.join(frames).replace('<', '&lt;')}\n\n{markdown(final)}\n{SINGLE}\n\n"
    if differ:
        text += f"## Settings that differ\n\n{markdown(pd.DataFrame({'run': list(frames)} | differ))}\n"
    text += "## Over the epochs\n\n"
    text += f"{shown(over_epochs)}\n\nDots mark evolve phases; a hollow dot left the parent unmoved.\n"
    if len(phases):
        text += f"\n## Evolve phases\n\n{markdown(phases)}\n{shown(of_phases)}\n"
    report = folder / "report.md"
    report.write_text(text)

    def drawn(chart: Chart) -> dict[str, str]:
        return {
            "title": chart.title,
            "about": chart.about,
            "wide": svg(chart.draw, WIDE[0]),
            "narrow": svg(chart.draw, NARROW[0]),
        }

    template = (resources.files("spartan_ray.report") / "page.html.j2").read_text()
    page = folder / "report.html"
    page.write_text(
        jinja2.Template(template, autoescape=True).render(
            names=list(frames),
            final=final,
            single=SINGLE,
            over_epochs=[drawn(chart) for chart in over_epochs],
            of_phases=[drawn(chart) for chart in of_phases],
            phases=phases,
            differing=differ,
            changed={name: changed(run) for name, run in zip(frames, runs, strict=True)},
            machines={name: _machine(run) for name, run in zip(frames, runs, strict=True)},
        )
    )
    return [*pictures, report, page]


def _machine(run: RunRecord) -> str:
    return f"{run.environment.processor}, torch {run.environment.versions.get('torch')}"
