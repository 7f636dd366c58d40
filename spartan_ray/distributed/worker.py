"""The Ray actor around one evaluator."""

from __future__ import annotations

import os
import socket
import time
from typing import Any

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from spartan_ray.distributed.joining import WorkerInfo, versions
from spartan_ray.engine.evaluator import EvaluatorSpec, ParentState, Scale
from spartan_ray.engine.process import set_up
from spartan_ray.engine.strategies.requests import CaseSet, Members, Part, Scores
from spartan_ray.engine.subspace import Basis
from spartan_ray.noise.fingerprint import fingerprint


def claim_device(threads: int | None) -> torch.device:
    """Set up this process, at its start, for the device that Ray assigned to it. Return the device."""
    return set_up(threads, gpu=bool(ray.get_runtime_context().get_accelerator_ids().get("GPU")))


class Worker:
    """The actor around one evaluator."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        self.device = claim_device(spec.threads)
        self.evaluator = spec.make(self.device)
        self.keys: tuple[int, int, int] = (0, 0, 0)

    def join(self) -> WorkerInfo:
        sample = fingerprint(self.evaluator.kernel)
        name, node = self.evaluator.device_name, ray.get_runtime_context().get_node_id()
        return WorkerInfo(socket.gethostname(), node, os.getpid(), name, torch.get_num_threads(), sample, versions())

    def evaluate(
        self,
        keys: tuple[int, int, int],
        parent: ParentState,
        scale: Scale,
        basis: Basis | None,
        members: Members,
        cases: CaseSet,
        threshold: float,
        part: Part,
        own: int | None,
    ) -> tuple[Scores, dict[int, str], float, float]:
        """Return the members' scores, the errors of the fitness by member, and the seconds to load and to score.

        The keys identify the parent, the scale and the basis. Only those that are new are loaded."""
        start = time.perf_counter()
        if keys[0] != self.keys[0]:
            self.evaluator.load(parent)
        if keys[1] != self.keys[1]:
            self.evaluator.load_scale(scale)
        if keys[2] != self.keys[2]:
            self.evaluator.load_basis(basis)
        self.keys = keys
        loaded = time.perf_counter()
        scores, failed = self.evaluator.evaluate(members, cases, threshold, part, own)
        return scores, failed, loaded - start, time.perf_counter() - loaded

    def ask(self, method: str, *arguments: Any) -> Any:
        """Call a method of the evaluator and return its answer."""
        return getattr(self.evaluator, method)(*arguments)

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        return self.evaluator.accumulate(seed_K, weight_K, start, stop)
