"""Tables and a page from run folders. Reads only what is in them."""

from __future__ import annotations

import base64
import json
import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Annotated, Any, Literal

import pandas as pd
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from spartan_ray.config import Config, InputError, Section, load_run_config, refuse_links

PICTURES = {
    "train_loss": "train loss",
    "validation_accuracy": "validation accuracy",
    "test_accuracy": "test accuracy",
}


SEARCH_CAPTION = "gain in fitness along the update"


Count = Annotated[int, Field(ge=0, le=2**53)]
Real = Annotated[float, Field(allow_inf_nan=False)]
# A number that was not finite is null in JSON.
Number = Real | None


class Epoch(BaseModel):
    """A line of metrics.jsonl. `train_loss` is on a fixed sample of the SGD split, in evaluation mode; there
    are also {evolution,validation,test}_{loss,accuracy}."""

    model_config = ConfigDict(strict=True)

    epoch: Annotated[int, Field(ge=1, le=2**53)]
    time: str | None = None
    """When it ended, in UTC."""
    run_seconds: Real | None = None
    """That the processes which wrote the record have taken for it up to then, from the folder or the checkpoint on."""
    lr: Real | None = None
    """Of the parent's optimizer."""
    kind: Literal["sgd", "evolve"]
    train_loss: Number
    validation_accuracy: Real
    test_accuracy: Real
    test_loss: Number
    seconds: Real
    evaluation_seconds: Real
    images_per_second: Real


class EvolvePhase(Epoch):
    """A line of an evolve phase. Statistics are over the members; one that was rejected early counts with the
    images that it was scored on. There are also fitness_{min,std}, broadcast_seconds, workers."""

    population: Count
    fitness_images: Count
    fitness_mean: Number
    fitness_max: Number
    fitness_nonfinite: Count = 0
    """Members that were not finite: the worst of all, and in none of these statistics."""
    parent_fitness_before: Number
    parent_fitness_after: Number
    """Both on the same images."""
    accepted: bool
    """Whether the parent moved, to a better one or not."""
    accepted_members: Count = 1
    """More than one in a chain."""
    chosen_member: Count | None = None
    """The last that became the parent."""
    note: str | None
    """Why the parent stayed."""
    confirm_fitness_before: Number = None
    confirm_fitness_after: Number = None
    """On images that did not choose."""
    search_ratios: list[Number] | None = None
    search_fitness: list[Number] | None = None
    """Lengths of the update, as step ratios, and the fitness of each."""
    step_ratio: Number
    """Norm of the phase's move over the norm of one mutation."""
    images_scored: Count = 0
    images_saved: Count = 0
    """By early rejection, or by racing."""
    images_discarded: Count = 0
    """Scored for members of a wave that were drawn again; depends on the wave."""
    scoring_seconds: Real
    gradient_seconds: Real = 0.0
    update_seconds: Real
    retries: Count
    """Tasks done again because their worker was lost."""
    late_results: Count = 0
    """Answers to what another worker had answered before."""
    members_failed: Count = 0
    """Scored worst because they failed on several workers."""


class Environment(BaseModel):
    """What a report uses of environment.json."""

    versions: dict[str, str] = {}
    processor: str | None = None
    resumed: list[Any] = []


@dataclass(frozen=True)
class RunRecord:
    """A run folder, read."""

    name: str
    config: Config
    metrics: pd.DataFrame
    environment: Environment


def read_run(folder: Path) -> RunRecord:
    """Read a run folder. Raises InputError naming the file that is missing or unreadable."""
    refuse_links(folder)
    path, rows = folder / "metrics.jsonl", []
    try:
        lines = path.read_text().splitlines(keepends=True)
        if lines and not lines[-1].endswith("\n"):
            lines.pop()  # cut off while it was written
        for number, line in enumerate(lines, 1):
            row = json.loads(line)
            if not isinstance(row, dict):
                raise InputError(f"{path}: line {number} is no record of an epoch")
            (EvolvePhase if row.get("kind") == "evolve" else Epoch).model_validate(row)
            rows.append(row)
        path = folder / "environment.json"
        environment = Environment.model_validate_json(path.read_text())
    except OSError as error:
        raise InputError(f"{error.filename}: not readable as a run folder: {error.strerror}") from None
    except ValidationError as error:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"])
        line_number = f" line {len(rows) + 1}:" if path.suffix == ".jsonl" else ""
        raise InputError(f"{path}:{line_number} {where}: {problem['msg']}") from None
    except (ValueError, RecursionError) as error:
        where = f"line {len(rows) + 1} is" if path.suffix == ".jsonl" else "is"
        raise InputError(f"{path}: {where} not JSON: {error}") from None
    if not rows:
        raise InputError(f"{folder / 'metrics.jsonl'}: no epoch has ended")
    config, frame = load_run_config(folder), pd.DataFrame(rows)
    frame.attrs["epochs"] = config.run.epochs
    return RunRecord(folder.resolve().name, config, frame, environment)


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
                "epochs": _epochs(frame),
                "evolve phases": _phases(evolve),
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


def effect(phase: Mapping[Any, Any]) -> str:
    """What an evolve phase made of the parent on the images that scored it: better, worse, equal, or unmoved."""
    names = ("parent_fitness_before", "parent_fitness_after")
    before, after = (-math.inf if pd.isna(phase[name]) else phase[name] for name in names)
    if not phase["accepted"]:
        return "unmoved"
    return "better" if after > before else "worse" if after < before else "equal"


def _phases(evolve: pd.DataFrame) -> str:
    """How many evolve phases moved the parent, and to what."""
    if not len(evolve):
        return "-"
    count = Counter(effect(phase) for phase in evolve.to_dict("records"))
    moved = len(evolve) - count.pop("unmoved", 0)
    text = f"{moved} moved" if moved == len(evolve) else f"{moved} of {len(evolve)} moved"
    effects = ", ".join(f"{count[name]} {name}" for name in ("better", "worse", "equal") if count[name])
    return f"{text}: {effects}" if moved else text


def _epochs(frame: pd.DataFrame) -> str:
    """How many epochs a run has, and of how many if it is not at its end."""
    done, wanted = len(frame), frame.attrs.get("epochs", len(frame))
    return str(done) if done == wanted else f"{done} of {wanted}"


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
                    "not finite": _count(phase.get("fitness_nonfinite")),
                    "parent before": number(phase["parent_fitness_before"]),
                    "parent after": number(phase["parent_fitness_after"]),
                    "confirm before": "" if pd.isna(confirm[0]) else number(confirm[0]),
                    "confirm after": "" if pd.isna(confirm[1]) else number(confirm[1]),
                    "moved": _moved(phase),
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


def _moved(phase: dict[Any, Any]) -> str:
    """What became of the parent, with the members that replaced it, or why it stayed."""
    found = effect(phase)
    if found == "unmoved":
        return f"no: {phase['note']}"
    if pd.isna(phase.get("chosen_member")):
        return found
    member, count = int(phase["chosen_member"]), int(phase["accepted_members"])
    return f"{found}: member {member}" if count == 1 else f"{found}: {count} members, the last {member}"


def _count(value: Any) -> str:
    """Nothing for none."""
    return "" if not value or pd.isna(value) else str(int(value))


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
    return f"{text}; {run.environment.processor}, torch {run.environment.versions.get('torch')}"


def _changed(section: Section, exclude: set[str]) -> str:
    """The fields of a section that do not have their default, but for some."""
    default = type(section)().model_dump(exclude=exclude)
    values = section.model_dump(exclude=exclude)
    return "".join(f", {name} {value}" for name, value in values.items() if value != default[name])
