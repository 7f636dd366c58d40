"""The tables and pictures of `spartan scale`, made from its rows alone."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

from spartan_ray.report.plots import COLOURS, label_lines, save
from spartan_ray.report.tables import markdown
from spartan_ray.study.statistics import interval

# Prefix of the ways that start from the average.
OF_AVERAGE = "average-"

ABOUT = """How one update changes a parent, at the length found by a search on other images. Values are means with 95 \
% intervals (Student's t) over {parents} parents, or as many as a row says; a parent's value is the mean of its \
draws. Bold: the interval excludes 0. That happens by chance to about one value in 20, and all ways share the \
parents.

A way is named after what it moves and what scores it: *all* parameters, those of *batchnorm*, or the point in the \
span of the parent's last epochs (*trajectory*); *average* moves all parameters of the average of those epochs, and \
its changes are relative to that average (the picture adds the average's own gain over the parent). Members are \
scored on *common* images, the same for all, or each mirrored pair on its *own*.

*Images* are those forwarded to score the members and to search the length. *Scored* images are up to 4,096 of those \
that can score members; few members with images of their own see only some of them. *Unscored* images are of the \
validation split, which scored nothing. Populations are nested: draw d of K members consists of members d K to (d + \
1) K - 1 of the largest population. *Over* the smallest population is the difference in test change, parent by \
parent. *Spread* is the standard deviation of the test change between the draws of a parent. *Cosine* is the cosine \
between the update and the direction in which the loss of all images that can score members falls; *over chance* is \
its ratio to sqrt(pairs / parameters). *Gain* is the improvement on unscored images per million images forwarded.
"""


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return one row per parent, way, population and fitness, with the means of its draws."""
    found = rows[rows["fitness"].notna()].copy()
    for on in ("scored", "unscored", "test"):
        for what in ("loss", "accuracy"):
            found[f"{on} {what}"] = found[f"{on}_{what}"] - found[f"{on}_{what}_before"]
    found["chance"] = found["cosine"] / found["cosine_expected"]
    key = ["fitness", "way", "population", "weights"]
    groups = found.groupby(key, sort=False)
    means = groups.mean(numeric_only=True)
    for what in ("loss", "accuracy"):
        means[f"spread {what}"] = groups[f"test {what}"].std()
    return means.reset_index()


def table(means: pd.DataFrame, fitness: str) -> pd.DataFrame:
    """Return one row per way and population: the ways in the order of `means`, populations ascending."""
    factor, digits, unit = (100.0, 2, "points") if fitness == "accuracy" else (1.0, 3, "loss")
    lines = []
    means = means[means["fitness"] == fitness].set_index("weights")
    smallest = means["population"].min()
    ways = means.groupby("way", sort=False)
    groups = [(way, size, group) for way, mine in ways for size, group in mine.groupby("population")]
    for way, population, group in groups:
        shown = {
            "way": str(way),
            "K": f"{population:,.0f}",
            "parents": str(len(group)),
            "images, M": f"{group['images'].mean() / 1e6:.2f}",
        }
        for on in ("test", "unscored", "scored"):
            shown[f"{on}, {unit}"] = interval(group[f"{on} {fitness}"]).bold(digits, factor)
        small = means[(means["way"] == way) & (means["population"] == smallest)]
        more = (group[f"test {fitness}"] - small[f"test {fitness}"]).dropna()
        shown[f"over K = {smallest:,.0f}"] = "" if population == smallest else interval(more).bold(digits, factor)
        other = "loss" if fitness == "accuracy" else "accuracy"
        other_factor, other_digits = (1.0, 3) if other == "loss" else (100.0, 2)
        shown[f"test {other}"] = interval(group[f"test {other}"]).bold(other_digits, other_factor)
        spread = math.sqrt(float((group[f"spread {fitness}"] ** 2).mean()))
        shown["spread"] = "" if math.isnan(spread) else f"{spread * factor:.{digits}f}"
        known = group["cosine"].notna().any()  # there is no update if all members score the same
        shown["cosine"] = f"{group['cosine'].mean():+.4f}" if known else ""
        in_subspace = str(way).startswith("trajectory")
        shown["over chance"] = f"{group['chance'].mean():+.2f}" if known and not in_subspace else ""
        better = group[f"unscored {fitness}"] * (1 if fitness == "accuracy" else -1)
        shown["gain"] = f"{float((better / group['images']).mean()) * 1e6 * factor:+.{digits}f}"
        lines.append(shown)
    return pd.DataFrame(lines)


