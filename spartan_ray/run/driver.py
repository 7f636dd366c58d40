"""The driver: the Ray actor that owns the parent, and trains and evolves it epoch by epoch."""

from __future__ import annotations

import contextlib
import functools
import math
import os
import platform
import threading
import time
from collections.abc import Callable

import torch

from spartan_ray.distributed.pool import Pool
from spartan_ray.distributed.relayed import RelayTransport
from spartan_ray.distributed.transport import room_for
from spartan_ray.distributed.worker import claim_device
from spartan_ray.engine.evaluator import EvaluatorSpec
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.moments import load_optimizer, optimizer_state
from spartan_ray.engine.population import Population
from spartan_ray.engine.strategies.requests import Strategy
from spartan_ray.errors import Diverged, InputError, RunError, one_line
from spartan_ray.run.checkpoint import (
    Checkpoint,
    Loop,
    be_after_epoch,
    is_empty,
    latest_checkpoint,
    load_evolution,
    prune,
    save_checkpoint,
    save_weights,
)
from spartan_ray.run.config import Config
from spartan_ray.run.esgd import Parents
from spartan_ray.run.journal import write_journal
from spartan_ray.run.loading import MAY_CHANGE, refuse_changes
from spartan_ray.run.loggers import About, Logger, make_loggers
from spartan_ray.run.place import Place, exists
from spartan_ray.run.progress import Progress
from spartan_ray.run.record import Row, RunFolder, best_epoch, is_over, phase_row, run_id
from spartan_ray.run.setup import (
    epochs_behind,
    make_average,
    make_breeder,
    make_population,
    make_strategy,
    refuse_sets,
)
from spartan_ray.run.telemetry import Telemetry
from spartan_ray.vision.averaging import Average
from spartan_ray.vision.classification import Normaliser, score
from spartan_ray.vision.data import Splits, load_splits
from spartan_ray.vision.models import describe, initial_model, refuse_unfit
from spartan_ray.vision.training import Trainer, lr_factor

# Maximum number of SGD images for the train loss. They are the same in every epoch.
TRAIN_LOSS_IMAGES = 5000
# Every measured update with a step ratio above this made the parent worse.
STEP_RATIO_LIMIT = 1.4


class Stopped(Exception):
    """The user asked the run to stop."""


