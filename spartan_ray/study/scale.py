"""Measures how much larger populations improve one parent; members are scored once, smaller populations are subsets.

Shapes: D parameters, K members, M statistics."""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import math
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray

from spartan_ray.distributed.population import Population
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.strategies.es import best_length, less_pair_mean, search_lengths
from spartan_ray.engine.strategies.requests import (
    Compare,
    Members,
    Score,
    Scores,
    SetDirection,
    SetScale,
    merge_seeds,
)
from spartan_ray.engine.strategies.shaping import zscore
from spartan_ray.errors import InputError
from spartan_ray.noise.contract import member_seeds
from spartan_ray.run.checkpoint import be_after_epoch, epochs_kept, latest_checkpoint
from spartan_ray.run.files import write_whole
from spartan_ray.run.loading import load_run_config, refuse_code
from spartan_ray.run.setup import REFERENCE_IMAGES
from spartan_ray.study.plan import key_of
from spartan_ray.vision.averaging import Average
from spartan_ray.vision.classification import Classification, Normaliser, recalibrate, score
from spartan_ray.vision.data import Images, load_splits
from spartan_ray.vision.models import build_model

# Number of members to score between two writes.
BLOCK = 2_000
# Largest number of images to judge an update on: of those that scored members, and of those that did not.
JUDGED = 4_096
# Number of evolution images for the search for an update's length, or half of the split if that is less.
SEARCH_IMAGES = 2_048
STATISTICS = ("loss", "accuracy")
# Largest number of epochs in the average that a way may start from.
AVERAGED = 8
# Width of the ResNet18 that the sigmas of WAYS are for.
WIDTH = 64


@dataclass(frozen=True)
class Way:
    """How members are made and scored.

    images        number of images that score a member
    own           True: each mirrored pair draws its own images; False: all members share the same ones
    mutate, subspace    as in the configuration of evolution
    sigma         scale of the noise, for a ResNet18 of width 64
    of_average    start from the average of the parent's last epochs"""

    images: int
    own: bool = False
    mutate: str = "all"
    subspace: str = "none"
    sigma: float = 0.01
    of_average: bool = False

    def at(self, width: int) -> Way:
        """Return this way for a network of another width. Initial weights are proportional to 1 / sqrt(width), and so
        is sigma if all weights are mutated."""
        of_weights = self.mutate == "all" and not self.subspace.startswith("trajectory")
        return replace(self, sigma=self.sigma * math.sqrt(WIDTH / width)) if of_weights else self

    @property
    def digest(self) -> str:
        return hashlib.sha256(repr(self).encode()).hexdigest()[:8]


WAYS = {
    "all-common-512": Way(512),
    "all-own-128": Way(128, own=True),
    "batchnorm-common-512": Way(512, mutate="batchnorm", sigma=0.08),
    "batchnorm-own-128": Way(128, own=True, mutate="batchnorm", sigma=0.08),
    "trajectory-common-512": Way(512, subspace="trajectory:8", sigma=0.5),
    "average-own-128": Way(128, own=True, of_average=True),
}


