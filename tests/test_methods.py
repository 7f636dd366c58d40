"""Tests of methods that make large populations worthwhile: few parameters, subspaces, own cases per pair, and several
generations per phase. Each is compared with its formula in NumPy, and gives the same bits on workers and in this
process."""

from __future__ import annotations

import math
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from test_population import INPUTS_NI, TARGETS_N, WithLoss, likelihood, network
from test_stack import Close, evaluator
from torch import nn
from whole_runs import change, metrics, run_here, same_result

from spartan_ray import EvolutionStrategies, InputError, Population, RandomGradients
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.mutate import moved_parameters
from spartan_ray.engine.strategies.es import adaptation
from spartan_ray.engine.strategies.requests import Members
from spartan_ray.noise.contract import RMS, member_seeds, noise
from spartan_ray.report.reading import read_run
from spartan_ray.report.tables import final_table
from spartan_ray.run.config import Config
from spartan_ray.run.journal import read_journal
from spartan_ray.run.loading import configuration, load_config
from spartan_ray.run.replay import Replay
from spartan_ray.run.setup import make_strategy
from spartan_ray.vision.averaging import Average
from spartan_ray.vision.classification import recalibrate
from spartan_ray.vision.config import Parent
from spartan_ray.vision.models import build_model

CPU = torch.device("cpu")
Vector = NDArray[np.float64]


def flat(net: nn.Module, mutate: str = "all") -> FlatModel:
    return FlatModel(net, CPU, mutate=mutate)


def vector(net: nn.Module) -> Vector:
    theta_D: Vector = flat(net).theta_D.numpy().astype(np.float64)
    return theta_D


def fitness_at(theta_D: Vector, case_N: NDArray[np.int64]) -> float:
    """Return the fitness of the network with these parameters, computed by torch alone."""
    net = network().eval()
    with torch.no_grad():
        flat(net).theta_D.copy_(torch.from_numpy(theta_D))
        return float(likelihood(net, torch.from_numpy(case_N)).double().mean())


def drawn(available: int, *key: int) -> NDArray[np.int64]:
    """Return the permutation that sorts the first words of NumPy's own Philox generator."""
    return np.argsort(np.random.Philox(key=np.array(key, np.uint64)).random_raw(available), kind="stable")


def zscores(fitness_K: Vector) -> Vector:
    shaped_K: Vector = (fitness_K - fitness_K.mean()) / fitness_K.std()
    return shaped_K


@pytest.mark.parametrize(("mutate", "size"), [
    ("batchnorm", 9600),
    ("classifier", 5130),
    ("biases", 4810),
    ("batchnorm,classifier", 14730),
    ("batchnorm, biases", 9610),
    ("layer4.*.conv?.weight,fc.bias", 8257546),
    ("no-batchnorm", 11181642 - 9600),
    ("all", 11181642),
])  # fmt: skip
def test_groups_and_patterns_say_what_is_moved(mutate: str, size: int) -> None:
    with torch.device("meta"):
        module = build_model(Parent(), 10)
    moved = moved_parameters(module, mutate)
    assert sum(parameter.numel() for parameter in moved.values()) == size
    assert list(moved) == [name for name, _ in module.named_parameters() if name in moved]


def test_what_matches_nothing_is_said_by_itself() -> None:
    with pytest.raises(InputError, match=r"mutate 'layer9\.\*': matches no parameter \(such as 0\.weight or 3\.bias\)"):
        moved_parameters(network(), "batchnorm,layer9.*")


@pytest.mark.parametrize("mutate", ["batchnorm", "3.*", "biases"])
def test_noise_is_as_long_as_what_is_moved_and_the_rest_stays(mutate: str) -> None:
    net = network()
    before = {name: parameter.detach().clone() for name, parameter in net.named_parameters()}
    chosen = moved_parameters(net, mutate)
    theta_D = flat(network(), mutate).theta_D.numpy().copy()
    population = Population(net, WithLoss(), mutate=mutate, fitness_cases=60)
    outcome = population.step(EvolutionStrategies(12, sigma=0.1, lr=0.05, weight_decay=0.1))
    assert outcome.accepted
    sum_D = sum(
        weight * gain * noise("uniform", int(seed), 0, len(theta_D)).astype(np.float64)
        for seed, gain, weight in zip(outcome.members.seed_K, outcome.members.gain_K, outcome.weight_K, strict=True)
    )
    expected_D = theta_D + 0.05 * (sum_D - 0.1 * theta_D)
    np.testing.assert_allclose(flat(net, mutate).theta_D.numpy(), expected_D, rtol=1e-5, atol=1e-6)
    for name, parameter in net.named_parameters():
        assert torch.equal(parameter, before[name]) == (name not in chosen)


