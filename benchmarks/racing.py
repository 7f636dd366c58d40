"""Measures how often successive halving misses the best member and what it saves: `python benchmarks/racing.py IMAGES`.

IMAGES is a folder as for `data.name folder`. The program trains a ResNet18 for ten epochs and scores its
random-gradient members on eight equal parts of 2,048 evolution images. It then runs races among random draws of these
members on the known scores, and compares each winner with the best member over all images. Writes
benchmarks/racing.json and prints the table.
"""

from __future__ import annotations

import functools
import json
import logging
import sys
from pathlib import Path

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.placement import resolve_cluster
from spartan_ray.distributed.pool import Pool
from spartan_ray.distributed.transport import RayTransport
from spartan_ray.engine.evaluator import EvaluatorSpec, ParentState
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.process import set_up
from spartan_ray.engine.strategies.requests import noisy
from spartan_ray.noise.contract import member_seeds
from spartan_ray.run.config import Config, Evolution
from spartan_ray.run.setup import make_fitness
from spartan_ray.vision.classification import Normaliser, mean_gradient
from spartan_ray.vision.config import Data, Parent
from spartan_ray.vision.data import load_splits
from spartan_ray.vision.models import build_model, initial_model
from spartan_ray.vision.training import Trainer

SEED, EPOCHS, IMAGES, PARTS = 0, 10, 2048, 8
MEMBERS, RACES, LR = 256, 2000, 0.05
CPU = torch.device("cpu")


def race(fitness_KP: NDArray[np.float64], halvings: int) -> tuple[int, int]:
    """Race members on their fitnesses on equal parts of the images. Return the winner and the number of scored
    parts."""
    alive_R, scored = np.arange(len(fitness_KP)), 0
    seen = 0
    for halving in range(halvings, -1, -1):
        until = PARTS >> halving
        scored += len(alive_R) * (until - seen)
        seen = until
        fitness_R = fitness_KP[alive_R, :until].mean(axis=1)
        if halving == 0:
            return int(alive_R[np.argmax(fitness_R)]), scored
        best_first_R = np.argsort(-fitness_R, kind="stable")
        alive_R = np.sort(alive_R[best_first_R[: -(-len(alive_R) // 2)]])
    raise AssertionError("the last round has no halving")


def main() -> None:
    set_up()
    config = Config(
        data=Data(name="folder", root=sys.argv[1], sgd_images=10_000, evolution_images=IMAGES),
        parent=Parent(threads=2),
        evolution=Evolution(strategy="random-gradients", fitness_images=IMAGES),
    )
    splits = load_splits(config.data, SEED)
    normalise = Normaliser(splits.mean_C, splits.std_C, CPU)
    model = FlatModel(initial_model(config.parent, 10, SEED)[0], CPU)
    trainer = Trainer(config.parent, model, splits.sgd, normalise, SEED, augment=False)
    for epoch in range(1, EPOCHS + 1):
        trainer.train_epoch(epoch, lambda count: None)
        print(f"epoch {epoch}/{EPOCHS}", file=sys.stderr)
    mean_gradient(model.module, splits.sgd[slice(0, 512)], normalise, "running")
    gradient_D = model.gradient()

    ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    cluster = resolve_cluster(Cluster(), [node["Resources"] for node in ray.nodes()])
    make_network = functools.partial(build_model, config.parent, 10)
    spec = EvaluatorSpec(make_network, make_fitness(config.evolution, splits), config.evolution.noise, threads=1)
    transport = RayTransport(spec, cluster)
    pool = Pool(transport, cluster, config.evolution.noise, print, lambda members, images: None)
    pool.wait_until_joined()
    pool.broadcast(ParentState(model.theta_D.numpy(), model.buffers, {"fitness": np.arange(IMAGES)}))
    pool.broadcast_scale(gradient_D.numpy())
    found = []
    random = np.random.default_rng(SEED)
    for low in (-1.0, 0.0):
        members = noisy(member_seeds(SEED, 1, MEMBERS), -LR * (1 + low) / 2, -LR * (1 - low) / 2)
        parts = [pool.evaluate(members, part=(part / PARTS, (part + 1) / PARTS)) for part in range(PARTS)]
        for statistic, fitness in enumerate(("loss", "accuracy")):
            fitness_KP = np.stack([part.mean_KM[:, statistic] for part in parts], axis=1)
            mean_K = fitness_KP.mean(axis=1)
            for population in (50, 200):
                for halvings in (1, 2, 3):
                    missed, lost, scored = 0, [], 0
                    for _ in range(RACES):
                        drawn_K = random.permutation(MEMBERS)[:population]
                        winner, scored = race(fitness_KP[drawn_K], halvings)
                        best = mean_K[drawn_K].max()
                        missed += int(mean_K[drawn_K][winner] < best)
                        lost.append((best - mean_K[drawn_K][winner]) / mean_K.std())
                    found.append({
                        "u": f"U({low:g}, 1)", "fitness": fitness, "population": population, "racing": halvings,
                        "saved": 1 - scored / (population * PARTS), "missed": missed / RACES,
                        "lost_deviations": float(np.mean(lost)), "spread": float(mean_K.std()),
                    })  # fmt: skip
    pool.close()
    ray.shutdown()
    (Path(__file__).parent / "racing.json").write_text(json.dumps(found, indent=1) + "\n")
    print("| u | fitness | members | `racing` | images saved | best missed | loss of fitness, in members' std |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for row in found:
        print(
            f"| {row['u']} | {row['fitness']} | {row['population']} | {row['racing']} | {row['saved']:.0%} "
            f"| {row['missed']:.1%} | {row['lost_deviations']:.2f} |"
        )


if __name__ == "__main__":
    main()
