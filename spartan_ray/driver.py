"""The loop of a run, and the Ray actor that owns the parent and runs it."""

from __future__ import annotations

import contextlib
import json
import math
import os
import platform
import threading
import time
from dataclasses import dataclass, field
from typing import Any

import ray
import torch
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spartan_ray.checkpoint import save_weights
from spartan_ray.config import Config
from spartan_ray.data import load_splits
from spartan_ray.evolve import Evolver, reference_images
from spartan_ray.fitness import Normaliser, score
from spartan_ray.journal import write_journal
from spartan_ray.model import FlatModel, initial_model
from spartan_ray.parent import Trainer
from spartan_ray.pool import Pool, WorkerSpec, claim_device, resolve_cluster
from spartan_ray.record import Row, RunFolder
from spartan_ray.strategies import make_strategy

# The train loss is taken on so many SGD images at most: the same ones every epoch.
TRAIN_LOSS_IMAGES = 5000
# Above this ratio of update to mutation every measured update made the parent worse.
STEP_RATIO_LIMIT = 1.4


class Stopped(Exception):
    """The user asked the run to end."""


@dataclass
class Progress:
    """What a run is at; `rows` and `notes` grow, so that a reader can ask for the new ones."""

    folder: str | None = None
    phase: str = "starting"
    epoch: int = 0
    epochs: int = 0
    unit: str = ""
    done: int = 0
    total: int = 0
    images: int = 0
    started: float = 0.0
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    driver_pid: int = field(default_factory=os.getpid)
    worker_pids: list[int] = field(default_factory=list)


