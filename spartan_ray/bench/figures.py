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