class ScaleRows:
    """The rows of all parents in one file. Only one process may add to it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[dict[str, Any]] = []

    def read(self) -> None:
        """Read the file if it exists. Raises InputError if it cannot be read."""
        try:
            self.rows = [json.loads(text) for text in self.path.read_text().splitlines()] if self.path.exists() else []
        except (OSError, ValueError) as error:
            raise InputError(f"{self.path}: cannot be read: {error}") from None

    def refuse_others(self, parents: Sequence[Scaling]) -> None:
        """Raise InputError if the parents, those in the file included, differ in configuration or in epochs kept."""
        key = self.rows[0]["key"] if self.rows else parents[0].about["key"]
        if other := next((parent for parent in parents if parent.about["key"] != key), None):
            what = f"differs in configuration or run.keep from the other parents ({other.about['key']}, not {key})"
            raise InputError(f"{self.path}: {other.name} {what}")

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append(row)
        self._write()

    def _write(self) -> None:
        write_whole(self.path, "".join(json.dumps(row) + "\n" for row in self.rows).encode())

    def has(self, wanted: dict[str, Any]) -> bool:
        """Return whether there is a row with these values."""
        return any(_matches(row, wanted) for row in self.rows)

    def renew(self, wanted: dict[str, Any], among: dict[str, Any]) -> None:
        """Move the rows with the values `wanted` to the end, unless they are the last of those with the values `among`:
        of several parents of a seed, and of several versions of a way, tables show the last."""
        last = next((row for row in reversed(self.rows) if _matches(row, among)), wanted)
        if not _matches(last, wanted) and self.has(wanted):
            self.rows.sort(key=lambda row: _matches(row, wanted))
            self._write()


def _matches(row: dict[str, Any], wanted: dict[str, Any]) -> bool:
    return all(row.get(name) == value for name, value in wanted.items())


class Scaling:
    """The measurements on one parent, which is the last network of a run."""

    def __init__(
        self, run: Path, rows: ScaleRows, populations: list[int], draws: int, say: Callable[[str], None]
    ) -> None:
        """Rows are added to `rows`, and scores are kept beside its file. What is there is not computed again. Raises
        InputError if the run cannot be used."""
        self.rows, self.folder, self.draws, self.say = rows, rows.path.parent, draws, say
        self.populations = sorted(set(populations))
        self.name = run.resolve().name
        self.config = config = load_run_config(run)
        refuse_code(run, config, "its networks cannot be scaled")
        checkpoint, _ = latest_checkpoint(run, say)
        self.splits = load_splits(config.data, config.run.seed, say)
        if checkpoint.loop.data != self.splits.digest():
            raise InputError(f"{run}: data.root: the images are not those that the run had")
        self.normalise = Normaliser(self.splits.mean_C, self.splits.std_C, torch.device("cpu"))
        self.network = build_model(config.parent, len(self.splits.classes))
        self.model = FlatModel(self.network, torch.device("cpu"))
        self.reference_NCHW = self.normalise(self.splits.sgd[slice(0, REFERENCE_IMAGES)].pixels_NHWC)
        self.thetas: list[torch.Tensor] = []
        kept = [epoch for epoch in epochs_kept(run / "checkpoints") if epoch <= checkpoint.epoch]
        in_a_row = next((count for count, epoch in enumerate(reversed(kept)) if epoch != kept[-1] - count), len(kept))
        be_after_epoch(self.network, checkpoint, run / "checkpoints", in_a_row, self._remember)
        self.buffers = [buffer.clone() for buffer in self.model.buffers]
        # The average and the trajectory depend on the number of epochs that the run has kept.
        self.about = {
            "key": f"{key_of(config)}-{len(self.thetas)}",
            "seed": config.run.seed,
            "epoch": checkpoint.epoch,
            "weights": self.model.digest()[:12],
        }
        if checkpoint.epoch < config.run.epochs:
            say(f"{self.name}: the parent is the network of epoch {checkpoint.epoch} of {config.run.epochs}")

    def _remember(self, epoch: int) -> None:
        self.thetas.append(self.model.theta_D.clone())

    def _begin(self, of_average: bool = False) -> None:
        """Load the parent, or the average of its last epochs, into the network."""
        self.model.theta_D.copy_(self.thetas[-1])
        self.model.load_buffers(self.buffers)
        if of_average:
            self._average("epochs", self.averaged).become()

    def _average(self, kind: str, epochs: int) -> Average:
        """Return an average of the last epochs. Leave the parent in the network."""
        average = Average(
            kind,
            epochs,
            self.model,
            lambda: recalibrate(self.network, self.reference_NCHW),
            lambda: score(self.network, self.splits.evolution, self.normalise).accuracy,
        )
        for theta_D in self.thetas[-epochs:]:
            self.model.theta_D.copy_(theta_D)
            if kind == "soup":
                recalibrate(self.network, self.reference_NCHW)
            average.after_epoch()
        self.model.theta_D.copy_(self.thetas[-1])
        self.model.load_buffers(self.buffers)
        return average

    def _judge(self, images: Images) -> dict[str, float]:
        result = score(self.network, images, self.normalise)
        return {"loss": result.loss, "accuracy": result.accuracy}

    def _add(self, **row: Any) -> None:
        self.rows.add(self.about | row)

    def _is_done(self, **row: Any) -> bool:
        return self.rows.has(self.about | row)

    def _renew(self, way: str, made: str) -> None:
        """Make this version of a way the one that tables show, if it has rows."""
        among = self.about | {"way": way}
        self.rows.renew(among | {"made": made}, among)

    @property
    def averaged(self) -> int:
        """Number of epochs in the average that a way may start from."""
        return min(AVERAGED, len(self.thetas))

    def baselines(self, levels: Sequence[Scaling] = ()) -> None:
        """Score the parent, averages of its last epochs, and their greedy soup, chosen on the evolution split. Also
        score the last networks of other runs with the same seed, `levels`, and their averages."""
        self.rows.renew(self.about, {"seed": self.about["seed"]})
        counts = sorted({*(count for count in (2, 4) if count < self.averaged), self.averaged} - {1})
        ways = {"parent": ("epochs", 1)} | {f"average of {count} epochs": ("epochs", count) for count in counts}
        if counts:
            ways[f"greedy soup of {counts[-1]} epochs"] = ("soup", counts[-1])
        for name, (kind, count) in ways.items():
            self._level(name, self, kind, count)
        for other in levels:
            if other.splits.classes != self.splits.classes:
                raise InputError(f"--levels {other.name}: has other classes than {self.name}")
            name = other.name.removesuffix(f"-{other.about['seed']}")
            if name in ways:
                raise InputError(f"--levels {other.name}: the name {name!r} is taken: rename the run folder")
            self._level(name, other, "epochs", 1)
            if other.averaged > 1:
                self._level(f"{name}, average of {other.averaged} epochs", other, "epochs", other.averaged)

    def _level(self, name: str, of: Scaling, kind: str, count: int) -> None:
        """Score the last network of a run, or an average of its last epochs, on this parent's test images."""
        made = str(of.about["weights"])
        self._renew(name, made)
        if self._is_done(way=name, made=made):
            return
        of._begin()
        if count > 1:
            of._average(kind, count).become()
        found = of._judge(self.splits.test)
        of._begin()
        self._add(way=name, made=made, **{f"test_{what}": value for what, value in found.items()})
        self.say(f"{self.name} {name}: test accuracy {found['accuracy']:.4f}")

    def refuse_unfit(self, name: str, way: Way) -> None:
        """Raises InputError if a way needs more evolution images or epochs than there are."""
        if not way.own and way.images + self.search_images > len(self.splits.evolution):
            raise InputError(
                f"{self.name}: {name}: {way.images} common images and {self.search_images} to search a length do not "
                f"fit data.evolution_images ({len(self.splits.evolution)}): choose other --ways"
            )
        if (way.of_average or way.subspace != "none") and len(self.thetas) == 1:
            raise InputError(f"{self.name}: {name}: the run has kept only its last epoch (run.keep)")

    @property
    def search_images(self) -> int:
        """Number of evolution images for the search for an update's length."""
        return min(SEARCH_IMAGES, len(self.splits.evolution) // 2)

    def way(self, name: str, way: Way, workers: int | Literal["local", "auto"]) -> None:
        """Make and judge one update for every population and draw, by loss and by accuracy."""
        way, most = way.at(self.config.parent.width), max(self.populations)
        self._renew(name, way.digest)
        wanted = [
            (count, draw, fitness)
            for count in self.populations
            for draw in range(min(self.draws, most // count))
            for fitness in STATISTICS
            if not self._is_done(way=name, made=way.digest, population=count, draw=draw, fitness=fitness)
        ]
        if not wanted:
            return
        with self._population(way, workers) as population:
            population.begin(("fitness", "search"), 1)
            members = pairs_of(self.config.run.seed, most, way.sigma)
            mean_KM = self._scores(name, way, population, members)
            scored_N = torch.from_numpy(population.case_sets["fitness"][:JUDGED])
            sets = {
                "scored": self.splits.evolution[scored_N],
                "unscored": self.splits.validation[slice(0, JUDGED)],
                "test": self.splits.test,
            }
            before = {on: self._judge(images) for on, images in sets.items()}
            for count, draw, fitness in wanted:
                part = slice(draw * count, (draw + 1) * count)
                column = STATISTICS.index(fitness)
                row = self._update(population, members[part], mean_KM[part, column], way, column)
                after = before
                if row["length"]:
                    with _moved(population, row["length"]):
                        after = {on: self._judge(images) for on, images in sets.items()}
                for on, what in ((on, what) for on in sets for what in STATISTICS):
                    row |= {f"{on}_{what}_before": before[on][what], f"{on}_{what}": after[on][what]}
                size = population.model.theta_D.numel()
                row |= {"parameters": size, "cosine_expected": math.sqrt(min(1.0, count / 2 / size))}
                row["images"] += count * way.images
                self._add(way=name, made=way.digest, population=count, draw=draw, fitness=fitness, **row)
                gain = after["test"]["accuracy"] - before["test"]["accuracy"]
                self.say(f"{self.name} {name}: {count:,} members, draw {draw}, by {fitness}: test {gain:+.4f}")

    def _population(self, way: Way, workers: int | Literal["local", "auto"]) -> Population:
        """Return the Population that scores the members of a way."""
        self._begin(way.of_average)
        splits, evolution = self.splits, self.config.evolution
        reference = splits.sgd[slice(0, REFERENCE_IMAGES)]
        fitness = Classification(
            splits.evolution, reference, splits.mean_C, splits.std_C, "loss", "running", evolution.precision
        )
        population = Population(
            self.network,
            fitness,
            workers=workers,
            seed=self.config.run.seed,
            mutate=way.mutate,
            subspace=way.subspace,
            fitness_cases=None if way.own else way.images,
            confirm_cases=self.search_images,
            note=self.say,
        )
        if way.subspace.startswith("trajectory"):
            for theta_D in self.thetas:
                self.model.theta_D.copy_(theta_D)
                population.remember()
            self._begin(way.of_average)
        return population

    def _scores(self, name: str, way: Way, population: Population, members: Members) -> NDArray[np.float64]:
        """Return the members' mean statistics, K x M. Load those in the file and score the others."""
        words = re.sub(r"[^a-zA-Z0-9]+", "-", name)
        path = self.folder / "scores" / f"{self.about['weights']}-{words}-{way.digest}.npy"
        path.parent.mkdir(exist_ok=True)
        found = np.load(path) if path.exists() else np.empty((0, len(STATISTICS)))
        own = way.images if way.own else None
        if len(found) >= len(members):  # an update's length is in mutations, and it has seen none yet
            population.answer(Score(members[:2], own=own))
        while len(found) < len(members):
            block = members[len(found) : len(found) + BLOCK]
            scores = population.answer(Score(block, own=own))
            assert isinstance(scores, Scores)
            found = np.concatenate([found, scores.mean_KM])
            content = io.BytesIO()
            np.save(content, found)
            write_whole(path, content.getvalue())
            self.say(f"{self.name} {name}: {len(found):,} of {len(members):,} members are scored")
        return found[: len(members)]

    def _update(
        self, population: Population, members: Members, statistic_K: NDArray[np.float64], way: Way, column: int
    ) -> dict[str, Any]:
        """Make the update of these members the scale, and search its length by a statistic of the search images. Return
        its length, its cosine to the gradient, and the number of images that the search forwarded."""
        shaped_K = zscore(less_pair_mean(statistic_K) if way.own else statistic_K)
        population.answer(SetScale("none"))
        if not shaped_K.any():
            return {"images": 0, "length": 0.0, "cosine": None}
        population.answer(SetDirection(*merge_seeds(members, shaped_K), 1.0, ratio=1.0))
        cosine = population.answer(Compare())
        fitness_of = _answered(population, search_lengths(), column)
        return {"images": len(fitness_of) * self.search_images, "length": best_length(fitness_of), "cosine": cosine}


@contextlib.contextmanager
def _moved(population: Population, length: float) -> Iterator[None]:
    """Within the context, the network is the parent plus `length` times the update."""
    model = population.model
    assert population.scale is not None
    theta_D = model.theta_D.clone()
    try:
        model.theta_D.add_(population.scale, alpha=length)
        model.write()
        yield
    finally:
        model.theta_D.copy_(theta_D)
        model.write()


def _answered(
    population: Population, asked: Generator[Any, Scores, dict[float, float]], column: int
) -> dict[float, float]:
    """Return the result of a search that uses a statistic as its fitness."""
    request = next(asked)
    try:
        while True:
            scores = population.answer(request)
            assert isinstance(scores, Scores)
            request = asked.send(replace(scores, fitness_K=scores.mean_KM[:, column]))
    except StopIteration as end:
        found: dict[float, float] = end.value
        return found


def pairs_of(seed: int, count: int, sigma: float) -> Members:
    """Return mirrored members. The first ones are the members of every smaller population."""
    seed_K = np.repeat(member_seeds(seed, 1, count // 2), 2)
    gain_K = np.tile(np.array([sigma, -sigma], np.float32), count // 2)
    return Members(seed_K, np.zeros(count, np.float32), gain_K)
