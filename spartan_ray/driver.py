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
from pathlib import Path
from typing import Any

import ray
import torch
from ray.exceptions import RayActorError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spartan_ray.checkpoint import (
    Checkpoint,
    latest_checkpoint,
    load_optimizer,
    optimizer_tensors,
    prune,
    save_checkpoint,
    save_weights,
)
from spartan_ray.config import Config, InputError
from spartan_ray.data import load_splits
from spartan_ray.evaluator import EvaluatorSpec
from spartan_ray.evolve import Evolver
from spartan_ray.fitness import Normaliser, score
from spartan_ray.journal import write_journal
from spartan_ray.model import FlatModel, initial_model
from spartan_ray.parent import Trainer
from spartan_ray.pool import Pool, nodes_here_first, pool_size
from spartan_ray.record import Row, RunFolder, lock_folder
from spartan_ray.resources import resolve_cluster
from spartan_ray.strategies import make_strategy
from spartan_ray.worker import claim_device

# The train loss is taken on so many SGD images at most: the same ones every epoch.
TRAIN_LOSS_IMAGES = 5000
# Above this ratio of update to mutation every measured update made the parent worse.
STEP_RATIO_LIMIT = 1.4
# Seconds that a driver which was lost may take to end and let go of its run folder.
LOCK_PATIENCE = 60.0


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
    resumed: int = 0  # rows that were there when this driver began
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    driver_pid: int = field(default_factory=os.getpid)
    worker_pids: list[int] = field(default_factory=list)


