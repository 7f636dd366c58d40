"""The loop of a run, and the Ray actor that owns the parent and runs it.

Shapes: D parameters, K members, N images of a generation.
"""

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

import numpy as np
import ray
import torch
from numpy.typing import NDArray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spartan_ray.checkpoint import save_weights
from spartan_ray.config import Config, InputError
from spartan_ray.data import load_splits, permutation
from spartan_ray.evaluator import ParentState
from spartan_ray.fitness import Normaliser, score
from spartan_ray.journal import write_journal
from spartan_ray.model import FlatModel, initial_model
from spartan_ray.noise import RMS
from spartan_ray.parent import Trainer
from spartan_ray.pool import Pool, WorkerSpec, claim_device, resolve_cluster
from spartan_ray.record import Row, RunFolder
from spartan_ray.strategies import PARENT, Members, Move, make_strategy, merge_seeds, with_parent

# Key of `permutation` for the fitness images of a generation.
IMAGES_OF_GENERATION = 1 << 33
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
        self.at_end = contextlib.ExitStack()

    def run(self) -> bool:
        """The whole run. False when `stop` ended it early."""
        try:
            self._set_up()
            evolve_every = self.config.evolution.every if self.strategy else math.inf
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
        """An evolve phase: ask, evaluate, tell, and move the parent."""
        assert self.strategy
        assert self.pool
        retries, started = self.pool.retries, time.perf_counter()
        members = self.strategy.ask(self.config.run.seed, generation)
        state = self._state(generation, generation)
        self._begin("evolve", "members", len(members) + 2)
        fitness_K, broadcast_seconds = self.pool.evaluate(state, with_parent(members))
        before, fitness_K = float(fitness_K[0]), fitness_K[1:]
        scored = time.perf_counter()

        move = self.strategy.tell(fitness_K)
        write_journal(self.record.path / "journal", generation, members, fitness_K, move)
        step_ratio = self._apply(members, move)
        updated = time.perf_counter()

        after = before
        if move.accepted:
            # The same images, but another broadcast: its key is negative, so that no other has it.
            after = float(self.pool.evaluate(self._state(-generation, generation), PARENT)[0][0])
        self._advance(self.progress.total - self.progress.done)
        if move.note:
            self._note(f"epoch {generation}: {move.note}")
        if step_ratio > STEP_RATIO_LIMIT:
            self._note(
                f"epoch {generation}: the step ratio {step_ratio:.2f} is above {STEP_RATIO_LIMIT}: "
                "a smaller evolution.lr is likely to do better"
            )
        images = (len(members) + 1) * len(state.image_N)
        return {
            "kind": "evolve",
            "seconds": time.perf_counter() - started,
            "images_per_second": images / (scored - started),
            "population": len(members),
            "fitness_images": len(state.image_N),
            **fitness_statistics(fitness_K),
            "fitness_nonfinite": move.nonfinite,
            "parent_fitness_before": before,
            "parent_fitness_after": after,
            "accepted": move.accepted,
            "note": move.note,
            "step_ratio": step_ratio,
            "scoring_seconds": scored - started,
            "update_seconds": updated - scored,
            "broadcast_seconds": broadcast_seconds,
            "retries": self.pool.retries - retries,
            "workers": len(self.pool.infos),
        }

    def _apply(self, members: Members, move: Move) -> float:
        """theta += scale * sum_k weight_k sign_k noise_k. Returns the norm of that over one mutation's."""
        if not move.accepted:
            return 0.0
        assert self.pool
        seed_K, weight_K = merge_seeds(members, move)
        sum_D = torch.from_numpy(self.pool.weighted_sum(seed_K, weight_K, self.model.theta_D.numel()))
        self.model.theta_D += sum_D.to(self.device) * members.scale
        return float(sum_D.double().norm()) / (RMS[self.config.evolution.noise] * math.sqrt(sum_D.numel()))

    def _state(self, key: int, generation: int) -> ParentState:
        """The parent as it is now, with the generation's fitness images."""
        wanted, seed = self.config.evolution.fitness_images, self.config.run.seed
        image_N = fitness_images(len(self.splits.evolution), wanted, seed, generation)
        buffers = [buffer.cpu().numpy() for buffer in self.model.buffers]
        return ParentState(key, self.model.theta_D.detach().cpu().numpy(), buffers, image_N)

    def _score_splits(self) -> Row:
        """Loss and accuracy of the parent on every split, and its loss on a sample of the SGD split."""
        self._begin("score", "splits", 4)
        started = time.perf_counter()
        sample = self.splits.sgd[slice(0, TRAIN_LOSS_IMAGES)]
        row: Row = {"train_loss": score(self.model.module, sample, self.normalise).loss}
        self._advance(1)
        for name in ("evolution", "validation", "test"):
            row[f"{name}_loss"], row[f"{name}_accuracy"] = score(
                self.model.module, getattr(self.splits, name), self.normalise
            )
            self._advance(1)
        return row | {"evaluation_seconds": time.perf_counter() - started}

    def _set_up(self) -> None:
        """Load the data, make the parent and the run folder, start the workers."""
        config = self.config
        threads = config.parent.threads or config.cluster.driver_cpus or len(os.sched_getaffinity(0))
        config = config.model_copy(update={"parent": config.parent.model_copy(update={"threads": threads})})
        self.device = claim_device(threads)
        splits = load_splits(config.data, config.run.seed, self._note)
        wanted, available = config.evolution.fitness_images, len(splits.evolution)
        if wanted and wanted > available:
            raise InputError(f"evolution.fitness_images ({wanted}) is larger than the evolution split ({available})")
        self.splits = splits.to(self.device)
        module, notes = initial_model(config.parent, len(splits.classes), config.run.seed)
        self.model = FlatModel(module, self.device)
        self.normalise = Normaliser(splits.mean_C, splits.std_C, self.device)
        self.strategy = make_strategy(config.evolution)
        self.config = config
        self.description = {
            "model": config.parent.model,
            "stem": config.parent.stem,
            "classes": splits.classes,
            "mean": splits.mean_C,
            "std": splits.std_C,
        }
        if self.strategy:
            assert isinstance(config.cluster.workers, int)
            spec = WorkerSpec(
                config.parent,
                config.evolution,
                splits.evolution,
                len(splits.classes),
                splits.mean_C,
                splits.std_C,
                config.cluster.cpus_per_worker,
            )
            self.pool = Pool(spec, config.cluster, self._note, self._members_done)
            self.at_end.callback(self.pool.close)
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
        if self.strategy and config.evolution.every > config.run.epochs:
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

    def _members_done(self, count: int) -> None:
        self._advance(count, count * (self.config.evolution.fitness_images or len(self.splits.evolution)))

    def _advance(self, done: int, images: int = 0) -> None:
        if self.stopping.is_set():
            raise Stopped
        self.progress.done += done
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


def fitness_statistics(fitness_K: NDArray[np.float64]) -> Row:
    """What the record says of the members' finite fitnesses."""
    finite_K = fitness_K[np.isfinite(fitness_K)]
    return {
        f"fitness_{name}": float(getattr(finite_K, name)()) if len(finite_K) else math.nan
        for name in ("min", "mean", "max", "std")
    }


def fitness_images(split: int, wanted: int | None, run_seed: int, generation: int) -> NDArray[np.int64]:
    """Indices of the images that score a generation, out of an evolution split of so many."""
    return np.sort(permutation(split, run_seed, IMAGES_OF_GENERATION + generation)[:wanted])


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
