"""Tests of the evaluator's efficiency and of the benchmark's output.

Efficiency is measured in bytes, allocations, passes and memory, which do not depend on a clock."""

from __future__ import annotations

import json
import math
import mmap
import os
import subprocess
import sys
import time
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from bench import figures, model
from bench.bare import PARENT as RESNET
from bench.measure import (
    SAMPLE_SECONDS,
    SMALL,
    FreeWorker,
    Generation,
    close,
    peak_memory,
    pss,
    stored_bytes,
    worker_processes,
)
from hypothesis import given
from hypothesis import strategies as st
from local import CPU, Phase, make_spec, trained
from whole_runs import ROOT

from spartan_ray.distributed.pool import Pool
from spartan_ray.distributed.spans import CHUNK_SECONDS, ONE_ROUND, chunk_size, workers_worth
from spartan_ray.engine.evaluator import Evaluator, ParentState
from spartan_ray.engine.executor import LocalExecutor
from spartan_ray.engine.strategies.requests import Scores, noisy
from spartan_ray.noise.cpu import CpuKernel
from spartan_ray.vision.classification import Classification
from spartan_ray.vision.folding import Folding

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"


def evaluator(**evolution: Any) -> Evaluator:
    return make_spec(**evolution).make(CPU)


def state(images: int) -> ParentState:
    parent = trained()
    return ParentState(parent.theta_D.numpy(), parent.buffers, {"fitness": np.arange(images)})


@pytest.fixture
def resnet(local_ray: None) -> Iterator[tuple[Generation, Pool]]:
    generation = Generation(RESNET, 2)
    generation.evolution = generation.evolution.model_copy(update={"population": 6})
    pool = generation.pool(2)
    yield generation, pool
    close(pool)


def test_a_generation_sends_a_parent_and_an_update_and_a_few_numbers_a_member(resnet: tuple[Generation, Pool]) -> None:
    generation, pool = resnet
    before = stored_bytes()
    row = generation.evolve(pool, 16)
    assert row["accepted"]
    assert stored_bytes() - before < 2.1 * generation.model.theta_D.nbytes + 200 * row["population"]


def test_memory_is_flat_over_a_hundred_thousand_members(local_ray: None) -> None:
    class CheapWorker(FreeWorker):
        """A worker that gives members different fitness, and reports a duration that leads to realistic chunks."""

        def evaluate(self, *arguments: Any) -> tuple[Scores, dict[int, str], float, float]:
            scores, failed, loading, _ = super().evaluate(*arguments)
            members = arguments[4]
            return replace(scores, fitness_K=members.seed_K / 2**64), failed, loading, 1e-4 * len(members)

    small = Generation(SMALL, 2)
    pool = small.pool(2, CheapWorker)
    watched = [[process] for process in (psutil.Process(), *worker_processes(pool))]
    used = []
    for population in (4000, 1000, 100_000):  # the first is a warm-up
        with peak_memory(*watched) as peaks:
            row = small.evolve(pool, population)
        assert row["accepted"]
        used.append(peaks)
    close(pool)
    grown = [after / before for before, after in zip(used[1], used[2], strict=True) if after]  # 0 if it has ended
    assert len(grown) >= 2
    assert max(grown) < 1.05


