"""Tests of evolve phases against independent references: dense NumPy, a plain loop, and torch's own network.

Processors round differently. A test that needs a winner or a loser either sets its own fitness, or asserts that the
margin is far larger than rounding. Values that are compared to the bit are computed in the same way."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from local import CPU, NORMALISE, PARENT, SPLITS, Phase, scored, trained
from numpy.typing import NDArray
from scipy.stats import rankdata

from spartan_ray.engine.draws import GRADIENT_CASES_OF_GENERATION, draw_cases, permutation
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.strategies.requests import Outcome
from spartan_ray.errors import InputError
from spartan_ray.noise.contract import member_seeds, noise
from spartan_ray.vision.data import Images
from spartan_ray.vision.models import initial_model

Array = NDArray[np.floating[Any]]


def network_at(theta_D: Array, like: FlatModel) -> torch.nn.Module:
    """Return a new network with these parameters and the buffers of `like`, in evaluation mode."""
    model = FlatModel(initial_model(PARENT, 10, 5)[0], CPU)
    model.load_buffers(like.buffers)
    model.theta_D.copy_(torch.from_numpy(theta_D.astype(np.float32)))
    return model.module.eval()


def rising() -> Callable[[NDArray[np.float32]], float]:
    """Return a fitness by which each descendant is better than all before it."""
    count = itertools.count()
    return lambda theta_D: float(next(count))


def distance(phase: Phase, best: float = math.inf) -> Callable[[NDArray[np.float32]], float]:
    """Return a fitness: the distance of a descendant from the present parent. It falls again beyond `best`."""
    start_D = phase.population.model.theta_D.numpy().copy()
    return lambda theta_D: min(moved := float(np.linalg.norm(theta_D - start_D)), 2 * best - moved)


# A bound on the relative error of a network's float32 outputs. Each of its four layers sums up to 576 terms. The errors
# of n terms, 2^-24 each, add up to about sqrt(n) * 2^-24.
ROUNDING = 1e-5


def loss_and_accuracy(network: torch.nn.Module, index_N: NDArray[np.int64]) -> tuple[float, float]:
    """Return the loss and accuracy on images. Assert that rounding cannot change the class of any of them."""
    images = on(index_N)
    pixels = images.pixels_NHWC.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (SPLITS.mean_C, SPLITS.std_C))
    with torch.no_grad():
        logits = network((pixels - mean) / std)
    first_N, second_N = logits.topk(2).values.T
    assert (first_N - second_N).min() > ROUNDING * logits.abs().max()
    return F.cross_entropy(logits, images.labels_N).item(), (logits.argmax(1) == images.labels_N).double().mean().item()


def on(index_N: NDArray[np.int64]) -> Images:
    return SPLITS.evolution[torch.from_numpy(index_N)]


def assert_moved(theta_D: Array, start_D: Array, move_D: Array, tolerance: float = ROUNDING) -> None:
    """Assert that theta has moved by `move_D`, within a tolerance on the norm of the error.

    Single elements are not compared, because an element near 0 may consist of rounding errors. theta is float32, which
    rounds it by 2^-24."""
    error = np.linalg.norm(theta_D - start_D.astype(np.float64) - move_D)
    assert error <= tolerance * np.linalg.norm(move_D) + 1e-7 * np.linalg.norm(theta_D)


@pytest.mark.parametrize(("mirrored", "shaping", "fitness"), [
    (False, "zscore", "loss"), (True, "centered-rank", "loss"),
    (True, "zscore", "accuracy"), (False, "centered-rank", "accuracy"),
])  # fmt: skip
def test_es_is_the_article_s_formula_computed_densely(mirrored: bool, shaping: str, fitness: str) -> None:
    """The reference is theta + lr / (K sigma) * sum_k z_k noise_k, with a K x D matrix of noise and torch's loss."""
    sigma, lr = 0.05, 0.02
    phase = Phase(mirrored=mirrored, shaping=shaping, fitness=fitness, sigma=sigma, lr=lr)
    theta_D = phase.theta_D.astype(np.float64)
    outcome, row = phase.evolve()

    members = outcome.members
    noise_KD = np.stack([noise("uniform", int(seed), 0, len(theta_D)).astype(np.float64) for seed in members.seed_K])
    noise_KD *= np.sign(members.gain_K)[:, None]
    if mirrored:
        np.testing.assert_array_equal(noise_KD[0::2], -noise_KD[1::2])
    index_N = phase.case_sets["fitness"]
    results = [loss_and_accuracy(network_at(theta_D + sigma * n_D, phase.model), index_N) for n_D in noise_KD]
    expected_K = np.array([-loss if fitness == "loss" else accuracy for loss, accuracy in results])
    np.testing.assert_allclose(outcome.fitness_K, expected_K, rtol=ROUNDING)
    assert expected_K.std() > 100 * ROUNDING
    rewards = outcome.fitness_K  # not expected_K, because rounding may change the order
    if shaping == "zscore":
        weights = (rewards - rewards.mean()) / rewards.std()
    else:
        weights = (rankdata(rewards) - 1) / (len(rewards) - 1) - 0.5
    expected_D = lr / (len(rewards) * sigma) * (weights @ noise_KD)
    assert_moved(phase.theta_D, theta_D, expected_D)
    ratio = np.linalg.norm(expected_D) / (sigma * (len(theta_D) / 3) ** 0.5)  # u from U(-1, 1) has a mean square of 1/3
    assert row["step_ratio"] == pytest.approx(ratio, rel=1e-4)


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_optimizers_of_the_estimate_are_the_textbook_s_and_keep_their_state(optimizer: str) -> None:
    lr, decay, sigma = 0.01, 0.1, 0.02
    phase = Phase(optimizer=optimizer, lr=lr, weight_decay=decay, sigma=sigma)
    phase.pool.fitness["fitness"] = rising()
    first = second = np.zeros(len(phase.theta_D))
    for t in (1, 2, 3):
        theta_D = phase.theta_D.astype(np.float64)
        outcome, _ = phase.evolve()
        gradient_D = decay * theta_D - estimate(outcome, len(theta_D))
        if optimizer == "adam":
            first, second = 0.9 * first + 0.1 * gradient_D, 0.999 * second + 0.001 * gradient_D**2
            step_D = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        else:
            first = (0.9 * first if optimizer == "momentum" else 0) + gradient_D
            step_D = first
        assert_moved(phase.theta_D, theta_D, -lr * step_D)


