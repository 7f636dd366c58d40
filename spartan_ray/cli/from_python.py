"""`spartan_ray.train`: run `spartan train` from Python or a notebook."""

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
    """The result of a finished run."""

    path: Path | str
    """The run folder, or its URL."""
    metrics: pd.DataFrame
    """The lines of metrics.jsonl, one row per epoch."""

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        """The state dict of the final network."""
        from safetensors.torch import load_file

        from spartan_ray.run.place import reading

        with reading(str(self.path), lambda name: name == FINAL) as folder:
            return load_file(folder / FINAL)

    @property
    def best_epoch(self) -> int:
        """The epoch with the highest validation accuracy, the first one on a tie."""
        best = self.metrics["validation_accuracy"].to_numpy().argmax()
        return int(self.metrics["epoch"].iloc[best])


def train(
    config: str | Path | Mapping[str, Any] | Config | None = None,
    *,
    progress: bool = True,
    callbacks: Sequence[Callback] = (),
    **sections: Any,
) -> Result:
    """Do the same run as `spartan train` and wait for its end.

    The run uses the Ray that this process is connected to. If there is none, it joins the one of `cluster.address` or
    RAY_ADDRESS, or starts a new local Ray. An interrupted run ends with a checkpoint; `spartan resume` continues it.

    Example::

        result = spartan_ray.train("quickstart", run={"epochs": 10}, evolution={"population": 200})
        result.metrics.plot(x="epoch", y="test_accuracy")

    Args:
        config: Base configuration: the name of a preset, the path of a YAML file or run folder, a `Config`, or a dict
            of sections as in a file. Default: the default of every field.
        progress: Show a progress bar in a terminal or a notebook, and plain lines elsewhere.
        callbacks: Functions called in this process with each row of the metrics, a dict, when its epoch ends. An
            exception in a callback ends the run.
        **sections: Dicts of fields that override `config`: `run`, `data`, `parent`, `evolution`, `cluster`. Name a
            network or a strategy of your own: `parent={"model": "my_module:Net"}`.

    Returns:
        The run folder, the metrics and the weights.

    Raises:
        InputError: A wrong setting or input.
        RunError: The run cannot continue.
    """
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
                room_seconds = 0.0  # no node will join a local Ray
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
    """Read the Result of a finished run."""
    from spartan_ray.report.reading import read_run
    from spartan_ray.run.place import in_report, reading

    with reading(place, in_report) as folder:
        return Result(place if is_url(place) else Path(place), read_run(folder).metrics)
