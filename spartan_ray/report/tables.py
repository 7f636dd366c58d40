"""Tables of runs."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pandas as pd


def number(value: float | None, digits: int = 4) -> str:
    """Return the text of a number of the record, in which null is a value that was not finite."""
    return "not finite" if value is None or pd.isna(value) else f"{value:.{digits}f}"


def final_table(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return one row per run, and one per average: the values at the end, and the test accuracy at the epoch with the
    best validation accuracy."""
    rows = []
    for name, frame in frames.items():
        rows.append(_final(name, frame, ""))
        if "average_test_accuracy" in frame and not frame["average_test_accuracy"].isna().any():
            rows.append(_final(f"{name}, average", frame, "average_") | {"evolve phases": "", "train loss": ""})
    return pd.DataFrame(rows)


def _final(name: str, frame: pd.DataFrame, prefix: str) -> dict[str, str]:
    validation, accuracy, loss = f"{prefix}validation_accuracy", f"{prefix}test_accuracy", f"{prefix}test_loss"
    last, best = frame.iloc[-1], frame.iloc[int(frame[validation].argmax())]
    return {
        "run": name,
        "epochs": _epochs(frame),
        "evolve phases": _phases(frame[frame["kind"] == "evolve"]),
        "train loss": number(last["train_loss"]),
        "validation accuracy": number(last[validation]),
        "test accuracy": number(last[accuracy]),
        "test loss": number(last[loss]),
        "best validation": f"{number(best[validation])} (epoch {int(best['epoch'])})",
        "test accuracy there": number(best[accuracy]),
        "seconds": f"{frame['seconds'].sum() + frame['evaluation_seconds'].sum():.0f}",
    }


def effect(phase: Mapping[Any, Any]) -> str:
    """Return the effect of an evolve phase on the parent, on the images that scored it: better, worse, equal, or
    unmoved."""
    names = ("parent_fitness_before", "parent_fitness_after")
    before, after = (-math.inf if pd.isna(phase[name]) else phase[name] for name in names)
    if not phase["accepted"]:
        return "unmoved"
    return "better" if after > before else "worse" if after < before else "equal"


def _phases(evolve: pd.DataFrame) -> str:
    """Return how many evolve phases moved the parent, and with which effects."""
    if not len(evolve):
        return "-"
    count = Counter(effect(phase) for phase in evolve.to_dict("records"))
    moved = len(evolve) - count.pop("unmoved", 0)
    text = f"{moved} moved" if moved == len(evolve) else f"{moved} of {len(evolve)} moved"
    effects = ", ".join(f"{count[name]} {name}" for name in ("better", "worse", "equal") if count[name])
    return f"{text}: {effects}" if moved else text


def _epochs(frame: pd.DataFrame) -> str:
    """Return the number of epochs of a run, and the planned number if it has not ended."""
    done, wanted = len(frame), frame.attrs.get("epochs", len(frame))
    return str(done) if done == wanted else f"{done} of {wanted}"


SINGLE = "Differences between single runs are within what another seed can do: compare over seeds (spartan study)."
# Columns for a terminal; the report has the others.
SHORT = ["run", "epochs", "evolve phases", "train loss", "validation accuracy", "test accuracy", "test loss"]


def evolve_table(frames: Mapping[str, pd.DataFrame]) -> pd.DataFrame:
    """Return one row per evolve phase, without the columns that are empty for all phases."""
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
                    "selected": _count(phase.get("selected")),
                    "parents' mean": _fitness(phase.get("parents_fitness_mean")),
                    "step ratio": "" if _of_parents(phase) else number(phase["step_ratio"], 2),
                    "images saved": _share(phase, "images_saved"),
                    "images discarded": _share(phase, "images_discarded"),
                    "scoring, s": number(phase["scoring_seconds"], 1),
                    "gradient, s": number(phase["gradient_seconds"], 1) if phase.get("gradient_seconds") else "",
                    "update, s": number(phase["update_seconds"], 2),
                    "images/s": number(phase["images_per_second"], 0),
                    "retries": int(phase["retries"]),
                }
            )
    table = pd.DataFrame(rows)
    return table[[column for column in table if (table[column] != "").any()]]


def _moved(phase: dict[Any, Any]) -> str:
    """Return the effect on the parent with the members that replaced it, or the reason why it stayed."""
    found = effect(phase)
    if found == "unmoved":
        return f"no: {phase['note']}"
    if pd.isna(phase.get("chosen_member")):
        return found
    member, count = int(phase["chosen_member"]), int(phase["accepted_members"])
    return f"{found}: member {member}" if count == 1 else f"{found}: {count} members, last: member {member}"


def _of_parents(phase: Mapping[Any, Any]) -> bool:
    """Return whether a phase is a selection among several parents and their offspring."""
    return not pd.isna(phase.get("parents"))


def _fitness(value: Any) -> str:
    """Return the text of a fitness, empty for a missing one."""
    return "" if pd.isna(value) else number(value)


def _count(value: Any) -> str:
    """Return the text of a count, empty for 0 or a missing one."""
    return "" if not value or pd.isna(value) else str(int(value))


def _share(phase: dict[Any, Any], name: str) -> str:
    """Return a number of images as a share of all that were scored, saved or discarded; empty for 0."""
    images = phase.get(name)
    if not images or pd.isna(images):
        return ""
    return f"{images / (phase['images_scored'] + phase['images_saved'] + phase['images_discarded']):.0%}"


def markdown(table: pd.DataFrame) -> str:
    """Return a table as Markdown. Text in cells cannot end a cell or begin HTML."""
    cells = [
        [cell.replace("|", "\\|").replace("<", "&lt;") for cell in row] for row in table.astype(str).values.tolist()
    ]
    lines = [
        list(table.columns),
        ["---"] * len(table.columns),
        *([" ".join(cell.split()) for cell in row] for row in cells),
    ]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"
