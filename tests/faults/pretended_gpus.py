"""Placement of the driver and the workers on a Ray that declares GPUs. Prints the observations as JSON.

The cluster is a head without cores and two nodes with two GPUs each. A third node joins, and is lost during a
generation. No process uses a GPU: the workers sleep.
"""

from __future__ import annotations

import json
import os
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import ray
from ray.cluster_utils import Cluster as RayCluster

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))
from bench.sleeper import Sleeper

from spartan_ray.distributed import dispatch
from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.nodes import nodes_here_first
from spartan_ray.distributed.placement import resolve_cluster
from spartan_ray.distributed.pool import Pool
from spartan_ray.distributed.relayed import RelayTransport, Ticket
from spartan_ray.engine.strategies.requests import noisy
from spartan_ray.run import supervisor
from spartan_ray.run.config import Config

MEMBERS = noisy(np.arange(400, dtype=np.uint64), 0.0, 0.01)


class Placed:
    """A stand-in for the driver. It returns its node and its resources."""

    def __init__(self, *arguments: Any) -> None:
        pass

    def run(self) -> tuple[str, dict[str, float]]:
        context = ray.get_runtime_context()
        return context.get_node_id(), context.get_assigned_resources()


def main() -> None:
    os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)  # for the workers
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": 0, "num_gpus": 0})
    for _ in range(2):
        cluster.add_node(num_cpus=4, num_gpus=2)
    ray.init(address=cluster.address, log_to_driver=False)
    names = {node["NodeID"]: place for place, node in enumerate(nodes_here_first())}
    resolved = resolve_cluster(Cluster(), [node["Resources"] for node in nodes_here_first()])
    supervisor.Driver = Placed  # type: ignore[attr-defined, assignment]
    started = supervisor.Supervisor(Config(cluster=resolved))
    node, resources = ray.get(started.running)
    seen: dict[str, Any] = {"driver": names[node], "driver_gpus": resources["GPU"]}

    notes: list[str] = []
    added: list[Any] = []
    dispatch.NODES_SECONDS = 0.5

    def advance(members: int, cases: int) -> None:
        if members and added and "removed" not in seen:
            seen["removed"] = True
            cluster.remove_node(added[0], allow_graceful=False)

    transport = RelayTransport(None, resolved, Sleeper, least_nodes=2, workers_per_node=1)
    pool = Pool(transport, resolved, "uniform", notes.append, advance)

    def workers() -> list[int]:
        """Return the number of workers on each node, in ascending order."""
        return sorted(Counter(info.node for info in pool.infos).values())

    def wait_for(count: int) -> None:
        while len(pool.infos) != count or not all(node.up for node in transport.nodes.values()):
            pool.dispatcher._collect()

    wait_for(4)
    seen["workers"] = [workers()]
    added.append(cluster.add_node(num_cpus=4, num_gpus=2))
    names |= {node["NodeID"]: place for place, node in enumerate(nodes_here_first())}
    wait_for(6)
    seen["workers"].append(workers())
    seen["head"] = any(names[info.node] == 0 for info in pool.infos)
    submit, sent = transport.submit, list[Any]()

    def note(*arguments: Any) -> Any:
        sent.append(submit(*arguments))
        return sent[-1]

    transport.submit = note  # type: ignore[method-assign, assignment]
    pool.broadcast_scale(None)
    pool.broadcast(None)  # type: ignore[arg-type]
    scores = pool.evaluate(MEMBERS)
    seen["right"] = bool(np.array_equal(scores.fitness_K, MEMBERS.seed_K))
    seen["relayed"] = any(isinstance(reference, Ticket) for reference in sent)
    wait_for(4)
    seen["workers"].append(workers())
    seen["lost"] = sum("was lost" in note for note in notes)
    pool.close()
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
