"""Simulates a cluster with workers that sleep instead of computing on a GPU.

The dispatcher, Ray, and the number and size of the messages are real; only scoring is a sleep. The nodes are Ray nodes
on this machine.
"""

from __future__ import annotations

import os
import signal
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import psutil
import ray
from ray.cluster_utils import Cluster as RayCluster

from bench.figures import Results
from bench.measure import Said, pss
from bench.model import PARENT_BYTES
from bench.sleeper import SECONDS_A_MEMBER, SLOW_FACTOR, Sleeper, recover, slow_down
from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.placement import resolve_cluster
from spartan_ray.distributed.pool import Pool
from spartan_ray.distributed.relayed import RelayTransport
from spartan_ray.engine.strategies.requests import noisy

WORKERS, NODES = 64, 8
POPULATION, SHORT = 100_000, (1000, 10_000)
SLOW = 3


@dataclass
class Team:
    """A pool of sleeping workers, and a disturbance, called with the number of members done."""

    pool: Pool
    capacity: float = 0.0  # members that the present workers could have scored
    missing: float = 0.0  # present workers that do nothing
    done: int = 0
    disturb: Any = None
    counted: float = 0.0

    def able(self) -> float:
        """Return the number of working workers; a slow one counts as a fraction."""
        return len(self.pool.infos) - self.missing

    def advance(self, members: int, images: int) -> None:
        now = time.perf_counter()
        self.capacity += (now - self.counted) * self.able() / SECONDS_A_MEMBER
        self.counted = now
        self.done += members
        if self.disturb:
            self.disturb(self.done)


def simulate(say: Said, population: int = POPULATION, workers: int = WORKERS) -> list[Results]:
    """Simulate a generation: undisturbed, with slow and stopped workers, and with nodes that leave and join."""
    per_node = workers // NODES
    cluster = RayCluster(initialize_head=True, head_node_args={"num_cpus": per_node + 1})
    nodes = [cluster.add_node(num_cpus=per_node) for _ in range(NODES - 1)]
    ray.init(address=cluster.address, log_to_driver=False)
    parent: Any = np.zeros(PARENT_BYTES, np.uint8)
    resolved = resolve_cluster(Cluster(cpus_per_worker=1, driver_cpus=1), [node["Resources"] for node in ray.nodes()])
    team = Team(pool=None)  # type: ignore[arg-type]
    notes: list[str] = []
    started = time.perf_counter()
    transport = RelayTransport(None, resolved, Sleeper, NODES)
    team.pool = Pool(transport, resolved, "uniform", notes.append, team.advance)
    while len(team.pool.infos) < workers or not all(node.up for node in transport.nodes.values()):
        team.pool.wait_until_joined()
        transport.wait([], 1.0)
    say(f"simulation: {workers} workers on {NODES} nodes have joined after {time.perf_counter() - started:.0f} s")
    stopped: list[int] = []
    slowed: list[Any] = []
    changed: list[str] = []

    def relays(used: bool) -> None:
        transport.least_nodes = NODES if used else NODES + 1
        for node in transport.nodes.values():
            node.up = used and node.relay is not None

    def stragglers(done: int) -> None:
        if done > population // 10 and not stopped:
            slowed.extend(slot.worker for slot in team.pool.dispatcher.slots[:SLOW])
            for worker in slowed:
                worker.__ray_call__.remote(slow_down)
            stopped.append(team.pool.infos[SLOW].pid)
            os.kill(stopped[0], signal.SIGSTOP)
            team.missing = SLOW * (1 - 1 / SLOW_FACTOR) + 1

    def elastic(done: int) -> None:
        if done > population // 4 and not changed:
            cluster.remove_node(nodes.pop(), allow_graceful=False)
            changed.append("lost")
        elif done > population // 2 and len(changed) == 1:
            nodes.append(cluster.add_node(num_cpus=per_node))
            changed.append("joined")

    found = []
    team.pool.broadcast(parent)
    team.pool.broadcast_scale(None)
    team.pool.evaluate(noisy(np.arange(2 * workers, dtype=np.uint64), 0.0, 0.01))
    for name, size, disturb in (
        *((f"undisturbed{how}", size, None) for size in (*SHORT, population) for how in ("", ", with relays")),
        ("stragglers, with relays", population, stragglers),
        ("elastic, with relays", population, elastic),
    ):
        relays("relays" in name)
        members = noisy(np.arange(size, dtype=np.uint64), 0.0, 0.01)
        team.disturb, team.done, team.capacity = disturb, 0, 0.0
        counts, processor, before_mb = dict(team.pool.counts), time.process_time(), pss(psutil.Process())
        started = team.counted = time.perf_counter()
        team.pool.broadcast(parent)
        team.pool.broadcast_scale(None)
        scores = team.pool.evaluate(members)
        seconds = time.perf_counter() - started
        assert np.array_equal(scores.fitness_K, members.seed_K), "every member must be scored once, in its place"
        found.append(
            {
                "scenario": name,
                "workers": workers,
                "population": size,
                "seconds": seconds,
                "efficiency": size / team.capacity,
                "driver_cpu_seconds": time.process_time() - processor,
                "driver_grew_mb": pss(psutil.Process()) - before_mb,
                **{key: team.pool.counts[key] - counts[key] for key in ("retries", "late_results")},
            }
        )
        share = found[-1]["efficiency"]
        say(f"simulation: {name}, {size:,} members, {seconds:.2f} s, {share:.3f} of what the workers could do")
        for pid in stopped:
            os.kill(pid, signal.SIGCONT)
        stopped.clear()
        team.missing = 0.0
        ray.get([worker.__ray_call__.remote(recover) for worker in slowed])
        slowed.clear()
    team.pool.close()
    ray.shutdown()
    cluster.shutdown()
    return found
