"""Evolve phases against independent references: dense NumPy, a plain loop, torch's own network."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from local import CPU, NORMALISE, PARENT, SPLITS, Phase, scored, trained
from numpy.typing import NDArray
from scipy.stats import rankdata

from spartan_ray.config import InputError
from spartan_ray.data import Images, permutation
from spartan_ray.evolve import GRADIENT_IMAGES_OF_GENERATION, image_sets
from spartan_ray.model import FlatModel, initial_model
from spartan_ray.noise import member_seeds, noise
from spartan_ray.strategies.base import WHOLE


def network_at(theta_D: NDArray[np.floating[Any]], like: FlatModel) -> torch.nn.Module:
    """A network of its own at these parameters, with the statistics of another."""
    model = FlatModel(initial_model(PARENT, 10, 5)[0], CPU)
    model.load_buffers(like.buffers)
    model.theta_D.copy_(torch.from_numpy(theta_D.astype(np.float32)))
    return model.module.eval()


def loss_and_accuracy(network: torch.nn.Module, index_N: NDArray[np.int64]) -> tuple[float, float]:
    images = SPLITS.evolution[torch.from_numpy(index_N)]
    pixels = images.pixels_NHWC.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(values)[:, None, None] for values in (SPLITS.mean_C, SPLITS.std_C))
    with torch.no_grad():
        logits = network((pixels - mean) / std)
    return F.cross_entropy(logits, images.labels_N).item(), (logits.argmax(1) == images.labels_N).double().mean().item()


def confident_parent() -> FlatModel:
    """A parent whose loss differs so much between descendants that float32's rounding is nothing to it."""
    model = FlatModel(initial_model(PARENT, 10, 0)[0], CPU)
    list(model.module.parameters())[-2].data *= 100
    return model


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("shaping", ["zscore", "centered-rank"])
@pytest.mark.parametrize("fitness", ["loss", "accuracy"])
def test_es_is_the_article_s_formula_computed_densely(mirrored: bool, shaping: str, fitness: str) -> None:
    """theta + lr / (K sigma) * sum_k z_k noise_k with a K x D matrix of noise and torch's own loss."""
    sigma, lr = 0.05, 0.02
    phase = Phase(confident_parent(), mirrored=mirrored, shaping=shaping, fitness=fitness, sigma=sigma, lr=lr)
    theta_D = phase.theta_D.astype(np.float64)
    outcome, row = phase.evolve()
    update_D = phase.theta_D - theta_D

    members = outcome.members
    noise_KD = np.stack([noise("uniform", int(seed), 0, len(theta_D)).astype(np.float64) for seed in members.seed_K])
    noise_KD *= np.sign(members.gain_K)[:, None]
    if mirrored:
        np.testing.assert_array_equal(noise_KD[0::2], -noise_KD[1::2])
    index_N = phase.evolver.image_sets["fitness"]
    results = [loss_and_accuracy(network_at(theta_D + sigma * n_D, phase.model), index_N) for n_D in noise_KD]
    rewards = np.array([-loss if fitness == "loss" else accuracy for loss, accuracy in results])
    np.testing.assert_allclose(outcome.fitness_K, rewards, rtol=1e-4)
    if shaping == "zscore":
        weights = (rewards - rewards.mean()) / rewards.std()
    else:
        weights = (rankdata(rewards) - 1) / (len(rewards) - 1) - 0.5
    expected_D = lr / (len(rewards) * sigma) * (weights @ noise_KD)
    # theta is float32, which rounds the update by up to 1e-7 of theta.
    assert np.linalg.norm(update_D - expected_D) <= 1e-5 * np.linalg.norm(expected_D) + 1e-7 * np.linalg.norm(theta_D)
    ratio = np.linalg.norm(expected_D) / (sigma * np.linalg.norm(noise_KD[0]))
    assert abs(row["step_ratio"] / ratio - 1) < 0.02


