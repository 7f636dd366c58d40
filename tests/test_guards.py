"""Tests that scores stay right whatever a user does to the network of a population and whatever a fitness does to it,
and that mistakes are reported."""

from __future__ import annotations

import copy
import math
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save
from test_population import INPUTS_NI, TARGETS_N, WithLoss, likelihood, network
from torch import nn

from spartan_ray import EvolutionOptimizer, EvolutionStrategies, InputError, Population, RandomGradients
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.population import Population as EnginePopulation
from spartan_ray.engine.process import as_in_a_worker, float32_products
from spartan_ray.engine.strategies.requests import CaseSet
from spartan_ray.errors import Diverged, RunError
from spartan_ray.strategies import (
    PARENT,
    Outcome,
    Score,
    SetDirection,
    SetScale,
    Take,
    joined,
    line,
    member_seeds,
    noisy,
)

CPU = torch.device("cpu")


def real(network: nn.Module) -> float:
    """Return the fitness of a network, computed by torch alone."""
    with torch.inference_mode():
        return float(likelihood(copy.deepcopy(network).eval(), torch.arange(60)).double().mean())


def scored(population: EnginePopulation) -> float:
    return float(population.score().fitness_K[0])


def test_frozen_weights_that_are_loaded_later_are_scored() -> None:
    net = network()
    net[0].requires_grad_(False)
    population = Population(net, WithLoss())
    net.load_state_dict(network(5).state_dict())
    assert scored(population) == pytest.approx(real(net), abs=1e-6)
    before = population.model.digest()
    with torch.no_grad():
        net[0].weight[0, 0] += 1  # type: ignore[index, operator]
    assert population.model.digest() != before
    assert scored(population) == pytest.approx(real(net), abs=1e-6)


def test_a_factory_s_own_frozen_weights_are_not_scored() -> None:
    net = network()
    net[0].requires_grad_(False)

    def factory() -> nn.Module:
        other = network(9)
        other[0].requires_grad_(False)
        return other

    assert scored(Population(net, WithLoss(), factory=factory)) == pytest.approx(real(net), abs=1e-6)


def test_a_factory_of_other_parameters_is_refused() -> None:
    def factory() -> nn.Module:
        return network().requires_grad_(False).append(nn.Linear(2, 2))

    with pytest.raises(InputError, match=r"^factory: makes a network with other trainable parameters than"):
        Population(network(), likelihood, cases=60, factory=factory)


def test_new_parameter_objects_are_found_and_others_refused() -> None:
    net = network()
    population = Population(net, WithLoss())
    net.load_state_dict(network(5).state_dict(), assign=True)
    assert scored(population) == pytest.approx(real(net), abs=1e-6)
    before = [parameter.clone() for parameter in net.parameters()]
    assert population.step(EvolutionStrategies(4, sigma=0.1)).accepted
    assert not any(torch.equal(*pair) for pair in zip(net.parameters(), before, strict=True))
    net[0].requires_grad_(False)
    with pytest.raises(
        InputError, match=r"^the network's 0\.weight is not trained, or not there; when the pop.*\(8, 5\)"
    ):
        population.step(EvolutionStrategies(4))
    with pytest.raises(InputError, match=r"^the network's 0\.weight is \(8, 5\) of torch\.bfloat16 on cpu; when"):
        Population(net.requires_grad_(), WithLoss()).model.refuse_other(FlatModel(network().bfloat16(), CPU).layout)


def test_the_user_s_parameters_keep_their_memory_and_layout() -> None:
    net = nn.Sequential(nn.Conv2d(1, 4, 3), nn.Flatten(), nn.Linear(4, 2))
    pointers = [parameter.data_ptr() for parameter in net.parameters()]
    population = Population(net, lambda network, case_N: network(torch.ones(len(case_N), 1, 3, 3))[:, 0], cases=3)
    vector_D = torch.nn.utils.parameters_to_vector(net.parameters())
    population.step(EvolutionStrategies(4, sigma=0.1, lr=0.1))
    assert not torch.equal(torch.nn.utils.parameters_to_vector(net.parameters()), vector_D)
    assert [parameter.data_ptr() for parameter in net.parameters()] == pointers
    assert save(net.state_dict())
    assert all(parameter.is_contiguous() for parameter in net.parameters())


def test_tied_weights_can_be_saved() -> None:
    net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
    net[1].weight = net[0].weight
    assert save(FlatModel(net, CPU).state_dict())