def test_an_update_of_few_parameters_is_computed_and_sent_for_those_alone() -> None:
    asked: list[tuple[int, ...]] = []
    population = Population(network(), WithLoss(), mutate="batchnorm")
    plain = population.executor.weighted_sum

    def weighted_sum(seed_U: Any, weight_U: Any, start: int, stop: int) -> Any:
        sum_S = plain(seed_U, weight_U, start, stop)
        asked.append((start, stop, sum_S.size))
        return sum_S

    population.executor.weighted_sum = weighted_sum  # type: ignore[method-assign]
    population.step(EvolutionStrategies(6, sigma=0.1))
    assert asked == [(0, 16, 16)]
    assert population._parent_state(population.executor).theta_D.numel() == 16
    subspace = Population(network(), WithLoss(), subspace="random:3")
    plain = subspace.executor.weighted_sum
    subspace.executor.weighted_sum = weighted_sum  # type: ignore[method-assign]
    subspace.step(EvolutionStrategies(6, sigma=0.1))
    size = len(vector(network()))
    assert asked[1:] == [(size, size + 3, 3)]


def own_cases(seed: int, count: int) -> NDArray[np.int64]:
    return np.sort(drawn(60, seed, 1 << 43)[:count])


@pytest.mark.parametrize("shaping", ["zscore", "centered-rank"])
def test_each_pair_is_scored_on_cases_that_its_seed_draws(shaping: Any) -> None:
    net, sigma, lr, pairs = network(), 0.2, 0.05, 8
    theta_D = vector(network())
    outcome = Population(net, WithLoss()).step(
        EvolutionStrategies(2 * pairs, sigma=sigma, lr=lr, mirrored=True, own_cases=9, shaping=shaping)
    )
    fitness_P2, sum_D = np.empty((pairs, 2)), np.zeros_like(theta_D)
    seeds = member_seeds(0, 1, pairs).tolist()
    for place, seed in enumerate(seeds):
        step_D = sigma * noise("uniform", seed, 0, len(theta_D)).astype(np.float64)
        cases = own_cases(seed, 9)
        fitness_P2[place] = fitness_at(theta_D + step_D, cases), fitness_at(theta_D - step_D, cases)
    np.testing.assert_allclose(outcome.fitness_K, fitness_P2.reshape(-1), atol=1e-5)
    assert outcome.cases_K.tolist() == [9] * 2 * pairs
    assert outcome.cases == 9
    assert outcome.cases_scored == 60 + 2 * pairs * 9 + 60
    centred_K = (fitness_P2 - fitness_P2.mean(1, keepdims=True)).reshape(-1)
    ranks_K = np.argsort(np.argsort(centred_K)) / (2 * pairs - 1) - 0.5
    shaped_K = zscores(centred_K) if shaping == "zscore" else ranks_K
    for place, seed in enumerate(seeds):
        weight = shaped_K[2 * place] - shaped_K[2 * place + 1]
        sum_D += weight * noise("uniform", seed, 0, len(theta_D)).astype(np.float64)
    np.testing.assert_allclose(vector(net), theta_D + lr / (2 * pairs * sigma) * sum_D, atol=1e-5)
    assert len({tuple(own_cases(seed, 9)) for seed in seeds}) == pairs


def test_own_cases_are_those_that_there_are_where_more_are_wanted_and_need_pairs() -> None:
    both = [
        Population(network(), WithLoss()).step(EvolutionStrategies(8, sigma=0.1, mirrored=True, own_cases=count))
        for count in (60, 1000)
    ]
    assert both[0].fitness_K.tolist() == both[1].fitness_K.tolist()
    with pytest.raises(InputError, match=r"^own_cases \(9\) needs mirrored pairs: set mirrored$"):
        EvolutionStrategies(8, own_cases=9)


