"""Shaping and evolution strategies, against independent references."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.stats import rankdata

from spartan_ray.config import Data, Evolution, Parent
from spartan_ray.data import load_splits
from spartan_ray.evaluator import Evaluator, ParentState
from spartan_ray.fitness import Normaliser
from spartan_ray.model import FlatModel, initial_model
from spartan_ray.noise import noise
from spartan_ray.strategies import Members, Move, make_strategy, merge_seeds
from spartan_ray.strategies.base import SHAPING, centered_rank, zscore

finite_fitness = arrays(np.float64, st.integers(2, 60), elements=st.floats(-1e6, 1e6, width=32))
any_fitness = arrays(np.float64, st.integers(2, 60), elements=st.floats(-1e6, 1e6, width=32) | st.sampled_from(
    [np.nan, np.inf, -np.inf]))  # fmt: skip


@given(finite_fitness)
def test_zscore_has_mean_zero_and_std_one(fitness_K: NDArray[np.float64]) -> None:
    shaped = zscore(fitness_K)
    if np.ptp(fitness_K) == 0:
        assert not shaped.any()
    elif fitness_K.std() > 1e-9 * np.abs(fitness_K).max():
        assert abs(shaped.mean()) < 1e-6
        assert abs(shaped.std() - 1) < 1e-6


@given(finite_fitness)
def test_centered_rank_is_scipy_s_rank_from_minus_to_plus_one_half(fitness_K: NDArray[np.float64]) -> None:
    expected = (rankdata(fitness_K) - 1) / (len(fitness_K) - 1) - 0.5
    np.testing.assert_allclose(centered_rank(fitness_K), expected, atol=1e-12)


@pytest.mark.parametrize("name", sorted(SHAPING))
@given(fitness_K=any_fitness)
def test_a_nonfinite_fitness_never_wins(name: str, fitness_K: NDArray[np.float64]) -> None:
    shaped, finite = SHAPING[name](fitness_K), np.isfinite(fitness_K)
    assert np.isfinite(shaped).all()
    if finite.any() and not finite.all():
        assert shaped[~finite].max() <= shaped[finite].min()


@pytest.mark.parametrize("name", sorted(SHAPING))
@pytest.mark.parametrize("value", [0.25, np.nan, np.inf])
def test_equal_fitness_is_no_update_and_said(name: str, value: float) -> None:
    strategy = make_strategy(Evolution(population=8, shaping=name))  # type: ignore[arg-type]
    assert strategy
    move = strategy.tell(np.full(8, value))
    assert not move.accepted
    assert move.note == "no update: all members have equal fitness"
    assert move.nonfinite == (0 if value == 0.25 else 8)


@given(st.integers(1, 20), st.randoms(use_true_random=False))
def test_merging_seeds_keeps_the_sum(pairs: int, random: object) -> None:
    seed_K = np.repeat(np.arange(pairs, dtype=np.uint64) * 77 % 41, 2)
    sign_K = np.tile(np.array([1, -1], np.int8), pairs)
    weight_K = np.random.default_rng(pairs).normal(size=2 * pairs)
    merged_seed, merged_weight = merge_seeds(Members(seed_K, sign_K, 0.1), Move(weight_K))
    assert len(merged_seed) <= pairs
    expected = sum(w * s * noise("uniform", int(k), 0, 50) for w, s, k in zip(weight_K, sign_K, seed_K, strict=True))
    merged = sum(w * noise("uniform", int(k), 0, 50) for w, k in zip(merged_weight, merged_seed, strict=True))
    np.testing.assert_allclose(merged, expected, atol=1e-5)


def confident_network() -> torch.nn.Module:
    """A network whose loss differs so much between descendants that float32's rounding is nothing to it."""
    network = initial_model(Parent(model="convnet"), 10, 0)[0]
    list(network.parameters())[-2].data *= 100
    return network


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("shaping", ["zscore", "centered-rank"])
@pytest.mark.parametrize("fitness", ["loss", "accuracy"])
def test_es_is_the_article_s_formula_computed_densely(mirrored: bool, shaping: str, fitness: str) -> None:
    """theta + lr / (K sigma) * sum_k z_k noise_k with a K x D matrix of noise, a network built
    anew for every descendant, and torch's own loss, against evaluator and strategy."""
    config = Evolution(population=12, mirrored=mirrored, shaping=shaping, fitness=fitness, sigma=0.05, lr=0.02)  # type: ignore[arg-type]
    splits = load_splits(Data(name="digits"), 0)
    images, cpu = splits.evolution[slice(0, 100)], torch.device("cpu")
    normalise = Normaliser(splits.mean_C, splits.std_C, cpu)
    parent = FlatModel(confident_network(), cpu)
    theta_D = parent.theta_D.numpy().copy()

    strategy = make_strategy(config)
    assert strategy
    members = strategy.ask(1, 5)
    evaluator = Evaluator(initial_model(Parent(model="convnet"), 10, 9)[0], images, normalise, "uniform", fitness, cpu)  # type: ignore[arg-type]
    evaluator.load(ParentState(1, theta_D, [b.numpy() for b in parent.buffers], np.arange(100)))
    move = strategy.tell(evaluator.evaluate(members))
    update_D = config.sigma * evaluator.accumulate(*merge_seeds(members, move), 0, len(theta_D)).astype(np.float64)

    noise_KD = np.stack(
        [s * noise("uniform", int(k), 0, len(theta_D)) for k, s in zip(members.seed_K, members.sign_K, strict=True)]
    ).astype(np.float64)
    if mirrored:
        np.testing.assert_array_equal(noise_KD[0::2], -noise_KD[1::2])
    rewards = []
    for noise_D in noise_KD:
        network = confident_network().eval()
        start = 0
        for parameter in network.parameters():
            part = noise_D[start : start + parameter.numel()]
            start += parameter.numel()
            if parameter.dim() == 4:
                o, i, h, w = parameter.shape
                part = part.reshape(o, h, w, i).transpose(0, 3, 1, 2)
            parameter.data += torch.from_numpy((config.sigma * part).reshape(parameter.shape)).float()
        pixels = images.pixels_NHWC.permute(0, 3, 1, 2).float() / 255
        mean, std = (torch.tensor(values)[:, None, None] for values in (splits.mean_C, splits.std_C))
        logits = network((pixels - mean) / std)
        loss = torch.nn.functional.cross_entropy(logits, images.labels_N).item()
        rewards.append(-loss if fitness == "loss" else (logits.argmax(1) == images.labels_N).double().mean().item())
    if shaping == "zscore":
        weights = (np.array(rewards) - np.mean(rewards)) / np.std(rewards)
    else:
        weights = (rankdata(rewards) - 1) / (len(rewards) - 1) - 0.5
    expected_D = config.lr / (len(rewards) * config.sigma) * (weights @ noise_KD)
    assert np.linalg.norm(update_D - expected_D) <= 1e-5 * np.linalg.norm(expected_D)