def estimate(outcome: Outcome, size_D: int) -> NDArray[np.float64]:
    """Return the direction that the weights, gains and seeds of the journal give."""
    rows = zip(outcome.weight_K, outcome.members.gain_K, outcome.members.seed_K, strict=True)
    return np.asarray(sum(w * g * noise("uniform", int(k), 0, size_D).astype(np.float64) for w, g, k in rows))


@pytest.mark.parametrize("population", [50, 200])
def test_step_ratio_holds_the_norm_of_the_update(population: int) -> None:
    phase = Phase(population=population, fitness_images=20, step="ratio", step_ratio=0.3)
    theta_D = phase.theta_D.astype(np.float64)
    _, row = phase.evolve()
    assert row["accepted"]
    mutation = 0.01 * (len(theta_D) / 3) ** 0.5
    assert np.linalg.norm(phase.theta_D - theta_D) == pytest.approx(0.3 * mutation, rel=1e-4)
    assert row["step_ratio"] == pytest.approx(0.3, rel=1e-4)


def test_step_search_takes_the_best_length_on_images_that_did_not_choose_the_direction() -> None:
    phase = Phase(step="search", fitness_images=150, confirm_images=200, sigma=0.05)
    _, row = phase.evolve()
    sets = phase.case_sets
    assert {name: len(index_N) for name, index_N in sets.items()} == {"fitness": 150, "search": 200}
    assert not set(sets["fitness"]) & set(sets["search"])
    tried = dict(zip(row["search_ratios"], row["search_fitness"], strict=True))
    assert row["search_ratios"][0] == 0
    assert tried[0.0] == -scored(trained().module, on(sets["search"])).loss
    best = max(tried, key=lambda ratio: tried[ratio])
    assert -phase.score("search").loss == tried[best] > tried[0.0] + 1e-3
    assert abs(row["step_ratio"] / best - 1) < 1e-3


@pytest.mark.parametrize(("sigma", "fitness"), [(1e-4, "loss"), (1e-3, "accuracy"), (0.01, "accuracy"), (0.3, "loss")])
def test_a_search_of_any_sigma_and_fitness_ends(sigma: float, fitness: str) -> None:
    """The search also ends if the fitness has steps or ties, or if the best length is far from one mutation."""
    phase = Phase(step="search", fitness=fitness, sigma=sigma, confirm_images=60)
    for _ in range(2):
        _, row = phase.evolve()
        if row["note"] == "no update: all members have equal fitness":
            continue
        assert max(row["search_fitness"]) == row["search_fitness"][row["search_ratios"].index(0)] or row["accepted"]
        assert all(members for members, _ in phase.pool.asked)


