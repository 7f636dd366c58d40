"""Tests of the loggers of a run: TensorBoard, MLflow and Weights & Biases without a network, and a user's logger."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from spartan_ray.errors import InputError
from spartan_ray.run.config import Config, Run
from spartan_ray.run.loading import refuse_links
from spartan_ray.run.loggers import About, make_loggers
from spartan_ray.run.record import RunFolder


class Kept:
    """A user's logger. It fails in epoch 2."""

    made: ClassVar[list[Kept]] = []

    def __init__(self, about: About) -> None:
        self.about, self.closed = about, False
        self.rows: list[dict[str, Any]] = []
        self.made.append(self)

    def log(self, row: dict[str, Any]) -> None:
        if row["epoch"] == 2:
            raise ConnectionError("the server\nis away")
        self.rows.append(row)

    def close(self) -> None:
        self.closed = True


def about(folder: Path, config: Config, first_epoch: int = 1) -> About:
    return About(folder, f"s3://bucket/{folder.name}", f"id-of-{folder.name}", config, first_epoch)


def written(folder: Path, loggers: str, epochs: range, first_epoch: int = 1) -> list[str]:
    """Return the messages of a run with these loggers and epochs."""
    notes: list[str] = []
    config = Config(run=Run(loggers=loggers, seed=7))
    folder.mkdir(exist_ok=True)
    made = make_loggers(about(folder, config, first_epoch), notes.append)
    record = RunFolder.create(folder, config, {}, made, notes.append)
    for epoch in epochs:
        record.append({"epoch": epoch, "kind": "sgd", "train_loss": 1 / epoch, "accepted": True, "note": None})
    record.close()
    return notes


def test_tensorboard_has_the_numbers_of_each_epoch_and_not_those_that_a_run_took_back(tmp_path: Path) -> None:
    assert written(tmp_path / "run", "tensorboard", range(1, 5)) == []
    assert written(tmp_path / "run", "tensorboard", range(3, 6), first_epoch=3) == []
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("train_loss")] == [
        (epoch, pytest.approx(1 / epoch)) for epoch in range(1, 6)
    ]
    assert "epoch" not in events.Tags()["scalars"]


def test_mlflow_has_the_configuration_and_one_run_for_what_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlflow").as_uri())
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_EXPERIMENT_NAME", "theirs")
    assert written(tmp_path / "run", "mlflow", range(1, 3)) == []
    assert written(tmp_path / "run", "mlflow", range(3, 5), first_epoch=3) == []
    assert written(tmp_path / "other", "mlflow", range(1, 2)) == []
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("theirs").experiment_id
    run, other = sorted(client.search_runs([experiment]), key=lambda run: str(run.info.run_name), reverse=True)
    assert (run.info.run_name, other.info.run_name, run.info.status) == ("run", "other", "FINISHED")
    assert run.data.params["run.seed"] == "7"
    history = client.get_metric_history(run.info.run_id, "train_loss")
    assert [(metric.step, metric.value) for metric in history] == [(epoch, 1 / epoch) for epoch in range(1, 5)]


def test_wandb_keeps_what_it_would_send(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_DIR", str(tmp_path))
    assert written(tmp_path / "run", "wandb", range(1, 3)) == []
    assert list((tmp_path / "wandb").glob("offline-run-*/run-id-of-run.wandb"))
    refuse_links(tmp_path / "run")  # W&B leaves no links in the run folder


def test_one_s_own_gets_the_rows_and_one_that_fails_ends_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Kept, "made", [])
    notes = written(tmp_path / "run", "test_loggers:Kept, test_loggers:Kept,tensorboard", range(1, 4))
    said = "test_loggers:Kept gets no more rows: ConnectionError: the server\nis away"
    assert notes == [said, said]
    first, second = (kept.about for kept in Kept.made)
    assert first == second == about(tmp_path / "run", first.config)
    assert first.config.run.seed == 7
    assert [[row["epoch"] for row in kept.rows] for kept in Kept.made] == [[1], [1]]
    assert len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()) == 3
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()
    assert len(events.Scalars("train_loss")) == 3

    assert written(tmp_path / "two", "test_loggers:Kept", range(3, 5)) == []
    assert Kept.made[-1].closed


def test_a_logger_that_cannot_be_is_one_line_that_names_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match=r"^run\.loggers \('tensorbord'\): expected tensorboard, mlflow, wandb, or"):
        Run(loggers="tensorbord")

    def make(loggers: str, first_epoch: int = 1) -> tuple[int, list[str]]:
        notes: list[str] = []
        return len(make_loggers(about(tmp_path, Config(run=Run(loggers=loggers)), first_epoch), notes.append)), notes

    assert make("none") == (0, [])
    monkeypatch.setitem(sys.modules, "mlflow", None)
    with pytest.raises(InputError, match=r"^run\.loggers mlflow: .*pip install 'spartan-ray\[mlflow\]'$"):
        make("mlflow")
    with pytest.raises(InputError, match=r"^run\.loggers \(test_loggers:Absent\): "):
        make("test_loggers:Absent")
    # In a resumed run, a missing logger is only a message.
    made, (note,) = make("tensorboard,mlflow", first_epoch=3)
    assert made == 1
    assert note.startswith("run.loggers mlflow: ")