@pytest.mark.parametrize("rows", [2, 5])
def test_cases_of_their_own_are_those_of_members_alone_in_a_pass_of_several(rows: int) -> None:
    members = Members(
        np.repeat(member_seeds(0, 1, 6), 2), np.zeros(12, np.float32), np.tile([0.2, -0.2], 6).astype("f4")
    )
    alone, _ = evaluator(1).evaluate(members, "fitness", -math.inf, own=12)
    together, failed = evaluator(rows, Close()).evaluate(members, "fitness", -math.inf, own=12)
    assert not failed
    np.testing.assert_allclose(together.mean_KM, alone.mean_KM, rtol=1e-5, atol=1e-6)
    assert together.cases_K.tolist() == [12] * 12


def test_several_generations_of_a_phase_are_phases_one_after_another() -> None:
    """Each generation has its own members and cases, and starts from the parent that the one before it left."""
    net, sigma, count = network(), 0.1, 20
    theta_D = vector(network())
    outcome = Population(net, WithLoss(), seed=5, fitness_cases=count).step(
        EvolutionStrategies(8, generations=3, sigma=sigma, step="ratio", step_ratio=0.4), generation=7
    )
    seed_K = member_seeds(5, 7, 24)
    assert outcome.members.seed_K.tolist() == seed_K.tolist()
    first = np.sort(drawn(60, 5, (1 << 33) + 7)[:count])
    assert outcome.before == pytest.approx(fitness_at(theta_D, first), abs=1e-6)
    for draw in range(3):
        cases = np.sort(drawn(60, 5, (1 << 33) + 7 + (draw << 44))[:count])
        noise_KD = np.array([noise("uniform", int(s), 0, len(theta_D)) for s in seed_K[8 * draw : 8 * draw + 8]], float)
        fitness_K = np.array([fitness_at(theta_D + sigma * noise_D, cases) for noise_D in noise_KD])
        np.testing.assert_allclose(outcome.generations[draw].fitness_K, fitness_K, atol=1e-5)
        update_D = zscores(fitness_K) @ noise_KD
        length = 0.4 * sigma * RMS["uniform"] * math.sqrt(len(theta_D))
        theta_D = theta_D + length * update_D / np.linalg.norm(update_D)
    np.testing.assert_allclose(vector(net), theta_D, atol=1e-5)
    moved = np.linalg.norm(theta_D - vector(network())) / (sigma * RMS["uniform"] * math.sqrt(len(theta_D)))
    assert outcome.step_ratio == pytest.approx(moved, rel=1e-3)
    assert outcome.after == pytest.approx(fitness_at(theta_D, first), abs=1e-5)


def test_a_generation_after_one_that_stayed_has_cases_of_its_own_too() -> None:
    """The parent is the same, but must be sent again with the new cases."""
    outcome = Population(network(), WithLoss(), fitness_cases=20).step(
        EvolutionStrategies(8, generations=2, sigma=0.1, step="ratio", step_ratio=1e3, accept="if-better")
    )
    assert not outcome.accepted
    assert outcome.note
    assert outcome.note.startswith("0 of 2 generations moved; ")
    assert outcome.after == outcome.before
    for draw, one in enumerate(outcome.generations):
        cases = np.sort(drawn(60, 0, (1 << 33) + 1 + (draw << 44))[:20])
        assert one.before == pytest.approx(fitness_at(vector(network()), cases), abs=1e-6)
        for seed, fitness in zip(one.members.seed_K.tolist(), one.fitness_K, strict=True):
            member_D = vector(network()) + 0.1 * noise("uniform", seed, 0, len(vector(network())))
            assert fitness == pytest.approx(fitness_at(member_D, cases), abs=1e-5)
    assert outcome.generations[0].before != outcome.generations[1].before


def test_the_length_of_a_generation_is_the_first_guess_of_the_next() -> None:
    outcome = Population(network(), WithLoss(), seed=1).step(
        EvolutionStrategies(20, generations=4, sigma=0.1, step="search", adapt_sigma=True)
    )
    last: float | None = None
    sigma = 0.1
    for one in outcome.generations:
        assert one.search
        assert one.members.gain_K.tolist() == [np.float32(sigma)] * 20
        lengths = one.search[0]
        if last:
            assert lengths == pytest.approx([0, last / 2**0.5, last * 2**0.5])
        else:
            assert len(lengths) > 5
        if not one.accepted:
            last = last and last / 2
        else:
            last = one.length
            factor = min(1.25, max(0.8, math.sqrt(2 * last)))
            assert adaptation(last) == pytest.approx(factor)
            sigma, last = sigma * factor, last / factor
    assert any(one.accepted for one in outcome.generations)