@pytest.mark.parametrize("step", ["lr", "ratio", "search"])
def test_the_journal_s_numbers_give_the_update(step: str) -> None:
    phase = Phase(step=step, lr=0.01, sigma=0.05)
    for _ in range(2):
        theta_D = phase.theta_D
        phase.pool.fitness["search"] = distance(phase, 3)
        outcome, row = phase.evolve()
        assert row["accepted"]
        move_D = outcome.factor * outcome.length * outcome.rate * estimate(outcome, len(theta_D))
        assert_moved(phase.theta_D, theta_D, move_D)


@pytest.mark.parametrize("sign", [1, 0, -1])
@pytest.mark.parametrize(("strategy", "fitness"), [("es", "loss"), ("best", "accuracy"), ("chain", "accuracy")])
def test_what_is_better_is_taken_only_if_images_that_did_not_choose_it_confirm_it(
    strategy: str, fitness: str, sign: int
) -> None:
    """Every descendant is better on the fitness images. On the other images it is better, equal or worse."""
    options: dict[str, Any] = {"accept": "if-better", "step": "ratio"}
    if strategy != "es":
        options = {"strategy": "random-gradients", "accept": strategy, "gradient_images": 64}
    phase = Phase(fitness=fitness, confirm=True, fitness_images=40, **options)
    theta_D, moved = phase.theta_D, distance(phase)
    phase.pool.fitness = {"fitness": moved, "confirm": lambda theta_D: sign * moved(theta_D)}
    outcome, row = phase.evolve()
    sets = phase.case_sets
    assert len(sets["confirm"]) == 560
    assert not set(sets["fitness"]) & set(sets["confirm"])
    assert row["accepted"] == (sign == 1)
    assert row["confirm_fitness_before"] == 0
    if sign == 1:
        assert row["confirm_fitness_after"] == row["parent_fitness_after"] == moved(phase.theta_D)
    else:
        assert row["confirm_fitness_after"] <= 0
        assert row["note"].startswith("not confirmed")
        assert (row["chosen_member"], row["step_ratio"]) == (None, 0.0)
        assert row["parent_fitness_after"] == row["parent_fitness_before"] == 0
        assert not outcome.weight_K.any()
        np.testing.assert_array_equal(phase.theta_D, theta_D)


def test_es_if_better_keeps_a_parent_that_the_update_would_harm() -> None:
    phase = Phase(accept="if-better", lr=5.0)
    before = phase.theta_D
    outcome, row = phase.evolve()
    assert (row["accepted"], row["step_ratio"]) == (False, 0.0)
    assert row["note"].startswith("the update is no better than the parent")
    assert row["parent_fitness_after"] == row["parent_fitness_before"] == -phase.score().loss
    assert not outcome.weight_K.any()
    np.testing.assert_array_equal(phase.theta_D, before)
    taken, _ = Phase(accept="always", lr=5.0).evolve()
    assert taken.after < taken.before


@pytest.mark.parametrize("fitness", ["loss", "accuracy"])
def test_the_best_random_gradient_becomes_the_parent_to_the_bit(fitness: str) -> None:
    phase = Phase(strategy="random-gradients", fitness=fitness, lr=0.05, low=-1.0, gradient_images=64)
    model, theta_D = phase.model, phase.theta_D
    phase.generation = 4
    outcome, row = phase.evolve()
    best = int(np.argmax(outcome.fitness_K))
    assert outcome.fitness_K[best] > outcome.before + 0.01
    assert row["accepted"]
    assert row["chosen_member"] == best
    assert row["parent_fitness_after"] == outcome.fitness_K[best]
    result = phase.score()
    assert row["parent_fitness_after"] == (-result.loss if fitness == "loss" else result.accuracy)

    # Compute the descendant from the definition of the noise, and the gradient by torch.
    gradient_D, gain = phase.pool.scales[0], np.float32(-0.05)
    assert gradient_D is not None
    u_D = noise("uniform", int(outcome.members.seed_K[best]), 0, len(theta_D))
    np.testing.assert_array_equal(phase.theta_D, theta_D + gradient_D * (gain * u_D))
    # One of 459 thousand ReLU inputs may be so near 0 that rounding changes its sign: more than ROUNDING.
    expected_D = gradient_at(theta_D, model, phase.generation, 64)
    assert np.linalg.norm(gradient_D - expected_D) < 1e-3 * np.linalg.norm(expected_D)


