"""Dispatch on real Ray workers: every span once, lost workers, refused workers, resources."""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import ray
import torch

from spartan_ray.config import Cluster, Data, Evolution, InputError, Parent
from spartan_ray.data import load_splits
from spartan_ray.evaluator import Evaluator, EvaluatorSpec, ParentState
from spartan_ray.fitness import Normaliser
from spartan_ray.joining import WorkerInfo, versions
from spartan_ray.model import FlatModel, initial_model
from spartan_ray.noise import noise
from spartan_ray.pool import Pool, PoolError, _Slot, backoff, may_do
from spartan_ray.resources import resolve_cluster, workers_that_fit
from spartan_ray.spans import Span
from spartan_ray.strategies import Members
from spartan_ray.strategies.base import Scores

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
    """A pool with what it said, and its expected answers computed without Ray."""

    def __init__(self, **cluster: object) -> None:
        splits = load_splits(Data(name="digits"), 0)
        images = splits.evolution[slice(0, 64)]
        spec = EvaluatorSpec(PARENT, Evolution(), images, images, 10, splits.mean_C, splits.std_C, threads=1)
        self.notes: list[str] = []
        self.done = 0
        self.kill_after: int | None = None
        resolved = resolve_cluster(Cluster(**cluster), [{"CPU": 2}])  # type: ignore[arg-type]
        self.pool = Pool(spec, resolved, self.notes.append, self.advance)
        self.pool.wait_until_joined()
        model = FlatModel(initial_model(PARENT, 10, 3)[0], CPU)
        image_N = np.arange(0, 64, 2)
        scale_D = np.linspace(-1, 2, model.theta_D.numel()).astype(np.float32)
        buffers = [b.numpy() for b in model.buffers]
        self.state = ParentState(model.theta_D.numpy(), buffers, {"fitness": image_N, "search": image_N[:9]})
        evaluator = Evaluator(
            Evolution(),
            initial_model(PARENT, 10, 3)[0],
            images,
            images,
            Normaliser(splits.mean_C, splits.std_C, CPU),
            CPU,
        )
        evaluator.load(self.state)
        evaluator.load_scale(scale_D)
        self.expected = evaluator.evaluate(MEMBERS, "fitness", -math.inf)
        self.expected_search = evaluator.evaluate(MEMBERS[3:9], "search", -math.inf)
        self.pool.broadcast(self.state)
        self.pool.broadcast_scale(scale_D)

    def advance(self, members: int, images: int) -> None:
        self.done += members
        if self.kill_after is not None and self.done >= self.kill_after:
            self.kill_after = None
            os.kill(self.pool.infos[0].pid, signal.SIGKILL)


@pytest.fixture
def running(local_ray: None) -> Iterator[Running]:
    fixture = Running(workers=2)
    yield fixture
    fixture.pool.close()


def test_fitness_and_update_are_the_evaluator_s_own(running: Running) -> None:
    scores = running.pool.evaluate(MEMBERS)
    assert same(scores, running.expected)
    assert running.done == len(MEMBERS)
    assert same(running.pool.evaluate(MEMBERS[3:9], "search"), running.expected_search)
    assert running.pool.counts["broadcast_seconds"] > 0
    seed_K, weight_K = np.array([3, 9], np.uint64), np.array([0.5, -2], np.float32)
    size = running.state.theta_D.size
    expected = np.float32(0.5) * noise("uniform", 3, 0, size) + np.float32(-2) * noise("uniform", 9, 0, size)
    assert running.pool.weighted_sum(seed_K, weight_K, size).tobytes() == expected.tobytes()


@pytest.mark.parametrize("chunk", [1, 7, 1000])
def test_chunks_of_any_size_give_the_same_answer(local_ray: None, chunk: int) -> None:
    one = Running(workers=1, chunk=chunk)
    scores = one.pool.evaluate(MEMBERS)
    one.pool.close()
    assert same(scores, one.expected)


def test_a_killed_worker_s_chunks_are_done_again_and_it_is_replaced(running: Running) -> None:
    before = {info.pid for info in running.pool.infos}
    running.pool.cluster = running.pool.cluster.model_copy(update={"chunk": 4})
    running.kill_after = 8
    scores = running.pool.evaluate(MEMBERS)
    assert same(scores, running.expected)
    assert running.done == len(MEMBERS)
    assert running.pool.counts["retries"] >= 1
    assert any("was lost and is replaced" in note for note in running.notes)
    running.pool.wait_until_joined()
    after = {info.pid for info in running.pool.infos}
    assert len(after) == 2
    assert len(after & before) == 1


