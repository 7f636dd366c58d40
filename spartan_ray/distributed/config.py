"""What a run says of its Ray and its workers."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, NonNegativeInt, PositiveInt

from spartan_ray.section import PositiveFloat, Section

# A driver or a worker computes on one device.
GpuShare = Annotated[float, Field(ge=0, le=1, allow_inf_nan=False)]


class Cluster(Section):
    """What Ray gives to the driver and the workers."""

    prefix = "cluster"

    address: str | None = None
    """Ray cluster to join (default: RAY_ADDRESS, which a Ray job sets, else a new local Ray)."""
    workers: PositiveInt | Literal["auto"] = "auto"
    """Workers; auto: one a GPU, or one a core where there is no GPU, more and fewer as nodes come and go."""
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
    """Seconds to wait for a worker when there is none, or none gets anything done, before the run stops."""
    task_timeout: PositiveFloat = 600.0
    """Seconds, and ten times the usual, that a worker with work may be silent before it is replaced."""
    on_member_error: Literal["worst", "stop"] = "worst"
    """A member that fails on three workers: it is scored worst, or the run stops."""
    driver_restarts: NonNegativeInt = 3
    """Times that a driver that was lost is started again from the last checkpoint."""
