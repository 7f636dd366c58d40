"""Workers as Ray actors: the transport that carries the tasks of a pool."""

from __future__ import annotations

import secrets
import time
from typing import Any

import ray
from ray.actor import ActorHandle
from ray.exceptions import RayError

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.nodes import free_resources, grows, is_impossible, leaving_nodes, nodes_here_first
from spartan_ray.distributed.placement import described, pool_size, worker_resources
from spartan_ray.distributed.protocol import Room
from spartan_ray.distributed.relay import lost_or_failed, named_task
from spartan_ray.distributed.worker import Worker

# Answers per second that the driver can receive; with a core of its own it can receive more.
ANSWERS_PER_SECOND = 800.0
# Seconds to wait for actors to end before they are killed.
LEAVE_SECONDS = 5.0


def leave(actors: list[ActorHandle[Any]]) -> None:
    """Let idle actors end normally. An actor that is killed looks like a failure to the operator of the Ray."""
    ended: list[Any] = [actor.__ray_terminate__.remote() for actor in actors]
    if ended:
        ray.wait(ended, num_returns=len(ended), timeout=LEAVE_SECONDS)
    for actor in actors:
        ray.kill(actor)


def actor_name(name: str, kind: str) -> str:
    """Return a unique name for an actor, shown in Ray's dashboard. A replacement needs another name."""
    return f"spartan:{name}:{kind}:{secrets.token_hex(4)}"


def room_for(cluster: Cluster, workers: int = 0, starting: int = 0) -> Room:
    """Return the room for workers beside the running driver, given that `workers` have joined and `starting` have
    not."""
    nodes, leaving = nodes_here_first(), leaving_nodes()
    staying = [node["Resources"] for node in nodes if node["NodeID"] not in leaving]
    size = pool_size(cluster, staying, free_resources(), workers, starting, grows())
    return Room(size, {node["NodeID"] for node in nodes}, leaving)


class RayTransport:
    """Workers as Ray actors. `worker` is their class, constructed from `spec`. Ray's dashboard shows the actors and
    their tasks under `name`."""

    def __init__(self, spec: object, cluster: Cluster, worker: type[Any] = Worker, name: str = "population") -> None:
        self.spec = ray.put(spec)
        self.cluster = cluster
        self.name = name
        self.actor: Any = ray.remote(worker)
        self.resources = {"num_cpus": cluster.cpus_per_worker, "num_gpus": cluster.gpus_per_worker}

    def start(self) -> tuple[ActorHandle[Any], Any]:
        name = actor_name(self.name, "worker")
        worker = self.actor.options(name=name, scheduling_strategy="SPREAD", **self.resources).remote(self.spec)
        return worker, named_task(worker, "join", self.name)()

    def joined(self, worker: ActorHandle[Any], node: str) -> None:
        pass

    def answers_per_second(self, method: str) -> float:
        return ANSWERS_PER_SECOND

    def put(self, value: Any) -> Any:
        return ray.put(value)

    def submit(self, worker: ActorHandle[Any], method: str, *arguments: Any) -> Any:
        return named_task(worker, method, self.name)(*arguments)

    def wait(self, references: list[Any], seconds: float) -> list[Any]:
        if references:
            return ray.wait(references, num_returns=1 if seconds else len(references), timeout=seconds)[0]
        time.sleep(seconds)
        return []

    def result(self, reference: Any) -> Any:
        try:
            return ray.get(reference)
        except RayError as error:
            raise lost_or_failed(error) from error

    def kill(self, worker: ActorHandle[Any]) -> None:
        ray.kill(worker)

    def end(self, workers: list[ActorHandle[Any]]) -> None:
        leave(workers)

    def now(self) -> float:
        return time.monotonic()

    def room(self, workers: int, starting: int) -> Room:
        return room_for(self.cluster, workers, starting)

    def impossible(self) -> str:
        wanted = worker_resources(self.cluster)
        if not is_impossible(wanted):
            return ""
        return f"no node of this Ray has {described(wanted)}, and its autoscaler cannot start one that has"
