"""Throughput of the evolve phase against what as many processes reach that only run the forward pass.

Both in one run and in turn, on the same Ray workers' cores: the limit is a bare process a core with the
same network, channels-last, batches of 256; the evolve phase is the pool's, from dispatch to last result,
with noise, Ray, broadcast and reduction. Prints the images/s of every repeat, the medians and their ratio.
"""

from __future__ import annotations

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import time
from multiprocessing.synchronize import Barrier as BarrierType
from typing import Any

import numpy as np

BATCH = 256


def forward_only(images: int, start: BarrierType, results: Any) -> None:
    """One process of the limit: a warm-up, then `images` images in evaluation mode."""
    import torch

    from spartan_ray.config import Parent
    from spartan_ray.model import FlatModel, initial_model

    torch.set_num_threads(1)
    module = FlatModel(initial_model(Parent(), 10, 0)[0], torch.device("cpu")).module.eval()
    batch = torch.randn(BATCH, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    with torch.inference_mode():
        for _ in range(4):
            module(batch)
        start.wait()
        started = time.perf_counter()
        for _ in range(images // BATCH):
            module(batch)
        results.put(images // BATCH * BATCH / (time.perf_counter() - started))


def measure_limit(processes: int, images: int) -> float:
    """Images a second of all processes together."""
    context = multiprocessing.get_context("spawn")
    start, results = context.Barrier(processes), context.Queue()
    running = [context.Process(target=forward_only, args=(images, start, results)) for _ in range(processes)]
    for process in running:
        process.start()
    total = float(sum(results.get() for _ in running))
    for process in running:
        process.join()
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--workers", type=int, default=len(os.sched_getaffinity(0)))
    parser.add_argument("--members", type=int, default=20)
    parser.add_argument("--images", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()

    import ray
    import torch

    from spartan_ray.config import Cluster, Evolution, Parent
    from spartan_ray.data import Images
    from spartan_ray.evaluator import EvaluatorSpec, ParentState
    from spartan_ray.model import FlatModel, initial_model
    from spartan_ray.pool import Pool
    from spartan_ray.resources import resolve_cluster
    from spartan_ray.strategies.base import noisy

    ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    pixels = torch.randint(0, 256, (arguments.images, 32, 32, 3), dtype=torch.uint8)
    images = Images(pixels, torch.randint(0, 10, (arguments.images,)))
    spec = EvaluatorSpec(Parent(), Evolution(), images, images, 10, (0.5, 0.5, 0.5), (0.25, 0.25, 0.25), threads=1)
    cluster = resolve_cluster(Cluster(workers=arguments.workers), [node["Resources"] for node in ray.nodes()])
    pool = Pool(spec, cluster, print, lambda members, images: None)
    pool.wait_until_joined()
    parent = FlatModel(initial_model(Parent(), 10, 0)[0], torch.device("cpu"))
    theta_D, buffers = parent.theta_D.numpy(), [buffer.numpy() for buffer in parent.buffers]
    members = noisy(np.arange(arguments.members, dtype=np.uint64), 0.0, 0.01)
    limits, scored, updates = [], [], []
    for repeat in range(arguments.repeats + 1):
        limit = measure_limit(arguments.workers, arguments.images * arguments.members // arguments.workers)
        state = ParentState(theta_D, buffers, None, {"fitness": np.arange(arguments.images)})
        started = time.perf_counter()
        pool.broadcast(state)
        pool.evaluate(members)
        seconds = time.perf_counter() - started
        started = time.perf_counter()
        pool.weighted_sum(members.seed_K, np.ones(arguments.members, np.float32), theta_D.size)
        if repeat:  # the first is a warm-up
            limits.append(limit)
            scored.append(arguments.images * arguments.members / seconds)
            updates.append((time.perf_counter() - started) / arguments.members * 1000)
    pool.close()
    ray.shutdown()
    result = {
        "workers": arguments.workers,
        "members": arguments.members,
        "fitness_images": arguments.images,
        "limit_images_per_second": [round(value) for value in limits],
        "scoring_images_per_second": [round(value) for value in scored],
        "efficiency": round(statistics.median(s / limit for s, limit in zip(scored, limits, strict=True)), 3),
        "update_seconds_per_1000_members": [round(value, 2) for value in updates],
    }
    if arguments.json:
        print(json.dumps(result))
    else:
        for name, value in result.items():
            print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
