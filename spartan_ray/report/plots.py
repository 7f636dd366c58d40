"""Charts of runs, as PNG files and as SVG for the page."""

from __future__ import annotations

import hashlib
import io
import itertools
import math
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import pandas as pd
from matplotlib import pyplot as plt
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from spartan_ray.report.reading import images_forwarded

# Text and axes, and what lies behind them. In an SVG they become the colours of the page, light or dark.
INK, PAGE = "#333334", "#fefefe"
# Okabe and Ito's colours, which colour-blind readers can tell apart. The page makes the blue lighter if it is dark.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", INK)
# Width and height in inches, and the longest label, of a chart beside text and on a telephone.
WIDE, NARROW = ((5.9, 3.7), 24), ((3.45, 3.1), 13)

Draw = Callable[[Axes], None]
Frames = Mapping[str, pd.DataFrame]


def colours(names: Any) -> dict[str, str]:
    """Return a colour for each name."""
    return dict(zip(names, itertools.cycle(COLOURS)))


def draw_measure(frames: Frames, measure: str, label: str) -> Draw:
    """Chart a column of the metrics over epochs, one line per run. Dots mark evolve phases; hollow ones left the parent
    unmoved."""

    def draw(axes: Axes) -> None:
        lines = {}
        for (name, frame), colour in zip(frames.items(), colours(frames).values(), strict=True):
            value = frame[measure].astype(float)  # null, a value that was not finite, is a gap
            axes.plot(frame["epoch"], value, color=colour, linewidth=1.8)
            lines[name] = (frame["epoch"].iloc[-1], value.iloc[-1], colour)
            mark_phases(axes, frame, frame["epoch"], value, colour)
        over_epochs(axes, label)
        label_lines(axes, lines)

    return draw


def draw_budget(frames: Frames) -> Draw:
    """Chart test accuracy over the images forwarded so far, for training and for scoring."""

    def draw(axes: Axes) -> None:
        lines = {}
        for (name, frame), colour in zip(frames.items(), colours(frames).values(), strict=True):
            trained, scored = images_forwarded(frame)
            images = (trained + scored).cumsum() / 1e6
            axes.plot(images, frame["test_accuracy"], color=colour, linewidth=1.8)
            lines[name] = (images.iloc[-1], frame["test_accuracy"].iloc[-1], colour)
            mark_phases(axes, frame, images, frame["test_accuracy"], colour)
        axes.set(xlabel="million images forwarded", ylabel="test accuracy")
        label_lines(axes, lines)

    return draw


def draw_members(frame: pd.DataFrame, fitness: Mapping[int, NDArray[np.float64]], colour: str) -> Draw:
    """Chart the fitness of the members of each phase as a distribution, with the parent before (line) and after (dot)
    on the same images. `fitness` is by epoch, K values each."""

    def draw(axes: Axes) -> None:
        phases = frame[frame["kind"] == "evolve"].set_index("epoch")
        for place, (epoch, fitness_K) in enumerate(fitness.items()):
            finite_K = fitness_K[np.isfinite(fitness_K)]
            if len(finite_K):
                count_B, edge_B = np.histogram(finite_K, bins=bins(finite_K))
                fitness_E, width_E = np.repeat(edge_B, 2)[1:-1], np.repeat(0.75 * count_B / count_B.max(), 2)
                axes.fill_betweenx(fitness_E, place, place + width_E, color=colour, alpha=0.35, linewidth=0.8)
            before, after = (phases[f"parent_fitness_{when}"].astype(float)[epoch] for when in ("before", "after"))
            names = (None, None) if place else ("parent before", "parent after")
            axes.plot([place, place + 0.8], [before, before], color=INK, linewidth=1.4, label=names[0])
            axes.plot(place + 0.8, after, "o", color=colour, markersize=5, label=names[1])
        axes.set_xticks([place + 0.4 for place in range(len(fitness))], [str(epoch) for epoch in fitness])
        axes.set(xlabel="epoch of the phase", ylabel="fitness")
        axes.legend(frameon=False, fontsize=9, loc="best")

    return draw


