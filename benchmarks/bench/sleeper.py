"""A worker for simulations that sleeps instead of computing. Without torch, dozens of them fit one machine."""

from __future__ import annotations

import os
import socket
import time

import numpy as np
import ray

from spartan_ray.distributed.joining import WorkerInfo, versions
from spartan_ray.engine.strategies.requests import CaseSet, Members, Part, Scores
from spartan_ray.noise.fingerprint import definition

SECONDS_A_MEMBER = 0.02
SLOW_FACTOR = 5.0


class Sleeper:
    """Sleeps to score; a member's fitness is its seed, so that results can be checked."""

    def __init__(self, spec: object) -> None:
        self.seconds = SECONDS_A_MEMBER

    def join(self) -> WorkerInfo:
        node = ray.get_runtime_context().get_node_id()
        return WorkerInfo(socket.gethostname(), node, os.getpid(), "sleep", 1, definition("uniform")[0], versions())

    def evaluate(
        self,
        keys: tuple[int, int, int],
        parent: object,
        scale: object,
        basis: object,
        members: Members,
        cases: CaseSet,
        threshold: float,
        part: Part,
        own: int | None,
    ) -> tuple[Scores, dict[int, str], float, float]:
        seconds = len(members) * self.seconds
        time.sleep(seconds)
        fitness_K = members.seed_K.astype(np.float64)
        return Scores(fitness_K[:, None], fitness_K, np.ones(len(members), np.int64)), {}, 0.0, seconds


def slow_down(worker: Sleeper) -> None:
    """Slow this worker down by SLOW_FACTOR. Runs inside the worker."""
    worker.seconds = SECONDS_A_MEMBER * SLOW_FACTOR


def recover(worker: Sleeper) -> None:
    """Restore the normal speed of this worker. Runs inside the worker."""
    worker.seconds = SECONDS_A_MEMBER
