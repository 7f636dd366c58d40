"""Tests of values that are not finite: they never win, and they do not affect what comes after them."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from local import NORMALISE, SPLITS, Phase, trained
from scipy.stats import rankdata

from spartan_ray.engine.strategies.requests import Score, Scores, SetDirection, noisy
from spartan_ray.engine.strategies.shaping import SHAPING, centered_rank, zscore
from spartan_ray.errors import Diverged
from spartan_ray.run.config import Evolution
from spartan_ray.run.setup import make_strategy
from spartan_ray.vision.classification import Classification, recalibrate, statistics_of
from spartan_ray.vision.data import Images


def mostly_zeros(phase: Phase) -> Phase:
    """Relabel the scored images: six of ten get class 0, the others a false class. Return the phase.

    Class 0 is the class of an output that is NaN. The parent is right about few images."""
    pixels_NHWC, labels_N = SPLITS.evolution.pixels_NHWC, (SPLITS.evolution.labels_N + 1) % 10
    labels_N[torch.arange(len(labels_N)) % 10 < 6] = 0
    fitness = phase.pool.evaluator.fitness
    assert isinstance(fitness, Classification)
    fitness.images = Images(pixels_NHWC, labels_N)
    return phase


@pytest.mark.parametrize("batchnorm", ["running", "batch", "recalibrate"])
@pytest.mark.parametrize("early_rejection", [True, False])
def test_a_dead_network_has_no_accuracy_and_never_becomes_the_parent(batchnorm: str, early_rejection: bool) -> None:
    """The outputs of a dead network are NaN, and the argmax of NaNs is class 0."""
    phase = mostly_zeros(
        Phase(
            strategy="random-gradients", fitness="accuracy", lr=1e38, low=-1.0, gradient_images=64,
            batchnorm=batchnorm, early_rejection=early_rejection,
        )
    )  # fmt: skip
    theta_D = phase.theta_D
    outcome, row = phase.evolve()
    assert outcome.before < 0.5
    assert np.isnan(outcome.fitness_K).all()
    assert row["fitness_nonfinite"] == len(outcome.members)
    assert not row["accepted"]
    assert phase.theta_D.tobytes() == theta_D.tobytes()
    # Score a dead network among finite ones, too: their scores are the same as without it.
    phase = mostly_zeros(Phase(fitness="accuracy", batchnorm=batchnorm))
    phase.population.begin(("fitness",), 1)
    phase.population.broadcast()
    members = noisy(np.arange(5, dtype=np.uint64), 0.0, 0.01)
    alone = phase.pool.evaluate(members)
    members.gain_K[2] = 1e38
    both = phase.pool.evaluate(members)
    assert (
        np.isnan(both.fitness_K).tolist()
        == np.isnan(both.mean_KM).all(1).tolist()
        == [False, False, True, False, False]
    )
    others = [0, 1, 3, 4]
    assert both.mean_KM[others].tobytes() == alone.mean_KM[others].tobytes()


@pytest.mark.parametrize("fitness", ["loss", "accuracy"])
def test_an_update_whose_score_is_not_finite_is_never_taken(fitness: str) -> None:
    """This holds even if `accept` is "always"."""
    phase = mostly_zeros(Phase(accept="always", fitness=fitness, lr=1e38, sigma=0.05))
    theta_D = phase.theta_D
    outcome, row = phase.evolve()
    assert np.isfinite(outcome.fitness_K).all()
    assert (row["accepted"], row["note"]) == (False, "the score of the update is not finite")
    assert row["parent_fitness_after"] == row["parent_fitness_before"]
    assert phase.theta_D.tobytes() == theta_D.tobytes()


@pytest.mark.parametrize("optimizer", ["momentum", "adam"])
def test_an_estimate_that_is_not_finite_leaves_the_optimizer_as_it_was(optimizer: str) -> None:
    phase = Phase(optimizer=optimizer, lr=1e-4)
    phase.evolve()
    weighted_sum = phase.pool.weighted_sum
    phase.pool.weighted_sum = lambda *arguments: weighted_sum(*arguments) * np.float32(math.inf)  # type: ignore[method-assign]
    assert phase.evolve()[1]["note"] == "the score of the update is not finite"
    phase.pool.weighted_sum = weighted_sum  # type: ignore[method-assign]
    assert phase.evolve()[1]["accepted"]


def test_a_parent_that_is_not_finite_ends_the_phase() -> None:
    phase = Phase()
    phase.model.theta_D[-1] = math.nan
    assert not phase.model.is_finite()
    with pytest.raises(Diverged, match="the parent's own fitness in generation 1 is not finite"):
        phase.evolve()
    model = trained()
    assert model.is_finite()
    model.buffers[0][0] = math.inf
    assert not model.is_finite()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_weighs_as_the_worst_and_enters_no_mean(value: float) -> None:
    finite_K = np.array([3.0, 1.0, 2.0, 1.0])
    fitness_K = np.array([3.0, value, 1.0, 2.0, value, 1.0])
    shaped_K = zscore(fitness_K)
    assert shaped_K[[0, 2, 3, 5]].tobytes() == zscore(finite_K).tobytes()
    assert (shaped_K[[1, 4]] == shaped_K.min()).all()
    assert centered_rank(fitness_K).tolist() == ((rankdata([4, 1, 2, 3, 1, 2]) - 1) / 5 - 0.5).tolist()
    for shape in SHAPING.values():
        assert not shape(np.full(5, value)).any()


def test_weights_of_a_phase_with_dead_members_are_those_of_the_living() -> None:
    strategy = make_strategy(Evolution(population=4), 10)
    assert strategy
    phase = strategy.generation(1, 5)
    assert isinstance(next(phase), Score)
    fitness_K = -np.array([1.0, 2.0, math.nan, 4.0, 5.0])
    wanted = phase.send(Scores(fitness_K[:, None], fitness_K, np.full(5, 10)))
    assert isinstance(wanted, SetDirection)
    z_K = (11 / 3 - np.array([2.0, 5.0, 4.0, 5.0])) / np.std([2, 4, 5])
    np.testing.assert_allclose(wanted.weight_U, z_K / (4 * 0.01), rtol=1e-6)


def test_what_fails_within_leaves_the_layers_as_they_were() -> None:
    """A caller may catch an out-of-memory error and use the network again."""
    module = trained().module
    layers = [layer for layer in module.modules() if isinstance(layer, torch.nn.BatchNorm2d)]

    def modes() -> list[object]:
        return [(layer.training, layer.track_running_stats, layer.momentum) for layer in layers]

    module.eval()
    before = modes()
    images_NCHW = NORMALISE(SPLITS.sgd[slice(0, 8)].pixels_NHWC)

    def full(*_: object) -> None:
        assert modes() != before
        raise MemoryError

    layers[-1].register_forward_pre_hook(full)
    with pytest.raises(MemoryError), statistics_of(module, "batch"):
        module(images_NCHW)
    assert modes() == before
    with pytest.raises(MemoryError):
        recalibrate(module, images_NCHW)
    assert modes() == before