def bins(value_N: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the edges of about 20 bins, or fewer for few values. Values that are multiples of a step, as accuracies
    are, fall equally many steps to a bin: otherwise the bins would make a comb of them."""
    distinct = np.unique(value_N)
    count = min(20, max(5, len(value_N) // 6))
    if len(distinct) < 2:
        return np.linspace(distinct[0] - 1e-9, distinct[0] + 1e-9, 2)
    extent, step = distinct[-1] - distinct[0], float(np.diff(distinct).min())
    if extent / step > 1e4:
        return np.linspace(distinct[0], distinct[-1], count + 1)
    width = math.ceil(extent / step / count) * step
    edge_B: NDArray[np.float64] = distinct[0] - step / 2 + width * np.arange(math.ceil((extent + step) / width) + 1)
    return edge_B


def draw_search(frames: Frames) -> Draw:
    """Chart what step search saw: the gain in fitness for each length that it tried, one line per phase."""

    def draw(axes: Axes) -> None:
        most, lines = 0.0, {}
        for (name, frame), colour in zip(frames.items(), colours(frames).values(), strict=True):
            searched = frame[frame["search_ratios"].notna()] if "search_ratios" in frame else frame[:0]
            for count, phase in enumerate(searched.to_dict("records")):
                tried = pd.DataFrame({"ratio": phase["search_ratios"], "fitness": phase["search_fitness"]}, dtype=float)
                tried["gain"] = tried["fitness"] - tried["fitness"].iloc[0]  # the first is the parent, of ratio 0
                tried = tried[1:].dropna()  # null, a fitness that was not finite, is a gap
                if len(tried):
                    alpha = 0.35 + 0.65 * (count + 1) / len(searched)
                    axes.plot(tried["ratio"], tried["gain"], color=colour, alpha=alpha, marker=".")
                    most = max(most, tried["gain"].max())
                    lines[name] = (tried["ratio"].iloc[-1], tried["gain"].iloc[-1], colour)
        axes.axhline(0, color=INK, linewidth=0.8)
        if lines:
            axes.set_xscale("log")
        if most > 0:  # lengths that are much too long would hide the rest
            axes.set_ylim(bottom=max(axes.get_ylim()[0], -most))
        axes.set(xlabel="step ratio", ylabel="gain in fitness")
        label_lines(axes, lines)

    return draw


def other_images(frame: pd.DataFrame) -> pd.DataFrame:
    """Return the phases whose gain is known on images that did not choose the direction, with the columns `epoch`,
    `scored` (gain on the images that scored the members) and `other`."""
    rows = []
    for phase in frame[frame["kind"] == "evolve"].to_dict("records"):
        pairs = [(phase.get("confirm_fitness_before"), phase.get("confirm_fitness_after"))]
        searched, ratio = phase.get("search_ratios"), phase.get("step_ratio")
        if isinstance(searched, list) and searched and phase["accepted"] and ratio is not None:
            taken = int(np.argmin([np.inf if tried is None else abs(tried - ratio) for tried in searched]))
            pairs.append((phase["search_fitness"][0], phase["search_fitness"][taken]))
        for before, after in pairs:
            if not (pd.isna(before) or pd.isna(after)):
                scored = phase["parent_fitness_after"] - phase["parent_fitness_before"]
                rows.append({"epoch": phase["epoch"], "scored": scored, "other": after - before})
                break
    return pd.DataFrame(rows, columns=["epoch", "scored", "other"])


def draw_confirmed(frames: Frames) -> Draw:
    """Chart each phase's gain on the images that scored its members (hollow) beside that on other images (filled)."""

    def draw(axes: Axes) -> None:
        lines = {}
        shift = 0.0
        for (name, frame), colour in zip(frames.items(), colours(frames).values(), strict=True):
            found = other_images(frame)
            if found.empty:
                continue
            epoch = found["epoch"] + shift
            axes.vlines(epoch, found["scored"], found["other"], color=colour, alpha=0.5)
            axes.scatter(epoch, found["scored"], facecolor=PAGE, edgecolor=colour, s=36, zorder=3)
            axes.scatter(epoch, found["other"], color=colour, s=36, zorder=3)
            lines[name] = (epoch.iloc[-1], found["other"].iloc[-1], colour)
            shift += 0.25
        axes.axhline(0, color=INK, linewidth=0.8)
        over_epochs(axes, "gain in fitness")
        label_lines(axes, lines)

    return draw


def draw_parents(frames: Frames) -> Draw:
    """Chart the fitness of the parents of runs that have several: a band from worst to best, and their mean dashed."""

    def draw(axes: Axes) -> None:
        lines = {}
        for (name, frame), colour in zip(frames.items(), colours(frames).values(), strict=True):
            if "parents" not in frame:
                continue
            lowest, mean, highest = (frame[f"parents_fitness_{part}"].astype(float) for part in ("min", "mean", "max"))
            axes.fill_between(frame["epoch"], lowest, highest, color=colour, alpha=0.2, linewidth=0)
            axes.plot(frame["epoch"], mean, color=colour, linewidth=1, linestyle="--")
            axes.plot(frame["epoch"], highest, color=colour, linewidth=1.8)
            mark_phases(axes, frame, frame["epoch"], highest, colour)
            lines[name] = (frame["epoch"].iloc[-1], highest.iloc[-1], colour)
        over_epochs(axes, "fitness")
        label_lines(axes, lines)

    return draw


def mark_phases(axes: Axes, frame: pd.DataFrame, x: pd.Series[Any], y: pd.Series[Any], colour: str) -> None:
    """Mark the evolve phases on a line. Hollow dots left the parent unmoved."""
    evolve = frame["kind"] == "evolve"
    accepted = frame["accepted"].eq(True) if "accepted" in frame else evolve
    for here, face in ((evolve & accepted, colour), (evolve & ~accepted, PAGE)):
        axes.scatter(x[here], y[here], facecolor=face, edgecolor=colour, s=36, zorder=3)


def over_epochs(axes: Axes, label: str) -> None:
    axes.set(xlabel="epoch", ylabel=label)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def label_lines(axes: Axes, lines: Mapping[str, tuple[float, float, str]], longest: int | None = None) -> None:
    """Write each line's name beside its end, (x, y, colour), moved apart where they would overlap. A single line needs
    none. What all names begin with, up to a dot, is left out, and so is what is over `longest` characters; None means
    what the figure has room for."""
    if len(lines) < 2:
        return
    low, high = axes.get_ylim()
    width, height = (72 * inches for inches in axes.get_figure(root=True).get_size_inches())  # type: ignore[union-attr]
    gap, size = 11 / (0.78 * height), 9  # as a share of the axes, and in points

    def share(y: float) -> float:
        """The height of a line's end in the axes; one that leaves them is labelled at the edge."""
        return min(max((y - low) / (high - low), 0.0), 1.0) if np.isfinite(y) else 0.0

    ends = sorted((share(y), name) for name, (_, y, _) in lines.items())
    places = [end for end, _ in ends]
    for number in range(1, len(places)):
        places[number] = max(places[number], places[number - 1] + gap)
    over = max(0, places[-1] - 1)
    places[-1] -= over
    for number in range(len(places) - 2, -1, -1):
        places[number] = min(places[number], places[number + 1] - gap)
    longest = longest or (NARROW if width < 360 else WIDE)[1]
    first, last = min(lines), max(lines)
    shared = next((place for place, pair in enumerate(zip(first, last, strict=False)) if pair[0] != pair[1]), 0)
    shared = first[:shared].rfind(".") + 1
    where: dict[str, Any] = {
        "xycoords": "axes fraction",
        "va": "center",
        "annotation_clip": False,
        "fontsize": size,
        "parse_math": False,
    }
    for place, (_, name) in zip(places, ends, strict=True):
        text = name[shared:]
        text = text if len(text) <= longest else f"{text[: longest - 1]}…"
        axes.annotate(text, (1.02, place), color=lines[name][2], **where)


def figure_of(draw: Draw, size: tuple[float, float]) -> Figure:
    """Draw a chart on a figure of a size in inches."""
    style: dict[Any, Any] = dict.fromkeys(
        ("text.color", "axes.labelcolor", "axes.edgecolor", "xtick.color", "ytick.color"), INK
    )
    with plt.rc_context(style | {"font.size": 10, "axes.spines.top": False, "axes.spines.right": False}):
        figure, axes = plt.subplots(figsize=size, layout="constrained")
        draw(axes)
        axes.grid(alpha=0.25)
    return figure


def png(draw: Draw, path: Path) -> None:
    """Write a chart to a PNG."""
    figure = figure_of(draw, (7.2, 4.2))
    figure.savefig(path, dpi=150)
    plt.close(figure)


def digest(rows: pd.DataFrame) -> str:
    """Return the digest of a picture's rows, which its file holds."""
    return hashlib.sha256(rows.to_csv(index=False).encode()).hexdigest()


def save(figure: Figure, axes: Axes, path: Path, rows: pd.DataFrame) -> None:
    """Write a figure with a legend to a PNG, in the style of all charts, with the digest of its rows."""
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    if axes.get_legend_handles_labels()[0]:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150, metadata={"Rows": digest(rows)})
    plt.close(figure)


def svg(draw: Draw, size: tuple[float, float]) -> str:
    """Return a chart as an SVG element that takes its colours from the page that it stands in."""
    figure, content = figure_of(draw, size), io.StringIO()
    with plt.rc_context({"svg.fonttype": "none", "svg.hashsalt": "spartan"}):
        figure.savefig(content, format="svg", transparent=True, metadata={"Date": None})
    plt.close(figure)
    text = content.getvalue()
    text = re.sub(r"<metadata>.*?</metadata>", "", text[text.index("<svg") :], flags=re.DOTALL)
    text = re.sub(r' id="[a-zA-Z0-9.]+_\d+"', "", text)  # several charts stand in one page
    opening, rest = text.split(">", maxsplit=1)
    opening = re.sub(r' (width|height)="[^"]*"', "", opening)  # as wide as the page lets it be
    text = f"{opening}>{rest}".replace(INK, "currentColor").replace(PAGE, "var(--page)")
    return text.replace(COLOURS[0].lower(), "var(--blue)")