class Driver:
    """Owns the parent and runs the loop. `run` takes the run's time; the other methods answer meanwhile."""

    def __init__(self, config: Config) -> None:
        self.config = config
        self.progress = Progress(epochs=config.run.epochs)
        self.stopping = threading.Event()
        self.pool: Pool | None = None
        self.evolver: Evolver | None = None
        self.at_end = contextlib.ExitStack()

    def run(self) -> bool:
        """The whole run. False when `stop` ended it early."""
        try:
            self._set_up()
            evolve_every = self.config.evolution.every if self.evolver else math.inf
            for epoch in range(1, self.config.run.epochs + 1):
                self.progress.epoch = epoch
                row = self._evolve(epoch) if epoch % evolve_every == 0 else self._train(epoch)
                self.progress.rows.append(self.record.append({"epoch": epoch} | row | self._score_splits()))
            self._finish()
        except Stopped:
            return False
        finally:
            self.at_end.close()
        return True

    def _train(self, epoch: int) -> Row:
        """An epoch of gradient descent on the SGD split."""
        self._begin("sgd", "images", len(self.splits.sgd))
        started = time.perf_counter()
        images = self.trainer.train_epoch(epoch, lambda count: self._advance(count, count))
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return {"kind": "sgd", "seconds": seconds, "images_per_second": images / seconds}

    def _evolve(self, generation: int) -> Row:
        """An evolve phase; it counts as an epoch."""
        assert self.evolver
        moments = self.config.parent.moments_after_evolution
        self._begin("evolve", "members", self.config.evolution.population + 1)
        started = time.perf_counter()
        norms_T = self.trainer.gradient_norms() if moments == "rescale" else None
        outcome, row = self.evolver.evolve(generation)
        write_journal(self.record.path / "journal", generation, outcome)
        if row["accepted"] and norms_T is not None:
            self.trainer.rescale_moments(norms_T)
        elif row["accepted"] and moments == "reset":
            self.trainer.reset_moments()
        self._advance(self.progress.total - self.progress.done)
        if outcome.note:
            self._note(f"epoch {generation}: {outcome.note}")
        evolution = self.config.evolution
        if row["step_ratio"] > STEP_RATIO_LIMIT and evolution.strategy == "es" and evolution.step != "search":
            smaller = "evolution.lr" if evolution.step == "lr" else "evolution.step_ratio"
            self._note(
                f"epoch {generation}: the step ratio {row['step_ratio']:.2f} is above {STEP_RATIO_LIMIT}: "
                f"a smaller {smaller}, or evolution.step search, is likely to do better"
            )
        return {"kind": "evolve", "seconds": time.perf_counter() - started} | row

    def _score_splits(self) -> Row:
        """Loss and accuracy of the parent on every split, and its loss on a sample of the SGD split."""
        self._begin("score", "splits", 4)
        started = time.perf_counter()
        sample = self.splits.sgd[slice(0, TRAIN_LOSS_IMAGES)]
        row: Row = {"train_loss": score(self.model.module, sample, self.normalise).loss}
        self._advance(1)
        for name in ("evolution", "validation", "test"):
            result = score(self.model.module, getattr(self.splits, name), self.normalise)
            row[f"{name}_loss"], row[f"{name}_accuracy"] = result.loss, result.accuracy
            self._advance(1)
        return row | {"evaluation_seconds": time.perf_counter() - started}

    def _set_up(self) -> None:
        """Load the data, make the parent and the run folder, start the workers."""
        config = self.config
        threads = config.parent.threads or config.cluster.driver_cpus or len(os.sched_getaffinity(0))
        assert isinstance(config.cluster.workers, int)
        config = config.model_copy(
            update={
                "parent": config.parent.model_copy(update={"threads": threads}),
                "evolution": config.evolution.resolved(config.cluster.workers),
            }
        )
        self.device = claim_device(threads)
        splits = load_splits(config.data, config.run.seed, self._note)
        self.splits = splits.to(self.device)
        module, notes = initial_model(config.parent, len(splits.classes), config.run.seed)
        self.model = FlatModel(module, self.device)
        self.normalise = Normaliser(splits.mean_C, splits.std_C, self.device)
        self.config = config
        self.description = {
            "model": config.parent.model,
            "stem": config.parent.stem,
            "classes": splits.classes,
            "mean": splits.mean_C,
            "std": splits.std_C,
        }
        strategy = make_strategy(config.evolution, len(splits.classes))
        if strategy:
            spec = WorkerSpec(
                config.parent,
                config.evolution,
                splits.evolution,
                reference_images(splits),
                len(splits.classes),
                splits.mean_C,
                splits.std_C,
                config.cluster.cpus_per_worker,
            )
            self.pool = Pool(spec, config.cluster, self._note, self._advance)
            self.at_end.callback(self.pool.close)
            self.evolver = Evolver(
                config.evolution, config.run.seed, strategy, self.model, self.splits, self.normalise, self.pool
            )
            self.pool.wait_until_joined()
            self.progress.worker_pids = [info.pid for info in self.pool.infos]
        self.trainer = Trainer(
            config.parent, self.model, self.splits.sgd, self.normalise, config.run.seed, config.data.augment
        )
        devices = {
            "driver": {"host": platform.node(), "pid": os.getpid(), "device": str(self.device)},
            "workers": [info.record() for info in (self.pool.infos if self.pool else [])],
        }
        self.record = RunFolder(config, devices)
        self.at_end.callback(self.record.close)
        self.progress.folder = str(self.record.path)
        parts = ("sgd", "evolution", "validation", "test")
        sizes = ", ".join(f"{len(getattr(self.splits, part))} {part}" for part in parts)
        team = f"{config.cluster.workers} workers" if self.pool else "no workers"
        self._note(f"{sizes} images of {len(splits.classes)} classes; {team}; {self.record.path}")
        for note in notes:
            self._note(note)
        if self.evolver and config.evolution.every > config.run.epochs:
            self._note(
                f"no evolve phase: evolution.every ({config.evolution.every}) > run.epochs ({config.run.epochs})"
            )

    def _finish(self) -> None:
        save_weights(self.record.path / "final.safetensors", self.model.state_dict(), json.dumps(self.description))
        self._begin("done", "", 0)

    def _begin(self, phase: str, unit: str, total: int) -> None:
        progress = self.progress
        progress.phase, progress.unit, progress.total = phase, unit, total
        progress.done = progress.images = 0
        progress.started = time.time()

    def _advance(self, done: int, images: int = 0) -> None:
        if self.stopping.is_set():
            raise Stopped
        self.progress.done += done
        self.progress.total = max(self.progress.total, self.progress.done)
        self.progress.images += images

    def _note(self, text: str) -> None:
        self.progress.notes.append(text)

    def look(self, rows: int, notes: int) -> Progress:
        """Where the run is, with the rows and notes after the first `rows` and `notes`."""
        values = vars(self.progress)
        return Progress(**values | {"rows": values["rows"][rows:], "notes": values["notes"][notes:]})

    def stop(self) -> None:
        """Let `run` end at the next batch or result."""
        self.stopping.set()


def start_driver(config: Config) -> Any:
    """The driver actor of a run on the Ray that this process is connected to.

    Raises InputError when the workers that the configuration asks for do not fit."""
    here = ray.get_runtime_context().get_node_id()
    nodes = sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here)
    cluster = resolve_cluster(config.cluster, [node["Resources"] for node in nodes])
    # The driver stays where the command runs, if it fits there, since it writes the run folder.
    # Two threads: one runs the loop, the other answers look and stop.
    actor = ray.remote(Driver).options(
        num_cpus=cluster.driver_cpus,
        num_gpus=cluster.driver_gpus,
        max_concurrency=2,
        scheduling_strategy=NodeAffinitySchedulingStrategy(here, soft=True),
    )
    return actor.remote(config.model_copy(update={"cluster": cluster}))
