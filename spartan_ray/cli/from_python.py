"""`spartan train` from Python or a notebook."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from spartan_ray.cli.flags import with_absolute_paths
from spartan_ray.cli.follow import Callback, follow
from spartan_ray.cli.train import STOP_SECONDS, begun, check_paths
from spartan_ray.distributed.address import ray_address
from spartan_ray.distributed.start import join_ray
from spartan_ray.errors import InputError, RunError, one_line
from spartan_ray.run.config import Config
from spartan_ray.run.loading import configuration, load_config, override
from spartan_ray.section import is_url

if TYPE_CHECKING:
    import pandas as pd
    import torch


FINAL = "final.safetensors"


@dataclass(frozen=True)
class Result:
    """A run that ended."""

    path: Path | str
    """Its folder, or its URL."""
    metrics: pd.DataFrame
    """A row an epoch: the lines of metrics.jsonl."""

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict of the network at the end."""
        from safetensors.torch import load_file

        from spartan_ray.run.place import reading

        with reading(str(self.path), lambda name: name == FINAL) as folder:
            return load_file(folder / FINAL)

    @property
    def best_epoch(self) -> int:
        """The epoch of the highest validation accuracy, the first of several."""
        best = self.metrics["validation_accuracy"].to_numpy().argmax()
        return int(self.metrics["epoch"].iloc[best])


def train(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    **sections: Any,
) -> Result:
    """Run what `spartan train` runs, to its end.

        result = spartan_ray.train("quickstart", run={"epochs": 10}, evolution={"population": 200})
        result.metrics.plot(x="epoch", y="test_accuracy")

    config      a preset, a YAML file, a run folder, or sections of fields as in a file (default: the defaults)
    progress    show a progress bar in a terminal or a notebook, lines elsewhere
    callbacks   functions that are called in this process with each row of `metrics`, a dict, as its epoch ends; what
                one raises ends the run
    sections    fields that override those of the config: run, data, parent, evolution, cluster. A network or strategy
                of your own is named: parent={"model": "my_module:Net"}

    The Result has the run's folder (`path`), a row an epoch (`metrics`), the state dict at the end (`weights`) and
    `best_epoch`, by validation accuracy.

    Runs on the Ray that this process is connected to, else on that of `cluster.address` or RAY_ADDRESS, else on a new
    one of this machine. Interrupted, the run ends with a checkpoint: `spartan resume` goes on.

    Raises InputError for what cannot be used, by the name of the field, and RunError for a run that cannot go on."""
    import ray
    from ray.exceptions import RayError, RayTaskError

    from spartan_ray.run.supervisor import ROOM_SECONDS, Supervisor

    if not isinstance(config, Config):
        config = load_config(str(config)) if isinstance(config, str | Path) else configuration(dict(config or {}))
    chosen = with_absolute_paths(override(config, sections))
    console = Console(quiet=not progress)
    leave, supervisor, room_seconds = None, None, ROOM_SECONDS
    place, finished = begun(chosen)
    if place and finished:
        return _result(place)
    try:
        if not ray.is_initialized():
            if ray_address(chosen.cluster.address)[0] == "local":
                check_paths(chosen, new=place is None)
                room_seconds = 0.0  # nothing joins it
            leave = join_ray(chosen.cluster.address)
        supervisor = Supervisor(chosen, place, room_seconds)
        try:
            follow(supervisor, console, callbacks)
        except KeyboardInterrupt:
            supervisor.stop()
            supervisor.watch(STOP_SECONDS, 0)
            console.print(f"stopped; go on with: spartan resume {supervisor.folder}", markup=False, highlight=False)
            raise
        supervisor.result()
        assert supervisor.folder
        return _result(supervisor.folder)
    except RayTaskError as error:
        if isinstance(error.cause, InputError | RunError):
            raise error.cause from None
        raise
    except RayError as error:
        raise RunError(f"the driver was lost: {one_line(str(error))}") from error
    finally:
        if supervisor:
            supervisor.close()
        if leave:
            leave()


def _result(place: str) -> Result:
    """Of a run that has ended."""
    from spartan_ray.report.reading import read_run
    from spartan_ray.run.place import in_report, reading

    with reading(place, in_report) as folder:
        return Result(place if is_url(place) else Path(place), read_run(folder).metrics)