def perturbed(theta_D: Vector, rows_MD: Vector, seed: int, sigma: float, whole: float = 0.0) -> Vector:
    size = len(theta_D)
    made_D = noise("uniform", seed, size, size + len(rows_MD)).astype(np.float64) @ rows_MD
    return theta_D + sigma * (made_D + whole * noise("uniform", seed, 0, size))


def random_rows(theta_D: Vector) -> Vector:
    words = [np.random.Philox(key=np.array((0, (1 << 41) + 1 + (m << 44)), np.uint64)).random_raw() for m in range(3)]
    return np.array([noise("uniform", int(word) >> 1, 0, len(theta_D)) for word in words]) * 3**0.5 / 3**0.5


def guided_rows(theta_D: Vector) -> Vector:
    """Return the gradients on two draws of cases, orthonormalised and scaled to half of a mutation's variance."""
    kept: list[Vector] = []
    for draw in range(2):
        net = network().eval()
        order = drawn(60, 0, (1 << 35) + 1 + (draw << 44))[:20]
        torch.nn.functional.cross_entropy(net(INPUTS_NI[order]), TARGETS_N[order]).backward()
        row_D = flat(net).gradient().numpy().astype(np.float64)
        for other_D in kept:
            row_D = row_D - row_D @ other_D * other_D
        kept.append(row_D / np.linalg.norm(row_D))
    return np.array(kept) * math.sqrt(len(theta_D) / 2 / 2)


def trajectory(population: Population, net: nn.Module) -> Vector:
    """Remember three parents; the phase starts from the last one. Return the steps between them, the last first."""
    points = []
    for shift in (0.3, 0.1, 0.0):
        with torch.no_grad():
            for parameter, value in zip(net.parameters(), network().parameters(), strict=True):
                parameter.copy_(value + shift)
        population.remember()
        points.append(vector(network()) + shift)
    return np.array([points[2] - points[1], points[1] - points[0]])


@pytest.mark.parametrize(
    ("subspace", "whole"), [("random:3", 0.0), ("trajectory:2", 0.0), ("guided:2", math.sqrt(0.5))]
)
def test_members_and_updates_lie_in_the_subspace(subspace: str, whole: float) -> None:
    net, theta_D, sigma = network(), vector(network()), 0.3
    population = Population(net, WithLoss(), subspace=subspace, gradient_cases=20)
    if subspace == "trajectory:2":
        rows_MD = trajectory(population, net)
    else:
        rows_MD = random_rows(theta_D) if subspace == "random:3" else guided_rows(theta_D)
    outcome = population.step(EvolutionStrategies(10, sigma=sigma, lr=0.02, mirrored=True))
    cases, sum_D = np.arange(60), np.zeros_like(theta_D)
    for k, (seed, gain) in enumerate(zip(outcome.members.seed_K.tolist(), outcome.members.gain_K, strict=True)):
        member_D = perturbed(theta_D, rows_MD, seed, float(gain), whole)
        assert outcome.fitness_K[k] == pytest.approx(fitness_at(member_D, cases), abs=2e-5)
    shaped_K = zscores(outcome.fitness_K)
    for k, seed in enumerate(outcome.members.seed_K.tolist()):
        sign = 1 if k % 2 == 0 else -1
        sum_D += sign * shaped_K[k] * (perturbed(theta_D, rows_MD, seed, 1.0, whole) - theta_D)
    np.testing.assert_allclose(vector(net), theta_D + 0.02 / (10 * sigma) * sum_D, atol=2e-5)


def test_a_mutation_of_a_subspace_is_as_long_as_one_of_the_whole_space() -> None:
    whole = Population(network(), WithLoss())
    whole.step(EvolutionStrategies(6, sigma=0.1))
    for subspace in ("random:5", "guided:2"):
        population = Population(network(), WithLoss(), subspace=subspace)
        population.step(EvolutionStrategies(6, sigma=0.1))
        assert population.mutation_norm == pytest.approx(whole.mutation_norm, rel=0.2)