@pytest.mark.parametrize("optimizer", ["sgd", "momentum", "adam"])
def test_optimizers_of_the_estimate_are_the_textbook_s_and_keep_their_state(optimizer: str) -> None:
    lr, decay, sigma = 0.01, 0.1, 0.02
    phase = Phase(optimizer=optimizer, lr=lr, weight_decay=decay, sigma=sigma)
    first = second = np.zeros(len(phase.theta_D))
    for t in (1, 2, 3):
        theta_D = phase.theta_D.astype(np.float64)
        outcome, _ = phase.evolve()
        gradient_D = decay * theta_D - sum(
            weight * gain * noise("uniform", int(seed), 0, len(theta_D)).astype(np.float64)
            for weight, gain, seed in zip(outcome.weight_K, outcome.members.gain_K, outcome.members.seed_K, strict=True)
        )
        if optimizer == "adam":
            first, second = 0.9 * first + 0.1 * gradient_D, 0.999 * second + 0.001 * gradient_D**2
            step_D = first / (1 - 0.9**t) / (np.sqrt(second / (1 - 0.999**t)) + 1e-8)
        else:
            first = (0.9 * first if optimizer == "momentum" else 0) + gradient_D
            step_D = first
        np.testing.assert_allclose(phase.theta_D, theta_D - lr * step_D, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("population", [50, 1000])
def test_step_ratio_holds_the_norm_of_the_update(population: int) -> None:
    phase = Phase(population=population, fitness_images=20, step="ratio", step_ratio=0.3)
    theta_D = phase.theta_D.astype(np.float64)
    outcome, row = phase.evolve()
    assert row["accepted"]
    mutation = 0.01 * np.linalg.norm(noise("uniform", int(outcome.members.seed_K[0]), 0, len(theta_D)))
    assert abs(np.linalg.norm(phase.theta_D - theta_D) / (0.3 * mutation) - 1) < 0.01
    assert abs(row["step_ratio"] / 0.3 - 1) < 0.001


def test_step_search_takes_the_best_length_on_images_that_did_not_choose_the_direction() -> None:
    phase = Phase(step="search", fitness_images=150, confirm_images=200, sigma=0.05)
    parent = phase.model.theta_D.clone()
    _, row = phase.evolve()
    sets = phase.evolver.image_sets
    assert {name: len(index_N) for name, index_N in sets.items()} == {"fitness": 150, "search": 200}
    assert not set(sets["fitness"]) & set(sets["search"])
    tried = dict(zip(row["search_ratios"], row["search_fitness"], strict=True))
    assert row["search_ratios"][0] == 0
    assert tried[0.0] == -scored(network_at(parent.numpy(), phase.model), on(sets["search"])).loss
    best = max(tried, key=lambda ratio: tried[ratio])
    assert -phase.score("search").loss == tried[best] > tried[0.0]
    assert abs(row["step_ratio"] / best - 1) < 1e-3


def on(index_N: NDArray[np.int64]) -> Images:
    return SPLITS.evolution[torch.from_numpy(index_N)]


@pytest.mark.parametrize(("sigma", "fitness"), [(1e-4, "loss"), (1e-3, "accuracy"), (0.01, "accuracy"), (0.3, "loss")])
def test_a_search_of_any_sigma_and_fitness_ends(sigma: float, fitness: str) -> None:
    """Steps, ties, and a best length that is far from one mutation."""
    phase = Phase(step="search", fitness=fitness, sigma=sigma, confirm_images=60)
    for _ in range(4):
        _, row = phase.evolve()
        if row["note"] == "no update: all members have equal fitness":
            continue
        assert max(row["search_fitness"]) == row["search_fitness"][row["search_ratios"].index(0)] or row["accepted"]
        assert all(members for members, _ in phase.pool.asked)


@pytest.mark.parametrize("step", ["lr", "ratio", "search"])
def test_the_journal_s_numbers_give_the_update(step: str) -> None:
    phase = Phase(step=step, lr=0.01, sigma=0.05)
    for _ in range(2):
        theta_D = phase.theta_D.astype(np.float64)
        outcome, _ = phase.evolve()
        estimate_D = sum(
            weight * gain * noise("uniform", int(seed), 0, len(theta_D)).astype(np.float64)
            for weight, gain, seed in zip(outcome.weight_K, outcome.members.gain_K, outcome.members.seed_K, strict=True)
        )
        move_D = outcome.factor * outcome.length * outcome.rate * estimate_D
        assert np.linalg.norm(phase.theta_D - theta_D - move_D) < 1e-4 * np.linalg.norm(move_D)


def test_es_that_is_not_confirmed_leaves_the_parent() -> None:
    """The update is better on the 20 images that made it and, for this parent, worse on 580 others."""
    phase = Phase(
        trained(6), confirm=True, fitness_images=20, sigma=0.05, step="ratio", step_ratio=0.3, accept="if-better"
    )
    theta_D = phase.theta_D
    refused = 0
    for _ in range(6):
        _, row = phase.evolve()
        if row["confirm_fitness_after"] is not None:
            assert row["accepted"] == (row["confirm_fitness_after"] > row["confirm_fitness_before"])
            refused += not row["accepted"]
        if not row["accepted"]:
            np.testing.assert_array_equal(phase.theta_D, theta_D)
        theta_D = phase.theta_D
    assert refused


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
    assert row["accepted"]
    assert row["chosen_member"] == best
    assert row["parent_fitness_after"] == outcome.fitness_K[best] > row["parent_fitness_before"]
    result = phase.score()
    assert row["parent_fitness_after"] == (-result.loss if fitness == "loss" else result.accuracy)

    # The descendant from torch's gradient and the definition of the noise.
    gradient_D = gradient_at(theta_D, model, phase.generation, 64)
    u_D = noise("uniform", int(outcome.members.seed_K[best]), 0, len(theta_D))
    np.testing.assert_allclose(phase.theta_D, theta_D - 0.05 * gradient_D * u_D, atol=1e-6)
    assert abs(row["step_ratio"] - 1) < 0.05


def gradient_at(theta_D: NDArray[Any], like: FlatModel, generation: int, images: int) -> NDArray[np.float32]:
    """The gradient, by torch, of a network of its own on the phase's SGD images."""
    index_N = permutation(len(SPLITS.sgd), 7, GRADIENT_IMAGES_OF_GENERATION + generation)[:images]
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
    """The article's loop as it stands: one descendant after another, a better one becomes the parent."""

    def fitness_of(theta_D: NDArray[np.float32]) -> tuple[float, float]:
        loss, accuracy = loss_and_accuracy(network_at(theta_D, like), fitness_N)
        return (-loss if config.fitness == "loss" else accuracy), 1 - accuracy

    accepted = []
    (fitness, error), gradient_D = fitness_of(theta_D), gradient_at(theta_D, like, 1, config.gradient_images)
    for member, seed in enumerate(member_seeds(7, 1, config.population)):
        u_D = config.low + (config.high - config.low) * (noise("uniform", int(seed), 0, len(theta_D)) + 1) / 2
        descendant_D = (theta_D - config.lr * error * gradient_D * u_D).astype(np.float32)
        candidate, its_error = fitness_of(descendant_D)
        if candidate > fitness:
            accepted.append(member)
            theta_D, fitness, error = descendant_D, candidate, its_error
            gradient_D = gradient_at(theta_D, like, 1, config.gradient_images)
    return accepted, theta_D


@pytest.mark.parametrize("fitness", ["loss", "accuracy"])
@pytest.mark.parametrize("wave", [1, 3, 16])
def test_a_chain_accepts_what_the_plain_loop_accepts(fitness: str, wave: int) -> None:
    phase = Phase(
        strategy="random-gradients", accept="chain", wave=wave, fitness=fitness, population=16, lr=0.1, low=-1.0,
        gradient_images=64, temperature="error",
    )  # fmt: skip
    accepted, theta_D = plain_chain(
        phase.theta_D, trained(), phase.config, image_sets({"fitness": 100}, 600, 7, 1)["fitness"]
    )
    outcome, row = phase.evolve()
    assert 1 < len(accepted) < 16
    assert np.flatnonzero(outcome.weight_K).tolist() == accepted
    assert (row["accepted_members"], row["chosen_member"]) == (len(accepted), accepted[-1])
    np.testing.assert_allclose(phase.theta_D, theta_D, atol=1e-5)
    np.testing.assert_array_equal(outcome.members.seed_K, member_seeds(7, 1, 16))
    if wave == 1:
        assert row["images_discarded"] == 0
    result = phase.score()
    assert row["parent_fitness_after"] == (-result.loss if fitness == "loss" else result.accuracy)


@pytest.mark.parametrize("fitness", ["loss", "accuracy"])
def test_a_race_is_what_a_plain_reading_of_it_gives(fitness: str) -> None:
    """13 members on a quarter of the images, the better 7 on the next quarter, the best 4 on the other half."""
    options: dict[str, Any] = {"strategy": "random-gradients", "lr": 0.1, "low": -1.0, "gradient_images": 64}
    phase = Phase(trained(1), fitness=fitness, racing=2, population=13, fitness_images=80, **options)
    theta_D = phase.theta_D
    outcome, row = phase.evolve()
    gradient_D = phase.pool.scales[0]
    assert gradient_D is not None
    index_N = phase.evolver.image_sets["fitness"]
    alive, seen = list(range(-1, 13)), {}
    for stop in (20, 40, 80):
        for k in alive:  # member -1 is the parent, which is scored on all
            u_D = 0.0 if k < 0 else noise("uniform", int(outcome.members.seed_K[k]), 0, len(theta_D))
            network = network_at(theta_D - np.float32(0.1) * gradient_D * u_D, phase.model)
            loss, accuracy = loss_and_accuracy(network, index_N[:stop])
            seen[k] = (-loss if fitness == "loss" else accuracy), stop
        best_first = sorted(alive[1:], key=lambda k: -seen[k][0])
        alive = [-1, *sorted(best_first[: (len(alive)) // 2])]
    np.testing.assert_allclose(outcome.fitness_K, [seen[k][0] for k in range(13)], rtol=1e-5)
    assert outcome.images_K.tolist() == [seen[k][1] for k in range(13)]
    assert sorted(outcome.images_K) == [20] * 6 + [40] * 3 + [80] * 4
    assert outcome.chosen == max(np.flatnonzero(outcome.images_K == 80).tolist(), key=lambda k: seen[k][0])
    assert abs(outcome.before - seen[-1][0]) < 1e-5
    assert row["images_scored"] == 80 + 13 * 20 + 7 * 20 + 4 * 40
    assert row["images_saved"] == 13 * 80 - (13 * 20 + 7 * 20 + 4 * 40)
    assert max(seen[k][0] for k in range(13)) > seen[-1][0]


@pytest.mark.parametrize("fitness", ["loss", "accuracy"])
@pytest.mark.parametrize("accept", ["best", "chain"])
@pytest.mark.parametrize("lr", [0.1, 500.0])
def test_early_rejection_changes_nothing_but_the_images_scored(fitness: str, accept: str, lr: float) -> None:
    """600 images are three passes; at the larger step every member is far worse than the parent."""
    phases = [
        Phase(
            trained(6), strategy="random-gradients", accept=accept, fitness=fitness, early_rejection=early, lr=lr,
            low=-1.0, fitness_images=600, gradient_images=64,
        )
        for early in (True, False)
    ]  # fmt: skip
    (early, early_row), (full, full_row) = (phase.evolve() for phase in phases)
    assert phases[0].theta_D.tobytes() == phases[1].theta_D.tobytes()
    assert early.weight_K.tolist() == full.weight_K.tolist()
    assert full_row["images_saved"] == 0
    assert early_row["images_scored"] + early_row["images_saved"] == full_row["images_scored"]
    rejected = early.images_K < 600
    np.testing.assert_array_equal(early.fitness_K[~rejected], full.fitness_K[~rejected])
    assert (full.fitness_K[rejected] <= full.before).all()
    if lr > 100:
        assert not full_row["accepted"]
        assert early.images_K.sum() < 0.5 * full.images_K.sum()
    else:
        assert full_row["accepted"]


@pytest.mark.parametrize(("epochs", "confirmed"), [(3, True), (6, False)])
@pytest.mark.parametrize("population", [5, 13])
def test_a_winner_is_taken_only_if_images_that_did_not_choose_it_confirm_it(
    epochs: int, confirmed: bool, population: int
) -> None:
    """On 40 images some member is better than each of these parents; on 560 others, of the first alone."""
    phase = Phase(
        trained(epochs), strategy="random-gradients", fitness="accuracy", lr=0.1, low=-1.0, fitness_images=40,
        confirm=True, gradient_images=64, population=population,
    )  # fmt: skip
    theta_D = phase.theta_D
    outcome, row = phase.evolve()
    sets = phase.evolver.image_sets
    assert len(sets["confirm"]) == 560
    assert not set(sets["fitness"]) & set(sets["confirm"])
    assert outcome.fitness_K.max() > outcome.before
    assert row["confirm_fitness_before"] == scored(trained(epochs).module, on(sets["confirm"])).accuracy
    assert (row["confirm_fitness_after"] > row["confirm_fitness_before"]) == row["accepted"] == confirmed
    if confirmed:
        assert row["confirm_fitness_after"] == phase.score("confirm").accuracy
    else:
        assert row["note"].startswith("not confirmed")
        assert row["chosen_member"] is None
        np.testing.assert_array_equal(phase.theta_D, theta_D)


def test_a_chain_confirms_each_link_and_stays_the_same_for_every_wave() -> None:
    """Links are refused as well as taken, against a plain reading of what was asked."""
    ends = []
    for wave in (1, 5):
        phase = Phase(
            strategy="random-gradients", accept="chain", wave=wave, fitness="accuracy", lr=0.1, low=-1.0,
            fitness_images=60, confirm=True, confirm_images=60, gradient_images=64, population=30,
        )  # fmt: skip
        evaluate, pairs = phase.pool.evaluate, list[list[float]]()

        def watched(members: Any, images: Any = "fitness", bar: float = -math.inf, part: Any = WHOLE) -> Any:
            scores = evaluate(members, images, bar, part)  # noqa: B023
            if images == "confirm":
                pairs.append(scores.accuracy_K.tolist())  # noqa: B023
            return scores

        phase.pool.evaluate = watched  # type: ignore[method-assign]
        outcome, row = phase.evolve()
        ends.append((phase.theta_D.tobytes(), outcome.weight_K.tolist(), outcome.confirm, row["images_scored"]))
        start, first = pairs[0]
        best, taken = start, 0
        for candidate in [first, *(pair[0] for pair in pairs[1:])]:
            if candidate > best:
                best, taken = candidate, taken + 1
        assert outcome.accepted == taken > 1
        assert len(pairs) > taken
        assert outcome.confirm == (start, best)
        assert phase.score("confirm").accuracy == best
    assert ends[0] == ends[1]


def test_es_with_confirm_and_search_uses_three_disjoint_sets() -> None:
    phase = Phase(step="search", confirm=True, fitness_images=None, sigma=0.05)
    _, row = phase.evolve()
    sets = list(phase.evolver.image_sets.values())
    assert [len(index_N) for index_N in sets] == [200, 200, 200]
    assert len(set(np.concatenate(sets))) == 600
    assert row["accepted"]
    assert row["confirm_fitness_after"] == -phase.score("confirm").loss


@pytest.mark.parametrize("strategy", ["es", "random-gradients"])
@pytest.mark.parametrize("kind", ["running", "batch", "recalibrate"])
def test_batchnorm_modes(strategy: str, kind: str) -> None:
    """Scoring leaves the parent's statistics; a parent that moved has those that belong to it."""
    options: dict[str, Any] = {"lr": 0.01, "gradient_images": 64} if strategy == "random-gradients" else {}
    phase = Phase(strategy=strategy, batchnorm=kind, **options)
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
    same = [torch.equal(own, old) for own, old in zip(phase.model.buffers, buffers, strict=True)]
    result = phase.score()
    if kind == "running":
        assert all(same)
        assert outcome.after == -result.loss
    else:
        assert not any(same)
        # BatchNorm's statistics of the parent on the reference batch, by torch in training mode.
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
        images = SPLITS.evolution[torch.from_numpy(phase.evolver.image_sets["fitness"])]
        with torch.no_grad():
            logits = network_at(phase.theta_D, phase.model).train()(NORMALISE(images.pixels_NHWC))
        assert abs(-F.cross_entropy(logits, images.labels_N).item() - outcome.after) < 1e-5


def test_batchnorm_modes_score_the_same_members_differently() -> None:
    fitness = {kind: Phase(batchnorm=kind).evolve()[0].fitness_K for kind in ("running", "batch", "recalibrate")}
    assert not np.isclose(fitness["running"], fitness["batch"], rtol=1e-4).any()
    assert not np.isclose(fitness["running"], fitness["recalibrate"], rtol=1e-4).any()
    assert not np.isclose(fitness["batch"], fitness["recalibrate"], rtol=1e-4).any()


def test_a_descendant_that_diverged_leaves_nothing_to_the_next_one() -> None:
    """In every mode a member after one with infinite statistics scores as it does alone."""
    for kind in ("running", "batch", "recalibrate"):
        phase = Phase(batchnorm=kind)
        phase.evolve()
        members = phase.evolver.strategy.phase(7, 1)
        asked = next(members).members  # type: ignore[union-attr]
        alone = phase.pool.evaluate(asked[1:2])
        asked.gain_K[0] = 1e38
        both = phase.pool.evaluate(asked[0:2])
        assert not math.isfinite(both.loss_K[0])
        assert both.loss_K[1] == alone.loss_K[0]


@pytest.mark.parametrize("strategy", ["es", "random-gradients"])
@pytest.mark.parametrize(("which", "moved"), [
    ("all", {"0.weight", "1.weight", "1.bias", "11.weight", "11.bias"}),
    ("no-batchnorm", {"0.weight", "11.weight", "11.bias"}),
    ("11.*", {"11.weight", "11.bias"}),
])  # fmt: skip
def test_mutate_moves_what_it_names_and_leaves_the_rest_to_the_bit(strategy: str, which: str, moved: set[str]) -> None:
    options: dict[str, Any] = {"weight_decay": 0.1} if strategy == "es" else {"gradient_images": 64, "lr": 0.01}
    phase = Phase(strategy=strategy, mutate=which, **options)
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
    index_N = phase.evolver.image_sets["fitness"]
    noise_KD = np.stack([noise("uniform", int(seed), 0, len(theta_D)) for seed in outcome.members.seed_K])
    for k in (0, 5):
        loss, _ = loss_and_accuracy(network_at(theta_D + scale_D * 0.1 * noise_KD[k], model), index_N)
        assert abs(-loss / outcome.fitness_K[k] - 1) < 1e-4
    shaped_K = (outcome.fitness_K - outcome.fitness_K.mean()) / outcome.fitness_K.std()
    expected_D = 0.05 / (12 * 0.1) * scale_D * (shaped_K @ noise_KD)
    np.testing.assert_allclose(phase.theta_D - theta_D, expected_D, atol=1e-6)
    mutation = np.linalg.norm(scale_D * 0.1 * noise_KD[0])
    assert abs(row["step_ratio"] * mutation / np.linalg.norm(expected_D) - 1) < 0.05


def test_the_step_ratio_of_a_random_gradient_from_zero_to_one_is_one_and_of_a_chain_its_whole_way() -> None:
    options: dict[str, Any] = {"strategy": "random-gradients", "lr": 0.01, "gradient_images": 64}
    _, row = Phase(**options).evolve()
    assert row["accepted"]
    assert abs(row["step_ratio"] - 1) < 0.02
    phase = Phase(**options, accept="chain")
    theta_D = phase.theta_D.astype(np.float64)
    outcome, row = phase.evolve()
    assert outcome.accepted > 5
    mutation_D = 0.01 * gradient_at(theta_D, trained(), 1, 64) * (noise("uniform", 5, 0, len(theta_D)) + 1) / 2
    assert abs(row["step_ratio"] * np.linalg.norm(mutation_D) / np.linalg.norm(phase.theta_D - theta_D) - 1) < 0.02


@pytest.mark.parametrize("kind", ["running", "batch", "recalibrate"])
def test_the_gradient_is_of_the_function_that_is_scored(kind: str) -> None:
    """A short step against it lowers the loss, as the members of this mode measure it, as the gradient says."""
    phase = Phase(
        strategy="random-gradients", batchnorm=kind, gradient_split="evolution", fitness_images=200, lr=1e-4, high=1.0,
        low=0.999,
    )  # fmt: skip
    buffers = [buffer.clone() for buffer in phase.model.buffers]
    outcome, row = phase.evolve()
    gradient_D = phase.pool.scales[0]
    assert gradient_D is not None
    expected = 1e-4 * 0.9995 * float(np.square(gradient_D.astype(np.float64)).sum())
    assert row["accepted"]
    # The statistics of the fitness images stand for those of the reference images.
    assert abs((outcome.after - outcome.before) / expected - 1) < (0.3 if kind == "recalibrate" else 0.05)
    for own, sent in zip(buffers, phase.pool.broadcasts[0].buffers, strict=True):
        np.testing.assert_array_equal(own.numpy(), sent)


@pytest.mark.parametrize("split", ["sgd", "evolution"])
def test_gradient_images_are_drawn_anew_for_each_generation(split: str) -> None:
    phase = Phase(strategy="random-gradients", gradient_split=split, gradient_images=50)
    drawn = []
    for _ in range(2):
        phase.evolve()
        drawn.append({bytes(pixels.numpy()) for pixels in phase.evolver.gradient_images.pixels_NHWC})
    assert len(drawn[0] & drawn[1]) < 40
    if split == "evolution":
        fitness = on(phase.evolver.image_sets["fitness"])
        assert drawn[1] <= {bytes(pixels.numpy()) for pixels in fitness.pixels_NHWC}


def test_gradient_images_of_the_evolution_split_have_all_chosen() -> None:
    phase = Phase(
        strategy="random-gradients", gradient_split="evolution", confirm=True, fitness_images=80, gradient_images=80
    )
    phase.evolve()
    fitness = on(phase.evolver.image_sets["fitness"])
    chosen = [sorted(map(bytes, images.pixels_NHWC.numpy())) for images in (fitness, phase.evolver.gradient_images)]
    assert chosen[0] == chosen[1]


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
    first, again, second = (image_sets({"fitness": 100}, 500, 3, generation)["fitness"] for generation in (5, 5, 10))
    assert first.tolist() == again.tolist() != second.tolist()
    assert len(set(first)) == 100
    assert image_sets({"fitness": 500}, 500, 3, 5)["fitness"].tolist() == list(range(500))
