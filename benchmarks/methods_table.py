"""Tables of the rows of `benchmarks/methods.py`: `python benchmarks/methods_table.py ROWS ... > docs/methods.md`."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

BUDGETS = (1_000_000, 4_000_000)
POPULATIONS = (50, 200, 1000, 5000)
HEAD = """# What a budget of forwarded images buys

`benchmarks/methods_table.py` makes this page from the rows of `benchmarks/methods.py`. Parents are ResNet18, overfit by
14 epochs of SGD on 10,000 CIFAR-10 (JPEG) images. A way scores its members on evolution images: common to all members,
or own to each mirrored pair. For one update all members are scored once, and every smaller population is a part of
the largest one, so populations differ in nothing else. With 8 generations, each has its own members and images, and the
parent moves eight times.

The members of the first parent were scored in fp32, those of the others in bf16. The rows also contain one parent, not
in the tables, whose first way was scored in both: the accuracies differ by less than 0.2 points.

The length of an update is searched on 2,048 other images, which *images* does not count: with 10 to 15 members for
one update, with about 35 for 8 generations.

The tables show changes: of the cross-entropy, and of accuracy in tenths of a point. *Scored* are up to 4,096 images
that scored members, *unscored* are 4,096 images of the validation split, *test* are the 10,000 test images. Values are
means over the parents, with minimum and maximum. On 10,000 images a change of 3 is about the size of chance for one
parent. *Cosine* is between the update and the direction in which the loss of 1,024 scored images falls; *over chance*
is its ratio to sqrt(pairs / parameters); *gain* is the improvement on unscored images per million images forwarded, in
tenths of a point or in loss.
"""


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """Return the rows of updates with the changes that they made. Changes of accuracy are in tenths of a point."""
    rows = rows[rows["fitness"].notna()].copy()
    for on in ("scored", "unscored", "test"):
        rows[f"{on} loss"] = rows[f"{on}_loss"] - rows[f"{on}_loss_before"]
        rows[f"{on} accuracy"] = (rows[f"{on}_accuracy"] - rows[f"{on}_accuracy_before"]) * 1000
    better = rows["unscored accuracy"].where(rows["fitness"] == "accuracy", -rows["unscored loss"])
    rows["gain per million"] = better / rows["images"] * 1e6
    whole = ~rows["way"].str.contains("trajectory|guided")  # this chance does not hold in a subspace
    rows["of chance"] = (rows["cosine"] / rows["cosine_expected"]).where(whole)
    return rows


def spread(values: pd.Series, digits: int) -> str:
    """Return the text of a mean, with minimum and maximum if there are several values."""
    values = values.dropna()
    if values.empty:
        return ""
    text = f"{values.mean():+.{digits}f}"
    return text if len(values) == 1 else f"{text} ({values.min():+.{digits}f} to {values.max():+.{digits}f})"


def table(head: list[str], lines: list[list[str]]) -> list[str]:
    rule = "|" + " --- |" * len(head)
    return ["| " + " | ".join(head) + " |", rule, *("| " + " | ".join(line) + " |" for line in lines), ""]


def by_budget(rows: pd.DataFrame, fitness: str) -> list[str]:
    """Return the table of every way at each budget."""
    head = ["way", "images", "members", "scored loss", "accuracy", "unscored loss", "accuracy", "test loss", "accuracy"]
    lines = []
    for budget in BUDGETS:
        near = rows[(rows["fitness"] == fitness) & ((rows["images"] / budget - 1).abs() < 0.01)]
        for way, group in near.groupby("way", sort=False):
            members = f"{group['population'].iloc[0]:,.0f}"
            cells = [str(way), f"{budget / 1e6:.0f} M", f"8 x {members}" if "8 generations" in str(way) else members]
            for on in ("scored", "unscored", "test"):
                cells += [spread(group[f"{on} loss"], 3), spread(group[f"{on} accuracy"], 1)]
            cells += [f"{group['test_accuracy'].mean():.4f}", spread(group["cosine"], 4), spread(group["of chance"], 2)]
            lines.append([*cells, spread(group["gain per million"], 3)])
    return table([*head, "test accuracy reached", "cosine", "over chance", "gain"], lines)


def by_population(rows: pd.DataFrame, fitness: str) -> list[str]:
    """Return the table of each way's gain on the test images by population, whatever it costs."""
    lines = []
    for way, group in rows[rows["fitness"] == fitness].groupby("way", sort=False):
        cells = [str(way)]
        for population in POPULATIONS:
            found = group[group["population"] == population]
            cells.append(f"{spread(found['test loss'], 3)}, {spread(found['test accuracy'], 1)}" if len(found) else "")
        if any(cells[1:]):
            lines.append(cells)
    return table(["test loss, accuracy", *(f"K = {population:,}" for population in POPULATIONS)], lines)


def whole(rows: pd.DataFrame) -> pd.DataFrame:
    """Keep the rows of the parents on which all ways were tried, without duplicates: a program that was started again
    has written some rows twice."""
    key = ["width", "precision", "weights"]
    rows = rows.drop_duplicates([*key, "way", "population", "images", "fitness"], keep="last")
    ways = rows[rows["last"].eq(1)].groupby(key)["way"].nunique()
    return rows.set_index(key)[lambda frame: frame.index.map(ways) == ways.max()].reset_index()


def text(rows: pd.DataFrame) -> str:
    """Return all tables, for each width of the network."""
    rows, lines = whole(rows), [HEAD]
    for width, some in rows.groupby("width"):
        parents = some["weights"].nunique()
        lines += [f"## ResNet18 of width {width}, {parents} parent{'s' * (parents > 1)}", ""]
        still = some[some["fitness"].isna() & some["test_loss"].notna()]
        means = [
            [str(way), f"{group['test_loss'].mean():.3f}", f"{group['test_accuracy'].mean():.4f}"]
            for way, group in still.groupby("way", sort=False)
        ]
        lines += table(["without evolution", "test loss", "test accuracy"], means)
        found = changes(some)
        for fitness in ("accuracy", "loss"):
            lines += [f"### By {fitness}", "", *by_budget(found, fitness), *by_population(found, fitness)]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, nargs="+", help="rows.jsonl of benchmarks/methods.py")
    print(text(pd.concat([pd.read_json(path, lines=True) for path in parser.parse_args().rows])), end="")


if __name__ == "__main__":
    main()
