"""What a run says of its Ray and its workers."""

from __future__ import annotations

import re
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, NonNegativeInt, PositiveInt

from spartan_ray.section import PositiveFloat, Section


def _worker_range(workers: str) -> str:
    """A range of workers, `least..most`."""
    found = re.fullmatch(r"(\d{1,6})\.\.(\d{1,6})", workers)
    if not found or not 1 <= int(found[1]) <= int(found[2]):
        raise ValueError("not a range of workers")
    return workers


WorkerRange = Annotated[str, AfterValidator(_worker_range)]
# A driver or a worker computes on one device.
GpuShare = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Cluster(Section):
    """What Ray gives to the driver and the workers."""

    prefix = "cluster"

    address: str | None = None
    """Ray cluster to join (default: RAY_ADDRESS, which a Ray job sets, else a new local Ray)."""
    workers: PositiveInt | Literal["auto"] | WorkerRange = "auto"
    """Workers: a number, 4..64 for at least and at most so many, or auto: one a free GPU, or a free core where there is
    no GPU. A range and auto follow what is free and the nodes that come and go."""
    gpus_per_worker: GpuShare | None = None
    """GPUs of a worker, at most 1 (default: 0.9 where there are GPUs); several on one take turns unless MPS runs."""
    cpus_per_worker: PositiveInt = 1
    """CPU cores, and threads, of a worker. The bits of the scores depend on it."""
    driver_gpus: GpuShare | None = None
    """GPUs of the driver, at most 1 (default: 0.1 where there are GPUs)."""
    driver_cpus: Annotated[int, Field(ge=0)] = 0
    """CPU cores kept for the driver; 0 shares the workers' cores, since the phases alternate."""
    chunk: PositiveInt | Literal["auto"] = "auto"
    """Members sent to a worker at once; auto: about two seconds of work."""
    worker_timeout: PositiveFloat = 600.0
    """Seconds to wait for a worker when all are gone, or none gets anything done, before the run stops. The first
    worker is waited for without end where a node may have room for it."""
    task_timeout: PositiveFloat = 600.0
    """Seconds, and ten times the usual, that a worker with work may be silent before it is replaced."""
    on_member_error: Literal["worst", "stop"] = "worst"
    """A member that fails on three workers: it is scored worst, or the run stops."""
    driver_restarts: NonNegativeInt = 3
    """Times that a driver that was lost is started again from the last checkpoint."""

    @property
    def least_workers(self) -> int:
        """How many workers a run begins with at least."""
        return int(str(self.workers).split("..")[0]) if ".." in str(self.workers) else 1

    @property
    def most_workers(self) -> int | None:
        """How many workers there may be; None is without end."""
        return None if self.workers == "auto" else int(str(self.workers).split("..")[-1])