class Driver:
    """Owns the parent and runs the loop. `run` takes the run's time; the other methods answer meanwhile.

    With a folder the run goes on from its last checkpoint; `patience` is how long, in seconds, another
    process may take to let go of it."""

    def __init__(self, config: Config, folder: Path | None = None, patience: float = 0.0) -> None:
        self.config = config
        self.folder = folder
        self.patience = patience
        self.progress = Progress(epochs=config.run.epochs)
        self.stopping = threading.Event()
        self.pool: Pool | None = None
        self.evolver: Evolver | None = None
        self.at_end = contextlib.ExitStack()

    def run(self) -> bool:
        """The whole run, or what is left of it. False when `stop` ended it early."""
        try:
            first = self._set_up()
            evolve_every = self.config.evolution.every if self.evolver else math.inf
            for epoch in range(first, self.config.run.epochs + 1):
                self.progress.epoch = epoch
                row = self._evolve(epoch) if epoch % evolve_every == 0 else self._train(epoch)
                self.progress.rows.append(self.record.append({"epoch": epoch} | row | self._score_splits()))
                self._save(epoch)
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
        before = self.model.digest()
        outcome, row = self.evolver.evolve(generation)
        write_journal(self.record.path / "journal", generation, outcome, before, self.model.digest())
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

    def _set_up(self) -> int:
        """Load the data, make the parent and the run folder or take them from a checkpoint, start the
        workers. Returns the first epoch to run."""
        checkpoint = lock = None
        if self.folder:
            lock = lock_folder(self.folder, self.patience)
            self.at_end.callback(lock.close)
            checkpoint, metrics = latest_checkpoint(self.folder, self._note)
        config, workers = self.config, pool_size(self.config.cluster)
        if checkpoint:
            run = Config(**checkpoint.loop["config"])
            run_keep = run.run.model_copy(update={"keep": config.run.keep})
            config = run.model_copy(update={"run": run_keep, "cluster": config.cluster})
        threads = config.parent.threads or config.cluster.driver_cpus or len(os.sched_getaffinity(0))
        self.config = config = config.model_copy(
            update={
                "parent": config.parent.model_copy(update={"threads": threads}),
                "evolution": config.evolution.resolved(workers),
            }
        )
        self.device = claim_device(threads)
        splits = load_splits(config.data, config.run.seed, self._note)
        self.splits = splits.to(self.device)
        self.data_digest = splits.digest()
        # The weights of a run that goes on are those of the checkpoint; their file may be gone.
        origin = config.parent.model_copy(update={"weights": "none"}) if checkpoint else config.parent
        module, notes = initial_model(origin, len(splits.classes), config.run.seed)
        self.model = FlatModel(module, self.device)
        self.normalise = Normaliser(splits.mean_C, splits.std_C, self.device)
        self.description = {
            "model": config.parent.model,
            "stem": config.parent.stem,
            "classes": splits.classes,
            "mean": splits.mean_C,
            "std": splits.std_C,
        }
        strategy = make_strategy(config.evolution, len(splits.classes))
        if strategy:
            self.pool = Pool(EvaluatorSpec.of(config, splits), config.cluster, self._note, self._advance)
            self.at_end.callback(self.pool.close)
            self.evolver = Evolver(
                config.evolution, config.run.seed, strategy, self.model, self.splits, self.normalise, self.pool
            )
        # While the workers start: torch's first optimizer takes a second to import what it needs.
        self.trainer = Trainer(
            config.parent, self.model, self.splits.sgd, self.normalise, config.run.seed, config.data.augment
        )
        if self.pool:
            self.pool.wait_until_joined()
        devices = {
            "driver": {"host": platform.node(), "pid": os.getpid(), "device": str(self.device)},
            "workers": [info.record() for info in (self.pool.infos if self.pool else [])],
        }
        if self.folder and lock and checkpoint:
            self._restore(checkpoint)
            self.record = RunFolder.reopen(self.folder, lock, config, devices, checkpoint.epoch, metrics)
        else:
            self.record = RunFolder.create(config, devices)
        self.at_end.callback(self.record.close)
        self.progress.folder = str(self.record.path)
        self.progress.resumed = len(self.record.rows)
        self.progress.rows = list(self.record.rows)
        parts = ("sgd", "evolution", "validation", "test")
        sizes = ", ".join(f"{len(getattr(self.splits, part))} {part}" for part in parts)
        team = f"{workers} workers" if self.pool else "no workers"
        self._note(f"{sizes} images of {len(splits.classes)} classes; {team}; {self.record.path}")
        for note in notes:
            self._note(note)
        if self.evolver and config.evolution.every > config.run.epochs:
            self._note(
                f"no evolve phase: evolution.every ({config.evolution.every}) > run.epochs ({config.run.epochs})"
            )
        if checkpoint:
            self._note(f"going on after epoch {checkpoint.epoch}")
            return checkpoint.epoch + 1
        self._save(0)
        return 1

    def _save(self, epoch: int) -> None:
        """Write the checkpoint of an epoch, and delete those that are no longer needed."""
        every = self.config.evolution.every
        tensors = {
            "network": self.model.state_dict(),
            "optimizer": optimizer_tensors(self.trainer.optimizer),
            "evolution": self.evolver.optimizer_state() if self.evolver else {},
        }
        loop = {
            "generation": epoch // every * every if self.evolver else 0,
            "steps": self.trainer.steps,
            "data": self.data_digest,
            "metrics": self.record.metrics_state(),
            "config": self.config.model_dump(),
        }
        folder, run = self.record.path / "checkpoints", self.config.run
        save_checkpoint(folder, Checkpoint(epoch, tensors, loop))
        prune(folder, run.keep, lambda epoch: bool(run.keep_parents and self.evolver and (epoch + 1) % every == 0))

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Be what the run was at a checkpoint. Raises InputError when its images are others now."""
        if checkpoint.loop["data"] != self.data_digest:
            raise InputError(f"{self.folder}: data.root: the images are not those that the run began with")
        self.model.module.load_state_dict(checkpoint.tensors["network"])
        load_optimizer(self.trainer.optimizer, checkpoint.tensors["optimizer"])
        self.trainer.steps = checkpoint.loop["steps"]
        if self.evolver:
            self.evolver.load_optimizer_state(checkpoint.tensors["evolution"])

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
        infos = self.pool.infos if self.pool else []
        new = {"rows": values["rows"][rows:], "notes": values["notes"][notes:]}
        return Progress(**values | new | {"worker_pids": [info.pid for info in infos]})

    def stop(self) -> None:
        """Let `run` end at the next batch or result."""
        self.stopping.set()


class Supervisor:
    """A run from outside: its driver actor, which is started again from the last checkpoint when it is lost.

    Runs on the Ray that this process is connected to. Raises InputError when the workers that the
    configuration asks for do not fit."""

    def __init__(self, config: Config, folder: Path | None = None) -> None:
        self.config = config
        self.folder = folder
        self.restarts = 0
        self._start(patience=0.0)

    def _start(self, patience: float) -> None:
        nodes = nodes_here_first()
        cluster = resolve_cluster(self.config.cluster, [node["Resources"] for node in nodes])
        # The driver stays where the command runs, if it fits there, since it writes the run folder.
        # Two threads: one runs the loop, the other answers look and stop.
        actor: Any = ray.remote(Driver).options(
            num_cpus=cluster.driver_cpus,
            num_gpus=cluster.driver_gpus,
            max_concurrency=2,
            scheduling_strategy=NodeAffinitySchedulingStrategy(nodes[0]["NodeID"], soft=True),
        )
        self.driver = actor.remote(self.config.model_copy(update={"cluster": cluster}), self.folder, patience)
        self.running = self.driver.run.remote()
        self.notes = 0

    def watch(self, seconds: float, rows: int) -> tuple[bool, Progress]:
        """Wait so long for the end: whether it came, and the progress with the rows after the first `rows`
        and the notes since the last call. Raises the driver's error when it was lost too often."""
        try:
            ended = bool(ray.wait([self.running], timeout=seconds)[0])
            progress: Progress = ray.get(self.driver.look.remote(rows, self.notes))
        except RayActorError as error:
            return False, self._restart(error)
        self.notes += len(progress.notes)
        self.folder = Path(progress.folder) if progress.folder else self.folder
        return ended, progress

    def result(self) -> bool:
        """What the driver's `run` returned, or its error."""
        return bool(ray.get(self.running))

    def stop(self) -> None:
        """Ask the driver to end the run."""
        ray.get(self.driver.stop.remote())

    def close(self) -> None:
        """End the driver, and with it its workers."""
        ray.kill(self.driver)

    def _restart(self, error: RayActorError) -> Progress:
        self.restarts += 1
        if self.restarts > self.config.cluster.driver_restarts:
            raise error
        self.close()
        self._start(LOCK_PATIENCE)
        reason = str(error).strip().splitlines()[0]
        return Progress(
            folder=str(self.folder) if self.folder else None,
            epochs=self.config.run.epochs,
            notes=[f"the driver was lost and is started again from the last checkpoint: {reason}"],
        )
