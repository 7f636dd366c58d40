"""Tests of the peers that the evaluator is compared with: their updates against formulas, and their output."""

from __future__ import annotations

import argparse
import copy
import json
import subprocess
import sys
import time

import naive_ray
import numpy as np
import pytest
import thread_pool_es
import torch
from torch import nn
from work import Fitness, initial_network, measure

SIGMA, LR = 0.1, 0.02
FITNESS_K = [-2.0, 0.5, -1.25, -0.25, -3.0]


def small_network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(nn.Conv2d(2, 3, 3), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 4))


def expected_move(noise_KD: np.ndarray) -> np.ndarray:
    """Return lr / (K sigma) * sum over members of (f - mean) / std * noise, computed member by member."""
    mean = sum(FITNESS_K) / len(FITNESS_K)
    std = (sum((f - mean) ** 2 for f in FITNESS_K) / len(FITNESS_K)) ** 0.5
    move_D = np.zeros(noise_KD.shape[1])
    for fitness, noise_D in zip(FITNESS_K, noise_KD, strict=True):
        move_D += LR / (len(FITNESS_K) * SIGMA) * (fitness - mean) / std * noise_D
    return move_D


def flat(network: nn.Module) -> np.ndarray:
    return np.concatenate([tensor.detach().numpy().ravel() for tensor in network.parameters()])


def test_thread_pool_es_descends_and_moves() -> None:
    parent = small_network()
    noise_K = thread_pool_es.sample(parent, len(FITNESS_K), np.random.default_rng(0))
    noise_KD = np.stack([np.concatenate([unit.ravel() for unit in noise]) for noise in noise_K])
    theta_D = flat(parent)

    descendant = thread_pool_es.descend(parent, noise_K[1], SIGMA)
    np.testing.assert_allclose(flat(descendant), theta_D + SIGMA * noise_KD[1], atol=1e-6)
    np.testing.assert_array_equal(flat(parent), theta_D)

    thread_pool_es.update(parent, noise_K, FITNESS_K, LR, SIGMA)
    np.testing.assert_allclose(flat(parent), theta_D + expected_move(noise_KD), atol=1e-6)


def test_naive_ray_descends_and_moves() -> None:
    network = small_network()
    parent = {name: tensor.detach() for name, tensor in network.named_parameters()}
    noise_K = [naive_ray.sample(parent) for _ in FITNESS_K]
    noise_KD = np.stack([torch.cat([unit.ravel() for unit in noise.values()]).numpy() for noise in noise_K])
    theta_D = flat(network)

    descendant = copy.deepcopy(network)
    arrays = naive_ray.descend(parent, noise_K[1], SIGMA)
    descendant.load_state_dict({name: torch.from_numpy(array) for name, array in arrays.items()}, strict=False)
    np.testing.assert_allclose(flat(descendant), theta_D + SIGMA * noise_KD[1], atol=1e-6)
    np.testing.assert_array_equal(flat(network), theta_D)

    naive_ray.update(parent, noise_K, FITNESS_K, LR, SIGMA)
    np.testing.assert_allclose(flat(network), theta_D + expected_move(noise_KD), atol=1e-6)


def test_fitness_is_minus_the_loss_in_evaluation_mode() -> None:
    network, fitness = initial_network(), Fitness(300)
    assert not network.training
    with torch.no_grad():
        loss = nn.functional.cross_entropy(network(fitness.images_NCHW), fitness.labels_N)
    assert fitness(network) == pytest.approx(-float(loss), rel=1e-5)


def test_the_parent_is_the_same_everywhere_and_costs_no_random_numbers() -> None:
    """EvoTorch's actors draw members after they build the network. If building it seeded their generator, all
    actors would draw the same members."""
    torch.manual_seed(5)
    expected = torch.randn(3)
    torch.manual_seed(5)
    first, second = initial_network(), initial_network()
    assert torch.equal(torch.randn(3), expected)
    assert all(torch.equal(a, b) for a, b in zip(first.parameters(), second.parameters(), strict=True))


def test_a_peer_prints_one_line_of_rates_and_memory(capsys: pytest.CaptureFixture[str]) -> None:
    calls: list[int] = []

    def generation() -> float:
        calls.append(1)
        time.sleep(0.25)
        return 0.125

    hold = f"held = b'x' * {10**8}; print(); input()"
    with subprocess.Popen([sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout
        other.stdout.readline()
        measure("peer", ["numpy"], argparse.Namespace(population=10, generations=2), generation)
        other.communicate(b"\n")
    assert len(calls) == 4  # the first is a warm-up, the last measures memory
    (line,) = capsys.readouterr().out.splitlines()
    result = json.loads(line)
    assert result["version"] == {"numpy": np.__version__}
    assert result["scoring_members_per_second"] == [80, 80]
    assert all(0 < rate <= 40 for rate in result["members_per_second"])
    assert 20 < result["peak_driver_mb"] < result["peak_mb"] - 100
