"""What the seeds of a study say together: means with intervals, and differences seed by seed."""

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
    """A mean with its 95 % interval by Student's t: mean - half to mean + half. Of one value there is none."""

    mean: float
    half: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        return abs(self.mean) > self.half

    def text(self, digits: int, scale: float = 1.0, sign: bool = False) -> str:
        """As tables have it."""
        if not self.count:
            return "-"
        mean = f"{self.mean * scale:{'+' if sign else ''}.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half * scale:.{digits}f}"


def interval(values: Sequence[float] | pd.Series[float]) -> Interval:
    """Of values that are independent of each other."""
    value_N = np.asarray(values, float)
    count = len(value_N)
    if count < 2:
        return Interval(float(value_N.mean()) if count else math.nan, math.nan, count)
    quantile = float(stats.t.ppf(0.975, count - 1))
    return Interval(float(value_N.mean()), quantile * float(value_N.std(ddof=1)) / math.sqrt(count), count)


def ends(rows: pd.DataFrame, first_baseline: str | None) -> pd.DataFrame:
    """A row for each way and seed: where its run ended. Beside every method, which ends with its last epoch, there is
    the average of its weights where it has one, and of the first baseline the epoch that the evolution split chooses,
    as if the run had been stopped there."""
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
    if prefix:  # the SGD images were not shown to an average
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
    """A measure of a way by seed."""
    mine = ends_frame[(ends_frame["group"] == group) & (ends_frame["way"] == way)]
    return mine.set_index("seed")[measure].dropna()


def difference(ends_frame: pd.DataFrame, group: str, way: str, over: str, measure: str) -> tuple[Interval, int]:
    """How much higher a measure is than of another way at the same seeds, and at how many of them it is higher."""
    mine, others = (values_of(ends_frame, group, name, measure) for name in (way, over))
    between = (mine - others).dropna()
    return interval(between), int((between > 0).sum())


def verdict(ends_frame: pd.DataFrame, claim: Claim) -> tuple[str, list[Interval]]:
    """Whether the seeds confirm a claim, and the measure, or its difference to each of the ways. It is confirmed where
    every interval excludes 0 on the side that it says, and contradicted where one does on the other; "not higher" can
    be contradicted alone."""
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