def test_what_a_stopped_worker_had_is_done_by_the_other_and_its_late_answer_dropped(running: Running) -> None:
    """It answers again while the range is still being covered: what it had counts once."""
    pool = running.pool
    assert same(pool.evaluate(MEMBERS), running.expected)
    pool.cluster = pool.cluster.model_copy(update={"chunk": 1})
    slot = pool.slots[0]
    assert slot.info
    pid = slot.info.pid
    state = "running"

    def disturb(members: int, images: int) -> None:
        nonlocal state
        refs = [task.ref for task in slot.tasks]
        if state == "running" and len(refs) == 2:
            os.kill(pid, signal.SIGSTOP)
            if ray.wait(refs, timeout=0)[0]:
                os.kill(pid, signal.SIGCONT)  # it had just answered
            else:
                state = "stopped"
        elif state == "stopped" and any(task.span.done for task in slot.tasks):
            os.kill(pid, signal.SIGCONT)
            ray.wait(refs, num_returns=len(refs))
            state = "answered"

    pool.advance = disturb
    while not pool.counts["late_results"]:
        state = "running"
        assert same(pool.evaluate(MEMBERS), running.expected)
    assert pool.counts["retries"] == 0
    assert slot in pool.slots


def test_a_worker_killed_between_generations_is_replaced(running: Running) -> None:
    for info in running.pool.infos:
        os.kill(info.pid, signal.SIGKILL)
    scores = running.pool.evaluate(MEMBERS)
    assert same(scores, running.expected)
    assert (
        running.pool.weighted_sum(np.array([1], np.uint64), np.ones(1, np.float32), 9).tobytes()
        == noise("uniform", 1, 0, 9).tobytes()
    )


def test_a_worker_whose_noise_differs_is_refused_by_name(running: Running) -> None:
    slot = running.pool.slots[0]
    assert slot.info
    wrong = WorkerInfo("elsewhere", "node", 77, "cpu", 1, slot.info.fingerprint + np.float32(1e-3), versions())
    running.pool._welcome(slot, wrong)
    assert running.notes == ["refused worker 77 on elsewhere (cpu): its noise fingerprint differs"]
    scores = running.pool.evaluate(MEMBERS)
    assert same(scores, running.expected)
    running.pool._welcome(running.pool.slots[0], wrong)
    with pytest.raises(PoolError, match="no workers are left"):
        running.pool.evaluate(MEMBERS)


def poisoned() -> Members:
    """Members of which the one of seed 5 cannot be scored on any worker."""

    class Poison:
        def __int__(self) -> int:
            raise FloatingPointError("this member breaks the device")

        def __str__(self) -> str:
            return "5"

    seed_K = np.array([4, Poison(), 6, 7], dtype=object)
    return Members(seed_K, np.zeros(4, np.float32), np.full(4, 0.05, np.float32))


def test_a_member_that_fails_on_three_workers_is_named_and_scored_worst(running: Running) -> None:
    scores = running.pool.evaluate(poisoned())
    assert np.isnan(scores.loss_K).tolist() == [False, True, False, False]
    assert running.pool.counts["members_failed"] == 1
    (said,) = [note for note in running.notes if "scored worst" in note]
    assert said == (
        "the member of seed 5 failed on 3 workers and is scored worst: "
        "FloatingPointError: this member breaks the device"
    )
    assert sum("is replaced" in note and "FloatingPointError" in note for note in running.notes) == 3
    # What has no noise is the parent, or its update: without its score there is no phase.
    members = poisoned()[1:2]
    with pytest.raises(PoolError, match="the member of seed 5 failed on 3 workers: FloatingPointError"):
        running.pool.evaluate(Members(members.seed_K, members.offset_K, np.zeros(1, np.float32)))
    running.pool.cluster = running.pool.cluster.model_copy(update={"on_member_error": "stop"})
    with pytest.raises(PoolError, match="the member of seed 5 failed on 3 workers: FloatingPointError"):
        running.pool.evaluate(members)


def test_a_place_where_workers_fail_again_and_again_is_filled_after_longer_and_longer_pauses(running: Running) -> None:
    assert [backoff(failures) for failures in (0, 1, 2, 3, 6, 7, 99)] == [0, 1, 2, 4, 32, 60, 60]
    pool = running.pool
    pool._fail(pool.slots[0], "it broke")
    pool.wait_until_joined()
    (again,) = [slot for slot in pool.slots if slot.failures]
    assert again.failures == 1
    pool._fail(again, "it broke again")
    assert running.notes[-1].endswith("was lost and is replaced in 1 s: it broke again")
    ((when, place, failures),) = pool.starts
    assert when > time.monotonic()
    assert (place, failures) == (again.place, 2)
    # The other place has a worker that succeeds, which does not shorten the pause here.
    assert same(pool.evaluate(MEMBERS[0:3]), Scores(*(column[:3] for column in vars(running.expected).values())))
    assert [start[1:] for start in pool.starts] == [(again.place, 2)]


