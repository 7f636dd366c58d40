"""A model of a generation on many GPUs, from what was measured here and what is on paper."""

from __future__ import annotations

import heapq
import math
from collections.abc import Iterable
from pathlib import Path

from bench.figures import Results, number
from spartan_ray.distributed.spans import chunk_size, workers_worth

# See docs/scaling.md for where they come from: one H100, 10,000 fitness images, bf16.
SECONDS_A_MEMBER = 4e-3
UPDATE_SECONDS_A_MEMBER = 20e-6
PARENT_BYTES = 4 * 11_181_642
NETWORK_BYTES_A_SECOND = 100e9 / 8
GPUS_A_NODE = 8
POPULATIONS = (1000, 10_000, 100_000, 1_000_000)
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


def seconds_of_generation(population: int, workers: int, answers_a_second: float) -> dict[str, float]:
    """The parts of a generation's time, one after another.

    broadcast  the parent from the driver's node to each other one in turn; Ray may do better
    scoring    an equal share of the members for every worker
    waiting    until the last chunk is done, beyond that: chunks are cut by the pool's own rule, given out one by one
               as fast as the driver can, each to the worker that is free first
    update     a slice for each worker that is worth an answer, the answers, and a parent's bytes back to the driver
    """
    free_W = [0.0] * workers
    left, driver, last = population, 0.0, 0.0
    while left > 0:
        size = min(left, chunk_size(left, population, workers, SECONDS_A_MEMBER))
        left, driver = left - size, driver + 1 / answers_a_second
        end = max(driver, heapq.heappop(free_W)) + size * SECONDS_A_MEMBER
        heapq.heappush(free_W, end)
        last = max(last, end)
    share = SECONDS_A_MEMBER * population / workers
    update = population * UPDATE_SECONDS_A_MEMBER
    slices = workers_worth(update, workers)
    parent_seconds = PARENT_BYTES / NETWORK_BYTES_A_SECOND
    return {
        "broadcast": (math.ceil(workers / GPUS_A_NODE) - 1) * parent_seconds,
        "scoring": share,
        "waiting": last - share,
        "update": update / slices + slices / answers_a_second + parent_seconds,
    }


def efficiency(population: int, workers: int, answers_a_second: float) -> float:
    """Time of scoring and update shared equally, over the time it takes."""
    ideal = population * (SECONDS_A_MEMBER + UPDATE_SECONDS_A_MEMBER) / workers
    return ideal / sum(seconds_of_generation(population, workers, answers_a_second).values())


def table(results: Results) -> str:
    """What the model says of a thousand GPUs, and what the simulation showed, as Markdown."""
    answers = results["dispatch"]["tasks_per_second"]["median"]
    lines = [
        f"The driver takes {number(answers)} answers a second here, on cores that it shares with the workers.",
        "",
        "| 1,000 GPUs, seconds | " + " | ".join(f"{population:,} members" for population in POPULATIONS) + " |",
        "| --- " * (1 + len(POPULATIONS)) + "|",
    ]
    parts = [seconds_of_generation(population, 1000, answers) for population in POPULATIONS]
    lines += [f"| {name} | " + " | ".join(number(part[name]) for part in parts) + " |" for name in parts[0]]
    shares = (efficiency(population, 1000, answers) for population in POPULATIONS)
    lines += ["| efficiency | " + " | ".join(f"{share:.0%}" for share in shares) + " |", ""]
    lines += [
        "| simulated | workers | members | seconds | of what those workers could do | driver, CPU seconds "
        "| driver, MB more at the end | tasks lost and done again |",
        "| --- " * 8 + "|",
    ]
    lines += [
        f"| {row['scenario']} | {row['workers']} | {row['population']:,} | {row['seconds']:.1f} "
        f"| {row['efficiency']:.1%} | {row['driver_cpu_seconds']:.1f} | {row['driver_grew_mb']:.0f} "
        f"| {row['retries']} |"
        for row in results["simulation"]
    ]
    return "\n".join(lines) + "\n"


def draw(results: Results, path: Path) -> None:
    """Efficiency over GPUs for each population, and where the time of a thousand goes."""
    from matplotlib import pyplot as plt

    from spartan_ray.report.plots import COLOURS

    answers = results["dispatch"]["tasks_per_second"]["median"]
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for population, colour in zip(POPULATIONS, COLOURS, strict=False):
        shares = [efficiency(population, workers, answers) for workers in WORKERS]
        left.plot(WORKERS, shares, color=colour, marker=".", label=f"{population:,}")
    left.set(xscale="log", ylim=(0, 1.02), xlabel="GPUs", ylabel="efficiency (modelled)")
    left.legend(title="members", frameon=False)
    bottoms = [0.0] * len(POPULATIONS)
    names: Iterable[str] = ("scoring", "waiting", "broadcast", "update")
    parts = [seconds_of_generation(population, 1000, answers) for population in POPULATIONS]
    for name, colour in zip(names, COLOURS, strict=False):
        shares = [part[name] / sum(part.values()) for part in parts]
        right.bar([f"{population:,}" for population in POPULATIONS], shares, bottom=bottoms, color=colour, label=name)
        bottoms = [bottom + share for bottom, share in zip(bottoms, shares, strict=True)]
    right.set(xlabel="members, on 1,000 GPUs", ylabel="share of a generation's time (modelled)", ylim=(0, 1))
    figure.legend(*right.get_legend_handles_labels(), loc="outside right upper", frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)
    plt.close(figure)
