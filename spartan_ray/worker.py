"""The Ray actor around one evaluator."""

from __future__ import annotations

import os
import socket
import time

import numpy as np
import ray
import torch
from numpy.typing import NDArray

from spartan_ray.config import ImageSet
from spartan_ray.evaluator import EvaluatorSpec, ParentState, Scale
from spartan_ray.joining import WorkerInfo, versions
from spartan_ray.noise import fingerprint
from spartan_ray.process import set_up
from spartan_ray.strategies.base import Members, Part, Scores


def claim_device(threads: int) -> torch.device:
    """Set this process up, at its start, for the device that Ray assigned to it."""
    return set_up(threads, gpu=bool(ray.get_runtime_context().get_accelerator_ids().get("GPU")))


class Worker:
    """The actor around one evaluator."""

    def __init__(self, spec: EvaluatorSpec) -> None:
        self.device = claim_device(spec.threads)
        self.evaluator = spec.make(self.device)
        self.keys: tuple[int | None, int | None] = (None, None)

    def join(self) -> WorkerInfo:
        sample = fingerprint(self.evaluator.kernel)
        name, node = self.evaluator.device_name, ray.get_runtime_context().get_node_id()
        return WorkerInfo(socket.gethostname(), node, os.getpid(), name, torch.get_num_threads(), sample, versions())

    def evaluate(
        self,
        keys: tuple[int, int],
        parent: ParentState,
        scale: Scale,
        members: Members,
        images: ImageSet,
        bar: float,
        part: Part,
    ) -> tuple[Scores, float, float]:
        """The members' scores, and the seconds it took to load what is new of parent and scale, and to score them.
        The keys say which parent and which scale these are."""
        start = time.perf_counter()
        if keys[0] != self.keys[0]:
            self.evaluator.load(parent)
        if keys[1] != self.keys[1]:
            self.evaluator.load_scale(scale)
        self.keys = keys
        loaded = time.perf_counter()
        scores = self.evaluator.evaluate(members, images, bar, part)
        return scores, loaded - start, time.perf_counter() - loaded

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        return self.evaluator.accumulate(seed_K, weight_K, start, stop)
