"""What a benchmark found: figures with their spread, the targets, the table and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from typing import Any

Spread = dict[str, float]
Results = dict[str, Any]


def spread(values: Iterable[float]) -> Spread:
    """Median and range of the repeats, to four digits."""
    found = list(values)
    figures = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()}


def said(figure: Spread, digits: int = 3) -> str:
    """`median (min - max)`, one number where they agree."""

    def number(value: float) -> str:
        return f"{value:,.0f}" if abs(value) >= 10 ** (digits - 1) else f"{value:.{digits}g}"

    middle, low, high = (number(figure[name]) for name in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low} - {high})"


# Name, figure, wanted, whether it is to be at least or at most that, and why it falls short where it does.
Target = tuple[str, float, float, bool]


def targets(results: Results) -> list[Results]:
    """What the project aims at, and whether this machine reached it."""
    rates = {(row["fitness_images"], row["population"]): row for row in results["scoring"]}

    def efficiency(images: int) -> float:
        return max(float(row["efficiency"]["median"]) for (of, _), row in rates.items() if of == images)

    workers = max(row["workers"] for row in results["update"])
    (update,) = (row for row in results["update"] if row["workers"] == workers)
    scoring_1000 = 1000 * 2048 / max(row["images_per_second"]["median"] for row in results["scaling"])
    memory = results["memory"]
    growth = max(memory[-1][part]["median"] / memory[0][part]["median"] - 1 for part in ("driver_mb", "worker_mb"))
    found = [
        ("scoring, 2,048 images, over the bare forward pass", efficiency(2048), 0.97, True),
        ("scoring, 2,048 images, over torchvision's module", results["over_torchvision"]["median"], 1.10, True),
        ("scoring, 512 images, over the bare forward pass", efficiency(512), 0.94, True),
        (
            "update of 1,000 members over scoring them on 2,048 images",
            update["seconds_per_1000_members"]["median"] / scoring_1000,
            0.01,
            False,
        ),
        ("SGD epoch, over torchvision's module", results["sgd"]["ratio"]["median"], 1.6, True),
        *(
            (f"{row['workers']} workers over one", row["speedup"]["median"], 0.95 * row["workers"], True)
            for row in results["scaling"]
            if row["workers"] > 1
        ),
        ("free members a second", results["dispatch"]["members_per_second"]["median"], 50_000, True),
        ("parents through the object store a generation", results["broadcast"]["parents_per_generation"], 2.1, False),
        (f"memory at {memory[-1]['population']:,} members over {memory[0]['population']}, growth", growth, 0.05, False),
        ("PSS of a ResNet18 worker, MB", results["resnet18_worker_mb"]["max"], 800, False),
    ]
    peers = {peer["name"]: peer["members_per_second"]["median"] for peer in results.get("peers", [])}
    if "EvoTorch" in peers:
        found.append(("population 16, 512 images, over EvoTorch", peers["spartan-ray"] / peers["EvoTorch"], 6.0, True))
    return [
        {
            "name": name,
            "figure": float(f"{figure:.4g}"),
            "wanted": wanted,
            "at": "least" if at_least else "most",
            "met": bool(figure >= wanted if at_least else figure <= wanted),
        }
        for name, figure, wanted, at_least in found
    ]
