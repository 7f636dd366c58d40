"""What `benchmarks/methods.py` found, as tables: `python benchmarks/methods_table.py FOLDER/rows.jsonl`.

Each number is a mean over parents, with the least and the most where it is of the test images."""

from __future__ import annotations

import argparse
from pathlib import Path

import pandas as pd

BUDGETS = (1_000_000, 4_000_000)
POPULATIONS = (50, 200, 1000, 5000)


def changes(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of updates, with the changes that they made, in thousandths where they are of accuracy."""
    rows = rows[rows["fitness"].notna()].copy()
    for on in ("scored", "unscored", "test"):
        rows[f"{on} loss"] = rows[f"{on}_loss"] - rows[f"{on}_loss_before"]
        rows[f"{on} accuracy"] = (rows[f"{on}_accuracy"] - rows[f"{on}_accuracy_before"]) * 1000
    better = rows["unscored accuracy"].where(rows["fitness"] == "accuracy", -rows["unscored loss"])
    rows["gain per million"] = better / rows["images"] * 1e6
    whole = ~rows["way"].str.contains("trajectory|guided")  # chance is another one in a subspace
    rows["of chance"] = (rows["cosine"] / rows["cosine_expected"]).where(whole)
    return rows


def spread(values: pd.Series, digits: int) -> str:
    """A mean, and of several the least and the most."""
    values = values.dropna()
    if values.empty:
        return ""
    text = f"{values.mean():+.{digits}f}"
    return text if len(values) == 1 else f"{text} ({values.min():+.{digits}f} to {values.max():+.{digits}f})"


def print_table(head: list[str], lines: list[list[str]]) -> None:
    print("| " + " | ".join(head) + " |\n|" + " --- |" * len(head))
    for line in lines:
        print("| " + " | ".join(line) + " |")
    print()


def by_budget(rows: pd.DataFrame, fitness: str) -> None:
    """Every way at each budget."""
    head = ["way", "images", "members", "scored loss", "accuracy", "unscored loss", "accuracy", "test loss", "accuracy"]
    lines = []
    for budget in BUDGETS:
        near = rows[(rows["fitness"] == fitness) & ((rows["images"] / budget - 1).abs() < 0.01)]
        for way, group in near.groupby("way", sort=False):
            cells = [str(way), f"{budget / 1e6:.0f} M", f"{group['population'].iloc[0]:,.0f}"]
            for on in ("scored", "unscored", "test"):
                cells += [spread(group[f"{on} loss"], 3), spread(group[f"{on} accuracy"], 1)]
            cells += [
                f"{group['test_accuracy'].mean():.4f}",
                spread(group["cosine"], 4),
                spread(group["of chance"], 2),
                spread(group["gain per million"], 4),
            ]
            lines.append(cells)
    print_table([*head, "test accuracy reached", "cosine", "over chance", "gain per million images"], lines)


def by_population(rows: pd.DataFrame, fitness: str) -> None:
    """What every way gains on the test images from a larger population, whatever it costs."""
    lines = []
    for way, group in rows[rows["fitness"] == fitness].groupby("way", sort=False):
        cells = [str(way)]
        for population in POPULATIONS:
            found = group[group["population"] == population]
            cells.append(f"{spread(found['test loss'], 3)}, {spread(found['test accuracy'], 1)}" if len(found) else "")
        if any(cells[1:]):
            lines.append(cells)
    print_table(["way", *(f"K = {population:,}" for population in POPULATIONS)], lines)


def print_tables(rows: pd.DataFrame) -> None:
    """All that is known of the parents of a width."""
    still = rows[rows["fitness"].isna() & rows["test_loss"].notna()]
    lines = [
        [str(way), f"{group['test_loss'].mean():.3f}", f"{group['test_accuracy'].mean():.4f}"]
        for way, group in still.groupby("way", sort=False)
    ]
    print_table(["no evolution", "test loss", "test accuracy"], lines)
    found = changes(rows)
    for fitness in ("accuracy", "loss"):
        print(f"By {fitness}: changes of loss, and of accuracy in tenths of a point\n")
        by_budget(found, fitness)
        by_population(found, fitness)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("rows", type=Path, help="rows.jsonl of benchmarks/methods.py")
    for width, rows in pd.read_json(parser.parse_args().rows, lines=True).groupby("width"):
        print(f"ResNet18 of width {width}, {rows['weights'].nunique()} parents\n")
        print_tables(rows)


if __name__ == "__main__":
    main()