@pytest.mark.parametrize(("settings", "said"), [
    ({"subspace": "random"}, r"^subspace \('random'\): expected none, random:1 to random:1000, trajectory"),
    ({"subspace": "random:1001"}, r"^subspace \('random:1001'\): "),
    ({"subspace": "trajectory:2"}, "^subspace trajectory: fewer than two parents have been remembered$"),
])  # fmt: skip
def test_a_subspace_that_cannot_be_is_said(settings: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=said):
        Population(network(), WithLoss(), **settings).step(EvolutionStrategies(4))


def test_a_subspace_has_no_scale() -> None:
    population = Population(network(), WithLoss(), subspace="random:2")
    with pytest.raises(InputError, match=r"^a subspace cannot be combined with the scale 'rms'$"):
        population.step(EvolutionStrategies(4, sigma_scale="relative"))
    with pytest.raises(InputError, match=r"^a subspace cannot be combined with the scale 'gradient'$"):
        population.step(RandomGradients(4))
    with pytest.raises(InputError, match=r"^remember is for a subspace trajectory:m$"):
        population.remember()


def test_the_cosine_is_that_of_the_update_and_the_falling_loss_of_the_fitness_cases() -> None:
    net, theta_D = network(), vector(network())
    population = Population(net, WithLoss(), fitness_cases=30)
    outcome = population.step(EvolutionStrategies(40, sigma=0.05, lr=0.01, diagnostics=True))
    other = network().eval()
    case_N = torch.from_numpy(population.case_sets["fitness"])
    torch.nn.functional.cross_entropy(other(INPUTS_NI[case_N]), TARGETS_N[case_N]).backward()
    gradient_D = flat(other).gradient().numpy().astype(np.float64)
    move_D = vector(net) - theta_D
    expected = -(move_D @ gradient_D) / np.linalg.norm(move_D) / np.linalg.norm(gradient_D)
    assert outcome.cosine == pytest.approx(expected, abs=1e-4)
    assert outcome.cosine_expected == pytest.approx(math.sqrt(40 / len(theta_D)))
    assert expected > 0.3
    assert all(parameter.grad is None for parameter in net.parameters())


METHODS: dict[str, tuple[dict[str, Any], Callable[[], EvolutionStrategies]]] = {
    "few": ({"mutate": "batchnorm,biases"}, lambda: EvolutionStrategies(10, sigma=0.1, step="search")),
    "own": ({}, lambda: EvolutionStrategies(10, sigma=0.1, mirrored=True, own_cases=9, generations=3, step="search")),
    "random": ({"subspace": "random:4"}, lambda: EvolutionStrategies(10, sigma=0.1, optimizer="adam", generations=2)),
    "guided": ({"subspace": "guided:2", "mutate": "no-batchnorm"}, lambda: EvolutionStrategies(10, sigma=0.1)),
    "trajectory": ({"subspace": "trajectory:3"}, lambda: EvolutionStrategies(10, sigma=0.5, step="search")),
    "passes": ({"batch_members": 4}, lambda: EvolutionStrategies(10, sigma=0.1, mirrored=True, own_cases=9)),
}


class Batched(WithLoss):
    vmap = True


@pytest.mark.parametrize("method", METHODS)
def test_methods_are_the_same_on_workers_in_this_process_and_after_a_resume(local_ray: None, method: str) -> None:
    settings, strategy = METHODS[method]
    ends = set()
    for workers in ("local", 1, 2):
        net = network()
        with Population(net, Batched(), workers=workers, seed=3, **settings) as population:
            state: Any = None
            for phase in range(3):
                if "trajectory" in method:
                    with torch.no_grad():
                        for parameter in net.parameters():
                            parameter.mul_(1.01)
                    population.remember()
                    if not phase:
                        continue
                if phase == 2 and workers == "local":
                    state = network_state(net), population.state_dict()
                population.step(strategy())
        ends.add(flat(net).digest())
        if state:
            other = network(9)
            resumed = Population(other, Batched(), seed=3, **settings)
            other.load_state_dict(state[0])
            resumed.load_state_dict(state[1])
            resumed.step(strategy())
            ends.add(flat(other).digest())
    assert len(ends) == 1


def network_state(net: nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in net.state_dict().items()}


