"""Pictures of a study: a measure over the epochs, as the mean over the seeds with its interval."""

from __future__ import annotations

from pathlib import Path

import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from spartan_ray.report.plots import COLOURS, save
from spartan_ray.study.plan import Picture
from spartan_ray.study.statistics import interval


def draw(rows: pd.DataFrame, picture: Picture, path: Path) -> Axes:
    """Draw a picture to a PNG file and return its axes. It shows the methods that have rows, at the epochs that all
    seeds of a method have."""
    figure, axes = plt.subplots(figsize=(7.2, 4.2), layout="constrained")
    for number, method in enumerate(picture.methods):
        mine = rows[(rows["group"] == picture.group) & (rows["method"] == method)]
        table = mine.pivot(index="epoch", columns="seed", values=picture.measure).dropna()
        if table.empty:
            continue
        bands = [interval(values) for _, values in table.iterrows()]
        mean_E = [band.mean for band in bands]
        colour = COLOURS[number % len(COLOURS)]
        axes.plot(table.index, mean_E, color=colour, linewidth=1.8, label=f"{method} ({bands[0].count} seeds)")
        low_E, high_E = ([band.mean + sign * band.half for band in bands] for sign in (-1, 1))
        axes.fill_between(table.index, low_E, high_E, color=colour, alpha=0.2, linewidth=0)
        phases = sorted(set(mine.loc[mine["kind"] == "evolve", "epoch"]) & set(table.index))
        axes.scatter(phases, [mean_E[table.index.get_loc(epoch)] for epoch in phases], color=colour, s=30, zorder=3)
    axes.set(xlabel="epoch (dots: evolve phases)", ylabel=picture.measure.replace("_", " "))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, steps=[1, 2, 5, 10]))
    save(figure, axes, path, rows)
    return axes
