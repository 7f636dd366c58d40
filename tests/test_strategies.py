"""The mathematics of the strategies: shaping, step search, temperature, schedules."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray
from scipy.stats import rankdata

from spartan_ray.engine.strategies.requests import (
    Generation,
    Members,
    Score,
    Scores,
    SetDirection,
    SetScale,
    merge_seeds,
)
from spartan_ray.engine.strategies.shaping import SHAPING, centered_rank, zscore
from spartan_ray.noise.contract import noise
from spartan_ray.run.config import Evolution
from spartan_ray.run.setup import make_strategy

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
    phase = make_phase(Evolution(population=8, shaping=name))  # type: ignore[arg-type]
    next(phase)
    with pytest.raises(StopIteration) as end:
        phase.send(scores([1.0] + [-value] * 8))
    outcome = end.value.value
    assert not outcome.accepted
    alike = "all members have equal fitness" if np.isfinite(value) else "0 of 8 members are finite"
    assert outcome.note == f"no update: {alike}"


def make_phase(config: Evolution) -> Generation:
    strategy = make_strategy(config, 10)
    assert strategy
    return strategy.generation(1, 5)


def scores(losses: list[float]) -> Scores:
    fitness_K = -np.array(losses)
    return Scores(fitness_K[:, None], fitness_K, np.full(len(losses), 100))


@given(st.integers(1, 20))
def test_merging_seeds_keeps_the_sum(pairs: int) -> None:
    seed_K = np.repeat(np.arange(pairs, dtype=np.uint64) * 77 % 41, 2)
    gain_K = np.tile(np.array([0.1, -0.1], np.float32), pairs)
    weight_K = np.random.default_rng(pairs).normal(size=2 * pairs)
    merged_seed, merged_weight = merge_seeds(Members(seed_K, np.zeros(2 * pairs, np.float32), gain_K), weight_K)
    assert len(merged_seed) <= pairs
    expected = sum(w * g * noise("uniform", int(k), 0, 50) for w, g, k in zip(weight_K, gain_K, seed_K, strict=True))
    merged = sum(w * noise("uniform", int(k), 0, 50) for w, k in zip(merged_weight, merged_seed, strict=True))
    np.testing.assert_allclose(merged, expected, atol=1e-6)


@given(st.floats(0.02, 400.0), st.floats(0.1, 10), st.floats(-3, 3))
def test_a_search_finds_the_best_length_of_a_parabola(best: float, curvature: float, peak: float) -> None:
    """The search gets within 0.1 % of the possible gain for best lengths from 0.02 to 400.

    It tries at most 10 lengths where 2 is not the best of the first ones, and at most 15 otherwise."""

    def fitness(length: float) -> float:
        return peak - curvature * (length - best) ** 2

    length, tried = search(fitness)
    gain = fitness(best) - fitness(0)
    assert fitness(best) - fitness(length) <= 1e-3 * gain
    assert len(tried) <= (10 if best < 1.2 else 15)


@given(st.lists(st.sampled_from([-1.0, 0.0, 0.5, np.nan]) | st.floats(-5, 5), min_size=20, max_size=20))
def test_a_search_never_takes_what_is_worse_than_the_parent(values: list[float]) -> None:
    order: dict[float, float] = {}
    length, tried = search(lambda length: order.setdefault(length, values[len(order)]))
    best = max((value for value in tried.values() if not np.isnan(value)), default=np.nan)
    if np.isnan(best):
        assert length == 0
    else:
        assert tried[length] == best
        assert length == min(tried_length for tried_length, value in tried.items() if value == best)
    if not np.isnan(tried[0.0]):
        assert tried[length] >= tried[0.0]


def search(fitness: Callable[[float], float]) -> tuple[float, dict[float, float]]:
    """Return the length that `step: search` takes, and the fitness of each length that it tried.

    `fitness` is a function of the length of the update."""
    phase = make_phase(Evolution(population=4, step="search"))
    request, tried = next(phase), dict[float, float]()
    try:
        while True:
            if isinstance(request, Score):
                assert len(request.members)
            if isinstance(request, Score) and request.cases == "search":
                lengths = [float(length) for length in request.members.offset_K]
                tried |= {length: fitness(length) for length in lengths}
                request = phase.send(scores([-tried[length] for length in lengths]))
            elif isinstance(request, Score):
                request = phase.send(scores([float(k) for k in range(len(request.members))]))
            else:
                request = phase.send(1.0 if isinstance(request, SetDirection) else None)
    except StopIteration as end:
        outcome = end.value
    assert outcome.search
    assert bool(outcome.accepted) == (outcome.length > 0)
    return outcome.length, dict(zip(*outcome.search, strict=True))


@pytest.mark.parametrize(("kind", "expected"), [("none", 1.0), ("error", 0.375), ("loss", 1.5 / 2.302585092994046)])
def test_temperatures_are_what_is_computed_by_hand(kind: str, expected: float) -> None:
    """The parent has a loss of 1.5 and 5 of 8 images right. There are 10 classes, and the step is 0.2."""
    config = Evolution(strategy="random-gradients", temperature=kind, lr=0.2, low=-1, high=3)  # type: ignore[arg-type]
    phase = make_phase(config)
    assert next(phase) == SetScale("gradient")
    phase.send(None)
    request = phase.send(Scores(np.array([[-1.5, 0.625]]), np.array([-1.5]), np.array([8])))
    assert isinstance(request, Score)
    np.testing.assert_allclose(request.members.offset_K, -0.2 * expected * 1, rtol=1e-6)
    np.testing.assert_allclose(request.members.gain_K, -0.2 * expected * 2, rtol=1e-6)


def test_schedules_decay_by_the_phase() -> None:
    config = Evolution(every=5, sigma=0.1, sigma_decay=0.5, lr=0.3, lr_decay=0.1, population=4)
    strategy = make_strategy(config, 10)
    assert strategy
    for generation, sigma, rate in ((5, 0.1, 0.3), (10, 0.05, 0.03), (15, 0.025, 0.003)):
        phase = strategy.generation(1, generation)
        request = next(phase)
        assert isinstance(request, Score)
        np.testing.assert_allclose(request.members.gain_K, [0, *[sigma] * 4], rtol=1e-6)
        aim = phase.send(scores([1.0, 2, 3, 4, 5]))
        assert isinstance(aim, SetDirection)
        assert abs(aim.rate / rate - 1) < 1e-9
        # The estimate is 1 / (K sigma) * sum of shaped * noise. `weight_U` has the factors of the noise.
        np.testing.assert_allclose(aim.weight_U, zscore(np.array([-2.0, -3, -4, -5])) / (4 * sigma), rtol=1e-6)
    descents = make_strategy(Evolution(strategy="random-gradients", every=5, lr=0.3, lr_decay=0.1), 10)
    assert descents
    for generation, step in ((5, 0.3), (10, 0.03)):
        phase = descents.generation(1, generation)
        next(phase)
        phase.send(None)
        request = phase.send(scores([1.0]))
        assert isinstance(request, Score)
        np.testing.assert_allclose(request.members.offset_K, -step / 2, rtol=1e-6)


def test_weights_that_cancel_are_no_update() -> None:
    """The two members of each mirrored pair have equal fitness. The fitness differs between the pairs."""
    phase = make_phase(Evolution(population=4, mirrored=True, step="ratio"))
    next(phase)
    with pytest.raises(StopIteration) as end:
        phase.send(scores([1.0, 2, 2, 3, 3]))
    assert end.value.value.note == "no update: the weights of the members cancel"
    assert not end.value.value.accepted
