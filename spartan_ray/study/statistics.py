"""Statistics over the seeds of a study: means with intervals, and differences seed by seed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy import stats

from spartan_ray.study.plan import AVERAGE, STOPPED, Claim


@dataclass(frozen=True)
class Interval:
    """A mean of `count` values with its 95 % interval, mean ± half, by Student's t. `half` is NaN for fewer than two
    values."""

    mean: float
    half: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    def text(self, digits: int, scale: float = 1.0, sign: bool = False) -> str:
        """Return the text for tables."""
        if not self.count:
            return "-"
        mean = f"{self.mean * scale:{'+' if sign else ''}.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half * scale:.{digits}f}"


def interval(values: Sequence[float] | pd.Series[float]) -> Interval:
    """Return the interval of independent values."""
    value_N = np.asarray(values, float)
    count = len(value_N)
    if count < 2:
        return Interval(float(value_N.mean()) if count else math.nan, math.nan, count)
    quantile = float(stats.t.ppf(0.975, count - 1))
    return Interval(float(value_N.mean()), quantile * float(value_N.std(ddof=1)) / math.sqrt(count), count)


def ends(rows: pd.DataFrame, first_baseline: str | None) -> pd.DataFrame:
    """Return one row per way and seed, with the measures at its end and what it spent.

    Every method is a way, which ends with its last epoch. The average of a method's weights, if it has one, is another.
    The first baseline is also a way that stops early, at the epoch with the highest accuracy on the evolution split."""
    found = []
    for (group, method, seed), frame in rows.groupby(["group", "method", "seed"], sort=False):
        about = {"group": group, "seed": seed, "way": method}
        last = frame.iloc[-1]
        spent = {name: frame[name].sum() for name in ("trained", "scored", "seconds")}
        found.append(about | _measures(frame, last, "") | spent)
        if not pd.isna(last["average_test_accuracy"]):
            found.append(about | {"way": f"{method}{AVERAGE}"} | _measures(frame, last, "average_") | spent)
        if method == first_baseline:
            until = frame.iloc[: int(frame["evolution_accuracy"].argmax()) + 1]
            spent = {name: until[name].sum() for name in spent}
            found.append(about | {"way": f"{method}{STOPPED}"} | _measures(until, until.iloc[-1], "") | spent)
    return pd.DataFrame(found)


def _measures(frame: pd.DataFrame, end: pd.Series, prefix: str) -> dict[str, float]:
    names = ("test_accuracy", "test_loss", "validation_accuracy", "validation_loss")
    row = {name: float(end[f"{prefix}{name}"]) for name in names}
    if prefix:  # an average is not scored on the SGD images
        return row
    evolve = np.flatnonzero(frame["kind"] == "evolve")
    evolve = evolve[evolve > 0]
    for name in ("train_loss", "validation_accuracy"):
        value_E = frame[name].to_numpy(float)
        row[f"phase_{name}"] = float((value_E[evolve] - value_E[evolve - 1]).mean()) if len(evolve) else math.nan
    late = frame.iloc[-(-2 * len(frame) // 3) - 1]  # two thirds through the run
    row |= {"train_loss": float(end["train_loss"]), "overfitting": float(end["test_loss"] - end["train_loss"])}
    return row | {"late_validation_accuracy": float(end["validation_accuracy"] - late["validation_accuracy"])}


def values_of(ends_frame: pd.DataFrame, group: str, way: str, measure: str) -> pd.Series[float]:
    """Return a measure of a way, indexed by seed."""
    mine = ends_frame[(ends_frame["group"] == group) & (ends_frame["way"] == way)]
    return mine.set_index("seed")[measure].dropna()


def difference(ends_frame: pd.DataFrame, group: str, way: str, over: str, measure: str) -> tuple[Interval, int]:
    """Return how much higher a measure is than for another way at the same seeds, and at how many seeds it is
    higher."""
    mine, others = (values_of(ends_frame, group, name, measure) for name in (way, over))
    between = (mine - others).dropna()
    return interval(between), int((between > 0).sum())


def verdict(ends_frame: pd.DataFrame, claim: Claim) -> tuple[str, list[Interval]]:
    """Return the verdict on a claim, and the interval of its measure, or of the difference to each way of `over`.

    The claim is confirmed if every interval excludes 0 on the claimed side, contradicted if one excludes it on the
    other side, and undecided otherwise. The claim "not higher" is never confirmed: it is contradicted if one interval
    is above 0."""
    if claim.over:
        found = [difference(ends_frame, claim.group, claim.way, way, claim.measure)[0] for way in claim.over]
    else:
        found = [interval(values_of(ends_frame, claim.group, claim.way, claim.measure))]
    sides = [math.copysign(1, one.mean) if one.count > 1 and one.excludes_zero else 0 for one in found]
    side = -1 if claim.expects == "lower" else 1
    if claim.expects == "not higher":
        return "contradicted" if 1 in sides else "not contradicted", found
    if all(one == side for one in sides):
        return "confirmed", found
    return "contradicted" if -side in sides else "undecided", found
