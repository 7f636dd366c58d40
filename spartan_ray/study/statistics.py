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
    """A mean of `count` values with its interval, mean ± half, by Student's t. `half` is NaN for fewer than two
    values."""

    mean: float
    half: float
    count: int

    @property
    def excludes_zero(self) -> bool:
        """Return whether 0 is outside. Fewer than two values exclude nothing."""
        return abs(self.mean) > self.half

    def text(self, digits: int, scale: float = 1.0, sign: bool = False) -> str:
        """Return the text for tables."""
        if not self.count:
            return "-"
        mean = f"{self.mean * scale:{'+' if sign else ''}.{digits}f}"
        return mean if math.isnan(self.half) else f"{mean} ± {self.half * scale:.{digits}f}"

    def bold(self, digits: int, scale: float = 1.0) -> str:
        """Return the text of a difference, bold in Markdown if the interval excludes 0."""
        text = self.text(digits, scale, sign=True)
        return f"**{text}**" if self.excludes_zero else text


def interval(values: Sequence[float] | pd.Series[float], level: float = 0.95) -> Interval:
    """Return the interval of independent values that covers their mean with probability `level`."""
    value_N = np.asarray(values, float)
    count = len(value_N)
    if count < 2:
        return Interval(float(value_N.mean()) if count else math.nan, math.nan, count)
    quantile = float(stats.t.ppf((1 + level) / 2, count - 1))
    return Interval(float(value_N.mean()), quantile * float(value_N.std(ddof=1)) / math.sqrt(count), count)


def ends(rows: pd.DataFrame, first_baseline: str | None) -> pd.DataFrame:
    """Return one row per way and seed, with the measures at its end and what it spent.

    Every method is a way, which ends with its last epoch. The average of a method's weights, if it has one, is another.
    The first baseline is also a way that stops early, at the epoch with the highest accuracy on the evolution split.
    Late measures are means over the SGD epochs that all methods of a group have in the last quarter of a run."""
    found = []
    phases = rows[rows["kind"] == "evolve"].groupby("group")["epoch"].unique()
    for (group, method, seed), frame in rows.groupby(["group", "method", "seed"], sort=False):
        about = {"group": group, "seed": seed, "way": method}
        frame = frame.assign(late=~frame["epoch"].isin(phases.get(group, ())))
        last = frame.iloc[-1]
        spent = {name: frame[name].sum() for name in ("trained", "scored", "seconds")}
        found.append(about | _measures(frame, last, "") | spent)
        if not pd.isna(last["average_test_accuracy"]):
            found.append(about | {"way": f"{method}{AVERAGE}"} | _measures(frame, last, "average_") | spent)
        if method == first_baseline:
            until = frame.iloc[: int(frame["evolution_accuracy"].argmax()) + 1]
            spent = {name: until[name].sum() for name in spent}
            measures = _measures(until, until.iloc[-1], "") | {"late_test_accuracy": math.nan}  # it has no end phase
            found.append(about | {"way": f"{method}{STOPPED}"} | measures | spent)
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
    third, last = (frame.iloc[len(frame) * quarter // 4 : len(frame) * (quarter + 1) // 4] for quarter in (2, 3))
    row["turn_of_validation_accuracy"] = float(last["validation_accuracy"].mean() - third["validation_accuracy"].mean())
    row["late_test_accuracy"] = float(last.loc[last["late"], "test_accuracy"].mean())
    return row | {"train_loss": float(end["train_loss"]), "overfitting": float(end["test_loss"] - end["train_loss"])}


def values_of(ends_frame: pd.DataFrame, group: str, way: str, measure: str) -> pd.Series[float]:
    """Return a measure of a way, indexed by seed."""
    mine = ends_frame[(ends_frame["group"] == group) & (ends_frame["way"] == way)]
    return mine.set_index("seed")[measure].dropna()


def differences(ends_frame: pd.DataFrame, group: str, way: str, over: str, measure: str) -> pd.Series[float]:
    """Return how much higher a measure is than for another way, by seed, at the seeds that both have."""
    mine, others = (values_of(ends_frame, group, name, measure) for name in (way, over))
    return (mine - others).dropna()


def verdict(ends_frame: pd.DataFrame, claim: Claim) -> tuple[str, list[Interval]]:
    """Return the verdict on a claim, and the 95 % interval of its measure, or of the difference to each way of `over`.

    The claim is confirmed if every interval excludes 0 on the claimed side. It is contradicted if one excludes 0 on the
    other side at level 1 - 0.05 / n, with n intervals. Otherwise, and with fewer than two seeds, it is undecided. The
    claim "not higher" is never confirmed: it is contradicted if an interval is above 0."""
    if claim.over:
        values = [differences(ends_frame, claim.group, claim.way, way, claim.measure) for way in claim.over]
    else:
        values = [values_of(ends_frame, claim.group, claim.way, claim.measure)]
    found = [interval(one) for one in values]
    if min(one.count for one in found) < 2:
        return "undecided", found
    sign = -1 if claim.expects == "lower" else 1
    against = -1 if claim.expects == "not higher" else 1
    wide = [interval(one, 1 - 0.05 / len(values)) for one in values]
    if any(one.excludes_zero and one.mean * sign * against < 0 for one in wide):
        return "contradicted", found
    if claim.expects == "not higher":
        return "not contradicted", found
    return "confirmed" if all(one.excludes_zero and one.mean * sign > 0 for one in found) else "undecided", found
