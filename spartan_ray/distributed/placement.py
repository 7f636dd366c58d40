"""Compute how many workers fit the nodes of a Ray, beside the driver.

`Resources` maps the resources of a node, CPU and GPU, to their amounts."""

from __future__ import annotations

import math

from spartan_ray.distributed.config import Cluster
from spartan_ray.errors import InputError

Resources = dict[str, float]
TOLERANCE = 1e-9


def resolve_cluster(cluster: Cluster, nodes: list[Resources], grows: bool = False) -> Cluster:
    """Return the cluster section with the GPU shares filled in from the resources of the nodes.

    The first node is preferred for the driver. A Ray that `grows` may have other nodes later. Raises InputError if the
    requested workers do not fit, or if it cannot be known yet whether workers use GPUs."""
    gpus = sum(int(node.get("GPU", 0)) for node in nodes)
    if grows and not gpus and cluster.gpus_per_worker is None:
        raise InputError(
            "cluster.gpus_per_worker is not given, and this Ray has no GPU now but starts nodes on demand: set it to "
            "0.9 for one worker per GPU, or to 0 for workers without a GPU"
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
            f"cluster.workers ({cluster.workers}) with {cluster.cpus_per_worker} CPUs (cluster.cpus_per_worker) and "
            f"{cluster.gpus_per_worker:g} GPUs (cluster.gpus_per_worker) each, and a driver with {cluster.driver_cpus} "
            f"CPUs and {cluster.driver_gpus:g} GPUs do not fit the {len(nodes)} nodes of this Ray, which have {cpus} "
            f"CPUs and {gpus} GPUs: there is room for {fit}"
        )
    return cluster


def worker_resources(cluster: Cluster) -> Resources:
    """Return the resources of one worker."""
    return {"CPU": float(cluster.cpus_per_worker), "GPU": cluster.gpus_per_worker or 0.0}


def holds(node: Resources, wanted: Resources) -> bool:
    """Whether a node has at least the wanted resources."""
    return all(node.get(name, 0.0) + TOLERANCE >= value for name, value in wanted.items())


def described(wanted: Resources) -> str:
    """Return resources in words."""
    return " and ".join(f"{value:g} {name}s" for name, value in wanted.items())


def pool_size(
    cluster: Cluster, nodes: list[Resources], free: list[Resources], workers: int, starting: int, grows: bool
) -> int:
    """Return how many workers a run should have, given that `workers` have joined and `starting` have not.

    A number in the configuration is taken as it is. With `auto` or a range the result is the workers that have joined
    and as many as fit the free resources. Workers that are starting may hold their resources already or still wait
    for them; if they are more than those that fit, they count instead. On a Ray that `grows`, a range is requested
    at its maximum, because the request starts new nodes."""
    if isinstance(cluster.workers, int):
        return cluster.workers
    least, most = cluster.least_workers, cluster.most_workers
    if grows and most:
        return most
    more = sum(_workers_on(node, cluster.cpus_per_worker, cluster.gpus_per_worker or 0.0, 0, 0) for node in free)
    fit = min(workers + max(more, starting), workers_that_fit(cluster, nodes))
    return max(least, min(fit, most or fit))


def workers_that_fit(cluster: Cluster, nodes: list[Resources]) -> int:
    """Return how many workers fit the nodes beside the driver; 0 if the driver itself does not fit."""
    gpus_per_worker, driver_gpus = cluster.gpus_per_worker or 0.0, cluster.driver_gpus or 0.0
    free = [_workers_on(node, cluster.cpus_per_worker, gpus_per_worker, 0, 0) for node in nodes]
    # The driver takes the first node that has room for it.
    for number, node in enumerate(nodes):
        if node.get("CPU", 0) >= cluster.driver_cpus and node.get("GPU", 0) >= driver_gpus:
            free[number] = _workers_on(node, cluster.cpus_per_worker, gpus_per_worker, cluster.driver_cpus, driver_gpus)
            return sum(free)
    return 0


def _workers_on(node: Resources, cpus_each: int, gpus_each: float, driver_cpus: int, driver_gpus: float) -> int:
    """Return how many workers fit a node beside a driver of that size (0 and 0: no driver)."""
    fit = int(node.get("CPU", 0) - driver_cpus) // cpus_each
    if not gpus_each:
        return fit
    # A share never spans two GPUs. The driver takes whole GPUs and a part of one more. If the free resources include
    # fractions of several GPUs, assume that they are on as few GPUs as possible.
    whole, part = divmod(node.get("GPU", 0.0) + TOLERANCE, 1)
    shares = 1.0, math.ceil(driver_gpus) - driver_gpus, part
    per_gpu, beside, rest = (int((share + TOLERANCE) // gpus_each) for share in shares)
    return min(fit, (int(whole) - math.ceil(driver_gpus)) * per_gpu + beside + rest)
