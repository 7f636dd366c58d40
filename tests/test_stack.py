"""Scoring several members in one pass.

The scores agree with those of one member at a time. Their bits depend only on the size of a pass.
"""

from __future__ import annotations

import copy
import math
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from spartan_ray import EvolutionStrategies, Fitness, InputError, Population, RunError
from spartan_ray.engine.evaluator import Evaluator, ParentState
from spartan_ray.engine.fitness import FunctionFitness, as_fitness
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.strategies.requests import Members, Scores
from spartan_ray.noise.contract import member_seeds, noise

CPU = torch.device("cpu")
CASES, MEMBERS = 40, 21
IMAGES_NCHW = torch.from_numpy(noise("uniform", 1, 0, CASES * 2 * 36).reshape(CASES, 2, 6, 6).copy())
WANTED_N3 = IMAGES_NCHW.mean((2, 3)).abs().sum(1, keepdim=True).expand(CASES, 3)


class Tied(nn.Module):
    """A network with a convolution, BatchNorm buffers, a frozen layer and a weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(2, 8, 3)
        self.norm = nn.BatchNorm2d(8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)
        self.second.weight = self.first.weight
        self.last = nn.Linear(8, 3)

    def forward(self, images_NCHW: torch.Tensor) -> torch.Tensor:
        hidden_N8 = self.norm(self.convolution(images_NCHW)).relu().mean((2, 3))
        output_N3: torch.Tensor = self.last(self.second(self.first(self.frozen(hidden_N8)).tanh()))
        return output_N3


def network() -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return Tied().eval()


def closeness(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
    """Return two statistics per case."""
    error_N3 = (network(IMAGES_NCHW[case_N]) - WANTED_N3[case_N]).abs()
    return torch.stack([-error_N3.sum(1), (error_N3.amax(1) < 0.5).float()], 1)


class Close(Fitness):
    """The same fitness in batches of eight cases, with the maximum of each statistic."""

    cases = CASES
    batch: int | None = 8
    best = np.array([0.0, 1.0])
    vmap = True

    def __call__(self, network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return closeness(network, batch)


def members_of(count: int = MEMBERS) -> Members:
    sign_K = np.where(np.arange(count) % 3, 0.2, -0.2).astype(np.float32)
    return Members(member_seeds(0, 1, count), np.zeros(count, np.float32), sign_K)


def evaluator(rows: int, fitness: Any = None, module: nn.Module | None = None) -> Evaluator:
    evaluator = Evaluator(copy.deepcopy(module or network()), fitness or Close(), "uniform", CPU, rows)
    model = evaluator.model
    parent_D = (model.theta_D if module is None else FlatModel(module, CPU).theta_D).clone()
    evaluator.load(ParentState(parent_D.numpy(), list(model.buffers), {"fitness": np.arange(CASES)}))
    return evaluator


def scores_of(rows: int, fitness: Any = None, threshold: float = -math.inf) -> Scores:
    scores, failed = evaluator(rows, fitness).evaluate(members_of(), "fitness", threshold)
    assert not failed
    return scores


@pytest.mark.parametrize("rows", [2, 7, 21, 64])
def test_a_pass_scores_the_members_that_are_scored_one_at_a_time(rows: int) -> None:
    alone, together = scores_of(1), scores_of(rows)
    assert np.ptp(alone.fitness_K) > 0.1
    np.testing.assert_allclose(together.mean_KM, alone.mean_KM, rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(together.cases_K, alone.cases_K)


def test_the_bits_of_a_member_depend_on_the_size_of_a_pass_and_not_on_its_company() -> None:
    """The members are scored in another order and in parts of several sizes."""
    whole = scores_of(8).mean_KM
    worker, members = evaluator(8), members_of()
    order_K = np.argsort(members.seed_K)
    shuffled = Members(members.seed_K[order_K], members.offset_K[order_K], members.gain_K[order_K])
    for cuts in ([0, 21], [0, 1, 2, 3, 21], [0, 5, 19, 21]):
        found = [
            worker.evaluate(shuffled[start:stop], "fitness", -math.inf)[0].mean_KM for start, stop in pairwise(cuts)
        ]
        assert np.concatenate(found).tobytes() == whole[order_K].tobytes()


@pytest.mark.parametrize("rows", [4, 32])
def test_a_member_that_cannot_win_is_left_where_it_would_be_left_alone(rows: int) -> None:
    threshold = float(np.sort(scores_of(1).fitness_K)[-3])
    alone, together = scores_of(1, threshold=threshold), scores_of(rows, threshold=threshold)
    assert len(set(alone.cases_K)) > 2
    np.testing.assert_array_equal(together.cases_K, alone.cases_K)
    np.testing.assert_allclose(together.mean_KM, alone.mean_KM, rtol=1e-5, atol=1e-6)


def test_a_network_in_half_precision_is_cast_before_it_is_scored() -> None:
    half = network().to(torch.bfloat16)

    def in_half(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        output_N3: torch.Tensor = network(IMAGES_NCHW[case_N].bfloat16())
        return output_N3.float().sum(1)

    fitness = FunctionFitness(in_half, CASES)
    alone, together = (
        evaluator(rows, fitness, half).evaluate(members_of(), "fitness", -math.inf)[0].fitness_K for rows in (1, 8)
    )
    np.testing.assert_allclose(together, alone, rtol=0.05)


def test_random_numbers_of_a_fitness_are_the_same_for_all_members_of_a_pass() -> None:
    def noisy(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        generator = torch.Generator().manual_seed(int(case_N[0]))
        return closeness(network, case_N)[:, 0] + torch.rand(len(case_N), generator=generator)

    fitness = FunctionFitness(noisy, CASES)
    np.testing.assert_allclose(scores_of(8, fitness).fitness_K, scores_of(1, fitness).fitness_K, rtol=1e-5)


def test_ready_sees_the_members_of_a_pass() -> None:
    class Shifted(Close):
        def ready(self, network: nn.Module) -> Any:
            last: Any = network.get_submodule("last")
            self.shift: torch.Tensor = last.bias.sum()
            return super().ready(network)

        def __call__(self, network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            return closeness(network, batch) + self.shift

    alone, together = scores_of(1, Shifted()), scores_of(8, Shifted())
    np.testing.assert_allclose(together.mean_KM, alone.mean_KM, rtol=1e-5, atol=1e-6)
    assert np.abs(alone.mean_KM - scores_of(1).mean_KM).max() > 0.01


def test_phases_in_passes_are_the_same_on_two_workers_and_in_this_process(local_ray: None) -> None:
    ends = set()
    for workers in ("local", 2):
        net = network()
        with Population(net, Close(), workers=workers, batch_members=8) as population:
            outcomes = [population.step(EvolutionStrategies(20, sigma=0.1, step="search")) for _ in range(2)]
        assert any(outcome.accepted for outcome in outcomes)
        ends.add(FlatModel(net, CPU).digest())
    assert len(ends) == 1


def test_a_fitness_that_vmap_cannot_run_is_said() -> None:
    def counting(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        score_N = closeness(network, case_N)[:, 0]
        return score_N - score_N.max().item()

    population = Population(network(), counting, cases=CASES, batch_members=4)
    with pytest.raises(
        RunError,
        match=r"RuntimeError: vmap: It looks like you're calling \.item\(\).* \(test_stack\.py:\d+\); "
        r"with batch_members=4 it runs under torch\.func\.vmap$",
    ):
        population.step(EvolutionStrategies(4))
    plain = as_fitness(Close(), None)
    plain.vmap = False
    with pytest.raises(InputError, match=r"^batch_members \(4\): Close does not say vmap = True$"):
        Population(network(), plain, batch_members=4)
    with pytest.raises(InputError, match=r"^batch_members \(0\) must be at least 1$"):
        Population(network(), Close(), batch_members=0)