class Driver:
    """Owns the parent and runs the loop. `run` lasts as long as the run; `look` and `stop` can be called meanwhile.

    With `folder`, a path or URL, the run continues from its last checkpoint. `patience` is the time in seconds that
    another process may take to release the folder. `reason` is a message for the run's log."""

    def __init__(
        self, config: Config, folder: str | None = None, patience: float = 0.0, reason: str | None = None
    ) -> None:
        self.config = config
        self.folder = folder
        self.patience = patience
        self.progress = Progress(epochs=config.run.epochs)
        self.stopping = threading.Event()
        self.said_too_long = False
        self.pool: Pool | None = None
        self.population: Population | None = None
        self.parents: Parents | None = None  # of esgd, which has no population
        self.average: Average | None = None
        self.named: Callable[[str], str] = str  # replaces the local folder in messages by the run's place
        self.strategy: Strategy | None = None
        self.at_end = contextlib.ExitStack()
        self.unlogged = [reason] if reason else []  # messages from before there is a folder
        self.log: Callable[[str], None] = self.unlogged.append

    def run(self) -> bool:
        """Do the whole run, or what is left of it. Return False if `stop` ended it early. Raises InputError or RunError
        if it cannot start or continue."""
        try:
            self._set_up()
            evolve_every = self.config.evolution.every if self.evolves else math.inf
            while not is_over(self.record.rows, self.config.run):
                self.progress.epoch = epoch = len(self.record.rows) + 1
                row = self._evolve(epoch) if epoch % evolve_every == 0 else self._train(epoch)
                started = time.perf_counter()
                self._remember(epoch)
                if self.average:
                    row["average_seconds"] = time.perf_counter() - started
                lr = self.trainer.optimizer.param_groups[0]["lr"]
                row = self.record.append({"epoch": epoch, "lr": lr} | row | self._score_splits())
                self._refuse_divergence(row)
                self._save(epoch)
                self.progress.rows.append(row)
                self.progress.said.append(row)
            self._finish()
        except Stopped:
            self.log("stopped by the user")
            return False
        except (InputError, RunError) as error:
            said = self.named(str(error))
            self.log(one_line(f"ended by {type(error).__name__}: {said}"))
            raise type(error)(said) from None
        except Exception as error:
            self.log(one_line(f"ended by {type(error).__name__}: {error}"))
            raise
        finally:
            self.at_end.close()
        return True

    @property
    def evolves(self) -> bool:
        """Return whether the run has evolve phases."""
        return self.config.evolution.strategy != "none"

    def _train(self, epoch: int) -> Row:
        """Train for one epoch on the SGD split. Return the metrics."""
        if self.parents:
            self._begin("sgd", "parents", self.config.evolution.parents)
            row = self.parents.train(epoch)
            if row["backed_off"] == row["parents"]:
                rates = self.config.evolution.optimizers
                self._note(
                    f"epoch {epoch}: all parents backed off: try smaller learning rates (evolution.optimizers {rates})"
                )
            return row
        self._begin("sgd", "images", len(self.splits.sgd))
        started = time.perf_counter()

        def after_step(count: int) -> None:
            if self.average:
                self.average.after_step()
            self._advance(count, count)

        images = self.trainer.train_epoch(epoch, after_step)
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        seconds = time.perf_counter() - started
        return {"kind": "sgd", "seconds": seconds, "images_per_second": images / seconds}

    def _evolve(self, generation: int) -> Row:
        """Run an evolve phase, which counts as an epoch. Return the metrics."""
        if self.parents:
            self._begin("evolve", "members", self.config.evolution.population)
            row = self.parents.evolve(generation, self.record.path / "journal")
            self._note_phase(generation, row)
            return row
        assert self.population
        assert self.strategy
        moments = self.config.parent.moments_after_evolution
        self._begin("evolve", "members", self.strategy.population * self.config.evolution.generations + 1)
        started = time.perf_counter()
        norms_T = self.trainer.gradient_norms() if moments == "rescale" else None
        from_average = self.average if self.config.evolution.of == "average" else None
        back_to_parent = from_average.become() if from_average else None
        before = self.model.digest()
        outcome = self.population.step(self.strategy, generation)
        row = phase_row(outcome)
        write_journal(self.record.path / "journal", generation, outcome, before, self.model.digest())
        if back_to_parent and not row["accepted"]:
            back_to_parent()
        if row["accepted"] and norms_T is not None:
            self.trainer.rescale_moments(norms_T)
        elif row["accepted"] and moments == "reset":
            self.trainer.reset_moments()
        self._advance(self.progress.total - self.progress.done)
        self._note_phase(generation, row)
        evolution = self.config.evolution
        too_long = row["step_ratio"] > STEP_RATIO_LIMIT and evolution.strategy == "es" and evolution.step != "search"
        if too_long and not self.said_too_long:
            self.said_too_long = True
            smaller = "evolution.lr" if evolution.step == "lr" else "evolution.step_ratio"
            self._note(
                f"epoch {generation}: the step ratio {row['step_ratio']:.2f} is above {STEP_RATIO_LIMIT}: "
                f"a smaller {smaller}, or evolution.step search, is likely to do better"
            )
        return {"kind": "evolve", "seconds": time.perf_counter() - started} | row

    def _note_phase(self, generation: int, row: Row) -> None:
        """Report why the parent did not move, and how many members have a fitness that is not finite."""
        if row["note"]:
            self._note(f"epoch {generation}: {row['note']}")
        if dead := row["fitness_nonfinite"]:
            count = row["population"] * row["generations"]
            self._note(f"epoch {generation}: {dead} of {count} members are not finite: they count as the worst")

    def _remember(self, epoch: int) -> None:
        """Add the network at the end of an epoch to the trajectory and the average, if the run has them. Epoch 0 is the
        start."""
        if self.population and self.population.subspace and self.population.subspace.kind == "trajectory":
            self.population.remember()
        if self.average and epoch:
            self.average.after_epoch()

    def _score_splits(self) -> Row:
        """Return the loss and accuracy of the parent, and of its average if there is one, on the evolution, validation
        and test splits, and the parent's loss on a sample of the SGD split."""
        self._begin("evaluate", "splits", 7 if self.average else 4)
        started = time.perf_counter()
        sample = self.splits.sgd[slice(0, TRAIN_LOSS_IMAGES)]
        row: Row = {"train_loss": score(self.model.module, sample, self.normalise).loss}
        self._advance(1)
        for prefix in ("", "average_") if self.average else ("",):
            with self.average.as_network() if self.average and prefix else contextlib.nullcontext():
                for name in ("evolution", "validation", "test"):
                    result = score(self.model.module, getattr(self.splits, name), self.normalise)
                    row[f"{prefix}{name}_loss"], row[f"{prefix}{name}_accuracy"] = result.loss, result.accuracy
                    self._advance(1)
        return row | {"evaluation_seconds": time.perf_counter() - started}

    def _refuse_divergence(self, row: Row) -> None:
        """Raise Diverged if the network, its train loss or its evolution loss is not finite after an epoch: everything
        after it would be NaN. No checkpoint of it is written. The validation and test splits decide nothing, not even
        this."""
        if self.model.is_finite() and row["train_loss"] is not None and row["evolution_loss"] is not None:
            return
        last = f"{self.place.where}/checkpoints/epoch-{row['epoch'] - 1:06d}.safetensors"
        parent, evolution = self.config.parent, self.config.evolution
        smaller = f"parent.lr ({parent.lr:g})" if not self.parents else f"evolution.optimizers ({evolution.optimizers})"
        raise Diverged(
            f"{self.place.where}: the network diverged in epoch {row['epoch']} ({row['kind']}): its loss or its "
            f"parameters are not finite; start a new run with smaller {smaller}. The last network before it: {last}"
        )

    def _set_up(self) -> None:
        """Start the workers, make the parts of the run and its folder, and restore the last checkpoint if there is
        one."""
        checkpoint, metrics = self._checkpoint()
        workers = room_for(self.config.cluster).workers
        self.config = config = self._resolved(checkpoint, workers)
        assert config.parent.threads
        self.device = claim_device(config.parent.threads)
        splits = load_splits(config.data, config.run.seed, self._note)
        self.splits = splits.to(self.device)
        self.data_digest = splits.digest()
        notes = self._make_parent(splits, new=not checkpoint)
        self._make_strategy(splits)
        # Make it while the workers start: torch takes a second to import what its first optimizer needs.
        self.trainer = Trainer(
            config.parent,
            self.model,
            self.splits.sgd,
            self.normalise,
            config.run.seed,
            config.data.augment,
            config.run.epochs,
        )
        self.average = make_average(config, self.model, self.splits, self.normalise, lambda: self._advance(0))
        if self.pool:
            self.pool.wait_until_joined()
        if checkpoint:
            self._restore(checkpoint)
        self._open_folder(checkpoint, metrics)
        # From here on the run can be resumed.
        self.progress.folder = self.place.where
        self.progress.rows = list(self.record.rows)
        for note in (self._parts(workers), *notes):
            self._note(note)
        every, epochs = config.evolution.every, config.run.epochs
        if self.evolves and every > epochs:
            self._note(f"no evolve phase: evolution.every ({every}) > run.epochs ({epochs})")
        if checkpoint:
            self._note(f"going on after epoch {checkpoint.epoch}")

    def _checkpoint(self) -> tuple[Checkpoint | None, bytes]:
        """Return the checkpoint to continue from and the content of metrics.jsonl, or None for a new run."""
        run = self.config.run
        if not self.folder and run.resume == "auto" and exists(f"{run.out}/{run.name}"):
            self.folder = f"{run.out}/{run.name}"  # perhaps started by a driver that was lost
        if not self.folder:
            return None, b""
        self._be_at(Place.existing(self.folder, self.patience, self.stopping.wait, self._note))
        if run.resume != "never" and is_empty(self.place.path):
            return None, b""
        return latest_checkpoint(self.place.path, self._note, lambda config: epochs_behind(config)[0])

    def _resolved(self, checkpoint: Checkpoint | None, workers: int) -> Config:
        """Return the configuration with its defaults filled in. With a checkpoint, fields that affect the results keep
        its values. Raises InputError if the new values differ."""
        config = self.config
        if checkpoint:
            before = checkpoint.loop.config
            refuse_changes(str(self.folder), before, config)
            data = before.data.model_copy(update={name: getattr(config.data, name) for name in MAY_CHANGE["data"]})
            config = before.model_copy(update={"run": config.run, "data": data, "cluster": config.cluster})
        threads = config.parent.threads or config.cluster.driver_cpus or len(os.sched_getaffinity(0))
        parent = config.parent.model_copy(update={"threads": threads})
        return config.model_copy(update={"parent": parent, "evolution": config.evolution.resolved(workers)})

    def _make_parent(self, splits: Splits, new: bool) -> list[str]:
        """Make the network, with its initial weights if the run is new. Return notes for the user."""
        config = self.config
        # A resumed run takes its weights from the checkpoint; the file of the initial ones may be gone.
        origin = config.parent if new else config.parent.model_copy(update={"weights": "none"})
        module, notes = initial_model(origin, len(splits.classes), config.run.seed)
        for name, value in module.state_dict().items():
            if not value.isfinite().all():
                raise InputError(f"parent.weights {config.parent.weights}: {name} is not finite everywhere")
        refuse_unfit(module, config.parent, splits.image_size, len(splits.classes))
        self.normalise = Normaliser(splits.mean_C, splits.std_C, self.device)
        self.description = describe(config.parent, splits)
        self.model = FlatModel(module, self.device)
        return notes

    def _make_strategy(self, splits: Splits) -> None:
        """Make the strategy and the population, or the parents of esgd, and start the workers. Do nothing if the run
        does not evolve."""
        config = self.config
        self.strategy = make_strategy(config.evolution, len(splits.classes))
        if self.strategy:
            refuse_sets(config, self.strategy, len(splits.evolution))
            self.population = make_population(config, splits, self.model, self._note, self._start_workers)
            self.at_end.callback(self.population.close)
        if config.evolution.strategy == "esgd":
            esgd, spec = make_breeder(config, splits)
            pool = self._start_workers(spec)
            self.at_end.callback(pool.close)
            factor = functools.partial(lr_factor, config.parent.schedule, epochs=config.run.epochs)
            images = len(spec.case_N), len(splits.sgd)
            self.parents = Parents(esgd, pool, config.run.seed, self.model, *images, factor)

    def _open_folder(self, checkpoint: Checkpoint | None, metrics: bytes) -> None:
        """Create the run folder, or reopen it to continue from a checkpoint."""
        config = self.config
        devices = {
            "driver": {"host": platform.node(), "pid": os.getpid(), "device": str(self.device)},
            "workers": [info.record() for info in (self.pool.infos if self.pool else [])],
        }
        if checkpoint:
            loggers = self._loggers(run_id(self.place.path), checkpoint.epoch + 1)
            self.record = RunFolder.reopen(
                self.place.path, config, devices, checkpoint.epoch, metrics, loggers, self._note
            )
            if not is_over(self.record.rows, config.run):  # it was finished, and has more epochs now
                for name in ("final.safetensors", "average.safetensors"):
                    (self.place.path / name).unlink(missing_ok=True)
                self.place.push()
        else:
            if not self.folder:
                only = config.run.resume == "auto"
                self._be_at(Place.new(config.run.out, config.run.name, only, self.stopping.wait, self._note))
            id = run_id(self.place.path)
            self.record = RunFolder.create(self.place.path, config, devices, self._loggers(id, 1), self._note, id)
        self.at_end.callback(self.record.close)
        self.log = self.record.log
        for text in self.unlogged:
            self.log(text)
        if not checkpoint:
            self._remember(0)
            self._save(0)

    def _parts(self, workers: int) -> str:
        parts = ("sgd", "evolution", "validation", "test")
        sizes = ", ".join(f"{len(getattr(self.splits, part))} {part}" for part in parts)
        team = f"{workers} worker{'s' * (workers > 1)}" if self.pool else "no workers"
        return f"{sizes} images of {len(self.splits.classes)} classes; {team}; {self.place.where}"

    def _be_at(self, place: Place) -> None:
        self.place, self.named = place, place.named
        self.at_end.callback(place.close)

    def _loggers(self, id: str, first_epoch: int) -> list[tuple[str, Logger]]:
        """Return the loggers of the run, with their names."""
        own = make_loggers(About(self.place.path, self.place.where, id, self.config, first_epoch), self._note)
        return [*own, ("Ray's metrics", Telemetry(self.config.run.name, self.place.where))]

    def _start_workers(self, spec: EvaluatorSpec) -> Pool:
        cluster = self.config.cluster
        transport = RelayTransport(spec, cluster, name=self.config.run.name)
        self.pool = Pool(transport, cluster, spec.noise, self._note, self._advance)
        return self.pool

    def _save(self, epoch: int) -> None:
        """Write the checkpoint of an epoch, and delete those that are no longer needed."""
        every = self.config.evolution.every
        tensors, optimizers = {"network": self.model.state_dict()}, {}
        tensors["optimizer"], optimizers["optimizer"] = optimizer_state(self.trainer.optimizer)
        tensors["evolution"] = {}
        moving = self.average and self.average.kind == "ema"
        tensors["average"] = {"theta": self.average.theta_D.cpu()} if self.average and moving else {}
        if self.population and (optimizer := self.population.updates.optimizer):
            tensors["evolution"], optimizers["evolution"] = optimizer_state(optimizer)
            optimizers["evolution"]["kind"] = self.population.updates.kind
        if self.parents:
            tensors["evolution"], tensors["optimizer"], optimizers["evolution"] = self.parents.state()
        loop = Loop(
            epoch=epoch,
            generation=epoch // every * every if self.evolves else 0,
            steps=self.trainer.steps,
            device=self.device.type,
            data=self.data_digest,
            optimizers=optimizers,
            metrics=self.record.metrics_state(),
            config=self.config,
        )
        folder, run = self.record.path / "checkpoints", self.config.run
        if run.keep_best and epoch and best_epoch(self.record.rows) == epoch:
            save_weights(self.record.path / "best.safetensors", tensors["network"], self.description)
        save_checkpoint(folder, Checkpoint(tensors, loop))
        to_go_on, to_replay = epochs_behind(self.config)

        def replayed(epoch: int) -> bool:
            """Return whether a replay of the next evolve phase needs the checkpoint of this epoch."""
            return bool(run.keep_parents and self.evolves and -(epoch + 1) % every + 1 <= to_replay)

        prune(folder, epoch, run.keep + max(0, to_go_on - 1), replayed)  # and those that a resume needs
        self.place.push()

    def _restore(self, checkpoint: Checkpoint) -> None:
        """Restore the state of the run from a checkpoint. Raises InputError if the images or the device type have
        changed."""
        loop = checkpoint.loop
        if loop.data != self.data_digest:
            raise InputError(f"{self.folder}: data.root: the images are not those that the run began with")
        if loop.device != self.device.type:
            raise InputError(f"{self.folder}: the run began on {loop.device}, here the driver has {self.device.type}")
        checkpoints, epochs = self.place.path / "checkpoints", epochs_behind(self.config)[0]
        be_after_epoch(self.model.module, checkpoint, checkpoints, epochs, self._remember)
        if self.average and self.average.kind == "ema":
            self.average.theta_D.copy_(checkpoint.tensors["average"]["theta"])
        moments = checkpoint.tensors["optimizer"]
        if self.parents:
            self.parents.load(checkpoint.tensors["evolution"], moments, loop.optimizers.get("evolution", {}))
        else:
            load_optimizer(self.trainer.optimizer, moments, loop.optimizers["optimizer"])
        self.trainer.steps = loop.steps
        if self.population:
            load_evolution(self.population, checkpoint)

    def _finish(self) -> None:
        if self.average:
            with self.average.as_network():
                save_weights(self.record.path / "average.safetensors", self.model.state_dict(), self.description)
        save_weights(self.record.path / "final.safetensors", self.model.state_dict(), self.description)
        self.log("finished")
        self.place.push()
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
        text = one_line(self.named(text))  # it may quote a file name with line breaks
        self.progress.said.append(text)
        self.log(text)

    def look(self, rows: int | None, said: int) -> Progress:
        """Return the progress, with the messages after the first `said` and the rows after the first `rows`. Without
        `rows`, no rows are returned."""
        values = vars(self.progress)
        infos = self.pool.infos if self.pool else []
        new = {"rows": [] if rows is None else values["rows"][rows:], "said": values["said"][said:]}
        return Progress(**values | new | {"worker_pids": [info.pid for info in infos]})

    def stop(self) -> None:
        """Make `run` stop at the next batch or result."""
        self.stopping.set()
