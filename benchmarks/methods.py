"""Compares ways to spend a budget of forwarded images on an evolve phase: `python benchmarks/methods.py IMAGES FOLDER`.

IMAGES is a folder as for `data.name folder`. ResNet18 parents of a chosen width are overfit by gradient descent. Each
way scores its members once, and every smaller population is a part of the largest one. Rows are appended to
FOLDER/rows.jsonl as they are found; when started again, the program does the missing ones.
`benchmarks/methods_table.py` makes tables of the rows."""

from __future__ import annotations

import argparse
import json
import logging
import math
import re
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from spartan_ray import EvolutionStrategies, Population
from spartan_ray.engine.flat import FlatModel, dot, mean, norm
from spartan_ray.engine.guards import keeping_gradients
from spartan_ray.engine.process import set_up
from spartan_ray.engine.strategies.es import best_length, less_pair_mean, search_lengths
from spartan_ray.engine.strategies.requests import Members, Score, Scores, SetDirection, SetScale, merge_seeds
from spartan_ray.engine.strategies.shaping import zscore
from spartan_ray.study.scale import pairs_of
from spartan_ray.vision.averaging import Average
from spartan_ray.vision.classification import Classification, Normaliser, recalibrate, score
from spartan_ray.vision.config import Data, Parent
from spartan_ray.vision.data import Images, Splits, load_splits
from spartan_ray.vision.resnet import ResNet18
from spartan_ray.vision.training import Trainer

CPU = torch.device("cpu")
EPOCHS, KEPT = 14, 9
AVERAGED = 8  # number of these epochs in the average that a phase may start from
SGD_IMAGES, EVOLUTION_IMAGES, SEARCH_IMAGES = 10_000, 20_000, 2_048
BUDGETS = (1_000_000, 4_000_000)
POPULATIONS = (50, 200, 1000, 5000)
# Number of members to score between two writes.
BLOCK = 2_000
# Largest number of images to judge an update on (scored and unscored ones), and number of images for the gradient.
JUDGED = 4_096
GRADIENT_IMAGES = 1_024
STATISTICS = ("loss", "accuracy")


@dataclass(frozen=True)
class Way:
    """How members are made, and on how many images each is scored. sigma is for a ResNet18 of width 64."""

    images: int
    own: bool = False
    mutate: str = "all"
    subspace: str = "none"
    sigma: float = 0.01
    generations: int = 1
    of: str = "parent"

    def at(self, width: int) -> Way:
        """Return this way for a ResNet18 of another width. Initial weights are proportional to 1 / sqrt(width), and so
        is sigma if all weights are mutated."""
        of_weights = self.mutate == "all" and not self.subspace.startswith("trajectory")
        return replace(self, sigma=self.sigma * math.sqrt(64 / width)) if of_weights else self


WAYS = {
    "all, common 1,024": Way(1024),
    "all, own 128": Way(128, own=True),
    "all, own 32": Way(32, own=True),
    "BatchNorm, common 1,024": Way(1024, mutate="batchnorm", sigma=0.08),
    "BatchNorm, own 128": Way(128, own=True, mutate="batchnorm", sigma=0.08),
    "BatchNorm and classifier, own 128": Way(128, own=True, mutate="batchnorm,classifier", sigma=0.04),
    "trajectory of 8 epochs, common 1,024": Way(1024, subspace="trajectory:8", sigma=0.5),
    "guided by 4 gradients, own 128": Way(128, own=True, subspace="guided:4", sigma=0.0003),
    "all, own 128, 8 generations": Way(128, own=True, generations=8),
    "BatchNorm, own 128, 8 generations": Way(128, own=True, mutate="batchnorm", sigma=0.08, generations=8),
    "of the average of 8 epochs: all, own 128": Way(128, own=True, of="average"),
    "of the average of 8 epochs: all, own 128, 8 generations": Way(128, own=True, generations=8, of="average"),
}