def test_what_failed_in_one_place_is_done_in_another() -> None:
    first, second = _Slot(None, 0), _Slot(None, 1)  # type: ignore[arg-type]
    span = Span(0, 4, failed_on=[first.place])
    assert not may_do(span, first, [second])
    assert may_do(span, second, [first])
    assert may_do(span, first, [])
    span.failed_on.append(second.place)
    assert may_do(span, first, [second])
    doubtful = Span(0, 4, doubtful=second)
    assert not may_do(doubtful, second, [first])
    assert may_do(doubtful, second, [])


def test_a_refused_worker_is_not_missed_while_its_node_is_there_and_is_replaced_after(running: Running) -> None:
    pool, slot = running.pool, running.pool.slots[1]
    pool.cluster = pool.cluster.model_copy(update={"workers": "auto"})
    assert slot.info
    pool._welcome(slot, replace(slot.info, device="H100"))
    assert running.notes[-1].endswith("bits depend on who scores what")
    pool._welcome(slot, replace(slot.info, versions=versions() | {"torch": "1.0"}))
    pool._resize()
    assert (len(pool.slots), len(pool.starts)) == (1, 0)
    pool.refused = ["a node that left"]
    pool._resize()
    assert (len(pool.slots), len(pool.starts)) == (1, 1)
    pool.wait_until_joined()
    pool.size = 1
    assert same(pool.evaluate(MEMBERS), running.expected)
    assert len(pool.infos) == 2


def test_a_worker_that_is_stuck_in_an_update_does_not_hold_up_what_follows(running: Running) -> None:
    """Nor is it taken to hang when it answered while nobody looked."""
    pool, size = running.pool, running.state.theta_D.size
    seed_K, weight_K = np.arange(9, dtype=np.uint64), np.ones(9, np.float32)
    expected = pool.weighted_sum(seed_K, weight_K, size)
    assert same(pool.evaluate(MEMBERS), running.expected)
    pid = pool.infos[0].pid
    os.kill(pid, signal.SIGSTOP)
    assert pool.weighted_sum(seed_K, weight_K, size).tobytes() == expected.tobytes()
    assert same(pool.evaluate(MEMBERS), running.expected)
    os.kill(pid, signal.SIGCONT)
    (stuck,) = [slot for slot in pool.slots if slot.info and slot.info.pid == pid]
    ray.wait([task.ref for task in stuck.tasks], num_returns=len(stuck.tasks))
    stuck.since -= 3600
    pool.cluster = pool.cluster.model_copy(update={"task_timeout": 60.0})
    assert same(pool.evaluate(MEMBERS), running.expected)
    assert pool.counts["late_results"] >= 1
    assert pool.infos[0].pid == pid
    assert not running.notes


