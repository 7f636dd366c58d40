"""The tables of a study as Markdown, made from its rows alone."""

from __future__ import annotations

import pandas as pd

from spartan_ray.report.tables import markdown
from spartan_ray.study.plan import Claim, Planned, Study
from spartan_ray.study.statistics import differences, ends, interval, values_of, verdict

# How tables show a measure: its name, the factor of its values, and their digits.
WORDS = {
    "test_accuracy": ("test accuracy, %", 100.0, 2),
    "late_test_accuracy": ("late test accuracy, %", 100.0, 2),
    "test_loss": ("test loss", 1.0, 3),
    "validation_accuracy": ("validation accuracy, %", 100.0, 2),
    "train_loss": ("train loss", 1.0, 3),
    "overfitting": ("test loss minus train loss", 1.0, 3),
    "phase_train_loss": ("change of train loss in an evolve phase", 1.0, 3),
    "phase_validation_accuracy": ("change of validation accuracy in an evolve phase, points", 100.0, 2),
    "turn_of_validation_accuracy": ("validation accuracy, last quarter minus third quarter, points", 100.0, 2),
}


RULE = """A claim is confirmed if all its 95 % intervals lie on its side of 0. It is contradicted if one lies on the \
other side, at a level of 1 - 0.05 / n for n intervals. Otherwise it is undecided, or *not contradicted* if it claims \
no gain. Fewer than two seeds decide nothing. Nothing allows for the number of claims. Verdicts are about this size \
and these settings.
"""


def write_up(study: Study, runs: list[Planned], rows: pd.DataFrame, name: str) -> str:
    """Return all tables of a study as Markdown."""
    ended = ends(rows, study.baselines[0] if study.baselines else None)
    parts = [f"# {name}\n", f"{study.about}\n" if study.about else "", _about(runs, rows)]
    wanted = {group: len({run.seed for run in runs}) for group in dict.fromkeys(run.group for run in runs)}
    for group in wanted:
        if len(ended) and (ended["group"] == group).any():
            parts += [f"## {group}\n", markdown(group_table(ended, group, study.baselines, wanted[group]))]
    if study.claims and len(ended):
        parts += ["## Claims\n", RULE, markdown(claims_table(ended, study.claims, max(wanted.values())))]
    if study.pictures and len(ended):
        parts += ["## Over the epochs\n"]
        parts += [f"![{picture.name.replace('-', ' ')}]({picture.name}.png)\n" for picture in study.pictures]
    return "\n".join(part for part in parts if part)


def _about(runs: list[Planned], rows: pd.DataFrame) -> str:
    if rows.empty:
        return f"None of the {len(runs)} runs is done yet.\n"
    done = rows.groupby(["group", "method", "seed"], sort=False).ngroups
    seeds = len({run.seed for run in runs})
    starts = rows.groupby("group")["start"].nunique().max()
    files = f" Pretrained weights came from {starts} different files." if starts > 1 else ""
    processors = " and ".join(sorted(set(rows["processor"].dropna())))
    return (
        f"{done} of {len(runs)} runs: {len(runs) // seeds} cells of {seeds} seeds, on {processors}. "
        "Values are means over the seeds with 95 % intervals (Student's t). Differences are taken seed by seed, from "
        "runs with the same split of the images and the same initial weights; they are in points of test accuracy, "
        "with the seeds at which the way is higher in brackets. Bold: the interval excludes 0. That happens by chance "
        "to about one difference in 20, and the differences to one baseline share its chance. *Late* test accuracy is "
        "the mean over the epochs of the last quarter of a run that are SGD in every way: what a way is worth while "
        "SGD goes on, where test accuracy is that of the last epoch, perhaps right after an evolve phase. *Trained* "
        "and *scored* are millions of images forwarded for gradients and for evolution. *Seconds* is the sum of the "
        "epochs' durations without evaluation, a rough cost: several runs may share a machine."
        f"{files}\n"
    )


def group_table(ended: pd.DataFrame, group: str, baselines: list[str], seeds: int) -> pd.DataFrame:
    """Return one row per way: its measures at the end, and its difference to each baseline. `seeds` is the planned
    number of seeds; runs may be missing or have diverged."""
    lines = []
    mine = ended[ended["group"] == group]
    for way in dict.fromkeys(mine["way"]):
        count = len(values_of(ended, group, way, "test_accuracy"))
        shown = {"way": way, "seeds": _of(count, seeds)}
        for measure in ("test_accuracy", "test_loss", "overfitting"):
            words, factor, digits = WORDS[measure]
            over = interval(values_of(ended, group, way, measure))
            shown[words] = over.text(digits, factor) + (f" ({over.count} finite)" if 0 < over.count < count else "")
        for baseline in baselines:
            shown[f"over {baseline}"] = _over(ended, group, way, baseline, "test_accuracy")
        for baseline in baselines[:1]:
            shown[f"late, over {baseline}"] = _over(ended, group, way, baseline, "late_test_accuracy")
        own = mine[mine["way"] == way]
        for name in ("trained", "scored"):
            shown[name] = f"{own[name].mean() / 1e6:.2f}"
        shown["seconds"] = f"{own['seconds'].mean():.0f}"
        lines.append(shown)
    return pd.DataFrame(lines)


def _of(count: int, seeds: int) -> str:
    return str(count) if count == seeds else f"{count} of {seeds}"


def _over(ended: pd.DataFrame, group: str, way: str, baseline: str, measure: str) -> str:
    """Return the difference to a baseline in points and the seeds at which the way is higher, or nothing for the
    baseline itself."""
    by_seed = differences(ended, group, way, baseline, measure)
    between = interval(by_seed)
    if way == baseline or not between.count:
        return ""
    return f"{between.bold(2, 100.0)} ({(by_seed > 0).sum()}/{between.count})"


def claims_table(ended: pd.DataFrame, claims: list[Claim], seeds: int) -> pd.DataFrame:
    """Return one row per claim, with the numbers that decide it. `seeds` is the planned number of seeds."""
    lines = []
    for claim in claims:
        found, intervals = verdict(ended, claim)
        words, factor, digits = WORDS[claim.measure]
        texts = [one.text(digits, factor, sign=True) for one in intervals]
        over = [f"{text} over {way}" for text, way in zip(texts, claim.over, strict=True)] if claim.over else texts
        measured = f"{claim.group}, {claim.way}: {words}: {'; '.join(over)}"
        count = min(one.count for one in intervals)
        by = {"by": claim.by} if any(claim.by for claim in claims) else {}
        lines.append(
            {"claim": claim.says}
            | by
            | {"measured": measured, "seeds": _of(count, seeds), "": found if count == seeds else f"so far {found}"}
        )
    return pd.DataFrame(lines)
