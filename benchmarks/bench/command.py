"""The command behind `scripts/bench`: measures, compares, and writes results, tables and pictures."""

from __future__ import annotations

import json
import logging
import os
from pathlib import Path
from typing import Any

import psutil
import ray
import torch

from bench import model
from bench.figures import BEGIN, END, Results, draw, table, targets, write_into
from bench.measure import (
    FULL_SCORING,
    MEMORY_POPULATIONS,
    SCORING,
    Said,
    measure_dispatch,
    measure_memory,
    measure_phases,
    measure_scoring,
    measure_update,
)
from bench.peers import PROGRAMS, measure_peers
from bench.simulation import simulate
from spartan_ray.errors import InputError
from spartan_ray.run.record import environment

PARTIAL = "results-so-far.json"
# Share of the cores that others may use on a machine that counts as idle, and seconds to look.
BUSY, LOOK_SECONDS = 0.1, 2.0
DOCS = {Path("docs/benchmarks.md"): table, Path("docs/scaling.md"): model.table}


def bench(out: Path, full: bool, peers: Path | None, docs: bool, say: Said) -> Results:
    """Measure, and write results.json and pictures to `out`. Return the results.

    `full` includes the measurements that take long. `docs` writes the tables into docs/*.md of the
    working directory. Raises InputError before measuring if a file cannot be read or written."""
    _check(out, full, peers, docs)
    workers = len(os.sched_getaffinity(0))
    results: Results = {"machine": machine(workers)}
    if results["machine"]["busy_cores"] > BUSY * workers:
        say(f"other programs use {results['machine']['busy_cores']} cores: the figures will be low")
    parts = ["memory", *["peers"] * bool(peers), "phases", "scoring", "update", "dispatch", *["simulation"] * full]
    say(f"starting Ray; parts: {', '.join(parts)}; results so far are kept in {out / PARTIAL}")
    # Pools of every size exist at the same time, mostly idle, so Ray is given more logical cores.
    ray.init(
        address="local",
        num_cpus=8 * workers,
        num_gpus=0,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        # Memory first, before this process has grown.
        results["memory"] = measure_memory(workers, MEMORY_POPULATIONS if full else MEMORY_POPULATIONS[:3], say)
        save(results, out)
        results["peers"] = measure_peers(peers, workers, say) if peers else []
        save(results, out)
        results |= measure_phases(workers, say)
        save(results, out)
        results |= measure_scoring(workers, FULL_SCORING if full else SCORING, say)
        save(results, out)
        results |= measure_update(workers, say)
        results |= measure_dispatch(workers, say)
    finally:
        ray.shutdown()
    save(results, out)
    results["simulation"] = simulate(say) if full else []
    results["targets"] = targets(results)
    save(results, out)
    (out / PARTIAL).rename(out / "results.json")
    draw(results, out / "throughput.png")
    model.draw(results, out / "scaling.png")
    if docs:
        for path, text in DOCS.items():
            write_into(path, text(results))
    return results


def _check(out: Path, full: bool, peers: Path | None, docs: bool) -> None:
    """Check inputs and outputs before the long measurements. Raises InputError for the first problem."""
    if peers and not peers.is_dir():
        raise InputError(f"--peers {peers}: no such folder")
    for program, python, _ in PROGRAMS.values() if peers else ():
        for path in (peers / program, peers / python):  # type: ignore[operator]
            if not path.is_file():
                raise InputError(f"--peers {peers}: {path} is missing (benchmarks/peers/setup makes EvoTorch's)")
    if docs and not (full and peers):
        raise InputError("--write-docs: needs --full and --peers DIR, because the documents show their figures")
    for path in DOCS if docs else ():
        if not path.is_file() or not 0 <= path.read_text().find(BEGIN) < path.read_text().find(END):
            raise InputError(f"--write-docs: {path} is missing or has no {BEGIN.strip()} ... {END.strip()}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PARTIAL).touch()
    except OSError as error:
        raise InputError(f"-o {out}: not a folder to write to: {error.strerror}") from None


def save(results: Results, out: Path) -> None:
    """Save the results so far: they took long, and later parts may fail."""
    (out / PARTIAL).write_text(json.dumps(results, indent=1) + "\n")


def busy_cores() -> float:
    """Return how many of the cores available to this process are in use."""
    percent = psutil.cpu_percent(LOOK_SECONDS, percpu=True)
    return round(sum(percent[core] for core in os.sched_getaffinity(0)) / 100, 2)


def machine(workers: int) -> Results:
    """Return the facts about the machine that the figures depend on."""
    facts: dict[str, Any] = environment()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        **{name: facts[name] for name in ("processor", "versions", "python", "git_commit")},
        "capability": torch.backends.cpu.get_cpu_capability(),
        "cores": workers,
        "memory_gb": round(memory / 1e9),
        "busy_cores": busy_cores(),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU",
    }
