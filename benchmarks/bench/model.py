"""A model of a generation on many GPUs, from measurements on this machine and estimates for a GPU."""

from __future__ import annotations

import heapq
import random
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from bench.figures import Results, number
from spartan_ray.distributed.relayed import RELAYED_ANSWERS_PER_SECOND, RELAYED_NODES
from spartan_ray.distributed.spans import chunk_size, workers_worth
from spartan_ray.distributed.transport import ANSWERS_PER_SECOND

# Estimates for one H100, 10,000 fitness images and bf16: docs/scaling.md derives them.
SECONDS_A_MEMBER = 4e-3
UPDATE_SECONDS_A_MEMBER = 20e-6
PARENT_BYTES = 4 * 11_181_642
PARENT_SECONDS = PARENT_BYTES / (100e9 / 8)  # over the network
GPUS_A_NODE = 8
POPULATIONS = (1000, 10_000, 100_000, 1_000_000)
WORKERS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1000)


@dataclass(frozen=True)
class TaskSeconds:
    """Seconds of the driver to send a task and receive its answer: directly, or through the relay of a node."""

    direct: float
    relayed: float

    @classmethod
    def of(cls, results: Results) -> TaskSeconds:
        """Return the measured seconds."""
        return cls(*(results["dispatch"][name]["median"] for name in ("driver_seconds", "relayed_driver_seconds")))


def seconds_of_generation(population: int, workers: int, task: TaskSeconds, relays: bool) -> dict[str, float]:
    """Return the parts of a generation's time, in seconds.

    scoring    time to score an equal share of the members on every worker
    waiting    additional time until the last chunk is done. Chunks are cut by the pool's own rule. The driver sends
               them one by one, as fast as it can, each to the worker that began its previous chunk first. With relays
               it sends the chunks of a node together, and the relay passes them on one by one. With its first chunk a
               node fetches the parent from one that has it; each sender serves one node at a time
    update     time for the slices of as many workers as pay off, their answers, and sending a parent's bytes to the
               driver
    """
    share = SECONDS_A_MEMBER * population / workers
    update = population * UPDATE_SECONDS_A_MEMBER
    slices = workers_worth(update, workers, ANSWERS_PER_SECOND)
    return {
        "scoring": share,
        "waiting": _last(population, workers, task, relays) - share,
        "update": update / slices + slices * task.direct + PARENT_SECONDS,
    }


def _last(population: int, workers: int, task: TaskSeconds, relays: bool) -> float:
    """Return the time at which the driver has received the last answer."""
    chance = random.Random(0)
    began = [(0.0, worker) for worker in range(workers)]  # when each worker begins its last chunk so far
    end_W = [0.0] * workers
    parent_at: dict[int, float] = {}  # by node
    sending = {-1: 0.0}  # by node (-1: the driver's): until when it sends the parent to others
    left, driver = population, 0.0
    answers = RELAYED_ANSWERS_PER_SECOND if relays else ANSWERS_PER_SECOND
    while left > 0:
        at, worker = heapq.heappop(began)
        driver, node, told = max(driver, at), worker // GPUS_A_NODE, [worker]
        if relays:
            mates = [entry for entry in began if entry[1] // GPUS_A_NODE == node and entry[0] <= driver]
            began = [entry for entry in began if entry not in mates]
            heapq.heapify(began)
            told += [mate for _, mate in sorted(mates)]
        sizes: list[int] = []
        while told[len(sizes) :] and left:
            sizes.append(min(left, chunk_size(left, population, workers, SECONDS_A_MEMBER, answers)))
            left -= sizes[-1]
        driver += len(sizes) * (task.relayed if relays else task.direct)
        if node not in parent_at:
            source = chance.choice([other for other in sending if parent_at.get(other, 0.0) <= driver])
            sending[source] = sending[node] = parent_at[node] = max(driver, sending[source]) + PARENT_SECONDS
        for place, (worker, size) in enumerate(zip(told, sizes, strict=False)):
            arrived = driver + (place + 1) * task.direct * relays
            start = max(arrived, parent_at[node], end_W[worker])
            end_W[worker] = start + size * SECONDS_A_MEMBER
            heapq.heappush(began, (start, worker))
    return max(end_W) + (task.direct + task.relayed if relays else task.direct)


def efficiency(population: int, workers: int, task: TaskSeconds, relays: bool) -> float:
    """Return the time of scoring and update if shared equally, divided by the modelled time."""
    ideal = population * (SECONDS_A_MEMBER + UPDATE_SECONDS_A_MEMBER) / workers
    return ideal / sum(seconds_of_generation(population, workers, task, relays).values())


def table(results: Results) -> str:
    """Return the results of the model and of the simulation as Markdown."""
    task = TaskSeconds.of(results)
    lines = [
        f"A task costs {1e3 * task.direct:.2f} ms of the driver's main thread; "
        f"through a relay {1e3 * task.relayed:.2f} ms.",
        "",
        "| modelled efficiency, without relays and with them | "
        + " | ".join(f"{population:,} members" for population in POPULATIONS)
        + " |",
        "| --- " * (1 + len(POPULATIONS)) + "|",
    ]
    for workers in (64, 256, 1000):
        shares = [[efficiency(population, workers, task, how) for how in (False, True)] for population in POPULATIONS]
        lines.append(f"| {workers:,} GPUs | " + " | ".join(f"{a:.0%}, {b:.0%}" for a, b in shares) + " |")
    lines += [
        "",
        "| 1,000 GPUs with relays, seconds | "
        + " | ".join(f"{population:,} members" for population in POPULATIONS)
        + " |",
        "| --- " * (1 + len(POPULATIONS)) + "|",
    ]
    parts = [seconds_of_generation(population, 1000, task, True) for population in POPULATIONS]
    lines += [f"| {name} | " + " | ".join(number(part[name]) for part in parts) + " |" for name in parts[0]]
    lines += [
        "",
        "| simulated | workers | members | seconds | share of the workers' capacity | driver, CPU seconds "
        "| driver memory growth, MB | tasks retried |",
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
    """Draw the efficiency over GPUs for each population, and the parts of the time on a thousand GPUs."""
    from matplotlib import pyplot as plt

    from spartan_ray.report.plots import COLOURS

    task = TaskSeconds.of(results)
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.4), layout="constrained")
    for population, colour in zip(POPULATIONS, COLOURS, strict=False):
        for relays, style in ((False, ":"), (True, "-")):
            shown = [workers for workers in WORKERS if not relays or workers >= GPUS_A_NODE * RELAYED_NODES]
            shares = [efficiency(population, workers, task, relays) for workers in shown]
            label = f"{population:,}" if relays else None
            left.plot(shown, shares, style, color=colour, marker=".", label=label)
    left.set(xscale="log", ylim=(0, 1.02), xlabel="GPUs", ylabel="efficiency (modelled)")
    left.legend(title="members", frameon=False)
    bottoms = [0.0] * len(POPULATIONS)
    names: Iterable[str] = ("scoring", "waiting", "update")
    parts = [seconds_of_generation(population, 1000, task, True) for population in POPULATIONS]
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