def gradient_at(theta_D: NDArray[Any], like: FlatModel, generation: int, images: int) -> NDArray[np.float32]:
    """Return torch's gradient of a new network on the SGD images of a phase."""
    index_N = permutation(len(SPLITS.sgd), 7, GRADIENT_CASES_OF_GENERATION + generation)[:images]
    batch = SPLITS.sgd[torch.from_numpy(index_N)]
    network = network_at(theta_D, like)
    F.cross_entropy(network(NORMALISE(batch.pixels_NHWC)), batch.labels_N).backward()
    parts = []
    for parameter in network.parameters():
        assert parameter.grad is not None
        gradient = parameter.grad.permute(0, 2, 3, 1) if parameter.dim() == 4 else parameter.grad
        parts.append(gradient.reshape(-1))
    return torch.cat(parts).numpy()


def plain_chain(
    theta_D: NDArray[np.float32], like: FlatModel, config: Any, fitness_N: NDArray[np.int64]
) -> tuple[list[int], NDArray[np.float32]]:
    """Run the article's loop: score one descendant after another; a better one becomes the parent.

    Return the accepted members and the last parent."""

    def fitness_of(theta_D: NDArray[np.float32]) -> tuple[float, float]:
        loss, accuracy = loss_and_accuracy(network_at(theta_D, like), fitness_N)
        return (-loss if config.fitness == "loss" else accuracy), 1 - accuracy

    accepted = []
    (fitness, error), gradient_D = fitness_of(theta_D), gradient_at(theta_D, like, 1, config.gradient_images)
    for member, seed in enumerate(member_seeds(7, 1, config.population)):
        u_D = config.low + (config.high - config.low) * (noise("uniform", int(seed), 0, len(theta_D)) + 1) / 2
        descendant_D = (theta_D - config.lr * error * gradient_D * u_D).astype(np.float32)
        candidate, its_error = fitness_of(descendant_D)
        assert abs(candidate - fitness) > 10 * ROUNDING or config.fitness == "accuracy"
        if candidate > fitness:
            accepted.append(member)
            theta_D, fitness, error = descendant_D, candidate, its_error
            gradient_D = gradient_at(theta_D, like, 1, config.gradient_images)
    return accepted, theta_D


@pytest.mark.parametrize("fitness", ["loss", "accuracy"])
def test_a_chain_accepts_what_the_plain_loop_accepts(fitness: str) -> None:
    phases = [
        Phase(
            strategy="random-gradients", accept="chain", wave=wave, fitness=fitness, population=16, lr=0.05, low=-1.0,
            gradient_images=64, temperature="error",
        )
        for wave in (1, 3, 16)
    ]  # fmt: skip
    start_D, fitness_N = phases[0].theta_D, draw_cases({"fitness": 100}, 600, 7, 1)["fitness"]
    accepted, theta_D = plain_chain(start_D, trained(), phases[0].config, fitness_N)
    assert 1 < len(accepted) < 16
    rows = []
    for phase in phases:
        outcome, row = phase.evolve()
        assert np.flatnonzero(outcome.weight_K).tolist() == accepted
        assert (row["accepted_members"], row["chosen_member"]) == (len(accepted), accepted[-1])
        assert_moved(phase.theta_D, start_D, theta_D - start_D, 0.05)  # some ReLUs may switch, as above
        np.testing.assert_array_equal(outcome.members.seed_K, member_seeds(7, 1, 16))
        result = phase.score()
        assert row["parent_fitness_after"] == (-result.loss if fitness == "loss" else result.accuracy)
        rows.append(row)
    assert rows[0]["images_discarded"] == 0 < rows[1]["images_discarded"] < rows[2]["images_discarded"]


