"""Tables and a page from run folders. Reads only what is in them.

metrics.jsonl, one line an epoch:
  epoch, kind (sgd, evolve), seconds, evaluation_seconds, images_per_second,
  train_loss (on a fixed sample of the SGD split, in evaluation mode),
  {evolution,validation,test}_{loss,accuracy}
and for an evolve phase:
  population, fitness_images,
  fitness_{min,mean,max,std,nonfinite} over the members (a member that was rejected early counts with the
  images that it was scored on),
  parent_fitness_{before,after} on the same images, accepted, accepted_members (more than one in a chain),
  chosen_member (the last that became the parent), note (why the parent stayed),
  confirm_fitness_{before,after} on images that did not choose,
  search_{ratios,fitness} (lengths of the update, as step ratios, and the fitness of each),
  step_ratio (norm of the phase's move over the norm of one mutation),
  images_scored, images_saved (by early rejection), images_discarded (scored for members of a wave that
  were drawn again; depends on the wave),
  {scoring,gradient,update,broadcast}_seconds, retries, workers
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import pandas as pd

from spartan_ray.config import Config, InputError, Section, load_config

PICTURES = {
    "train_loss": "train loss",
    "validation_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
}


SEARCH_CAPTION = "gain in fitness along the update"


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read."""

    name: str
    config: Config
    metrics: pd.DataFrame
    environment: dict[str, Any]


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises InputError naming the file that is missing or unreadable."""
    metrics = folder / "metrics.jsonl"
    try:
        frame = pd.DataFrame([json.loads(line) for line in metrics.read_text().splitlines()])
        environment = json.loads((folder / "environment.json").read_text())
    except OSError as error:
        raise InputError(f"{error.filename}: not readable as a run folder: {error.strerror}") from None
    except ValueError as error:
        raise InputError(f"{folder}: a record is not JSON: {error}") from None
    missing = {"epoch", "kind", *PICTURES} - set(frame.columns)
    if missing:
        raise InputError(f"{metrics}: no {' or '.join(sorted(missing))} in it (no epoch has ended?)")
    return RunRecord(folder.resolve().name, load_config(str(folder / "config.yaml")), frame, environment)


def number(value: float | None, digits: int = 4) -> str:
    """A number of the record, whose null is a value that was not finite."""
    return "not finite" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def final_table(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row a run: where it ended, and the test accuracy at the epoch that validation would choose."""
    rows = []
    for name, frame in frames.items():
        last, best = frame.iloc[-1], frame.iloc[int(frame["validation_accuracy"].argmax())]
        evolve = frame[frame["kind"] == "evolve"]
        rows.append(
            {
                "run": name,
                "epochs": len(frame),
                "evolve phases": f"{int(evolve['accepted'].sum())} of {len(evolve)} accepted" if len(evolve) else "-",
                "train loss": number(last["train_loss"]),
                "validation accuracy": number(last["validation_accuracy"]),
                "test accuracy": number(last["test_accuracy"]),
                "test loss": number(last["test_loss"]),
                "best validation": f"{number(best['validation_accuracy'])} (epoch {int(best['epoch'])})",
                "test accuracy there": number(best["test_accuracy"]),
                "seconds": f"{frame['seconds'].sum() + frame['evaluation_seconds'].sum():.0f}",
            }
        )
    return pd.DataFrame(rows)


# What fits a terminal; the rest is in the report.
SHORT = ["run", "epochs", "evolve phases", "train loss", "validation accuracy", "test accuracy", "test loss"]


