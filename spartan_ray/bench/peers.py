"""The programs that the evaluator is compared with, each on the same work and in turn with ours."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from spartan_ray.bench.bare import PARENT
from spartan_ray.bench.figures import Results, said, spread
from spartan_ray.bench.measure import Generation, Said, close, peak_memory, process_tree
from spartan_ray.config import RunError

# The program of each, its python - EvoTorch has an environment of its own - and the package whose version counts.
PROGRAMS = {
    "EvoTorch PGPE": ("evotorch_pgpe.py", ".venv/bin/python", "evotorch"),
    "thread-pool ES": ("thread_pool_es.py", sys.executable, "torch"),
    "naive Ray": ("naive_ray.py", sys.executable, "ray"),
}
GENERATIONS = 3
POPULATION, IMAGES = 16, 512


def measure_peers(folder: Path, workers: int, say: Said) -> list[Results]:
    """Members a second and memory of whole generations, ours first."""
    resnet = Generation(PARENT, IMAGES)
    pool = resnet.pool(workers)
    resnet.score(pool, 2 * workers, IMAGES)
    resnet.update(pool, POPULATION)
    rates, found = [], []

    def own() -> None:
        for _ in range(GENERATIONS):
            seconds = resnet.score(pool, POPULATION, IMAGES) + resnet.update(pool, POPULATION)
            rates.append(POPULATION / seconds)
        say(f"peers: Spartan Ray, {said(spread(rates[-GENERATIONS:]))} members a second")

    for name, (program, python, package) in PROGRAMS.items():
        own()
        command = [str(folder / python), str(folder / program), "--workers", str(workers), "--population"]
        command += [str(POPULATION), "--images", str(IMAGES), "--generations", str(GENERATIONS)]
        say(f"peers: {' '.join(command)}")
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RunError(f"{' '.join(command)} ended with {done.returncode}")
        peer = json.loads(done.stdout.splitlines()[-1])
        rate = spread(peer["members_per_second"])
        say(f"peers: {name}, {said(rate)} members a second, {peer['peak_mb']:.0f} MB")
        version = f"{package} {peer['version'][package]}"
        found.append({"name": name, "version": version, "members_per_second": rate, "peak_mb": peer["peak_mb"]})
    own()
    # In a generation of its own and over all processes, Ray's too, as the peers do it.
    with peak_memory(process_tree(os.getpid())) as peaks:
        resnet.score(pool, POPULATION, IMAGES)
        resnet.update(pool, POPULATION)
    close(pool)
    version = importlib.metadata.version("spartan-ray")
    ours = {"name": "Spartan Ray", "version": version, "members_per_second": spread(rates), "peak_mb": sum(peaks)}
    return [ours, *found]