@pytest.mark.parametrize("fitness", ["loss", "accuracy"])
def test_a_race_is_what_a_plain_reading_of_it_gives(fitness: str) -> None:
    """13 members are scored on a quarter of the images, the best 7 on the next one, the best 4 on the other half."""
    options: dict[str, Any] = {"strategy": "random-gradients", "lr": 0.05, "low": -1.0, "gradient_images": 64}
    phase = Phase(fitness=fitness, racing=2, population=13, fitness_images=82, **options)
    theta_D = phase.theta_D
    outcome, row = phase.evolve()
    gradient_D = phase.pool.scales[0]
    assert gradient_D is not None
    index_N = phase.case_sets["fitness"]
    alive, seen = list(range(-1, 13)), {}
    for stop in (20, 41, 82):
        for k in alive:  # member -1 is the parent, which is scored on all images
            u_D = 0.0 if k < 0 else noise("uniform", int(outcome.members.seed_K[k]), 0, len(theta_D))
            network = network_at(theta_D - np.float32(0.05) * gradient_D * u_D, phase.model)
            loss, accuracy = loss_and_accuracy(network, index_N[:stop])
            seen[k] = (-loss if fitness == "loss" else accuracy), stop
        best_first = sorted(alive[1:], key=lambda k: -seen[k][0])
        assert np.diff(sorted(seen[k][0] for k in best_first)).min() > 10 * ROUNDING or fitness == "accuracy"
        alive = [-1, *sorted(best_first[: len(alive) // 2])]
    np.testing.assert_allclose(outcome.fitness_K, [seen[k][0] for k in range(13)], rtol=ROUNDING)
    assert outcome.cases_K.tolist() == [seen[k][1] for k in range(13)]
    assert sorted(outcome.cases_K) == [20] * 6 + [41] * 3 + [82] * 4
    assert outcome.chosen == best_first[0]
    assert outcome.before == pytest.approx(seen[-1][0], rel=ROUNDING)
    assert row["images_scored"] == 82 + 13 * 20 + 7 * 21 + 4 * 41
    assert row["images_saved"] == 13 * 82 - (13 * 20 + 7 * 21 + 4 * 41)
    assert seen[best_first[0]][0] > seen[-1][0] + 10 * ROUNDING


@pytest.mark.parametrize("fitness", ["loss", "accuracy"])
@pytest.mark.parametrize("accept", ["best", "chain"])
@pytest.mark.parametrize("lr", [0.003, 500.0])
def test_early_rejection_changes_nothing_but_the_images_scored(fitness: str, accept: str, lr: float) -> None:
    """600 images take three forward passes. With the larger lr, every member is far worse than the parent."""
    phases = [
        Phase(
            strategy="random-gradients", accept=accept, fitness=fitness, early_rejection=early, lr=lr,
            low=-1.0, fitness_images=600, gradient_images=64, population=6,
        )
        for early in (True, False)
    ]  # fmt: skip
    (early, early_row), (full, full_row) = (phase.evolve() for phase in phases)
    assert phases[0].theta_D.tobytes() == phases[1].theta_D.tobytes()
    assert early.weight_K.tolist() == full.weight_K.tolist()
    assert full_row["images_saved"] == 0
    assert early_row["images_scored"] + early_row["images_saved"] == full_row["images_scored"]
    rejected = early.cases_K < 600
    np.testing.assert_array_equal(early.fitness_K[~rejected], full.fitness_K[~rejected])
    # The fitness that a member had to beat: the parent's, which earlier members of a chain may have raised.
    taken_K = np.where((full.weight_K > 0) & (accept == "chain"), full.fitness_K, full.before)
    bar_K = np.maximum.accumulate([full.before, *taken_K[:-1]])
    assert (full.fitness_K[rejected] <= bar_K[rejected]).all()
    if lr > 100:
        assert full.fitness_K.max() < full.before - 0.1
        assert rejected.all()
    else:
        assert full.after > full.before + 0.001


def test_a_chain_confirms_each_link_and_stays_the_same_for_every_wave() -> None:
    """Nearly every member is further from the start than its parent, and half of these are higher on a slope. The chain
    therefore accepts some links and rejects others. The expected links are computed from the recorded heights."""

    def chain(wave: int) -> tuple[Any, ...]:
        phase = Phase(
            strategy="random-gradients", accept="chain", wave=wave, fitness="accuracy", confirm=True,
            confirm_images=60, low=-1.0, gradient_images=64, population=30,
        )  # fmt: skip
        slope_D, heights = noise("uniform", 1, 0, len(phase.theta_D)), list[float]()

        def height(theta_D: NDArray[np.float32]) -> float:
            heights.append(float(theta_D @ slope_D))
            return heights[-1]

        phase.pool.fitness = {"fitness": distance(phase), "confirm": height}
        outcome, row = phase.evolve()
        assert [count for count, cases in phase.pool.asked if cases == "confirm"] == [2] + [1] * (len(heights) - 2)
        best = list(itertools.accumulate(heights, max))
        assert outcome.accepted == len(set(best[1:]) - {best[0]})
        assert 1 < outcome.accepted < len(heights) - 2
        assert outcome.confirm == (heights[0], best[-1])
        assert height(phase.theta_D) == best[-1]
        return phase.theta_D.tobytes(), outcome.weight_K.tolist(), outcome.confirm, row["images_scored"]

    assert chain(1) == chain(5)


@pytest.mark.parametrize("fitness", ["loss", "accuracy"])
def test_es_with_confirm_and_search_uses_three_disjoint_sets(fitness: str) -> None:
    phase = Phase(step="search", confirm=True, fitness=fitness, fitness_images=None)
    phase.pool.fitness = {"fitness": distance(phase), "search": distance(phase, 3)}
    _, row = phase.evolve()
    sets = phase.case_sets
    assert [len(index_N) for index_N in sets.values()] == [200, 200, 200]
    assert len(set(np.concatenate(list(sets.values())))) == 600
    # The evaluator's network still holds the last scored descendant, which is the candidate.
    networks = trained().module, phase.pool.evaluator.model.module
    before, after = (scored(network, on(sets["confirm"])) for network in networks)
    expected = (-before.loss, -after.loss) if fitness == "loss" else (before.accuracy, after.accuracy)
    assert (row["confirm_fitness_before"], row["confirm_fitness_after"]) == expected
    assert row["accepted"] == (expected[1] > expected[0])
    assert before.loss != after.loss


@pytest.mark.parametrize("strategy", ["es", "random-gradients"])
@pytest.mark.parametrize("kind", ["running", "batch", "recalibrate"])
def test_batchnorm_modes(strategy: str, kind: str) -> None:
    """Scoring does not change the parent's statistics. A parent that moved has the statistics that its mode defines."""
    options: dict[str, Any] = {"gradient_images": 64} if strategy == "random-gradients" else {}
    phase = Phase(strategy=strategy, batchnorm=kind, population=4, **options)
    buffers = [buffer.clone() for buffer in phase.model.buffers]
    sent: list[bool] = []
    evaluate = phase.pool.evaluate

    def watched(*arguments: Any, **named: Any) -> Any:
        scores = evaluate(*arguments, **named)
        sent.append(all(torch.equal(a, b) for a, b in zip(phase.model.buffers, buffers, strict=True)))
        return scores

    phase.pool.evaluate = watched  # type: ignore[method-assign]
    outcome, row = phase.evolve()
    assert sent
    assert all(sent)
    assert row["accepted"]
    assert outcome.after > outcome.before + 0.001 or strategy == "es"
    pairs = zip(phase.model.buffers, buffers, strict=True)
    same = [torch.equal(own, old) for own, old in pairs if own.is_floating_point()]
    result = phase.score()
    if kind == "running":
        assert all(same)
        assert outcome.after == -result.loss
    else:
        assert not any(same)
        # Compute the parent's BatchNorm statistics on the reference batch by torch in training mode.
        network = network_at(phase.theta_D, phase.model)
        for layer in network.modules():
            if isinstance(layer, torch.nn.BatchNorm2d):
                layer.reset_running_stats()
                layer.momentum = None
        with torch.no_grad():
            network.train()(NORMALISE(SPLITS.sgd[slice(0, 512)].pixels_NHWC))
        for own, expected in zip(phase.model.buffers, network.buffers(), strict=True):
            torch.testing.assert_close(own, expected)
    if kind == "recalibrate":
        assert outcome.after == -result.loss
    if kind == "batch":
        images = SPLITS.evolution[torch.from_numpy(phase.case_sets["fitness"])]
        with torch.no_grad():
            logits = network_at(phase.theta_D, phase.model).train()(NORMALISE(images.pixels_NHWC))
        assert -F.cross_entropy(logits, images.labels_N).item() == pytest.approx(outcome.after, rel=ROUNDING)


def test_batchnorm_modes_score_the_same_members_differently() -> None:
    phases = [Phase(batchnorm=kind, population=4) for kind in ("running", "batch", "recalibrate")]
    for one_K, other_K in itertools.combinations([phase.evolve()[0].fitness_K for phase in phases], 2):
        assert np.linalg.norm(one_K - other_K) > 10 * ROUNDING * np.linalg.norm(other_K)


def test_a_descendant_that_diverged_leaves_nothing_to_the_next_one() -> None:
    """In every mode, a member that is scored after one with infinite statistics gets the same score as alone."""
    for kind in ("running", "batch", "recalibrate"):
        phase = Phase(batchnorm=kind)
        phase.population.begin(("fitness",), 1)
        phase.population.broadcast()
        asked = next(phase.strategy.generation(7, 1)).members  # type: ignore[union-attr]
        alone = phase.pool.evaluate(asked[1:2])
        asked.gain_K[0] = 1e38
        both = phase.pool.evaluate(asked[0:2])
        assert not math.isfinite(both.fitness_K[0])
        assert both.fitness_K[1] == alone.fitness_K[0]


@pytest.mark.parametrize("strategy", ["es", "random-gradients"])
@pytest.mark.parametrize(("which", "moved"), [
    ("all", {"0.weight", "1.weight", "1.bias", "11.weight", "11.bias"}),
    ("no-batchnorm", {"0.weight", "11.weight", "11.bias"}),
    ("11.*", {"11.weight", "11.bias"}),
])  # fmt: skip
def test_mutate_moves_what_it_names_and_leaves_the_rest_to_the_bit(strategy: str, which: str, moved: set[str]) -> None:
    options: dict[str, Any] = {"weight_decay": 0.1} if strategy == "es" else {"gradient_images": 64}
    phase = Phase(strategy=strategy, mutate=which, **options)
    phase.pool.fitness["fitness"] = distance(phase)
    before = {name: parameter.clone() for name, parameter in phase.model.module.named_parameters()}
    _, row = phase.evolve()
    assert row["accepted"]
    changed = {name for name, now in phase.model.module.named_parameters() if not torch.equal(now, before[name])}
    assert changed & {"0.weight", "1.weight", "1.bias", "11.weight", "11.bias"} == moved
    assert len(phase.pool.broadcasts) <= 2


def test_mutate_that_names_nothing_is_refused() -> None:
    with pytest.raises(InputError, match=r"evolution\.mutate 'layer9\.\*': matches no parameter"):
        Phase(mutate="layer9.*")


def test_relative_sigma_is_times_the_rms_of_each_tensor() -> None:
    phase = Phase(sigma_scale="relative", sigma=0.1, lr=0.05)
    model, theta_D = phase.model, phase.theta_D.astype(np.float64)
    parts = [view.numpy().astype(np.float64).copy() for view in model.views(torch.from_numpy(theta_D.copy()))]
    outcome, row = phase.evolve()
    scale_T = phase.pool.scales[0]
    assert scale_T is not None
    np.testing.assert_allclose(scale_T, [np.sqrt((part**2).mean()) for part in parts], rtol=1e-6)
    scale_D = model.spread(torch.from_numpy(scale_T)).numpy().astype(np.float64)
    index_N = phase.case_sets["fitness"]
    noise_KD = np.stack([noise("uniform", int(seed), 0, len(theta_D)) for seed in outcome.members.seed_K])
    for k in (0, 5):
        loss, _ = loss_and_accuracy(network_at(theta_D + scale_D * 0.1 * noise_KD[k], model), index_N)
        assert -loss == pytest.approx(outcome.fitness_K[k], rel=ROUNDING)
    shaped_K = (outcome.fitness_K - outcome.fitness_K.mean()) / outcome.fitness_K.std()
    expected_D = 0.05 / (12 * 0.1) * scale_D * (shaped_K @ noise_KD)
    assert_moved(phase.theta_D, theta_D, expected_D)
    mutation = 0.1 * np.linalg.norm(scale_D) / 3**0.5
    assert row["step_ratio"] == pytest.approx(np.linalg.norm(expected_D) / mutation, rel=ROUNDING)


@pytest.mark.parametrize(("accept", "low"), [("best", 0.0), ("best", -1.0), ("chain", 0.0)])
def test_the_step_ratio_of_a_random_gradient_is_one_and_of_a_chain_its_whole_way(accept: str, low: float) -> None:
    phase = Phase(strategy="random-gradients", accept=accept, lr=0.01, low=low, gradient_images=64)
    theta_D = phase.theta_D.astype(np.float64)
    phase.pool.fitness["fitness"] = rising()
    _, row = phase.evolve()
    gradient_D = np.float64(phase.pool.scales[0])
    mutation = 0.01 * np.linalg.norm(gradient_D) / 3**0.5  # u from U(0, 1), as from U(-1, 1), has a mean square of 1/3
    assert row["step_ratio"] == pytest.approx(np.linalg.norm(phase.theta_D - theta_D) / mutation, rel=ROUNDING)
    if accept == "best":
        # Allow four standard deviations. The ratio is the root of a mean of 3 u^2, weighted by gradient^2. 3 u^2 has
        # mean 1 and standard deviation sqrt(0.8), and the root halves the deviation.
        deviation = 0.5 * 0.8**0.5 * np.linalg.norm(gradient_D**2) / np.sum(gradient_D**2)
        assert row["step_ratio"] == pytest.approx(1, abs=4 * deviation)
    else:
        assert row["accepted_members"] == 12
        assert row["step_ratio"] > 2


@pytest.mark.parametrize("kind", ["running", "batch", "recalibrate"])
def test_the_gradient_is_of_the_function_that_is_scored(kind: str) -> None:
    """A short step against the gradient lowers the loss that this mode scores by the amount that the gradient gives."""
    images = SPLITS.sgd[slice(0, 256)]  # the same images for score, gradient and BatchNorm's statistics
    phase = Phase(
        replace(SPLITS, sgd=images, evolution=images), strategy="random-gradients", batchnorm=kind,
        fitness_images=256, gradient_images=256, lr=1e-4, high=1.0, low=0.999,
    )  # fmt: skip
    buffers = [buffer.clone() for buffer in phase.model.buffers]
    outcome, row = phase.evolve()
    gradient_D = phase.pool.scales[0]
    assert gradient_D is not None
    expected = 1e-4 * 0.9995 * float(np.square(gradient_D.astype(np.float64)).sum())
    assert row["accepted"]
    assert outcome.after - outcome.before == pytest.approx(expected, rel=0.05)
    for own, sent in zip(buffers, phase.pool.broadcasts[0].buffers, strict=True):
        np.testing.assert_array_equal(own.numpy(), sent)


@pytest.mark.parametrize("split", ["sgd", "evolution"])
def test_gradient_images_are_drawn_anew_for_each_generation(split: str) -> None:
    """With the evolution split, they are drawn from the images that score the generation."""
    phase = Phase(strategy="random-gradients", gradient_split=split, gradient_images=50, fitness_images=80)
    images = SPLITS.sgd if split == "sgd" else SPLITS.evolution
    drawn = []
    for generation in (1, 2):
        theta_D, scales = phase.theta_D, len(phase.pool.scales)
        phase.evolve()
        index_N = np.arange(600) if split == "sgd" else phase.case_sets["fitness"]
        index_N = index_N[permutation(len(index_N), 7, GRADIENT_CASES_OF_GENERATION + generation)[:50]]
        batch = images[torch.from_numpy(index_N)]
        network = network_at(theta_D, trained())
        F.cross_entropy(network(NORMALISE(batch.pixels_NHWC)), batch.labels_N).backward()
        expected_D = FlatModel(network, CPU).gradient().numpy()
        gradient_D = phase.pool.scales[scales]
        assert gradient_D is not None
        assert np.linalg.norm(gradient_D - expected_D) < 1e-3 * np.linalg.norm(expected_D)
        drawn.append(set(index_N.tolist()))
    assert len(drawn[0] & drawn[1]) < 40


@pytest.mark.parametrize(("options", "message"), [
    ({"fitness_images": 601}, "evolution.fitness_images (601) do not fit data.evolution_images (600)"),
    ({"fitness_images": 599, "confirm": True},
     "evolution.fitness_images (599) and evolution.confirm_images (the rest) to confirm do not fit "
     "data.evolution_images (600)"),
    ({"fitness_images": 100, "confirm": True, "step": "search", "confirm_images": 251},
     "evolution.fitness_images (100) and evolution.confirm_images (251) to search and confirm do not fit "
     "data.evolution_images (600)"),
    ({"strategy": "random-gradients", "gradient_images": 601},
     "evolution.gradient_images (601) is larger than the SGD split (600)"),
    ({"strategy": "random-gradients", "gradient_images": 101, "gradient_split": "evolution"},
     "evolution.gradient_images (101) is larger than"),
])  # fmt: skip
def test_images_that_are_not_there_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError) as caught:
        Phase(**{"fitness_images": 100} | options)
    assert message in str(caught.value)


def test_images_are_drawn_anew_for_each_generation() -> None:
    first, again, second = (draw_cases({"fitness": 100}, 500, 3, generation)["fitness"] for generation in (5, 5, 10))
    assert first.tolist() == again.tolist() != second.tolist()
    assert len(set(first)) == 100
    assert draw_cases({"fitness": 500}, 500, 3, 5)["fitness"].tolist() == list(range(500))
