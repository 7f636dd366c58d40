"""Pictures of runs: a measure over epochs, one line a run, evolve phases marked."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

# Okabe and Ito's colours, which colour-blind readers tell apart.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def draw_measure(frames: Mapping[str, pd.DataFrame], measure: str, label: str, path: Path) -> None:
    """Draw column `measure` of each run's metrics over epochs to a PNG."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    marked = False
    for number, (name, frame) in enumerate(frames.items()):
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(frame["epoch"], frame[measure], color=colour, linewidth=1.8, label=name)
        evolve = frame[frame["kind"] == "evolve"]
        for moved, face in ((True, colour), (False, "white")):
            phases = evolve[evolve["accepted"] == moved] if len(evolve) else evolve
            axes.scatter(phases["epoch"], phases[measure], facecolor=face, edgecolor=colour, s=46, zorder=3)
        marked = marked or len(evolve) > 0
    if marked:
        axes.scatter([], [], color="grey", s=46, label="after an evolve phase (hollow: parent unmoved)")
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, axes, path)


def draw_search(frames: Mapping[str, pd.DataFrame], label: str, path: Path) -> None:
    """Draw what step search saw: the fitness over the parent's for each length that it tried, a line a phase."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    most = 0.0
    for number, (name, frame) in enumerate(frames.items()):
        searched = frame[frame["search_ratios"].notna()] if "search_ratios" in frame else frame[:0]
        for count, phase in enumerate(searched.to_dict("records")):
            fitness = pd.Series(phase["search_fitness"], dtype=float)  # null, a fitness that was not finite, is a gap
            most = max(most, (fitness - fitness[0]).max())
            axes.plot(
                phase["search_ratios"][1:],  # the first is 0, the parent
                (fitness - fitness[0])[1:],
                color=COLOURS[number % len(COLOURS)],
                alpha=0.35 + 0.65 * (count + 1) / len(searched),
                marker=".",
                label=None if count else f"{name}, later phases darker",
            )
    axes.axhline(0, color="grey", linewidth=0.8)
    axes.set_xscale("log")
    if most > 0:  # what is much too long would hide the rest
        axes.set_ylim(bottom=max(axes.get_ylim()[0], -most))
    axes.set(xlabel="step ratio: length of the update in mutations", ylabel=label)
    save(figure, axes, path)


def draw_parents(frames: Mapping[str, pd.DataFrame], label: str, path: Path) -> None:
    """Draw the fitness of the parents of each run that has several: a band from the worst to the best, and the mean."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for number, (name, frame) in enumerate(frames.items()):
        if "parents" not in frame:
            continue
        colour, epoch = COLOURS[number % len(COLOURS)], frame["epoch"]
        lowest, mean, highest = (frame[f"parents_fitness_{part}"].astype(float) for part in ("min", "mean", "max"))
        axes.fill_between(epoch, lowest, highest, color=colour, alpha=0.2, linewidth=0)
        axes.plot(epoch, mean, color=colour, linewidth=1, linestyle="--")
        axes.plot(epoch, highest, color=colour, linewidth=1.8, label=name)
        evolve = frame[frame["kind"] == "evolve"]
        axes.scatter(evolve["epoch"], highest[evolve.index], color=colour, s=46, zorder=3)
    axes.scatter([], [], color="grey", s=46, label="after an evolve phase")
    axes.plot([], [], color="grey", linewidth=1, linestyle="--", label="mean of the parents")
    axes.set(xlabel="epoch", ylabel=label.split(":", maxsplit=1)[0])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    save(figure, axes, path)


def save(figure: Figure, axes: Axes, path: Path) -> None:
    """Write a picture as all of them look."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