POINTS_PD = np.array([[0.0, 0.0], [4.0, 0.0], [0.0, 2.0], [1.0, 1.0], [-2.0, 3.0]], np.float32)


def averaged(kind: str, number: float, points_PD: NDArray[np.float32], accuracy: Callable[[Vector], float]) -> Average:
    """Return the average of a network with two parameters that was at these points, at the first before any epoch."""
    model = FlatModel(nn.Linear(2, 1, bias=False), CPU)
    model.theta_D.copy_(torch.from_numpy(points_PD[0]))
    average = Average(kind, number, model, lambda: None, lambda: accuracy(model.theta_D.numpy().astype(np.float64)))
    for point_D in points_PD[1:]:
        model.theta_D.copy_(torch.from_numpy(point_D))
        average.after_step()
        average.after_epoch()
        assert model.theta_D.numpy().tolist() == point_D.tolist()  # the network itself does not change
    return average


def test_averages_are_their_formulas() -> None:
    for count in (1, 3, 9):
        found = averaged("epochs", count, POINTS_PD, lambda theta_D: 0.0)
        np.testing.assert_allclose(found.theta_D.numpy(), POINTS_PD[1:][-count:].mean(0), atol=1e-6)
    expected_D = POINTS_PD[0]
    for point_D in POINTS_PD[1:]:
        expected_D = 0.7 * expected_D + 0.3 * point_D
    found = averaged("ema", 0.7, POINTS_PD, lambda theta_D: 0.0)
    np.testing.assert_allclose(found.theta_D.numpy(), expected_D, atol=1e-6)


def test_a_soup_has_those_that_make_it_no_worse_from_the_best_on() -> None:
    def accuracy(theta_D: Vector) -> float:
        return -float(np.abs(theta_D - (2.0, 0.6)).sum())

    for count in (2, 4):
        points = sorted(POINTS_PD[1:][-count:].astype(np.float64), key=lambda point_D: -accuracy(point_D))
        chosen, best = [points[0]], accuracy(points[0])
        for point_D in points[1:]:
            if (now := accuracy(np.mean([*chosen, point_D], axis=0))) >= best:
                chosen, best = [*chosen, point_D], now
        assert 1 <= len(chosen) < 4
        found = averaged("soup", count, POINTS_PD, accuracy)
        np.testing.assert_allclose(found.theta_D.numpy(), np.mean(chosen, axis=0), atol=1e-6)
    assert len(chosen) > 1, "or nothing was mixed"


def test_a_network_is_its_average_for_a_while_with_statistics_of_its_own() -> None:
    net = network()
    model, before = flat(net), {name: value.clone() for name, value in net.state_dict().items()}
    average = Average("epochs", 2, model, lambda: recalibrate(net, INPUTS_NI), lambda: 0.0)
    average.after_epoch()
    with torch.no_grad():
        model.theta_D.mul_(1.5)
    average.after_epoch()
    now = {name: value.clone() for name, value in net.state_dict().items()}
    with average.as_network():
        assert torch.allclose(net[0].weight, before["0.weight"] * 1.25)  # type: ignore[arg-type]
        hidden_NH = torch.tanh(INPUTS_NI @ net[0].weight.T + net[0].bias)  # type: ignore[operator]
        torch.testing.assert_close(net[2].running_mean, hidden_NH.mean(0))
    for name, value in net.state_dict().items():
        assert torch.equal(value, now[name])


RUNS: dict[str, dict[str, Any]] = {
    "own cases": {
        "evolution": {"mirrored": True, "cases": "own", "fitness_images": 16, "generations": 2, "step": "search"}
        | {"adapt_sigma": True, "diagnostics": True}
    },
    "refused": {"evolution": {"optimizer": "adam", "generations": 6, "accept": "if-better", "step": "ratio"}},
    "few": {"evolution": {"mutate": "batchnorm,biases", "batchnorm": "recalibrate", "generations": 2, "sigma": 0.05}},
    "trajectory": {"evolution": {"subspace": "trajectory:2", "sigma": 0.3, "generations": 2}},
    "guided": {"evolution": {"subspace": "guided:2", "optimizer": "adam", "lr": 0.001}},
    "average": {"parent": {"average": "epochs:2"}, "evolution": {"of": "average"}},
    "moving": {"parent": {"average": "ema:.8"}, "evolution": {"of": "average", "accept": "if-better"}},
    "soup": {"parent": {"average": "soup:3"}, "evolution": {"of": "average", "subspace": "random:3"}},
}


