"""How many workers fit the nodes of a Ray, beside the driver. `Resources` are a node's: CPU, GPU."""

from __future__ import annotations

import math

from spartan_ray.distributed.config import Cluster
from spartan_ray.errors import InputError

Resources = dict[str, float]
TOLERANCE = 1e-9


def resolve_cluster(cluster: Cluster, nodes: list[Resources], grows: bool = False) -> Cluster:
    """The cluster section with the shares of the GPUs decided from what each node of the Ray has; the
    first node is preferred for the driver. What `grows` may have other nodes later.

    Raises InputError when the workers that are asked for do not fit, or what kind they are cannot be known yet."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if grows and not gpus and cluster.gpus_per_worker is None:
        raise InputError(
            "cluster.gpus_per_worker is not given, and this Ray has no GPU now but starts nodes when they are asked "
            "for: give 0.9 for a worker a GPU, 0 for workers without"
        )
    on_gpus = 0.1 if gpus or cluster.gpus_per_worker else 0.0
    defaults = {"gpus_per_worker": 0.9 if gpus else 0.0, "driver_gpus": on_gpus}
    cluster = cluster.model_copy(
        update={name: value for name, value in defaults.items() if getattr(cluster, name) is None}
    )
    fit = workers_that_fit(cluster, nodes)
    if not grows and fit < (cluster.workers if isinstance(cluster.workers, int) else cluster.least_workers):
        cpus = sum(int(node.get("CPU", 0)) for node in nodes)
        raise InputError(
            f"cluster.workers ({cluster.workers}) of {cluster.cpus_per_worker} CPUs (cluster.cpus_per_worker) and "
            f"{cluster.gpus_per_worker:g} GPUs (cluster.gpus_per_worker) beside a driver of {cluster.driver_cpus} CPUs "
            f"and {cluster.driver_gpus:g} GPUs do not fit the {len(nodes)} nodes with {cpus} CPUs and {gpus} GPUs of "
            "this Ray"
        )
    return cluster


def worker_resources(cluster: Cluster) -> Resources:
    """What a worker is given."""
    return {"CPU": float(cluster.cpus_per_worker), "GPU": cluster.gpus_per_worker or 0.0}


def holds(node: Resources, wanted: Resources) -> bool:
    """Whether a node has at least so much."""
    return all(node.get(name, 0.0) + TOLERANCE >= value for name, value in wanted.items())


def described(wanted: Resources) -> str:
    """Resources in words."""
    return " and ".join(f"{value:g} {name}s" for name, value in wanted.items())


def pool_size(
    cluster: Cluster, nodes: list[Resources], free: list[Resources], workers: int, starting: int, grows: bool
) -> int:
    """How many workers a run is to have, of which so many have joined and so many have not: as many as it asks for, or
    with `auto`, or a range, as many as fit in what is free beside those that have joined. Those that have not may have
    what they need, or wait for it: they are as many. A range is asked for whole where that makes new nodes."""
    if isinstance(cluster.workers, int):
        return cluster.workers
    least, most = cluster.least_workers, cluster.most_workers
    if grows and most:
        return most
    more = sum(_workers_on(node, cluster.cpus_per_worker, cluster.gpus_per_worker or 0.0, 0, 0) for node in free)
    fit = min(workers + max(more, starting), workers_that_fit(cluster, nodes))
    return max(least, min(fit, most or fit))


def workers_that_fit(cluster: Cluster, nodes: list[Resources]) -> int:
    """How many workers fit the nodes beside the driver; 0 where the driver itself does not."""
    gpus_per_worker, driver_gpus = cluster.gpus_per_worker or 0.0, cluster.driver_gpus or 0.0
    free = [_workers_on(node, cluster.cpus_per_worker, gpus_per_worker, 0, 0) for node in nodes]
    # The driver goes to the first node that has room for it.
    for number, node in enumerate(nodes):
        if node.get("CPU", 0) >= cluster.driver_cpus and node.get("GPU", 0) >= driver_gpus:
            free[number] = _workers_on(node, cluster.cpus_per_worker, gpus_per_worker, cluster.driver_cpus, driver_gpus)
            return sum(free)
    return 0


def _workers_on(node: Resources, cpus_each: int, gpus_each: float, driver_cpus: int, driver_gpus: float) -> int:
    """How many workers fit a node beside a driver of that size (0 and 0: none)."""
    fit = int(node.get("CPU", 0) - driver_cpus) // cpus_each
    if not gpus_each:
        return fit
    # A fraction of a GPU never spans two of them. The driver's share is of whole GPUs and one more; what is free of
    # several is taken to be of as few as can be.
    whole, part = divmod(node.get("GPU", 0.0) + TOLERANCE, 1)
    shares = 1.0, math.ceil(driver_gpus) - driver_gpus, part
    per_gpu, beside, rest = (int((share + TOLERANCE) // gpus_each) for share in shares)
    return min(fit, (int(whole) - math.ceil(driver_gpus)) * per_gpu + beside + rest)