def evolve_table(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """One row an evolve phase; columns that say nothing of any phase are left out."""
    rows = []
    for name, frame in frames.items():
        for phase in frame[frame["kind"] == "evolve"].to_dict("records"):
            confirm = (phase.get("confirm_fitness_before"), phase.get("confirm_fitness_after"))
            rows.append(
                {
                    "run": name,
                    "epoch": int(phase["epoch"]),
                    "members": int(phase["population"]),
                    "images": int(phase["fitness_images"]),
                    "members' mean": number(phase["fitness_mean"]),
                    "best member": number(phase["fitness_max"]),
                    "parent before": number(phase["parent_fitness_before"]),
                    "parent after": number(phase["parent_fitness_after"]),
                    "confirm before": "" if pd.isna(confirm[0]) else number(confirm[0]),
                    "confirm after": "" if pd.isna(confirm[1]) else number(confirm[1]),
                    "accepted": _accepted(phase),
                    "step ratio": number(phase["step_ratio"], 2),
                    "images saved": _share(phase, "images_saved"),
                    "images discarded": _share(phase, "images_discarded"),
                    "scoring s": number(phase["scoring_seconds"], 1),
                    "gradient s": number(phase["gradient_seconds"], 1) if phase.get("gradient_seconds") else "",
                    "update s": number(phase["update_seconds"], 2),
                    "images/s": number(phase["images_per_second"], 0),
                    "retries": int(phase["retries"]),
                }
            )
    table = pd.DataFrame(rows)
    return table[[column for column in table if (table[column] != "").any()]]


def _accepted(phase: dict[Any, Any]) -> str:
    """yes, with the members that became the parent, or no with the reason."""
    if not phase["accepted"]:
        return f"no: {phase['note']}"
    if pd.isna(phase.get("chosen_member")):
        return "yes"
    member, count = int(phase["chosen_member"]), int(phase["accepted_members"])
    return f"yes: member {member}" if count == 1 else f"yes: {count} members, the last {member}"


def _share(phase: dict[Any, Any], name: str) -> str:
    """Images as a share of those that were scored and saved, if any."""
    images = phase.get(name)
    if not images or pd.isna(images):
        return ""
    return f"{images / (phase['images_scored'] + phase['images_saved'] + phase['images_discarded']):.0%}"


def markdown(table: pd.DataFrame) -> str:
    """A table as Markdown."""
    lines = [list(table.columns), ["---"] * len(table.columns), *table.astype(str).values.tolist()]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def write_report(runs: list[RunRecord], folder: Path) -> list[Path]:
    """Write the pictures, report.md and report.html (self-contained); returns their paths."""
    import jinja2

    from spartan_ray.plots import draw_measure, draw_search

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"-o {folder}: not a folder to write to: {error.strerror}") from None
    frames = unique_frames(runs)
    pictures = {measure: folder / f"{measure}.png" for measure in PICTURES}
    for measure, path in pictures.items():
        draw_measure(frames, measure, PICTURES[measure], path)
    search = folder / "step_search.png"
    searched = any("search_ratios" in frame and frame["search_ratios"].notna().any() for frame in frames.values())
    if searched:
        draw_search(frames, SEARCH_CAPTION, search)
    final, phases = final_table(frames), evolve_table(frames)

    text = f"# {', '.join(frames)}\n\n{markdown(final)}\n"
    text += "\n".join(f"![{PICTURES[measure]}]({path.name})" for measure, path in pictures.items())
    if len(phases):
        text += f"\n\n## Evolve phases\n\n{markdown(phases)}"
    if searched:
        text += f"\n![{SEARCH_CAPTION}]({search.name})"
    report = folder / "report.md"
    report.write_text(text + "\n")

    template = (resources.files("spartan_ray") / "report.html.j2").read_text()
    page = folder / "report.html"
    page.write_text(
        jinja2.Template(template, autoescape=True).render(
            names=list(frames),
            setups=[(name, _setup(run)) for name, run in zip(frames, runs, strict=True)],
            pictures=[
                (PICTURES[measure], base64.b64encode(path.read_bytes()).decode()) for measure, path in pictures.items()
            ],
            final=final.to_html(index=False, border=0),
            phases=phases.to_html(index=False, border=0) if len(phases) else "",
            search=base64.b64encode(search.read_bytes()).decode() if searched else "",
            search_caption=SEARCH_CAPTION,
        )
    )
    return [*pictures.values(), *([search] if searched else []), report, page]


def unique_frames(runs: list[RunRecord]) -> dict[str, pd.DataFrame]:
    """The metrics by run name, a number added to a name that comes twice."""
    frames: dict[str, pd.DataFrame] = {}
    for run in runs:
        name, number = run.name, 1
        while name in frames:
            number += 1
            name = f"{run.name} ({number})"
        frames[name] = run.metrics
    return frames


def _setup(run: RunRecord) -> str:
    """The run in a line."""
    data, parent, evolution = run.config.data, run.config.parent, run.config.evolution.resolved()
    text = f"{data.name}{_changed(data, exclude={'name', 'root', 'download'})}; seed {run.config.run.seed}; "
    text += f"{parent.model}, {parent.optimizer} at lr {parent.lr:g}"
    text += _changed(parent, exclude={"model", "optimizer", "lr", "threads"})
    if evolution.strategy != "none":
        text += f"; {evolution.strategy} every {evolution.every} epochs: {evolution.population} members"
        text += f" by {evolution.fitness}, accept {evolution.accept}"
        text += f", lr {evolution.lr:g}" if evolution.step == "lr" else ""
        text += _changed(evolution, exclude={"strategy", "every", "population", "fitness", "accept", "lr", "wave"})
    versions = run.environment.get("versions", {})
    return f"{text}; {run.environment.get('processor')}, torch {versions.get('torch')}"


def _changed(section: Section, exclude: set[str]) -> str:
    """The fields of a section that do not have their default, but for some."""
    default = type(section)().model_dump(exclude=exclude)
    values = section.model_dump(exclude=exclude)
    return "".join(f", {name} {value}" for name, value in values.items() if value != default[name])
