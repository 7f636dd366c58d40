"""`spartan bench`: measures, compares, writes."""

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
# Share of the cores that others may use on a machine called idle, and for how long to look.
BUSY, LOOK_SECONDS = 0.1, 2.0
DOCS = {Path("README.md"): table, Path("docs/scaling.md"): model.table}


def bench(out: Path, full: bool, peers: Path | None, docs: bool, say: Said) -> Results:
    """Measure and write results.json and pictures to a folder; with `docs` the tables into README.md and
    docs/scaling.md of the working directory, with `full` what takes long too. Raises InputError for what it could
    not read or write at the end."""
    _check(out, full, peers, docs)
    workers = len(os.sched_getaffinity(0))
    results: Results = {"machine": machine(workers)}
    if results["machine"]["busy_cores"] > BUSY * workers:
        say(f"something else is running here ({results['machine']['busy_cores']} cores): the figures will be low")
    parts = ["memory", *["peers"] * bool(peers), "phases", "scoring", "update", "dispatch", *["simulation"] * full]
    say(f"starting Ray; the parts: {', '.join(parts)}; what is measured is kept in {out / PARTIAL} until the end")
    # Idle pools of every size stand beside each other: logical cores, which cost nothing.
    ray.init(
        address="local",
        num_cpus=8 * workers,
        num_gpus=0,
        include_dashboard=False,
        logging_level=logging.ERROR,
        log_to_driver=False,
    )
    try:
        # First, while this process has done nothing larger.
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
    """Before what takes long: is there what it needs, and where to write?"""
    if peers and not peers.is_dir():
        raise InputError(f"--peers {peers}: no such folder")
    for program, python, _ in PROGRAMS.values() if peers else ():
        for path in (peers / program, peers / python):  # type: ignore[operator]
            if not path.is_file():
                raise InputError(f"--peers {peers}: {path} is not there (benchmarks/peers/setup makes EvoTorch's)")
    if docs and not (full and peers):
        raise InputError("--write-docs: needs --full and --peers DIR, whose figures the documents show")
    for path in DOCS if docs else ():
        if not path.is_file() or not 0 <= path.read_text().find(BEGIN) < path.read_text().find(END):
            raise InputError(f"--write-docs: {path} is not there or has no {BEGIN.strip()} ... {END.strip()}")
    try:
        out.mkdir(parents=True, exist_ok=True)
        (out / PARTIAL).touch()
    except OSError as error:
        raise InputError(f"-o {out}: not a folder to write to: {error.strerror}") from None


def save(results: Results, out: Path) -> None:
    """Keep what there is: it took long, and what comes later may fail."""
    (out / PARTIAL).write_text(json.dumps(results, indent=1) + "\n")


def busy_cores() -> float:
    """How many of the cores that are ours somebody uses now."""
    percent = psutil.cpu_percent(LOOK_SECONDS, percpu=True)
    return round(sum(percent[core] for core in os.sched_getaffinity(0)) / 100, 2)


def machine(workers: int) -> Results:
    """What the figures depend on."""
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