@pytest.mark.ray
@pytest.mark.parametrize("method", RUNS)
def test_a_run_by_each_method_resumes_and_replays(local_ray: None, small_config: Config, method: str) -> None:
    config = change(small_config, run={"epochs": 6, "keep": 2}, **{"evolution": {"every": 3}} | {
        section: ({"every": 3} if section == "evolution" else {}) | fields for section, fields in RUNS[method].items()
    })  # fmt: skip
    whole, _ = run_here(config)
    rows = metrics(whole)
    assert any(row["accepted"] for row in rows if row["kind"] == "evolve")
    lost = Path(shutil.copytree(whole, whole.parent / "lost"))
    for path in (lost / "final.safetensors", lost / "checkpoints" / "epoch-000006.sha256"):
        path.unlink()
    run_here(change(config, cluster={"workers": 2}), folder=lost)
    assert same_result(lost, whole)
    replay = Replay(whole, lambda note: None)
    assert [replay.verify(generation) for generation in replay.generations] == [True, True]
    for member in (0, len(read_journal(whole / "journal" / "000006.npz")["member"]) - 1):
        recorded, scored = replay.descendant(6, member, whole / "descendant.safetensors")
        assert recorded == scored
    if config.parent.average != "none":
        assert (whole / "average.safetensors").read_bytes() == (lost / "average.safetensors").read_bytes()
        assert {"average_test_accuracy", "average_validation_loss"} <= rows[0].keys()
        table = final_table({"run": read_run(whole).metrics})
        assert table["run"].tolist() == ["run", "run, average"]
        assert table["test accuracy"][1] == f"{rows[-1]['average_test_accuracy']:.4f}"
    if method == "refused":
        taken: Any = read_journal(whole / "journal" / "000006.npz")["weight"].reshape(6, -1).any(1).tolist()
        assert True in taken[taken.index(False) :], "or no update comes after a refused one"
    if config.evolution.diagnostics:
        phase = next(row for row in rows if row.get("accepted"))
        assert phase["noise_share"] == pytest.approx(1 - phase["cosine"] ** 2)
        assert 0 < phase["effective_population"] <= 32
        assert phase["generations"] == 2
        assert len(phase["generation_lengths"]) == 2


@pytest.mark.ray
def test_an_average_goes_on_from_the_last_epoch_that_has_all_that_it_is_of(
    local_ray: None, small_config: Config, tmp_path: Path
) -> None:
    """Epochs 4 and 5 are lost, and epoch 3 needs epoch 2, which is damaged."""
    run = {"epochs": 5, "keep": 9}
    config = change(small_config, run=run, parent={"average": "epochs:2"}, evolution={"strategy": "none"})
    whole, _ = run_here(config)
    lost = Path(shutil.copytree(whole, tmp_path / "lost"))
    for name in ("final.safetensors", "average.safetensors"):
        (lost / name).unlink()
    for epoch in (4, 5):
        (lost / "checkpoints" / f"epoch-00000{epoch}.sha256").unlink()
    damaged = lost / "checkpoints" / "epoch-000002.safetensors"
    damaged.write_bytes(damaged.read_bytes()[:-1])
    _, notes = run_here(config, folder=lost)
    assert [note for note in notes if "trying" in note or "going on" in note] == [
        f"{damaged}: torn or changed: not what epoch-000002.sha256 says; trying the one before it",
        f"{damaged}: torn or changed: not what epoch-000002.sha256 says; trying the one before it",
        "going on after epoch 1",
    ]
    assert same_result(lost, whole)
    assert (whole / "average.safetensors").read_bytes() == (lost / "average.safetensors").read_bytes()
    assert all(row["average_seconds"] >= 0 for row in metrics(lost))