def test_memory_is_the_peak_of_a_group_and_what_processes_share_counts_once(tmp_path: Path) -> None:
    """Half of a page that two processes map counts for each of them. The file is large compared with the memory that
    this process shares with other test processes, which start and end meanwhile."""
    size, here = 800_000_000, psutil.Process()
    (tmp_path / "shared").write_bytes(bytes(size))
    share = "import mmap; f = open('shared'); m = mmap.mmap(f.fileno(), 0, prot=1); sum(m[::4096]); print(); input()"
    with (tmp_path / "shared").open("rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as mapped:
        assert sum(mapped[::4096]) == 0
        alone = pss(here)
        command = [sys.executable, "-c", share]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd=tmp_path) as other:
            assert other.stdout
            other.stdout.readline()
            assert 0.4 * size < (alone - pss(here)) * 1e6 < 0.6 * size
            until = time.monotonic() + 20
            both = [here, psutil.Process(other.pid)]
            # Use mmap, because the allocator keeps and reuses freed memory.
            with peak_memory([here], both) as peaks, mmap.mmap(-1, size // 4) as held:
                for _ in range(size // 4 // 10**6):
                    held.write(b"x" * 10**6)
                full = pss(here)
                while (peaks[0] < full - 10 or peaks[1] < full + 350) and time.monotonic() < until:
                    time.sleep(SAMPLE_SECONDS)
            assert pss(here) + 150 < peaks[0]
            assert peaks[0] + 350 < peaks[1] < peaks[0] + 500
            other.communicate(b"\n")


def test_an_update_takes_no_more_memory_for_more_members() -> None:
    kernel, elements = CpuKernel("uniform"), 100_000
    kernel.accumulate(np.zeros(1, np.uint64), np.ones(1, np.float32), 0, 8)
    for members in (1, 300):
        seed_K, weight_K = np.arange(members, dtype=np.uint64), np.ones(members, np.float32)
        tracemalloc.start()
        kernel.accumulate(seed_K, weight_K, 0, elements)
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert 4 * elements <= peak < 4 * elements + 60_000  # the result and the tiles of the kernel


def test_a_member_costs_its_passes_and_no_copy_of_the_parent() -> None:
    """Each batch of images is normalised once, and the weights of each member are folded once, not once per pass."""
    scoring, parent = evaluator(), state(600)
    parent.theta_D.flags.writeable = False
    scoring.load(parent)
    assert scoring.theta_D.data_ptr() == parent.theta_D.ctypes.data
    own, counts = scoring.model.theta_D.data_ptr(), {"passes": 0, "normalised": 0, "folded": 0}
    fitness = scoring.fitness
    assert isinstance(fitness, Classification)
    normalise, folding = fitness.normalise, Folding(scoring.model.module, fitness.reference_NCHW[:1])
    scoring.model.module.register_forward_hook(lambda *_: counts.update(passes=counts["passes"] + 1))

    def normalised(pixels_NHWC: torch.Tensor) -> torch.Tensor:
        counts["normalised"] += 1
        return normalise(pixels_NHWC)

    def folded(dtype: torch.dtype) -> Any:
        counts["folded"] += 1
        return folding(dtype)

    fitness.normalise, fitness.folding = normalised, folded  # type: ignore[assignment]
    for seeds in ((1, 2), (3, 4, 5)):
        scoring.evaluate(noisy(np.array(seeds, np.uint64), 0.0, 0.01), "fitness", -math.inf)
    assert counts == {"passes": 5 * 3, "normalised": 3, "folded": 5}
    assert scoring.model.theta_D.data_ptr() == own


def test_what_is_scored_is_built_without_dead_taps_and_scored_as_the_whole() -> None:
    generation = Generation(RESNET, 40)
    scoring = generation.spec.make(CPU)
    scoring.load(generation.state(40))
    assert scoring.needed_R2 is not None
    first_R, end_R = scoring.needed_R2.T
    assert 4_200_000 < (end_R - first_R).sum() < 4_300_000
    members = noisy(np.array([7], np.uint64), 0.0, 0.05)
    scoring.model.theta_D.fill_(math.nan)
    scored = scoring.evaluate(members, "fitness", -math.inf)[0]
    built_D = scoring.model.theta_D.clone()
    scoring.descend(7, 0.0, 0.05)
    needed_D = torch.zeros(len(built_D), dtype=torch.bool)
    for first, end in scoring.needed_R2:
        needed_D[first:end] = True
    assert torch.equal(built_D[needed_D], scoring.model.theta_D[needed_D])
    assert built_D[~needed_D].isnan().all()
    assert not scoring.model.theta_D.isnan().any()
    again = scoring.evaluate(members, "fitness", -math.inf)[0]
    assert scored.fitness_K.tobytes() == again.fitness_K.tobytes()


def test_the_score_of_an_update_is_the_driver_s_own_to_the_bit() -> None:
    """The driver then does not send the update to the workers."""
    sent, alone = Phase(lr=0.01), Phase(lr=0.01)
    alone.population.here = LocalExecutor(make_spec(), CPU, print)
    rows = [phase.evolve()[1] for phase in (sent, alone)]
    assert rows[0]["parent_fitness_after"] == rows[1]["parent_fitness_after"] != rows[1]["parent_fitness_before"]
    assert (len(sent.pool.broadcasts), len(sent.pool.scales)) == (1, 2)
    assert (len(alone.pool.broadcasts), alone.pool.scales) == (1, [None])
    assert sent.theta_D.tobytes() == alone.theta_D.tobytes()


def test_an_update_is_not_scored_by_a_driver_of_another_kind(monkeypatch: pytest.MonkeyPatch) -> None:
    phase = Phase(lr=0.01)
    here = LocalExecutor(make_spec(), CPU, print)
    monkeypatch.setattr(LocalExecutor, "devices", property(lambda pool: {"H100" if pool is here else "cpu"}))
    phase.population.here = here
    phase.evolve()
    assert len(phase.pool.scales) == 2


def test_bf16_scores_nearly_the_same_and_the_same_again() -> None:
    members = noisy(np.arange(12, dtype=np.uint64), 0.0, 0.1)
    scores = []
    for precision in ("fp32", "bf16", "bf16"):
        scoring = evaluator(precision=precision)
        scoring.load(state(300))
        scores.append(scoring.evaluate(members, "fitness", -math.inf)[0])
    assert np.corrcoef(scores[0].fitness_K, scores[1].fitness_K)[0, 1] > 0.99
    assert not np.array_equal(scores[0].fitness_K, scores[1].fitness_K)
    assert scores[1].fitness_K.tobytes() == scores[2].fitness_K.tobytes()


def test_a_driver_without_memory_for_it_sends_the_update_to_be_scored() -> None:
    sent, without = Phase(lr=0.01), Phase(lr=0.01)
    here = LocalExecutor(make_spec(), CPU, print)

    def full(*_: Any) -> Any:
        raise torch.OutOfMemoryError("a tenth of a GPU")

    here.evaluator.evaluate = full  # type: ignore[method-assign, assignment]
    without.population.here = here
    rows = [phase.evolve()[1] for phase in (sent, without)]
    assert rows[0]["parent_fitness_after"] == rows[1]["parent_fitness_after"]
    assert len(without.pool.scales) == 2


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("precision", "tolerance"), [("fp32", 1e-3), ("bf16", 0.05)])
def test_a_gpu_scores_as_a_cpu_does(precision: str, tolerance: float) -> None:
    members = noisy(np.arange(20, dtype=np.uint64), 0.0, 0.05)
    generation = Generation(RESNET, 600, precision)
    scores = []
    for device in (CPU, torch.device("cuda"), torch.device("cuda")):
        scoring = generation.spec.make(device)
        scoring.load(generation.state(600))
        scores.append(scoring.evaluate(members, "fitness", -math.inf)[0])
    np.testing.assert_allclose(scores[0].fitness_K, scores[1].fitness_K, rtol=tolerance)
    assert scores[1].fitness_K.tobytes() == scores[2].fitness_K.tobytes()


@given(st.integers(1, 10**6), st.integers(1, 2000), st.floats(1e-6, 100), st.floats(100, 5000))
def test_chunks_shrink_and_are_neither_too_long_nor_more_than_the_driver_can_hear_of(
    members: int, workers: int, seconds: float, answers: float
) -> None:
    sizes: list[int] = []
    left = members
    while left and len(sizes) < 3000:
        sizes.append(min(left, chunk_size(left, members, workers, seconds, answers)))
        left -= sizes[-1]
    assert sizes == sorted(sizes, reverse=True)
    round_, share = workers / answers, members * seconds / workers
    if share >= ONE_ROUND * round_:
        assert (sizes[0] - 1) * seconds <= max(CHUNK_SECONDS, round_) * 1.001
        # Every chunk but the last, which is the remainder, keeps a worker busy until all others have a task.
        assert all(size * seconds * 1.001 >= min(CHUNK_SECONDS, round_) for size in sizes[:-1])
    elif not left:
        # No worker gets two chunks, and a later chunk ends no later than the first, up to the time of one member.
        assert len(sizes) <= workers
        ends = [number / answers + size * seconds for number, size in enumerate(sizes)]
        assert max(ends) <= ends[0] + seconds * 1.001
        longest = share + round_ / 2 if share > round_ / 2 else math.sqrt(2 * members * seconds / answers)
        assert ends[0] <= (longest + seconds) * 1.001
    # A worker at half the speed gets half the members.
    once, slow = (chunk_size(members, members, workers, seconds, answers, pace) for pace in (None, 2 * seconds))
    assert slow <= once / 2 + 1
    assert chunk_size(members, members, workers, None, answers) == 1


def test_workers_pay_where_their_share_is_longer_than_to_tell_and_to_hear_them() -> None:
    assert [workers_worth(seconds, 1000, 500) for seconds in (0, 0.01, 0.2, 40, math.inf)] == [1, 2, 10, 141, 1000]
    assert workers_worth(math.inf, 3, 500) == 3


def test_the_model_s_one_gpu_is_busy_and_a_thousand_need_more_members() -> None:
    task = model.TaskSeconds(1e-3, 3e-4)
    for population in model.POPULATIONS:
        shares = [model.efficiency(population, workers, task, False) for workers in model.WORKERS]
        assert shares[0] > 0.98
        assert all(more <= fewer * 1.02 for fewer, more in pairwise(shares))
    assert model.efficiency(1_000_000, 1000, task, True) > model.efficiency(10_000, 1000, task, True)
    for population in model.POPULATIONS:
        assert model.efficiency(population, 1000, task, True) > model.efficiency(population, 1000, task, False)


def test_figures_are_said_with_their_spread() -> None:
    assert figures.spread([3, 1, 2.00004]) == {"median": 2.0, "min": 1, "max": 3, "repeats": 3}
    assert figures.said(figures.spread([1234.4, 999, 2000])) == "1,234 (999 - 2,000)"
    assert figures.said(figures.spread([0.5])) == "0.5"


@pytest.mark.parametrize("met", [False, True])
def test_a_target_that_is_missed_has_its_reason(met: bool) -> None:
    results = json.loads((BENCHMARKS / "results.json").read_text())
    good, little = (1e6, 1e-6) if met else (1e-6, 1e6)
    results["over_torchvision"]["median"] = results["sgd"]["ratio"]["median"] = good
    results["dispatch"]["members_per_second"]["median"] = good
    results["broadcast"]["parents_per_generation"]["max"] = results["resnet18_worker_mb"]["max"] = little
    results["memory"][-1]["worker_mb"] = little
    for row in results["scoring"]:
        row["efficiency"]["median"] = good
    for row in results["update"]:
        row["seconds_per_1000_members"]["median"] = little
    for row in results["scaling"]:
        row["speedup"]["median"] = good
    for peer in results["peers"]:
        peer.get("ours_over_it", {})["median"] = good
    judged = figures.targets(results)
    assert len(judged) == 11
    for target in judged:
        assert target["met"] is met, target
        assert bool(target.get("reason")) is not met


def test_a_table_goes_between_its_marks_and_nowhere_else(tmp_path: Path) -> None:
    file = tmp_path / "README.md"
    file.write_text(f"head\n{figures.BEGIN}old\n{figures.END}tail\n")
    for text in ("new\n", "newer\n"):
        figures.write_into(file, text)
    assert file.read_text() == f"head\n{figures.BEGIN}\nnewer\n\n{figures.END}tail\n"


def test_the_documents_have_the_tables_of_the_results() -> None:
    results = json.loads((BENCHMARKS / "results.json").read_text())
    tables, scaling = (BENCHMARKS.parent / "docs" / name for name in ("benchmarks.md", "scaling.md"))
    assert figures.table(results) in tables.read_text()
    assert model.table(results) in scaling.read_text()
    assert results["targets"] == figures.targets(results)
    for name in ("machine", "limit", "scoring", "update", "dispatch", "broadcast", "memory", "peers", "simulation"):
        assert results[name]


def test_a_simulated_worker_needs_no_torch_and_is_let_in() -> None:
    """Dozens of them must fit on one machine. With torch each takes 300 MB, and Ray kills workers to free memory."""
    program = (
        "import sys, types, ray, bench.sleeper\n"
        "ray.get_runtime_context = lambda: types.SimpleNamespace(get_node_id=lambda: 'node')\n"
        "from spartan_ray.distributed.joining import objections\n"
        "assert objections(bench.sleeper.Sleeper(None).join(), 'uniform') == ''\n"
        "sys.exit('torch' in sys.modules)"
    )
    path = f"{ROOT / 'benchmarks'}{os.pathsep}{ROOT}"
    assert (
        subprocess.run([sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, check=False).returncode
        == 0
    )