def _still(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows without evolution."""
    still = rows[rows["fitness"].isna()] if "fitness" in rows else rows
    return still.drop_duplicates(["weights", "way"], keep="last")


def levels(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the gain of each baseline over each parent, with columns `way`, `weights`, `loss`, `accuracy`, and `own`:
    whether it is made of the parent's own epochs."""
    still = _still(rows)
    parent = still[still["way"] == "parent"].set_index("weights")
    found = still[still["way"] != "parent"].copy()
    for what in ("loss", "accuracy"):
        found[what] = found[f"test_{what}"] - found["weights"].map(parent[f"test_{what}"]).astype(float)
    found["own"] = found["made"] == found["weights"]
    return found[["way", "weights", "loss", "accuracy", "own"]]


def latest(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep one parent per seed, that with the most epochs and of those the last: others of its seed are not
    independent. Of each way keep what it is now, the `made` of its last row."""
    rows = rows[rows["epoch"] == rows.groupby("seed")["epoch"].transform("max")]
    rows = rows[rows["weights"] == rows.groupby("seed")["weights"].transform("last")]
    return rows[rows["made"] == rows.groupby(["weights", "way"])["made"].transform("last")]


def write_up(rows: pd.DataFrame, name: str) -> str:
    """Return all tables as Markdown."""
    rows = latest(rows)
    parents = rows["weights"].nunique()
    still, over = _still(rows), levels(rows)
    lines = []
    for way, group in still.groupby("way", sort=False):
        mine = over[over["way"] == way]
        lines.append(
            {
                "without evolution": str(way),
                "test accuracy, %": interval(group["test_accuracy"]).text(2, 100.0),
                "over the parent, points": interval(mine["accuracy"]).bold(2, 100.0) if len(mine) else "",
                "test loss": interval(group["test_loss"]).text(3),
                "over the parent": interval(mine["loss"]).bold(3, 1.0) if len(mine) else "",
            }
        )
    parts = [f"# {name}\n", ABOUT.format(parents=parents), markdown(pd.DataFrame(lines))]
    for fitness in ("accuracy", "loss") if "fitness" in rows else ():
        parts += [f"## By {fitness}\n", markdown(table(changes(rows), fitness)), f"![test {fitness}]({fitness}.png)\n"]
    return "\n".join(parts)


def draw(rows: pd.DataFrame, fitness: str, path: Path) -> Axes:
    """Draw the gain on the test images over the population size: one line per way, at the sizes that all its parents
    have, and the baselines as grey levels. One that is far above the ways is only named, with its gain. Return the
    axes."""
    figure, axes = plt.subplots(figsize=(8.6, 5.0), layout="constrained")
    shown = latest(rows)
    over, means, sign = levels(shown), changes(shown), 1 if fitness == "accuracy" else -1
    factor = 100 if fitness == "accuracy" else 1
    mine = means[means["fitness"] == fitness]
    averages, labels = over[over["own"] & over["way"].str.startswith("average")], {}
    for number, (way, group) in enumerate(mine.groupby("way", sort=False)):
        if str(way).startswith(OF_AVERAGE):
            average = averages.groupby("weights")[fitness].last()
            group = group.assign(**{f"test {fitness}": group[f"test {fitness}"] + group["weights"].map(average)})
        parents = group.groupby("population")["weights"].transform("size")
        by_size = group[parents == parents.max()].groupby("population")[f"test {fitness}"]
        mean_P, colour = by_size.mean() * sign * factor, COLOURS[number % len(COLOURS)]
        low_P, high_P = by_size.min() * sign * factor, by_size.max() * sign * factor
        axes.plot(mean_P.index, mean_P, color=colour, marker="o", markersize=4, linewidth=1.8)
        axes.fill_between(mean_P.index, low_P, high_P, color=colour, alpha=0.12, linewidth=0)
        labels[str(way)] = (mean_P.index[-1], mean_P.iloc[-1], colour)
    # Of the parent's own averages only the longest is drawn, the one that ways start from.
    drawn = over[~over["own"] | over["way"].isin(averages["way"].unique()[-1:])]
    axes.axhline(0, color="black", linewidth=0.8)
    high = 1.1 * axes.get_ylim()[1]  # the levels of the parent's own averages are about as high as the ways from them
    for way, gains in drawn.groupby("way", sort=False)[fitness]:
        level = float(gains.mean()) * sign * factor
        name = str(way) if level < high else f"↑ {way}: {level:.{1 if fitness == 'accuracy' else 2}f}"
        if level < high:
            axes.axhline(level, color="grey", linewidth=1.1, linestyle="--")
        labels[name] = (0.0, level, "dimgrey")
    axes.set_ylim(top=high)
    axes.set_xscale("log")
    sizes = sorted(int(size) for size in np.unique(mine["population"])) if len(mine) else []
    axes.set_xticks(sizes, [f"{size:,}" for size in sizes])
    axes.minorticks_off()
    unit = "gain in test accuracy, points" if fitness == "accuracy" else "reduction of test loss"
    axes.set(xlabel=f"population, scored by {fitness} (band: minimum to maximum of the parents)", ylabel=unit)
    label_lines(axes, labels, longest=40)
    save(figure, axes, path, rows)
    return axes