@pytest.mark.parametrize(("sections", "said"), [
    ({"evolution": {"cases": "own", "fitness_images": 32}}, "evolution.cases (own) needs evolution.mirrored"),
    ({"evolution": {"cases": "own", "mirrored": True}}, "evolution.cases (own) needs evolution.fitness_images"),
    ({"evolution": {"subspace": "trajectory:2", "every": 1}}, "evolution.subspace (trajectory) needs epochs between"),
    ({"evolution": {"of": "average", "every": 1}, "parent": {"average": "ema:.9"}}, "evolution.of (average) needs epo"),
    ({"data": {"sgd_on_evolution": True}, "parent": {"average": "soup:2"}}, "parent.average (soup) needs images"),
    ({"evolution": {"of": "average"}}, "evolution.of (average) needs parent.average"),
    ({"evolution": {"of": "average", "strategy": "none"}}, "evolution.of (average) has no effect with evolution.strat"),
    ({"evolution": {"subspace": "random:0"}}, "evolution.subspace ('random:0'): expected none, random:1 to"),
    ({"evolution": {"subspace": "random:4", "sigma_scale": "relative"}}, "evolution.sigma_scale (relative) has no"),
    ({"evolution": {"generations": 2, "strategy": "random-gradients"}}, "evolution.generations (2) has no effect with"),
    ({"evolution": {"adapt_sigma": True}}, "evolution.adapt_sigma (True) has no effect with evolution.step lr"),
    ({"parent": {"average": "ema:1"}}, "parent.average ('ema:1'): expected none, epochs:1 to epochs:1000, soup:1 to"),
])  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(sections: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^{re.escape(said)}"):
        configuration(sections)


def test_the_presets_of_others_are_their_formulas() -> None:
    """Compare one update with NumPy: the formula of staturecrane/PyTorch-ES, and OpenAI's with Adam."""
    theta_D = vector(network())
    for preset, rows in (("pytorch-es", 1), ("openai-es", 2)):
        evolution = load_config(preset).evolution
        net = network()
        strategy = make_strategy(evolution.model_copy(update={"population": 20, "every": 1}), 2)
        assert strategy
        outcome = Population(net, WithLoss(), noise=evolution.noise).step(strategy)
        noise_PD = np.array(
            [noise("gaussian", int(seed), 0, len(theta_D)) for seed in member_seeds(0, 1, 20 // rows)], float
        )
        sigma, cases = evolution.sigma, np.arange(60)
        if preset == "pytorch-es":
            assert (sigma, evolution.lr, evolution.population) == (0.1, 0.001, 50)
            reward_K = np.array([fitness_at(theta_D + sigma * noise_D, cases) for noise_D in noise_PD])
            normalised_K = (reward_K - np.mean(reward_K)) / np.std(reward_K)
            expected_D = theta_D + 0.001 / (20 * sigma) * np.dot(noise_PD.T, normalised_K)
        else:
            assert (sigma, evolution.optimizer, evolution.lr) == (0.02, "adam", 0.01)
            plus_P, minus_P = (
                np.array([fitness_at(theta_D + sign * sigma * noise_D, cases) for noise_D in noise_PD])
                for sign in (1, -1)
            )
            rank_2P = np.argsort(np.argsort(np.concatenate([plus_P, minus_P]))) / 19 - 0.5
            gradient_D = -(rank_2P[:10] - rank_2P[10:]) @ noise_PD / 20 + 0.005 * theta_D
            # In Adam's first step, the corrected moments are the gradient and its square.
            expected_D = theta_D - 0.01 * gradient_D / (np.abs(gradient_D) + 1e-8)
        assert outcome.accepted
        np.testing.assert_allclose(vector(net), expected_D, atol=2e-5)


def test_fzoo_is_one_sided_rademacher_over_the_deviation_of_the_fitness() -> None:
    """FZOO (arXiv 2506.09034) is theta -= lr * sum of (loss_k - loss) / (K std) * u_k. Here, the mean loss of the
    members replaces the parent's loss."""
    net, theta_D = network(), vector(network())
    Population(net, WithLoss(), noise="rademacher").step(EvolutionStrategies(16, sigma=0.01, lr=0.01 * 0.05))
    sign_KD = np.array([noise("rademacher", int(seed), 0, len(theta_D)) for seed in member_seeds(0, 1, 16)], float)
    loss_K = -np.array([fitness_at(theta_D + 0.01 * sign_D, np.arange(60)) for sign_D in sign_KD])
    step_D = 0.05 * ((loss_K - loss_K.mean()) / loss_K.std()) @ sign_KD / 16
    np.testing.assert_allclose(vector(net), theta_D - step_D, atol=2e-4)