def test_a_slow_worker_has_smaller_chunks_and_a_small_update_fewer_slices(
    running: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, slots = running.pool, running.pool.slots
    pool.seconds_per_member, slots[0].seconds_per_member, slots[1].seconds_per_member = None, 0.5, 0.1
    assert [pool._chunk_size(1000, slot, 1000) for slot in slots] == [4, 20]
    assert same(pool.evaluate(MEMBERS), running.expected)
    assert all(slot.seconds_per_member for slot in slots)
    assert slots[0].seconds_per_member != 0.5
    slices: list[int] = []
    queue = Pool._queue

    def counted(pool: Pool, slot: _Slot, span: Span, range_: Any) -> None:
        slices.append(len(span))
        queue(pool, slot, span, range_)

    monkeypatch.setattr(Pool, "_queue", counted)
    seed_K, weight_K, size = np.arange(3, dtype=np.uint64), np.ones(3, np.float32), running.state.theta_D.size
    sums = []
    for seconds_per_noise in (0.0, 1.0, 1e-12):
        pool.seconds_per_noise = seconds_per_noise
        sums.append(pool.weighted_sum(seed_K, weight_K, size).tobytes())
    half = -(-size // 2)
    assert slices == [half, size - half, half, size - half, size]
    assert sums[0] == sums[1] == sums[2]


def test_without_any_worker_the_run_waits_and_then_stops(local_ray: None) -> None:
    """All cores are somebody else's."""

    class Hog:
        def ready(self) -> None: ...

    remote_hog: Any = ray.remote(num_cpus=2)(Hog)
    hog = remote_hog.remote()
    ray.get(hog.ready.remote())
    with pytest.raises(PoolError, match=r"no worker for 1.5 s \(cluster\.worker_timeout\)"):
        Running(workers=1, worker_timeout=1.5)
    ray.kill(hog)


def test_workers_that_cannot_start_end_the_run_with_the_reason(local_ray: None) -> None:
    splits = load_splits(Data(name="digits"), 0)
    spec = EvaluatorSpec(PARENT, Evolution(), splits.evolution, splits.sgd, -1, splits.mean_C, splits.std_C, threads=1)
    pool = Pool(
        spec, resolve_cluster(Cluster(workers=1), [{"CPU": 2}]), lambda note: None, lambda members, images: None
    )
    with pytest.raises(PoolError, match="the workers fail one after another") as caught:
        pool.wait_until_joined()
    assert "negative dimension" in str(caught.value)
    pool.close()


@pytest.mark.parametrize(
    ("asked", "resources", "workers", "gpus_per_worker", "driver_gpus"),
    [
        ({}, [{"CPU": 2.0}], 2, 0.0, 0.0),
        ({"cpus_per_worker": 4, "driver_cpus": 2}, [{"CPU": 16.0}], 3, 0.0, 0.0),
        ({}, [{"CPU": 16.0, "GPU": 1.0}], 1, 0.9, 0.1),
        ({}, [{"CPU": 64.0, "GPU": 8.0}], 8, 0.9, 0.1),
        ({"gpus_per_worker": 1}, [{"CPU": 64.0, "GPU": 8.0}], 7, 1.0, 0.1),
        ({"gpus_per_worker": 0.25}, [{"CPU": 64.0, "GPU": 2.0}], 7, 0.25, 0.1),
        ({"gpus_per_worker": 1, "driver_gpus": 0}, [{"CPU": 64.0, "GPU": 8.0}], 8, 1.0, 0.0),
        ({"gpus_per_worker": 2}, [{"CPU": 64.0, "GPU": 8.0}], 3, 2.0, 0.1),
        ({"gpus_per_worker": 0, "driver_gpus": 0}, [{"CPU": 6.0, "GPU": 8.0}], 6, 0.0, 0.0),
        ({"workers": 3}, [{"CPU": 8.0}], 3, 0.0, 0.0),
        # Several nodes: nothing spans two of them, and the driver goes to the first with room.
        ({}, [{"CPU": 8.0, "GPU": 1.0}] * 4, 4, 0.9, 0.1),
        ({}, [{"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}], 2, 0.9, 0.1),
        ({"gpus_per_worker": 1}, [{"CPU": 8.0, "GPU": 1.0}] * 4, 3, 1.0, 0.1),
        ({"cpus_per_worker": 3}, [{"CPU": 4.0}] * 5, 5, 0.0, 0.0),
    ],
)
def test_resources_are_shared_out(
    asked: dict[str, float], resources: list[dict[str, float]], workers: int, gpus_per_worker: float, driver_gpus: float
) -> None:
    resolved = resolve_cluster(Cluster(**asked), resources)  # type: ignore[arg-type]
    assert (resolved.gpus_per_worker, resolved.driver_gpus) == (gpus_per_worker, driver_gpus)
    assert resolved.workers in ("auto", workers)
    assert workers_that_fit(resolved, resources) >= workers


@pytest.mark.parametrize(
    ("asked", "resources"),
    [
        ({"gpus_per_worker": 1}, [{"CPU": 2.0}]),
        ({"workers": 3}, [{"CPU": 2.0}]),
        ({"driver_gpus": 1}, [{"CPU": 2.0}]),
        ({"driver_cpus": 3}, [{"CPU": 2.0}, {"CPU": 2.0}]),
        ({"gpus_per_worker": 1}, [{"CPU": 8.0, "GPU": 1.0}]),
        ({"gpus_per_worker": 2}, [{"CPU": 8.0, "GPU": 1.0}] * 4),
        ({"workers": 2}, [{"CPU": 8.0, "GPU": 1.0}]),
        ({"cpus_per_worker": 3}, [{"CPU": 2.0}, {"CPU": 2.0}]),
    ],
)
def test_resources_that_are_not_there_are_refused(asked: dict[str, float], resources: list[dict[str, float]]) -> None:
    with pytest.raises(InputError, match="do not fit the"):
        resolve_cluster(Cluster(**asked), resources)  # type: ignore[arg-type]
