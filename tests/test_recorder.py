"""Recordings of a member's work give the same bits as plain calls. On a CPU, a recording is a plain call."""

from __future__ import annotations

import math
import weakref
from functools import partial

import numpy as np
import pytest
import torch
from local import SPLITS, make_spec
from numpy.typing import NDArray

from spartan_ray.engine.evaluator import Evaluator, ParentState
from spartan_ray.engine.recorder import MOST, Recorder
from spartan_ray.engine.strategies.requests import Members, Scores
from spartan_ray.noise.contract import member_seeds

CPU = torch.device("cpu")


def state(evaluator: Evaluator, generation: int) -> ParentState:
    """Return a parent state whose parameters, buffers and cases depend on the generation."""
    chance = np.random.default_rng(generation)
    theta_D = chance.normal(0, 0.1, evaluator.model.theta_D.numel()).astype(np.float32)
    was = [buffer.cpu().numpy() for buffer in evaluator.model.buffers]
    buffers = [buffer + np.asarray(generation % 3, buffer.dtype) for buffer in was]
    cases_N = chance.permutation(len(SPLITS.evolution))[: 300 + generation % 2]
    return ParentState(theta_D, buffers, {"fitness": cases_N, "search": cases_N[:70]})


def pairs(seed: int, count: int) -> Members:
    seed_K = np.repeat(member_seeds(seed, 1, count // 2), 2)
    gain_K = np.tile(np.array([0.05, -0.05], np.float32), count // 2)
    return Members(seed_K, np.linspace(0, 0.1, count, dtype=np.float32), gain_K)


def scored(evaluator: Evaluator, scale: NDArray[np.float32] | None) -> list[Scores]:
    """Return the scores of several kinds of requests in four generations."""
    found = []
    for generation in range(4):
        evaluator.load(state(evaluator, generation))
        evaluator.load_scale(None if generation < 2 else scale)
        for members in (pairs(generation, 6), pairs(generation + 9, 4)):
            found.append(evaluator.evaluate(members, "fitness", -math.inf)[0])
            found.append(evaluator.evaluate(members, "fitness", -math.inf, part=(0.0, 0.5))[0])
            found.append(evaluator.evaluate(members, "fitness", -math.inf, own=40)[0])
            found.append(evaluator.evaluate(members, "search", -math.inf)[0])
        found.append(evaluator.evaluate(pairs(generation, 4), "fitness", -2.3)[0])  # a threshold prevents recording
    return found


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_what_is_repeated_from_a_recording_has_the_bits_of_what_is_computed_anew(device: str) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")
    where = torch.device(device)
    plain, recording = (make_spec(graphs=True).make(where) for _ in range(2))
    recorder = Recorder(where)
    plain.record_with(None)
    recording.record_with(recorder)
    scale = np.linspace(0.5, 1.5, plain.model.theta_D.numel(), dtype=np.float32)
    for one, other in zip(scored(plain, scale), scored(recording, scale), strict=True):
        assert one.mean_KM.tobytes() == other.mean_KM.tobytes()
        assert one.cases_K.tobytes() == other.cases_K.tobytes()
    # There is one recording for each number of cases, with and without a scale, and not for each generation. The
    # numbers are 300, 301, half of either, a pair's own 40, and 70.
    assert len(recorder.recorded) == (2 + 1 + 1 + 1) * 2


def test_a_recording_reads_the_memory_that_it_was_made_with() -> None:
    """The values for another parent are copied to the same memory."""
    recorder, calls = Recorder(CPU), 0
    first = recorder.keep("batch", (torch.ones(3), [torch.zeros(2, dtype=torch.int64), 7]))
    second = recorder.keep("batch", (torch.full((3,), 2.0), [torch.ones(2, dtype=torch.int64), 8]))
    other = recorder.keep("batch", (torch.ones(4), [torch.zeros(2, dtype=torch.int64), 7]))
    assert first[0] is second[0]
    assert first[0].tolist() == [2, 2, 2]
    assert second[1][1] == 8
    assert other[0] is not first[0]

    def work() -> torch.Tensor:
        nonlocal calls
        calls += 1
        return torch.stack([first[0].sum() * recorder.factor_2[1], recorder.seed_1[0]])

    recorder.upload(
        Members(np.array([3, 2**64 - 1], np.uint64), np.zeros(2, np.float32), np.array([1, 10], np.float32))
    )
    read = [*first[1], first[0]]
    assert [recorder.repeat(read, work, member).tolist() for member in (0, 1)] == [[6, 3], [60, -1]]
    assert calls == 2
    assert len(recorder.recorded) == 1
    recorder.repeat([*second[1], second[0]], work, 0)  # the same memory and another number make another recording
    assert len(recorder.recorded) == 2


def test_recordings_end_when_there_are_too_many_and_what_they_read_lives_as_long() -> None:
    recorder = Recorder(CPU)
    recorder.upload(Members(np.zeros(1, np.uint64), np.zeros(1, np.float32), np.ones(1, np.float32)))
    references = []
    for number in range(MOST + 1):
        tensor = torch.full((3,), float(number))
        references.append(weakref.ref(tensor))
        assert recorder.repeat([tensor], partial(torch.zeros, 3), 0).tolist() == [0.0] * 3
        del tensor
        assert len(recorder.recorded) == (number + 1 if number < MOST else 1)
        assert all(reference() is not None for reference in references) == (number < MOST)
    assert references[-1]() is not None
