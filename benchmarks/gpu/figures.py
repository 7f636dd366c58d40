"""The tables and the picture of `scripts/gpu`, with the estimates of docs/scaling.md."""

from __future__ import annotations

from pathlib import Path
from typing import Any

# Members per second on one H100, 10,000 images, bf16: the limit of its memory bandwidth, and the estimate.
ON_PAPER = {"roof on paper": 650.0, "expected on paper": 250.0}
Results = dict[str, Any]


def _number(value: Any) -> str:
    if not isinstance(value, float | int) or isinstance(value, bool):
        return "" if value is None else str(value)
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def _table(head: list[str], rows: list[list[Any]]) -> list[str]:
    if not rows:
        return []
    lines = ["| " + " | ".join(head) + " |", "| --- " * len(head) + "|"]
    return [*lines, *("| " + " | ".join(map(_number, row)) + " |" for row in rows), ""]


def table(results: Results) -> str:
    """Return all results as Markdown, with the last output of failed phases."""
    card, phases = results["card"], results["phases"]
    about = ", ".join(f"{name} {_number(value)}" for name, value in card.items())
    lines = ["A rehearsal on a CPU: the figures mean nothing.", ""] if results["rehearsal"] else []
    lines += [about, ""]
    lines += _table(
        ["phase", "seconds", "ended"], [[name, phase["seconds"], phase["ended"]] for name, phase in phases.items()]
    )
    figures = {name: phase["figures"] for name, phase in phases.items() if phase.get("figures")}
    lines += _table(
        ["compared with a CPU", "largest difference", "as required"],
        [[row["name"], row["difference"], "yes" if row["agrees"] else "NO"] for row in figures.get("bits", [])],
    )
    keys = "name", "microseconds", "gigabytes_per_second", "teraflops", "elements_per_second"
    lines += _table(
        ["kernel", "us", "GB/s", "TFLOP/s", "elements/s"],
        [[row.get(key) for key in keys] for row in figures.get("kernels", [])],
    )
    scoring = figures.get("scoring", [])
    head = ["images", "precision", "members", "members/s", "with graphs", "vs. bare pass", "with graphs"]
    head += ["vs. torchvision", "vs. compiled", "same bits"]
    rows = []
    for row in (row for row in scoring if "members" in row):
        plain, graphs = row.get("plain", {}), row.get("graphs", {})
        best = max(plain, graphs, key=lambda way: way.get("members_per_second", 0.0))
        rows.append([
            row["cases"], row["precision"], row["members"], plain.get("members_per_second"),
            graphs.get("members_per_second"), plain.get("over_ours"), graphs.get("over_ours"),
            best.get("over_torchvision"), best.get("over_compiled"),
            {None: None, True: "yes", False: "NO"}[row.get("same_bits")],
        ])  # fmt: skip
    lines += _table(head, rows)
    rows = [
        [row["cases"], row["precision"], way, about.get("launches"), about.get("idle"), about.get("megabytes")]
        for row in scoring
        if "members" not in row
        for way, about in row.items()
        if isinstance(about, dict)
    ]
    lines += _table(["images", "precision", "way", "launches per member", "idle", "MB"], rows)
    lines += [
        f"{row['cases']} images, {row['precision']}: {name}: {text}\n"
        for row in scoring
        for name, text in row.items()
        if name.endswith("failed")
    ]
    lines += _table(
        ["SGD, batch", "precision", "images/s", "torchvision's", "compiled"],
        [
            [row.get(key) for key in ("batch", "precision", "ours", "torchvision", "compiled")]
            for row in figures.get("training", [])
        ],
    )
    for name in ("tests", "whole"):
        lines += _table([name, ""], [list(item) for item in figures.get(name, {}).items()])
    return "\n".join(lines)


def draw(results: Results, path: Path) -> None:
    """Draw the speed of scoring relative to the bare pass, and members per second with the estimates."""
    from matplotlib import pyplot as plt

    rows = [row for row in results["phases"].get("scoring", {}).get("figures") or [] if "members" in row]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    colours = {"fp32": "tab:grey", "tf32": "tab:blue", "bf16": "tab:red"}
    for precision, colour in colours.items():
        for way, style in (("plain", "-"), ("graphs", "--")):
            best: dict[int, float] = {}
            for row in rows:
                if row["precision"] == precision and way in row:
                    best[row["cases"]] = max(best.get(row["cases"], 0.0), row[way]["over_ours"])
            if best:
                left.plot(list(best), list(best.values()), style, color=colour, marker=".", label=f"{precision}, {way}")
    left.axhline(1, color="black", linewidth=0.8, linestyle=":")
    left.set(xscale="log", xlabel="images per member", ylabel="speed relative to the bare pass")
    left.set_ylim(bottom=0)
    if rows:
        left.legend(frameon=False)
    most = max((row["cases"] for row in rows), default=0)
    for precision, colour in colours.items():
        rates = [
            row[way]["members_per_second"]
            for row in rows
            for way in ("plain", "graphs")
            if row["cases"] == most and row["precision"] == precision and way in row
        ]
        if rates:
            right.bar(precision, max(rates), color=colour)
    if most == 10_000:
        for name, rate in ON_PAPER.items():
            right.axhline(rate, color="black", linewidth=0.8, linestyle=":")
            right.annotate(name, (0, rate), textcoords="offset points", xytext=(0, 2))
    right.set(ylabel=f"members per second, {most:,} images", title=str(results["card"]["device"]))
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
