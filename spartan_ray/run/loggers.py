"""Loggers of a run's metrics: TensorBoard, MLflow, Weights & Biases, or one of the user's own."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from torch.utils.tensorboard import SummaryWriter

from spartan_ray.errors import InputError
from spartan_ray.naming import imported, logger_names

if TYPE_CHECKING:
    from spartan_ray.run.config import Config


class About(NamedTuple):
    """A run as described to its loggers.

    folder        run folder on this machine
    place         path or URL of the run as the user names it
    id            unique identifier of the run
    config        configuration of the run
    first_epoch   first epoch that will be logged; above 1 if the run was resumed
    """

    folder: Path
    place: str
    id: str
    config: Config
    first_epoch: int


class Logger(Protocol):
    """Takes the rows of metrics.jsonl, one per epoch. It is constructed with an `About`."""

    def log(self, row: dict[str, Any]) -> None: ...

    def close(self) -> None: ...


class TensorBoard:
    """Event files in the run folder."""

    def __init__(self, about: About) -> None:
        self.writer = SummaryWriter(str(about.folder / "tensorboard"), purge_step=about.first_epoch)

    def log(self, row: dict[str, Any]) -> None:
        for key, value in _numbers(row).items():
            self.writer.add_scalar(key, value, row["epoch"])

    def close(self) -> None:
        self.writer.close()


class MLflow:
    """A run on an MLflow server. MLFLOW_TRACKING_URI and MLFLOW_EXPERIMENT_NAME (default: spartan-ray) choose the
    server and the experiment. A resumed run continues the MLflow run with the same `spartan_run` tag."""

    def __init__(self, about: About) -> None:
        from mlflow import MlflowClient
        from mlflow.entities import Metric, Param

        self.client, self.metric = MlflowClient(), Metric
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", "spartan-ray")
        known = self.client.get_experiment_by_name(name)
        experiment = known.experiment_id if known else self.client.create_experiment(name)
        found = self.client.search_runs([experiment], f"tags.spartan_run = '{about.id}'", max_results=1)
        if found:
            self.run = found[0].info.run_id
            self.client.update_run(self.run, status="RUNNING")
            return
        tags = {"spartan_run": about.id, "spartan_place": about.place}
        self.run = self.client.create_run(experiment, run_name=about.place.split("/")[-1], tags=tags).info.run_id
        values = about.config.model_dump()
        params = [Param(f"{part}.{key}", str(value)) for part in values for key, value in values[part].items()]
        self.client.log_batch(self.run, params=params)

    def log(self, row: dict[str, Any]) -> None:
        numbers = _numbers(row).items()
        self.client.log_batch(self.run, [self.metric(key, value, 0, row["epoch"]) for key, value in numbers])

    def close(self) -> None:
        self.client.set_terminated(self.run)


class WandB:
    """A Weights & Biases run. WANDB_PROJECT (default: spartan-ray), WANDB_MODE and WANDB_DIR apply. A resumed run
    continues under the same id."""

    def __init__(self, about: About) -> None:
        import wandb

        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "spartan-ray"), id=about.id, name=about.place.split("/")[-1],
            resume="allow", config=about.config.model_dump(),
        )  # fmt: skip

    def log(self, row: dict[str, Any]) -> None:
        self.run.log(_numbers(row), step=row["epoch"])

    def close(self) -> None:
        self.run.finish()


OWN: dict[str, Callable[[About], Logger]] = {"tensorboard": TensorBoard, "mlflow": MLflow, "wandb": WandB}


def make_loggers(about: About, note: Callable[[str], None]) -> list[tuple[str, Logger]]:
    """Make the loggers of a run, as pairs of name and logger.

    Raises InputError if one cannot be made. In a resumed run it is left out with a note instead."""
    made: list[tuple[str, Logger]] = []
    for name in logger_names(about.config.run.loggers):
        try:
            make = OWN.get(name) or imported("run.loggers", name)
            made.append((name, make(about)))
        except Exception as error:  # each library raises its own errors
            said = (
                str(error) if isinstance(error, InputError) else f"run.loggers {name}: {type(error).__name__}: {error}"
            )
            if isinstance(error, ImportError) and name in OWN:
                said = f"run.loggers {name}: {error}: pip install 'spartan-ray[{name}]'"
            if about.first_epoch == 1:
                raise InputError(said) from error
            note(said)
    return made


def _numbers(row: dict[str, Any]) -> dict[str, float]:
    return {key: value for key, value in row.items() if isinstance(value, int | float) and key != "epoch"}
