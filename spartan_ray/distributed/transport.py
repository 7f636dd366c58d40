"""Workers as Ray actors: what carries the tasks of a pool."""

from __future__ import annotations

import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayActorError, RayError, RayTaskError

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.placement import workers_that_fit
from spartan_ray.distributed.protocol import Failed, Lost
from spartan_ray.distributed.worker import Worker


def nodes_here_first() -> list[dict[str, Any]]:
    """The nodes of the Ray that are up, this one first."""
    here = ray.get_runtime_context().get_node_id()
    return sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here)


def pool_size(cluster: Cluster) -> int:
    """How many workers a run is to have now. With `workers` auto that follows the nodes that are up."""
    if cluster.workers != "auto":
        return cluster.workers
    assert cluster.gpus_per_worker is not None, "resolved before"
    return max(1, workers_that_fit(cluster, [node["Resources"] for node in nodes_here_first()]))


class RayTransport:
    """Workers as Ray actors. `worker` is their class, which is made from a specification."""

    def __init__(self, spec: object, cluster: Cluster, worker: type[Any] = Worker) -> None:
        self.spec = ray.put(spec)
        self.cluster = cluster
        self.actor: Any = ray.remote(worker).options(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)

    def start(self) -> tuple[ActorHandle[Any], Any]:
        worker = self.actor.remote(self.spec)
        return worker, worker.join.remote()

    def put(self, value: Any) -> Any:
        return ray.put(value)

    def submit(self, worker: ActorHandle[Any], method: str, *arguments: Any) -> Any:
        return getattr(worker, method).remote(*arguments)

    def wait(self, references: list[Any], seconds: float) -> list[Any]:
        if references:
            return ray.wait(references, num_returns=1 if seconds else len(references), timeout=seconds)[0]
        time.sleep(seconds)
        return []

    def result(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except RayTaskError as error:
            raise Failed(_lines(error)[-1]) from error
        except RayActorError as error:
            if error.actor_init_failed:
                raise Failed(_lines(error)[-1]) from error
            raise Lost(_lines(error)[0]) from error
        except RayError as error:  # out of memory, unreachable, its result lost
            raise Lost(_lines(error)[0]) from error

    def kill(self, worker: ActorHandle[Any]) -> None:
        ray.kill(worker)

    def now(self) -> float:
        return time.monotonic()

    def room(self) -> tuple[int, set[str]]:
        return pool_size(self.cluster), {node["NodeID"] for node in nodes_here_first()}


def _lines(error: Exception) -> list[str]:
    """What an error says. Of one in the work the last line is the message, of others the first."""
    return [line.strip() for line in (str(error).strip() or type(error).__name__).splitlines()]
