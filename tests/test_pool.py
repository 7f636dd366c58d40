"""The pool on real Ray workers: exact results, and errors of workers that die, raise or cannot start."""

from __future__ import annotations

import math
import os
import signal
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch
from local import make_spec

from spartan_ray.distributed import dispatch
from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.placement import resolve_cluster
from spartan_ray.distributed.pool import Pool
from spartan_ray.distributed.protocol import Failed, Lost
from spartan_ray.distributed.relayed import RelayTransport
from spartan_ray.distributed.transport import RayTransport
from spartan_ray.engine.evaluator import ParentState
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.strategies.requests import Members, Scores
from spartan_ray.noise.contract import noise
from spartan_ray.vision.config import Data, Parent
from spartan_ray.vision.data import load_splits
from spartan_ray.vision.models import initial_model

CPU = torch.device("cpu")
PARENT = Parent(model="convnet")
MEMBERS = Members(
    np.arange(40, dtype=np.uint64) // 3,
    np.tile(np.array([0, 0, 0.5, 0], np.float32), 10),
    np.tile(np.array([0.05, -0.05, 0, 0.05], np.float32), 10),
)


def same(scores: Scores, expected: Scores) -> bool:
    return all(a.tobytes() == b.tobytes() for a, b in zip(vars(scores).values(), vars(expected).values(), strict=True))


class Running:
    """A pool with or without relays, its messages, and its expected answers, which are computed without Ray."""

    def __init__(self, relayed: bool = False, **cluster: Any) -> None:
        splits = load_splits(Data(name="digits"), 0)
        spec = make_spec(replace(splits, evolution=splits.evolution[slice(0, 64)]))
        self.relayed = relayed
        self.notes: list[str] = []
        self.done = 0
        resolved = resolve_cluster(Cluster(**cluster), [{"CPU": 2}])
        self.transport = RelayTransport(spec, resolved, least_nodes=1 if relayed else 2, workers_per_node=1)
        self.pool = Pool(self.transport, resolved, "uniform", self.notes.append, self.advance)
        self.pool.wait_until_joined()
        self.wait_for_relays()
        model = FlatModel(initial_model(PARENT, 10, 3)[0], CPU)
        image_N = np.arange(0, 64, 2)
        scale_D = np.linspace(-1, 2, model.theta_D.numel()).astype(np.float32)
        self.state = ParentState(model.theta_D.numpy(), model.buffers, {"fitness": image_N, "search": image_N[:9]})
        evaluator = spec.make(CPU)
        evaluator.load(self.state)
        evaluator.load_scale(scale_D)
        self.expected = evaluator.evaluate(MEMBERS, "fitness", -math.inf)[0]
        self.expected_search = evaluator.evaluate(MEMBERS[3:9], "search", -math.inf)[0]
        self.pool.broadcast(self.state)
        self.pool.broadcast_scale(scale_D)

    def advance(self, members: int, images: int) -> None:
        self.done += members

    def wait_for_relays(self) -> None:
        for _ in range(10):
            if not self.relayed or all(node.up for node in self.transport.nodes.values()):
                return
            self.transport.wait([], 60)
        raise AssertionError(self.notes)


@pytest.mark.parametrize(("killed", "error", "said"), [
    (False, Failed, r"^ValueError: not a worker$"), (True, Lost, r"^The actor died unexpectedly"),
])  # fmt: skip
def test_a_start_that_raises_failed_and_one_that_is_killed_is_lost(
    local_ray: None, killed: bool, error: type[Exception], said: str
) -> None:
    class Broken:
        def __init__(self, killed: bool) -> None:
            if killed:
                os.kill(os.getpid(), signal.SIGKILL)
            raise ValueError("not a worker")

        def join(self) -> None: ...

    transport = RayTransport(killed, resolve_cluster(Cluster(workers=1), [{"CPU": 2}]), Broken)
    _, reference = transport.start()
    assert transport.wait([reference], 60) == [reference]
    with pytest.raises(error, match=said):
        transport.result(reference)


@pytest.fixture(scope="module", params=["direct", "relayed"])
def shared(local_ray: None, request: pytest.FixtureRequest) -> Iterator[Running]:
    running = Running(relayed=request.param == "relayed", workers=2)
    yield running
    running.pool.close()


@pytest.fixture
def running(shared: Running) -> Running:
    """Return the shared pool when all of its workers and relays are up again."""
    shared.pool.wait_until_joined()
    shared.wait_for_relays()
    shared.notes.clear()
    shared.done = 0
    return shared


def test_fitness_and_update_are_the_evaluator_s_own(running: Running) -> None:
    for chunk in (1, 7, 1000, "auto"):
        running.pool.cluster = running.pool.cluster.model_copy(update={"chunk": chunk})
        running.done = 0
        assert same(running.pool.evaluate(MEMBERS), running.expected)
        assert running.done == len(MEMBERS)
    assert same(running.pool.evaluate(MEMBERS[3:9], "search"), running.expected_search)
    assert running.pool.counts["broadcast_seconds"] > 0
    seed_K, weight_K = np.array([3, 9], np.uint64), np.array([0.5, -2], np.float32)
    size = running.state.theta_D.size
    expected = np.float32(0.5) * noise("uniform", 3, 0, size) + np.float32(-2) * noise("uniform", 9, 0, size)
    assert running.pool.weighted_sum(seed_K, weight_K, 0, size).tobytes() == expected.tobytes()
    assert not running.notes


def test_workers_killed_while_nobody_looked_are_replaced(running: Running) -> None:
    for info in running.pool.infos:
        os.kill(info.pid, signal.SIGKILL)
    assert same(running.pool.evaluate(MEMBERS), running.expected)
    assert running.pool.dispatcher.failures_in_a_row == 0
    assert "was lost and is replaced: The actor died" in running.notes[0]
    one = np.array([1], np.uint64), np.ones(1, np.float32)
    assert running.pool.weighted_sum(*one, 0, 9).tobytes() == noise("uniform", 1, 0, 9).tobytes()


def test_a_member_that_raises_on_three_workers_is_named_and_scored_worst(running: Running) -> None:
    class Poison:
        def __int__(self) -> int:
            raise FloatingPointError("this member breaks the device")

        def __str__(self) -> str:
            return "5"

    seed_K = np.array([4, Poison(), 6, 7], dtype=object)
    scores = running.pool.evaluate(Members(seed_K, np.zeros(4, np.float32), np.full(4, 0.05, np.float32)))
    assert np.isnan(scores.fitness_K).tolist() == [False, True, False, False]
    assert running.pool.counts["members_failed"] == 1
    (said,) = [note for note in running.notes if "scored worst" in note]
    assert said.startswith(
        "the member of seed 5 failed on 3 workers and is scored worst: "
        "FloatingPointError: this member breaks the device (test_pool.py:"
    )


class Enough(Exception):
    """Raised to end a wait when the pool has sent a message."""


class Waiting(Running):
    def advance(self, members: int, images: int) -> None:
        if self.notes:
            raise Enough(*self.notes)


def test_without_room_for_any_worker_the_run_waits_and_says_so(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The shared pool holds all cores, so no worker of another pool can start."""
    assert "CPU" not in ray.available_resources()
    monkeypatch.setattr(dispatch, "SLOW_START_SECONDS", 1.0)
    with pytest.raises(Enough, match=r"^no workers: waiting for room for 1 workers with 1 CPUs and 0 GPUs each$"):
        Waiting(workers=1, worker_timeout=0.5)
