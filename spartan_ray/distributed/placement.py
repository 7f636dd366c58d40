"""How many workers fit the nodes of a Ray, beside the driver."""

from __future__ import annotations

import math

from spartan_ray.distributed.config import Cluster
from spartan_ray.errors import InputError


def resolve_cluster(cluster: Cluster, nodes: list[dict[str, float]]) -> Cluster:
    """The cluster section with the shares of the GPUs decided from what each node of the Ray has; the
    first node is preferred for the driver.

    Raises InputError when the workers that are asked for do not fit."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    defaults = {"gpus_per_worker": 0.9 if gpus else 0.0, "driver_gpus": 0.1 if gpus else 0.0}
    cluster = cluster.model_copy(
        update={name: value for name, value in defaults.items() if getattr(cluster, name) is None}
    )
    fit = workers_that_fit(cluster, nodes)
    if fit < (1 if cluster.workers == "auto" else cluster.workers):
        cpus = sum(int(node.get("CPU", 0)) for node in nodes)
        raise InputError(
            f"cluster.workers ({cluster.workers}) of {cluster.cpus_per_worker} CPUs (cluster.cpus_per_worker) and "
            f"{cluster.gpus_per_worker:g} GPUs (cluster.gpus_per_worker) beside a driver of {cluster.driver_cpus} CPUs "
            f"and {cluster.driver_gpus:g} GPUs do not fit the {len(nodes)} nodes with {cpus} CPUs and {gpus} GPUs of "
            "this Ray"
        )
    return cluster


def workers_that_fit(cluster: Cluster, nodes: list[dict[str, float]]) -> int:
    """How many workers fit the nodes beside the driver; 0 where the driver itself does not."""
    gpus_per_worker, driver_gpus = cluster.gpus_per_worker or 0.0, cluster.driver_gpus or 0.0
    free = [_workers_on(node, cluster.cpus_per_worker, gpus_per_worker, 0, 0) for node in nodes]
    # The driver goes to the first node that has room for it.
    for number, node in enumerate(nodes):
        if node.get("CPU", 0) >= cluster.driver_cpus and node.get("GPU", 0) >= driver_gpus:
            free[number] = _workers_on(node, cluster.cpus_per_worker, gpus_per_worker, cluster.driver_cpus, driver_gpus)
            return sum(free)
    return 0


def _workers_on(node: dict[str, float], cpus_each: int, gpus_each: float, driver_cpus: int, driver_gpus: float) -> int:
    """How many workers fit a node beside a driver of that size (0 and 0: none)."""
    fit = int(node.get("CPU", 0) - driver_cpus) // cpus_each
    if not gpus_each:
        return fit
    gpus, tolerance = int(node.get("GPU", 0)), 1e-9
    # A fraction of a GPU never spans two of them. The driver's share is of whole GPUs and one more.
    per_gpu = int((1 + tolerance) // gpus_each)
    untouched = gpus - math.ceil(driver_gpus)
    beside = int((math.ceil(driver_gpus) - driver_gpus + tolerance) // gpus_each)
    return min(fit, untouched * per_gpu + beside)
