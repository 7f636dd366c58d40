"""Where the rows of a run go beside metrics.jsonl: TensorBoard, MLflow, Weights & Biases, or a logger of one's own."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from torch.utils.tensorboard import SummaryWriter

from spartan_ray.errors import InputError, one_line
from spartan_ray.naming import imported, logger_names

if TYPE_CHECKING:
    from spartan_ray.run.config import Config


class Logger(Protocol):
    """Takes the rows of metrics.jsonl, one an epoch. Made with the run's folder, its place as the user names it, its
    configuration and the first epoch that is to come, which is not 1 in a run that goes on."""

    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, folder: Path, place: str, config: Config, first_epoch: int) -> None:
        self.writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_epoch)

    def log(self, row: dict[str, Any]) -> None:
        for key, value in _numbers(row).items():
            self.writer.add_scalar(key, value, row["epoch"])

    def close(self) -> None:
        self.writer.close()


class MLflow:
    """A run of the server and experiment that MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME name. A run that goes on
    has the place of the one before as its tag."""

    def __init__(self, folder: Path, place: str, config: Config, first_epoch: int) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.client, self.metric = MlflowClient(), Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "spartan-ray")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        filled = place.replace("'", "")
        found = self.client.search_runs([experiment], f"tags.spartan_run = '{filled}'", max_results=1)
        if found and first_epoch > 1:
            self.run = found[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
            return
        tags = {"spartan_run": filled}
        self.run = self.client.create_run(experiment, run_name=place.split("/")[-1], tags=tags).info.run_id
        values = config.model_dump()
        params = [Param(f"{part}.{key}", str(value)) for part in values for key, value in values[part].items()]
        self.client.log_batch(self.run, params=params)

    def log(self, row: dict[str, Any]) -> None:
        numbers = _numbers(row).items()
        self.client.log_batch(self.run, [self.metric(key, value, 0, row["epoch"]) for key, value in numbers])

    def close(self) -> None:
        self.client.set_terminated(self.run)


class WandB:
    """A run of the project that WANDB_PROJECT names, as WANDB_MODE says. One that goes on has the same id."""

    def __init__(self, folder: Path, place: str, config: Config, first_epoch: int) -> None:
        import wandb

        name = hashlib.sha256(place.encode()).hexdigest()[:16]
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "spartan-ray"), id=name, name=place.split("/")[-1],
            resume="allow" if first_epoch > 1 else None, config=config.model_dump(), dir=str(folder),
        )  # fmt: skip

    def log(self, row: dict[str, Any]) -> None:
        self.run.log(_numbers(row), step=row["epoch"])

    def close(self) -> None:
        self.run.finish()


OWN: dict[str, Callable[[Path, str, Config, int], Logger]] = {
    "tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB
}  # fmt: skip


def make_loggers(folder: Path, place: str, config: Config, first_epoch: int) -> list[tuple[str, Logger]]:
    """The loggers of a run, by their names. Raises InputError for one that cannot be made."""
    made: list[tuple[str, Logger]] = []
    for name in logger_names(config.run.loggers):
        make = OWN.get(name) or imported("run.loggers", name)
        try:
            made.append((name, make(folder, place, config, first_epoch)))
        except ImportError as error:
            raise InputError(f"run.loggers {name}: {one_line(str(error))}: pip install 'spartan-ray[{name}]'") from None
        except Exception as error:  # each library has errors of its own
            raise InputError(f"run.loggers {name}: {one_line(f'{type(error).__name__}: {error}')}") from error
    return made


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, int | float) and key != "epoch"}
