"""The results of the benchmark: figures with their spread, the targets, the table and the picture."""

from __future__ import annotations

import statistics
from collections.abc import Iterable
from pathlib import Path
from typing import Any

Spread = dict[str, float]
Results = dict[str, Any]

# Marks around the table in a page.
BEGIN, END = "<!-- benchmark -->\n", "<!-- end of benchmark -->\n"


def spread(values: Iterable[float]) -> Spread:
    """Return the median, minimum and maximum of the repeats, to four digits, and their number."""
    found = list(values)
    figures = {"median": statistics.median(found), "min": min(found), "max": max(found)}
    return {name: float(f"{value:.4g}") for name, value in figures.items()} | {"repeats": len(found)}


def number(value: float, digits: int = 3) -> str:
    """Format a number with `digits` digits, or from 100 on as a whole number with commas."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.{digits}g}"


def said(figure: Spread) -> str:
    """Format a figure as median (min - max), or as one number if they agree."""
    middle, low, high = (number(figure[name]) for name in ("median", "min", "max"))
    return middle if low == high else f"{middle} ({low} - {high})"


def targets(results: Results) -> list[Results]:
    """Return the targets of the project, whether this machine meets each, and the reason if not."""

    def of_the_limit(images: int, wanted: float) -> tuple[str, float, float, str, str]:
        row = max((row for row in results["scoring"] if row["fitness_images"] == images), key=lambda r: r["population"])
        name = f"scoring {row['population']:,} members on {images:,} images: speed relative to the bare forward pass"
        return name, row["efficiency"]["median"], wanted, "least", repeats(row["efficiency"])

    def repeats(figure: Spread) -> str:
        return f"{said(figure)} in {figure['repeats']} repeats"

    most = max(row["workers"] for row in results["update"])
    (update,) = (row for row in results["update"] if row["workers"] == most)
    (rate,) = (row["images_per_second"]["median"] for row in results["scaling"] if row["workers"] == most)
    first, last = results["memory"][0], results["memory"][-1]
    growths = {part: last[part] / first[part] - 1 for part in ("driver_mb", "worker_mb")}
    found: list[tuple[str, float, float, str, str]] = [
        of_the_limit(2048, 0.97),
        (
            f"scoring {16 * most} members on 2,048 images: speed relative to torchvision's bare module",
            results["over_torchvision"]["median"],
            1.10,
            "least",
            repeats(results["over_torchvision"]),
        ),
        of_the_limit(512, 0.94),
        (
            "update of 1,000 members: time relative to scoring them on 2,048 images",
            update["seconds_per_1000_members"]["median"] * rate / 2_048_000,
            0.01,
            "most",
            f"noise alone takes {said(results['update_limit']['noise_seconds_per_1000_members'])} seconds",
        ),
        (
            "SGD: speed relative to torchvision's module in its faster layout",
            results["sgd"]["ratio"]["median"],
            1.6,
            "least",
            repeats(results["sgd"]["ratio"]),
        ),
        (
            "dispatcher: members per second that cost nothing, in chunks of 200",
            results["dispatch"]["members_per_second"]["median"],
            50_000,
            "least",
            repeats(results["dispatch"]["members_per_second"]),
        ),
        (
            "bytes through the object store per generation, relative to the parent's",
            results["broadcast"]["parents_per_generation"]["max"],
            2.1,
            "most",
            repeats(results["broadcast"]["parents_per_generation"]),
        ),
        (
            f"memory of driver or worker: growth from {first['population']} to {last['population']:,} members",
            max(growths.values()),
            0.05,
            "most",
            f"driver {growths['driver_mb']:.1%}, worker {growths['worker_mb']:.1%}",
        ),
        (
            "memory of a worker with ResNet18 in whole evolve phases on 2,048 images, MB (shared pages in equal parts)",
            results["resnet18_worker_mb"]["max"],
            800,
            "most",
            repeats(results["resnet18_worker_mb"]),
        ),
    ]
    found += [
        (
            f"{row['workers']} workers, 16 members each: speed relative to one worker",
            row["speedup"]["median"],
            0.95 * row["workers"],
            "least",
            f"bare processes reach {said(row['bare_speedup'])}; relative to them, in the same repeats, it is "
            f"{said(row['of_the_bare_speedup'])}",
        )
        for row in results["scaling"]
        if row["workers"] > 1
    ]
    limit = results["limit"]["folded_images_per_second"]["median"] / 512
    found += [
        (
            "16 members on 512 images: speed relative to EvoTorch",
            peer["ours_over_it"]["median"],
            6,
            "least",
            f"{said(peer['ours_over_it'])}; the bare forward pass of our module with BatchNorm folded in, alone on the "
            f"machine, was {number(limit / peer['members_per_second']['median'])} times as fast later in this run",
        )
        for peer in results["peers"]
        if peer["name"].startswith("EvoTorch")
    ]
    judged = []
    for name, figure, wanted, at, reason in found:
        met = bool(figure >= wanted if at == "least" else figure <= wanted)
        figure = float(f"{figure:.4g}")
        judged.append({"name": name, "figure": figure, "wanted": wanted, "at": at, "met": met})
        if not met:
            judged[-1]["reason"] = reason
    return judged


def table(results: Results) -> str:
    """Return the figures as Markdown."""
    machine, limit, update = results["machine"], results["limit"], results["update_limit"]
    workers = max(row["workers"] for row in results["scaling"])
    lines = [
        f"{machine['processor']}, {machine['cores']} cores, {machine['memory_gb']} GB, {machine['device']}; "
        f"torch {machine['versions']['torch']}, Ray {machine['versions']['ray']}; {workers} workers of one thread, "
        f"ResNet18, 32x32 images, fp32; other programs used {machine['busy_cores']} cores at the start. Median (min - "
        "max) of the repeats of one run: five, three where a repeat takes minutes, and three generations of each peer. "
        "Relative figures are medians of ratios, each of two measurements of the same repeat. The ratio to EvoTorch "
        "compares each of its generations with ours just before and after.",
        "",
        "| | aim | here | met |",
        "| --- | --- | --- | --- |",
        *(
            f"| {target['name']} | at {target['at']} {number(target['wanted'])} | {number(target['figure'], 4)} "
            f"| {'yes' if target['met'] else 'no' + (': ' + target['reason']) * bool(target['reason'])} |"
            for target in results["targets"]
        ),
        "",
        "| images per second | |",
        "| --- | --- |",
        f"| {workers} bare processes, forward pass of our module, batches of {limit['batch']} "
        f"| {said(limit['images_per_second'])} |",
        f"| the same with BatchNorm folded in beforehand | {said(limit['folded_images_per_second'])}; scoring reaches "
        f"{said(results['over_folded'])} of it |",
        f"| the same of torchvision's module, channels-last | {said(limit['torchvision_images_per_second'])} |",
        *(
            f"| scoring: {row['population']:,} members on {row['fitness_images']:,} images "
            f"| {said(row['images_per_second'])}, {said(row['efficiency'])} of the bare pass |"
            for row in results["scoring"]
        ),
        *(
            f"| scoring with {row['workers']} worker{'s' * (row['workers'] > 1)}, 16 members each, 2,048 images "
            f"| {said(row['images_per_second'])} |"
            for row in results["scaling"]
        ),
        f"| the same in bf16 (`evolution.precision`), 16 members | {said(results['bf16']['images_per_second'])} |",
        f"| sgemm of {workers} bare processes, GFLOP/s | {said(limit['sgemm_gflops'])} |",
        f"| SGD, {workers} threads | {said(results['sgd']['images_per_second'])} |",
        f"| SGD, torchvision's module | {said(results['sgd']['torchvision_images_per_second'])} |",
        "",
        "| seconds | |",
        "| --- | --- |",
        *(
            f"| update of 1,000 members, {row['workers']} worker{'s' * (row['workers'] > 1)} "
            f"| {said(row['seconds_per_1000_members'])} |"
            for row in results["update"]
        ),
        f"| noise and sums alone, {update['workers']} bare processes "
        f"| {said(update['noise_and_axpy_seconds_per_1000_members'])} |",
        f"| noise alone | {said(update['noise_seconds_per_1000_members'])} |",
        f"| broadcast of the parent | {said(results['broadcast']['seconds'])} |",
        "",
        "| peak memory, small network, one generation each | driver, MB | worker, MB |",
        "| --- | --- | --- |",
        *(
            f"| {row['population']:,} members | {number(row['driver_mb'])} | {number(row['worker_mb'])} |"
            for row in results["memory"]
        ),
    ]
    if results["peers"]:
        lines += [
            "",
            "| generations of 16 members on 512 images: normal noise, scores, update | members per second "
            "| peak memory of all processes, MB |",
            "| --- | --- | --- |",
            *(
                f"| {peer['name']} ({peer['version']}) | {said(peer['members_per_second'])} "
                f"| {number(peer['peak_mb'])} |"
                for peer in results["peers"]
            ),
        ]
    return "\n".join(lines) + "\n"


def write_into(readme: Path, text: str) -> None:
    """Replace the text between the marks in a file."""
    before, _, rest = readme.read_text().partition(BEGIN)
    _, _, after = rest.partition(END)
    readme.write_text(before + BEGIN + "\n" + text + "\n" + END + after)


def draw(results: Results, path: Path) -> None:
    """Draw members per second in comparison with the peers, and memory over the population."""
    from matplotlib import pyplot as plt

    from spartan_ray.report.plots import COLOURS

    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2), layout="constrained")
    left.set_visible(bool(results["peers"]))
    peers = sorted(results["peers"], key=lambda peer: peer["members_per_second"]["median"])
    medians = [peer["members_per_second"]["median"] for peer in peers]
    errors = [
        [abs(peer["members_per_second"][end] - median) for peer, median in zip(peers, medians, strict=True)]
        for end in ("min", "max")
    ]
    colours = [COLOURS[0] if peer["name"].startswith("Spartan Ray") else "#9a9a9a" for peer in peers]
    bars = left.barh([peer["name"] for peer in peers], medians, xerr=errors, color=colours)
    left.bar_label(bars, labels=[number(median) for median in medians], padding=6)
    left.margins(x=0.2)
    left.set(xlabel="members per second")
    population_K = [row["population"] for row in results["memory"]]
    for part, label, colour in (("driver_mb", "driver", COLOURS[0]), ("worker_mb", "worker", COLOURS[1])):
        right.plot(population_K, [row[part] for row in results["memory"]], marker="o", color=colour, label=label)
    right.set(xscale="log", xlabel="members per generation", ylabel="peak memory, MB")
    right.legend(frameon=False)
    right.margins(y=0.15)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    right.set_ylim(bottom=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)
