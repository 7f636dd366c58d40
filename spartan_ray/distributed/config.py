"""The configuration of Ray, the driver and the workers: the `cluster` section."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from spartan_ray.section import PositiveFloat, Section


def _worker_range(workers: str) -> str:
    """Check a range of workers, `least..most`. Raises ValueError if it is not one."""
    found = re.fullmatch(r"(\d{1,6})\.\.(\d{1,6})", workers)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError("not a range of workers")
    return workers


WorkerRange = Annotated[str, AfterValidator(_worker_range)]
# The driver and each worker compute on one device, so a share is at most 1.
GpuShare = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Cluster(Section):
    """The Ray to use, the resources of the driver and the workers, and the handling of failures."""

    prefix = "cluster"

    address: str | None = None
    """Address of the Ray cluster to join (default: RAY_ADDRESS, which a Ray job sets, else a new local Ray)."""
    workers: PositiveInt | Literal["auto"] | WorkerRange = "auto"
    """Number of workers: a number, a range such as 4..64 (minimum and maximum), or auto. auto starts one per free GPU,
    or one per free core if there are no GPUs. A range and auto follow free resources and nodes that join or leave."""
    gpus_per_worker: GpuShare | None = None
    """GPUs per worker, at most 1 (default: 0.9 if there are GPUs, else 0). Workers on one GPU take turns unless MPS
    runs."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores and threads per worker. The bits of the scores depend on it."""
    driver_gpus: GpuShare | None = None
    """GPUs of the driver, at most 1 (default: 0.1 if there are GPUs or workers use them, else 0)."""
    driver_cpus: Annotated[int, Field(ge=0)] = 0
    """CPU cores reserved for the driver. With 0 it shares the workers' cores, because the phases alternate."""
    chunk: PositiveInt | Literal["auto"] = "auto"
    """Members per task of a worker; auto: about two seconds of work."""
    worker_timeout: PositiveFloat = 600.0
    """Seconds to wait when all workers are gone, or none makes progress, before the run stops. For the first worker
    the run waits indefinitely, as long as a node may have room for it. Also the limit for a driver that does not
    answer."""
    task_timeout: PositiveFloat = 600.0
    """Seconds, plus ten times the usual duration of its task, after which a worker that does not answer is replaced."""
    on_member_error: Literal["worst", "stop"] = "worst"
    """How to handle a member that fails on three workers: score it worst, or stop the run."""
    driver_restarts: NonNegativeInt = 3
    """Maximum number of restarts of a lost driver, each from the last checkpoint."""

    @property
    def least_workers(self) -> int:
        """Minimum number of workers to begin with: the lower end of a range, else 1."""
        return int(str(self.workers).split("..")[0]) if ".." in str(self.workers) else 1

    @property
    def most_workers(self) -> int | None:
        """Maximum number of workers; None means no limit."""
        return None if self.workers == "auto" else int(str(self.workers).split("..")[-1])