class Bench:
    """The measurements on one parent."""

    def __init__(self, splits: Splits, folder: Path, parent: int, width: int, precision: Any) -> None:
        self.splits, self.folder, self.parent, self.width, self.precision = splits, folder, parent, width, precision
        self.normalise = Normaliser(splits.mean_C, splits.std_C, CPU)
        self.rows_path = folder / "rows.jsonl"
        self.config = Parent(threads=2)
        torch.manual_seed(parent)
        self.network = ResNet18(len(splits.classes), "imagenet", width)
        self.model = FlatModel(self.network, CPU)
        self.thetas = self._thetas()
        self.reference_NCHW = self.normalise(splits.sgd[slice(0, 512)].pixels_NHWC)
        self.begin()
        # Results differ slightly between processors, so another processor trains another parent.
        self.weights = self.model.digest()[:12]

    def _thetas(self) -> list[torch.Tensor]:
        """Return the parent's weights at the ends of its last epochs, and set `buffers` to the final ones. Train the
        parent if it is not in the folder."""
        path = self.folder / f"parent-{self.parent}-{self.width}.pt"
        if not path.exists():
            trainer = Trainer(self.config, self.model, self.splits.sgd, self.normalise, self.parent, augment=False)
            kept: list[torch.Tensor] = []
            for epoch in range(1, EPOCHS + 1):
                trainer.train_epoch(epoch, lambda count: None)
                kept = [*kept, self.model.theta_D.clone()][-KEPT:]
                print(f"parent {self.parent}: epoch {epoch}/{EPOCHS}", flush=True)
            torch.save({"thetas": kept, "buffers": list(self.network.buffers())}, path)
        saved = torch.load(path)
        self.buffers = saved["buffers"]
        return list(saved["thetas"])

    def begin(self, of: str = "parent") -> None:
        """Load the parent, or the average of its last epochs, into the network."""
        self.model.theta_D.copy_(self.thetas[-1])
        self.model.load_buffers(self.buffers)
        if of == "average":
            self.model.theta_D.copy_(mean(self.thetas[-AVERAGED:]))
            recalibrate(self.network, self.reference_NCHW)

    def judge(self, images: Images | None = None) -> tuple[float, float]:
        """Return the network's current loss and accuracy on images, by default on all test images."""
        result = score(self.network, images or self.splits.test, self.normalise)
        return result.loss, result.accuracy

    def add(self, **row: Any) -> None:
        with self.rows_path.open("a") as file:
            file.write(json.dumps(self._about() | row) + "\n")
        print(json.dumps(row), flush=True)

    def _about(self) -> dict[str, Any]:
        return {"parent": self.parent, "width": self.width, "weights": self.weights, "precision": self.precision}

    def done(self, way: str) -> bool:
        """Return whether all rows of a way exist."""
        lines = self.rows_path.read_text().splitlines() if self.rows_path.exists() else []
        mine = self._about() | {"way": way, "last": True}
        return any(mine.items() <= {**row, "lengths": None}.items() for row in map(json.loads, lines))

    def baselines(self) -> None:
        """Score the parent, averages of its last epochs, and their greedy soup, chosen on the evolution split."""
        if self.done("baselines"):
            return
        self.begin()
        loss, accuracy = self.judge()
        self.add(way="parent", test_loss=loss, test_accuracy=accuracy)
        for count in (2, 4, 8):
            self.model.theta_D.copy_(mean(self.thetas[-count:]))
            recalibrate(self.network, self.reference_NCHW)
            loss, accuracy = self.judge()
            self.add(way=f"average of {count} epochs", test_loss=loss, test_accuracy=accuracy)
        self.begin()
        soup = Average(
            "soup", 8, self.model, lambda: recalibrate(self.network, self.reference_NCHW),
            lambda: score(self.network, self.splits.evolution, self.normalise).accuracy,
        )  # fmt: skip
        for theta_D in self.thetas[-8:]:
            self.model.theta_D.copy_(theta_D)
            recalibrate(self.network, self.reference_NCHW)
            soup.after_epoch()
        soup.become()
        loss, accuracy = self.judge()
        self.add(way="greedy soup of 8 epochs", test_loss=loss, test_accuracy=accuracy)
        self.add(way="baselines", last=True)
        self.begin()

    def population(self, way: Way, by: Any = "loss") -> Population:
        """Return the Population that scores the members of a way, on two workers."""
        self.begin(way.of)
        fitness = Classification(
            self.splits.evolution, self.splits.sgd[slice(0, 512)], self.splits.mean_C, self.splits.std_C, by,
            "running", self.precision,
        )  # fmt: skip
        population = Population(
            self.network,
            fitness,
            workers=2,
            seed=self.parent,
            mutate=way.mutate,
            subspace=way.subspace,
            fitness_cases=None if way.own else way.images,
            confirm_cases=SEARCH_IMAGES,
            note=print,
        )
        if population.subspace and population.subspace.kind == "trajectory":
            for theta_D in self.thetas:
                self.model.theta_D.copy_(theta_D)
                population.remember()
            self.begin()
        return population

    def single(self, name: str, way: Way) -> None:
        """Make one update for every population, by loss and by accuracy. The smaller populations are parts of the
        largest."""
        with self.population(way) as population:
            population.begin(("fitness", "search"), 1)
            most = max(BUDGETS[-1] // way.images // 2 * 2, POPULATIONS[-1])
            members = pairs_of(self.parent, most, way.sigma)
            mean_KM = self._scored(name, way, population, members)
            gradient_D = self._gradient(population)
            before = self._judged(population.case_sets["fitness"][:JUDGED])
            budgets = [budget // way.images // 2 * 2 for budget in BUDGETS]
            populations = sorted({*POPULATIONS, *budgets})
            for count in populations:
                for column, fitness in enumerate(STATISTICS):
                    row = self._update(population, members[:count], mean_KM[:count, column], way, column)
                    row |= self._after(population, row["length"], before, gradient_D)
                    pairs, size = count // 2, population.model.theta_D.numel()
                    expected = math.sqrt(min(1.0, pairs / size))
                    last = count == populations[-1] and column == 1
                    self.add(
                        way=name, population=count, images=count * way.images, fitness=fitness, parameters=size,
                        cosine_expected=expected, last=last, **row,
                    )  # fmt: skip

    def _scored(self, name: str, way: Way, population: Population, members: Members) -> NDArray[np.float64]:
        """Return the members' mean statistics, K x M. Load those in the file and score the others."""
        slug = re.sub(r"\W+", "-", name)
        path = self.folder / f"scores-{self.parent}-{self.width}-{self.precision}-{slug}.npy"
        found = np.load(path) if path.exists() else np.empty((0, 2))
        while len(found) < len(members):
            started, first = time.time(), len(found)
            block = members[first : first + BLOCK]
            scores = population.answer(Score(block, own=way.images if way.own else None))
            assert isinstance(scores, Scores)
            found = np.concatenate([found, scores.mean_KM])
            np.save(path, found)
            rate = len(block) * way.images / (time.time() - started)
            print(f"{self.parent} {name}: {len(found)}/{len(members)} members, {rate:.0f} images/s", flush=True)
        return found[: len(members)]

    def _gradient(self, population: Population) -> torch.Tensor:
        """Return the gradient of the loss on images that score members, for the cosine."""
        with keeping_gradients(self.network):
            population._backward(self.network, population.case_sets["fitness"][:GRADIENT_IMAGES])
            return population.model.gradient()

    def _judged(self, scored_N: NDArray[np.int64]) -> dict[str, tuple[float, float]]:
        """Return the network's current loss and accuracy on images that scored members, on images of the validation
        split, which scored nothing, and on the test images."""
        scored, unscored = self.splits.evolution[torch.from_numpy(scored_N)], self.splits.validation[slice(0, JUDGED)]
        return {"scored": self.judge(scored), "unscored": self.judge(unscored), "test": self.judge()}

    def _update(
        self, population: Population, members: Members, statistic_K: NDArray[np.float64], way: Way, column: int
    ) -> dict[str, Any]:
        """Make the update of these members the scale, and search its length by a statistic of the search images."""
        shaped_K = zscore(less_pair_mean(statistic_K) if way.own else statistic_K)
        seed_U, weight_U = merge_seeds(members, shaped_K)
        population.answer(SetScale("none"))
        if population.subspace:
            population.take_basis()
        population.mutation_norm = population._mutation_norm(members[:1])
        population.answer(SetDirection(seed_U, weight_U, 1.0, ratio=1.0))
        asked = search_lengths()
        request = next(asked)
        try:
            while True:
                scores = population.answer(request)
                assert isinstance(scores, Scores)
                request = asked.send(replace(scores, fitness_K=scores.mean_KM[:, column]))
        except StopIteration as end:
            return {"length": best_length(end.value)}

    def _after(
        self, population: Population, length: float, before: dict[str, Any], gradient_D: torch.Tensor
    ) -> dict[str, Any]:
        """Judge the network after the update, then make it the parent again."""
        model, update_D = population.model, population.scale
        assert update_D is not None
        lengths = norm(update_D) * norm(gradient_D)
        theta_D = model.theta_D.clone()
        model.theta_D.add_(update_D, alpha=length)
        model.write()
        after = self._judged(population.case_sets["fitness"][:JUDGED])
        model.theta_D.copy_(theta_D)
        model.write()
        row = {"cosine": -dot(update_D, gradient_D) / lengths if lengths else None}
        return row | _compared(before, after)

    def several(self, name: str, way: Way) -> None:
        """Do a phase of several generations for each budget, by loss and by accuracy."""
        for budget in BUDGETS:
            for fitness in STATISTICS:
                with self.population(way, fitness) as population:
                    count = budget // way.images // way.generations // 2 * 2
                    strategy = EvolutionStrategies(
                        count, generations=way.generations, sigma=way.sigma, mirrored=True, step="search",
                        own_cases=way.images if way.own else None,
                    )  # fmt: skip
                    population.begin(strategy.case_sets, 1)
                    scored_N = population.case_sets["fitness"][:JUDGED]
                    before = self._judged(scored_N)
                    outcome = population.step(strategy)
                    lengths = [one.length if one.accepted else 0 for one in outcome.generations]
                    after = self._judged(scored_N)
                    last = budget == BUDGETS[-1] and fitness == "accuracy"
                    self.add(
                        way=name,
                        population=count,
                        images=budget,
                        fitness=fitness,
                        lengths=lengths,
                        last=last,
                        **_compared(before, after),
                    )


def _compared(before: dict[str, Any], after: dict[str, Any]) -> dict[str, float]:
    """Return loss and accuracy before and after, on each set of images."""
    row = {f"{on}_{what}": after[on][i] for on in after for i, what in enumerate(STATISTICS)}
    return row | {f"{on}_{what}_before": before[on][i] for on in before for i, what in enumerate(STATISTICS)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", help="a folder with train/<class>/* and test/<class>/*")
    parser.add_argument("folder", type=Path, help="folder for rows and scores")
    parser.add_argument("--parents", type=int, nargs="+", default=[0, 1, 2], help="their numbers (default: 0 1 2)")
    parser.add_argument("--width", type=int, default=64, help="channels of the first stage (default: 64)")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32", help="of scoring (default: fp32)")
    parser.add_argument("--ways", nargs="*", default=list(WAYS), help=f"ways to try (default: all): {'; '.join(WAYS)}")
    arguments = parser.parse_args()
    arguments.folder.mkdir(parents=True, exist_ok=True)
    set_up(2)
    ray.init(address="local", include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    data = Data(name="folder", root=arguments.images, sgd_images=SGD_IMAGES, evolution_images=EVOLUTION_IMAGES)
    splits = load_splits(data, 0)
    for parent in arguments.parents:
        bench = Bench(splits, arguments.folder, parent, arguments.width, arguments.precision)
        bench.baselines()
        for name in arguments.ways:
            if not bench.done(name):
                way = WAYS[name].at(arguments.width)
                (bench.single if way.generations == 1 else bench.several)(name, way)


if __name__ == "__main__":
    main()
