"""Examine a node of a Ray by running a task on it."""

from __future__ import annotations

import socket
from dataclasses import dataclass
from typing import Any

import ray
import torch
from ray.exceptions import GetTimeoutError, RayError
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from spartan_ray.distributed.joining import WorkerInfo, objections, versions
from spartan_ray.distributed.worker import claim_device
from spartan_ray.errors import InputError, one_line
from spartan_ray.noise.contract import NoiseKind
from spartan_ray.noise.fingerprint import fingerprint
from spartan_ray.noise.kernels import kernel_for
from spartan_ray.noise.portable import PortableKernel

# Seconds to wait for a node, which has to start a process that imports torch.
SECONDS = 120.0


@dataclass(frozen=True)
class Examined:
    """A node, and why a worker on it would be refused (empty if it would be accepted)."""

    host: str
    device: str
    objections: str

    def __str__(self) -> str:
        return f"{self.host}, {self.device}"


def examine(noise: NoiseKind) -> WorkerInfo:
    """Return the WorkerInfo that a worker in this process would send."""
    device = claim_device(None)
    kernel = kernel_for(noise, device)
    name = f"cpu {torch.backends.cpu.get_cpu_capability()}"
    if device.type == "cuda":
        slow = " without Triton, which is slow" if isinstance(kernel, PortableKernel) else ""
        name = f"{torch.cuda.get_device_name(device)}{slow}"
    return WorkerInfo(socket.gethostname(), "", 0, name, torch.get_num_threads(), fingerprint(kernel), versions())


def examined(node: dict[str, Any], noise: NoiseKind) -> Examined:
    """Examine a node of `ray.nodes()`. Raises InputError if it does not answer."""
    info = on_node(node, examine, noise, gpu=bool(node["Resources"].get("GPU")))
    return Examined(info.host, info.device, objections(info, noise))


def on_node(node: dict[str, Any], function: Any, *arguments: Any, gpu: bool = False) -> Any:
    """Run a function in a process on a node and return its result. With `gpu` the process sees a GPU. Raises
    InputError if the function fails or does not return in time."""
    place = NodeAffinitySchedulingStrategy(node["NodeID"], soft=False)
    task: Any = ray.remote(function).options(
        num_cpus=0, num_gpus=0.01 if gpu else 0, scheduling_strategy=place, max_retries=0
    )
    where = f"{node['NodeManagerHostname']} ({node['NodeID'][:8]})"
    try:
        return ray.get(task.remote(*arguments), timeout=SECONDS)
    except GetTimeoutError:
        raise InputError(f"{where}: no answer in {SECONDS:.0f} s") from None
    except RayError as error:
        cause = getattr(error, "cause", None)
        raise InputError(f"{where}: {one_line(str(cause or error)).splitlines()[-1]}") from None
