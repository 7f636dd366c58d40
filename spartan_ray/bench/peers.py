"""The programs that the evaluator is compared with, each on the same work and in turn with ours."""

from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path

from spartan_ray.bench.bare import PARENT
from spartan_ray.bench.figures import Results, spread
from spartan_ray.bench.measure import Generation, Said, close, peak_memory
from spartan_ray.config import RunError

# A program of each; EvoTorch has an environment of its own.
PROGRAMS = {
    "evotorch_pgpe.py": ".venv/bin/python",
    "thread_pool_es.py": sys.executable,
    "naive_ray.py": sys.executable,
}
GENERATIONS = 3
POPULATION, IMAGES = 16, 512


def measure_peers(folder: Path, workers: int, say: Said) -> list[Results]:
    """Members a second and memory of whole generations, ours first."""
    resnet = Generation(PARENT, IMAGES)
    pool = resnet.pool(workers)
    resnet.score(pool, 2 * workers, IMAGES)
    resnet.update(pool, POPULATION)
    rates, peaks, found = [], [0.0], []

    def own() -> None:
        for _ in range(GENERATIONS):
            with peak_memory([os.getpid(), *(info.pid for info in pool.infos)]) as now:
                seconds = resnet.score(pool, POPULATION, IMAGES) + resnet.update(pool, POPULATION)
            rates.append(POPULATION / seconds)
            peaks.append(sum(now))
        say(f"Spartan Ray: {rates[-GENERATIONS:]} members a second")

    for program, python in PROGRAMS.items():
        own()
        command = [str(folder / python), str(folder / program), "--workers", str(workers), "--population"]
        command += [str(POPULATION), "--images", str(IMAGES), "--generations", str(GENERATIONS)]
        say(" ".join(command))
        done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=False)
        if done.returncode:
            raise RunError(f"{' '.join(command)} ended with {done.returncode}")
        peer = json.loads(done.stdout.splitlines()[-1])
        say(f"{peer['name']}: {peer['members_per_second']} members a second, {peer['peak_mb']:.0f} MB")
        kept = {name: peer[name] for name in ("name", "version", "peak_mb")}
        found.append(kept | {"members_per_second": spread(peer["members_per_second"])})
    own()
    close(pool)
    ours = {"name": "Spartan Ray", "version": importlib.metadata.version("spartan-ray"), "peak_mb": max(peaks)}
    return [ours | {"members_per_second": spread(rates)}, *found]