class Rude(WithLoss):
    """A fitness that changes the network's buffers and mode and draws from torch's global generator."""

    def __call__(self, network: Any, batch: torch.Tensor) -> torch.Tensor:
        found = likelihood(network, batch)
        network.train()
        likelihood(network, batch)  # this changes BatchNorm's statistics
        return found + torch.rand(len(batch))


@pytest.mark.parametrize("rows", [1, 4])
def test_a_member_finds_what_the_one_before_it_found(rows: int) -> None:

    def drawing(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        return likelihood(network, case_N) + torch.rand(len(case_N))

    fitness: Any = Rude() if rows == 1 else drawing
    cases = None if rows == 1 else 60
    population = Population(network(), fitness, cases=cases, batch_members=rows, seed=7)
    torch.manual_seed(3)
    state = torch.get_rng_state()
    members = noisy(member_seeds(0, 1, 5), 0.0, 0.1)
    together = population.score(members).fitness_K
    alone = [population.score(members[k : k + 1]).fitness_K[0] for k in range(5)]
    assert together.tolist() == alone
    assert torch.equal(torch.get_rng_state(), state)
    other = Population(network(), fitness, cases=cases, batch_members=rows, seed=8).score(members).fitness_K
    assert abs(other[0] - together[0]) > 1e-4
    assert np.ptp(together) > 1e-4


def test_autocast_around_a_phase_changes_no_score() -> None:
    plain, inside = network(), network()
    for net in (plain, inside):
        population = Population(net, WithLoss())
        with torch.autocast("cpu", torch.bfloat16, enabled=net is inside):
            population.step(EvolutionStrategies(6, sigma=0.1))
    assert FlatModel(plain, CPU).digest() == FlatModel(inside, CPU).digest()


def test_a_member_that_raises_in_a_pass_leaves_the_others_their_scores() -> None:
    def positive(network: Any, case_N: torch.Tensor) -> torch.Tensor:
        root: torch.Tensor = torch.linalg.cholesky(torch.eye(2) + network[0].weight[:2, :2])
        return root.sum() + likelihood(network, case_N)

    notes: list[str] = []
    population = Population(network(), positive, cases=60, batch_members=8, note=notes.append)
    scores = population.score(noisy(member_seeds(0, 1, 8), 0.0, 1.5))
    assert 0 < np.isnan(scores.fitness_K).sum() < 8
    assert len(notes) == np.isnan(scores.fitness_K).sum()
    assert all("cholesky" in note and "(test_guards.py:" in note for note in notes)


def test_a_phase_that_ends_with_an_error_leaves_all_as_it_was() -> None:
    """The phase is interrupted after Adam's moments have changed. Run again, it gives the uninterrupted result."""
    calls = [0]
    stop = [10**9]

    def fitness(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        calls[0] += 1
        if calls[0] > stop[0]:
            raise KeyboardInterrupt
        return likelihood(network, case_N)

    strategy = EvolutionStrategies(6, sigma=0.1, lr=0.05, optimizer="adam")
    ends = []
    for interrupted in (False, True):
        net, calls[0], stop[0] = network(), 0, 10**9
        population = Population(net, fitness, cases=60)
        population.step(strategy)
        if interrupted:
            before = FlatModel(copy.deepcopy(net), CPU).digest()
            stop[0] = calls[0] + 7  # at the score of the update
            with pytest.raises(KeyboardInterrupt):
                population.step(strategy)
            assert FlatModel(copy.deepcopy(net), CPU).digest() == before
            stop[0] = 10**9
        assert population.step(strategy).accepted
        ends.append(FlatModel(net, CPU).digest())
    assert ends[0] == ends[1]


def test_a_parent_that_is_not_finite_is_not_moved() -> None:
    net = network()

    def fitness(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        same = torch.equal(network.get_parameter("3.bias"), net.get_parameter("3.bias"))
        return likelihood(network, case_N) * (torch.nan if same else 1.0)

    before = FlatModel(copy.deepcopy(net), CPU).digest()
    with pytest.raises(Diverged):
        EnginePopulation(net, fitness, cases=60).step(EvolutionStrategies(4, sigma=0.1))
    assert FlatModel(net, CPU).digest() == before


class TwoSteps:
    """A strategy with two updates per phase, in a given scale. The second update starts where the first one ends."""

    case_sets: tuple[CaseSet, ...] = ("fitness",)
    population = 8

    def __init__(self, kind: Any) -> None:
        self.kind = kind

    def generation(self, seed: int, number: int) -> Any:
        before, parents = math.nan, []
        for half in range(2):
            yield SetScale(self.kind)
            members = noisy(member_seeds(seed, 2 * number + half, 8), 0.0, 0.1)
            scores = yield Score(joined(PARENT, members))
            before = scores.fitness_K[0] if half == 0 else before
            parents.append(scores.fitness_K[0])
            weight_K = scores.fitness_K[1:] - scores.fitness_K[1:].mean()
            yield SetDirection(members.seed_K, weight_K.astype(np.float32), rate=0.5)
            scores = yield Score(line(1.0))
            yield Take(line(1.0))
        return Outcome(members, np.zeros(8), np.full(8, 60), weight_K, before, scores.fitness_K[0])


@pytest.mark.parametrize("kind", ["none", "rms", "gradient"])
@pytest.mark.parametrize("mutate", ["all", "3.*"])
def test_a_phase_may_have_several_updates_in_any_scale(kind: Any, mutate: str) -> None:
    net = network()
    population = Population(net, WithLoss(), mutate=mutate)
    outcome = population.step(TwoSteps(kind))
    assert scored(population) == outcome.after
    assert torch.equal(net[0].weight, network()[0].weight) == (mutate != "all")  # type: ignore[arg-type]


def test_the_user_s_gradients_and_modes_stay() -> None:
    net = network().train()
    F.cross_entropy(net(INPUTS_NI), TARGETS_N).backward()
    gradients = [parameter.grad for parameter in net.parameters()]
    population = Population(net, WithLoss())
    population.step(RandomGradients(4, lr=0.1))
    population.score(noisy(member_seeds(0, 1, 2), 0.1, 0.1), scale="gradient", generation=1)
    assert [parameter.grad for parameter in net.parameters()] == gradients
    assert all(layer.training for layer in net.modules())


def test_members_of_random_gradients_are_scored_again_to_the_bit() -> None:
    net = network()
    population = Population(net, WithLoss(), fitness_cases=30, gradient_cases=10)
    population.step(RandomGradients(4, lr=0.1, early_rejection=False))
    before = copy.deepcopy(net.state_dict())
    outcome = population.step(RandomGradients(4, lr=0.1, early_rejection=False))
    case_N = population.case_sets["fitness"]
    net.load_state_dict(before)
    again = population.score(outcome.members, case_N, scale="gradient", generation=2)
    assert again.fitness_K.tolist() == outcome.fitness_K.tolist()


def test_moments_of_every_kind_are_rescaled_and_none_made() -> None:
    net = network()
    for make in (torch.optim.RMSprop, torch.optim.Adagrad, torch.optim.Adamax):
        base = make(net[3].parameters(), lr=0.01)
        population, strategy = Population(net, WithLoss()), EvolutionStrategies(4, sigma=0.3)
        optimizer = EvolutionOptimizer(base, population, strategy, moments="rescale")
        F.cross_entropy(net(INPUTS_NI), TARGETS_N).backward()
        optimizer.step()
        name = {"RMSprop": "square_avg", "Adagrad": "sum", "Adamax": "exp_inf"}[make.__name__]
        before = base.state[net[3].weight][name].clone()  # type: ignore[index]
        optimizer.evolve()
        assert not torch.equal(base.state[net[3].weight][name], before)  # type: ignore[index]
        optimizer.load_state_dict(optimizer.state_dict())
    with pytest.raises(TypeError, match="cannot be copied or pickled: copy its state_dict"):
        copy.deepcopy(optimizer)


def test_a_closed_population_says_so() -> None:
    population = Population(network(), WithLoss())
    population.close()
    for act in (lambda: population.step(EvolutionStrategies(4)), population.score):
        with pytest.raises(InputError, match=r"^the population is closed"):
            act()


@pytest.mark.parametrize(("given", "said"), [
    ({"fitness_cases": 0}, r"fitness_cases \(0\) must be at least 1"),
    ({"confirm_cases": -5}, r"confirm_cases \(-5\) must be at least 1"),
    ({"gradient_cases": 0}, r"gradient_cases \(0\) must be at least 1"),
    ({"seed": -1}, r"seed \(-1\) must be at least 0 and below 2\^63"),
])  # fmt: skip
def test_numbers_that_cannot_be_are_refused(given: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}$"):
        Population(network(), WithLoss(), **given)


def test_an_error_in_the_user_s_fitness_says_where() -> None:
    def wrong(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        return undefined  # type: ignore # noqa: F821

    with pytest.raises(RunError, match=r"NameError: name 'undefined' is not defined \(test_guards\.py:\d+\)$"):
        Population(network(), wrong, cases=60).score()


class Wrong:
    """A strategy with one given mistake."""

    case_sets: tuple[CaseSet, ...] = ("fitness",)
    population = 4

    def __init__(self, mistake: str) -> None:
        self.mistake = mistake

    def generation(self, seed: int, number: int) -> Any:
        members = noisy(member_seeds(seed, number, 4), 0.0, 0.1)
        if self.mistake == "members":
            yield members
        if self.mistake == "set":
            yield Score(members, cases="search")
        scores = yield Score(joined(PARENT, members))
        if self.mistake == "take":
            yield Take(members)
        if self.mistake == "row":
            yield Take(members[2])  # type: ignore[index]
        if self.mistake == "outcome":
            return None
        return Outcome(members, scores.fitness_K, scores.cases_K[1:], np.ones(4), 0.0, 0.0)


@pytest.mark.parametrize(("mistake", "said"), [
    ("members", r"the strategy yielded Members\(.*: expected a request of spartan_ray\.strategies"),
    ("set", r"cases 'search': not in the strategy's case_sets"),
    ("take", r"Take: expected one member, got 4: members\[k : k \+ 1\] is one"),
    ("row", r"use \[2 : 3\] for a table of one row; \[2\] is not a table"),
    ("outcome", r"the strategy's generation did not return an Outcome"),
    ("sizes", "the strategy's Outcome has 4 members, but 5 in fitness_K"),
])  # fmt: skip
def test_a_mistake_in_a_strategy_is_one_line(mistake: str, said: str) -> None:
    net = network()
    before = FlatModel(copy.deepcopy(net), CPU).digest()
    with pytest.raises(InputError, match=f"^{said}$"):
        Population(net, WithLoss()).step(Wrong(mistake))
    assert FlatModel(net, CPU).digest() == before


def test_what_is_no_strategy_no_fitness_or_another_network_s_optimizer_is_said() -> None:
    population: Any = Population(network(), WithLoss())
    for wrong in (Wrong, object()):
        with pytest.raises(InputError, match="is not a strategy: it needs population, case_sets and generation"):
            population.step(wrong)
    with pytest.raises(InputError, match=r"^WithLoss is a class: give an object, WithLoss\(\)$"):
        Population(network(), WithLoss)  # type: ignore[arg-type]
    with pytest.raises(InputError, match=r"^noise \('normal'\) must be one of uniform, "):
        Population(network(), WithLoss(), noise="normal")  # type: ignore[arg-type]
    base = torch.optim.SGD(network().parameters(), lr=0.1)
    with pytest.raises(InputError, match=r"^the optimizer has none of the parameters of the population's network$"):
        EvolutionOptimizer(base, population, EvolutionStrategies(4))
    mine = EvolutionOptimizer(
        torch.optim.SGD(population.model.module.parameters(), lr=0.1), population, EvolutionStrategies(4)
    )
    with pytest.raises(InputError, match="has no 'evolution'"):
        mine.load_state_dict(mine.base.state_dict())
    with pytest.raises(RunError, match="TypeError: the fitness returned a float: expected a tensor, one row per case"):
        Population(network(), lambda network, case_N: 0.5, cases=60).score()  # type: ignore[arg-type, return-value]


def test_what_multiplies_float32_on_a_gpu_is_as_it_was_whichever_setting_said_it() -> None:
    """A setting by the newer names makes the older name unreadable."""
    convolutions: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined]
    before = convolutions.fp32_precision
    try:
        convolutions.fp32_precision = "ieee"
        with as_in_a_worker(1, CPU):
            inside = convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision
            with float32_products("tf32"):
                deeper = convolutions.fp32_precision, torch.backends.cuda.matmul.fp32_precision
        assert (inside, deeper) == (("ieee", "ieee"), ("tf32", "tf32"))
        assert convolutions.fp32_precision == "ieee"
    finally:
        convolutions.fp32_precision = before
