"""Measures the programs that the evaluator is compared with, on the same work and in alternation with ours."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil

from bench.bare import PARENT
from bench.figures import Results, said, spread
from bench.measure import Generation, Phases, Said, close, peak_memory
from spartan_ray import __version__
from spartan_ray.engine.strategies.es import EvolutionStrategies
from spartan_ray.engine.strategies.requests import Score, Scores, Take, line, noisy
from spartan_ray.errors import RunError
from spartan_ray.noise.contract import member_seeds

# Each peer's program, its Python (EvoTorch has its own environment), and the package whose version is shown.
PROGRAMS = {
    "EvoTorch PGPE": ("evotorch_pgpe.py", ".venv/bin/python", "evotorch"),
    "thread-pool ES": ("thread_pool_es.py", sys.executable, "torch"),
    "naive Ray": ("naive_ray.py", sys.executable, "ray"),
}
GENERATIONS = 3
POPULATION, IMAGES = 16, 512


def members_alone(phases: Phases, generation: int) -> None:
    """Do what the peers do in a generation: score the members, shape, sum, move. A phase of evolution strategies also
    scores the parent before and after."""
    population, strategy = phases.population, phases.strategy
    assert isinstance(strategy, EvolutionStrategies)
    population.begin(strategy.case_sets, generation)
    members = noisy(member_seeds(population.seed, generation, strategy.population), 0.0, strategy.sigma)
    scores = population.answer(Score(members))
    assert isinstance(scores, Scores)
    weight_K = strategy.shaping(scores.fitness_K) / (len(members) * strategy.sigma**2)
    population.answer(strategy.direction(members.seed_K, weight_K.astype(np.float32), strategy.lr))
    population.answer(Take(line(1.0)))


# Our generation without the scores of the parent, as the peers do it, and with them.
OURS = {"Spartan Ray": members_alone, "Spartan Ray, parent scored too": Phases.evolve}


def measure_peers(folder: Path, workers: int, say: Said) -> list[Results]:
    """Measure members per second and memory of generations. Ours run before and after each peer's, never at the same
    time. All draw normal noise."""
    resnet = Generation(PARENT, IMAGES, noise="gaussian")
    rates: dict[str, list[float]] = {name: [] for name in OURS}
    peak_mb: dict[str, list[float]] = {name: [] for name in OURS}
    found = []

    def own() -> None:
        pool = resnet.pool(workers)
        phases, generations = resnet.phases(pool, POPULATION), itertools.count(1)
        phases.evolve(next(generations))  # a warm-up
        for name, generation in OURS.items():
            for _ in range(GENERATIONS):
                started = time.perf_counter()
                generation(phases, next(generations))
                rates[name].append(POPULATION / (time.perf_counter() - started))
            # Memory: in another generation and over all processes, including Ray's, as the peers measure it.
            here = psutil.Process()
            with peak_memory([here, *here.children(recursive=True)]) as peaks:
                generation(phases, next(generations))
            peak_mb[name] += peaks
            say(f"peers: {name}, {said(spread(rates[name][-GENERATIONS:]))} members/s, {peaks[0]:.0f} MB")
        close(pool)

    own()
    for name, (program, python, package) in PROGRAMS.items():
        command = [str(folder / python), str(folder / program), "--workers", str(workers), "--population"]
        command += [str(POPULATION), "--images", str(IMAGES), "--generations", str(GENERATIONS)]
        say(f"peers: {' '.join(command)}")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RunError(f"{' '.join(command)} ended with {done.returncode}")
        peer = json.loads(done.stdout.splitlines()[-1])
        rate = spread(peer["members_per_second"])
        say(f"peers: {name}, {said(rate)} members/s, {peer['peak_mb']:.0f} MB")
        version = f"{package} {peer['version'][package]}"
        own()
        beside = rates["Spartan Ray"][-2 * GENERATIONS :]
        found.append(
            {
                "name": name,
                "version": version,
                "members_per_second": rate,
                "peak_mb": peer["peak_mb"],
                # Ratios of our generations just before and after to each of the peer's.
                "ours_over_it": spread(own / their for own in beside for their in peer["members_per_second"]),
            }
        )
    ours = [
        {"name": name, "version": __version__, "members_per_second": spread(rates[name]), "peak_mb": max(peak_mb[name])}
        for name in OURS
    ]
    return [*ours, *found]
