"""The library with user-defined networks and fitness functions, in this process and on Ray."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import pickle
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import nn

from spartan_ray import (
    EvolutionOptimizer,
    EvolutionStrategies,
    Fitness,
    InputError,
    Population,
    RandomGradients,
    RunError,
)
from spartan_ray.engine.evaluator import EvaluatorSpec
from spartan_ray.engine.executor import Executor, LocalExecutor
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.population import Population as EnginePopulation
from spartan_ray.noise.contract import member_seeds, noise

CPU = torch.device("cpu")
INPUTS_NI = torch.from_numpy(noise("gaussian", 1, 0, 60 * 5).reshape(60, 5).copy())
TARGETS_N = (INPUTS_NI.sin().sum(1) > 0).long()


def network(seed: int = 0) -> nn.Sequential:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return nn.Sequential(nn.Linear(5, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 2))


def likelihood(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
    return -F.cross_entropy(network(INPUTS_NI[case_N]), TARGETS_N[case_N], reduction="none")


class WithLoss(Fitness):
    """The same fitness with all optional members: a batch size, a maximum and a loss."""

    cases = 60
    batch: int | None = 16
    best = np.zeros(1)

    def __call__(self, network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        return likelihood(network, batch)

    def loss(self, network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        return -likelihood(network, case_N).mean()


STRATEGIES: dict[str, Callable[[], Any]] = {
    "es": lambda: EvolutionStrategies(10, sigma=0.1, lr=0.05, mirrored=True, optimizer="momentum"),
    "search": lambda: EvolutionStrategies(10, sigma=0.1, step="search", sigma_scale="relative", confirm=True),
    "best": lambda: RandomGradients(10, lr=0.5, low=-1.0, racing=1),
    "chain": lambda: RandomGradients(10, lr=0.5, low=-1.0, accept="chain", confirm=True),
}


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_phases_are_the_same_on_one_worker_on_two_and_in_this_process(local_ray: None, strategy: str) -> None:
    ends = set()
    for workers in ("local", 1, 2):
        net = network()
        with Population(net, WithLoss(), workers=workers, seed=3) as population:
            outcomes = [population.step(STRATEGIES[strategy]()) for _ in range(3)]
        assert any(outcome.accepted for outcome in outcomes)
        assert population.generation == 3
        ends.add(FlatModel(net, CPU).digest())
    assert len(ends) == 1


class Deadly(WithLoss):
    """A fitness that kills the worker's process once for each file in a folder."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.home = folder, os.getpid()

    def __call__(self, network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        if os.getpid() != self.home:
            for path in self.folder.iterdir():
                with contextlib.suppress(FileNotFoundError):  # another worker has deleted it
                    path.unlink()
                    os.kill(os.getpid(), signal.SIGKILL)
        return likelihood(network, batch)


def test_workers_killed_by_a_fitness_of_the_user_s_own_change_no_bit(local_ray: None, tmp_path: Path) -> None:
    ends, notes = set(), list[str]()
    for workers in ("local", 2):
        net = network()
        for name in ("first", "second"):
            (tmp_path / name).touch()
        with Population(net, Deadly(tmp_path), workers=workers, note=notes.append) as population:
            for _ in range(2):
                population.step(STRATEGIES["es"]())
        ends.add(FlatModel(net, CPU).digest())
    assert len(ends) == 1
    assert not list(tmp_path.iterdir())
    assert sum("was lost and is replaced" in note for note in notes) == 2


@pytest.mark.parametrize("strategy", ["es", "search"])
def test_a_phase_is_resumed_and_its_members_are_scored_again_to_the_bit(strategy: str) -> None:
    net = network()
    population = Population(net, WithLoss(), seed=3, fitness_cases=20, confirm_cases=20)
    population.step(STRATEGIES[strategy]())
    weights, state = copy.deepcopy(net.state_dict()), copy.deepcopy(population.state_dict())
    outcome = population.step(STRATEGIES[strategy]())
    case_N = population.case_sets["fitness"]

    other = network(1)
    resumed = Population(other, WithLoss(), seed=3, fitness_cases=20, confirm_cases=20)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    scale: Any = "rms" if strategy == "search" else None
    again = resumed.score(outcome.members, case_N, scale=scale)
    assert again.fitness_K.tobytes() == outcome.fitness_K.tobytes()
    assert resumed.score().cases_K.tolist() == [60]
    assert resumed.score(case_N=case_N).fitness_K.tolist() == [outcome.before]
    resumed.step(STRATEGIES[strategy]())
    assert FlatModel(other, CPU).digest() == FlatModel(net, CPU).digest()
    for wrong in ([60], [-1], []):
        with pytest.raises(InputError, match=r"^case_N: expected numbers below 60$"):
            resumed.score(case_N=np.array(wrong, int))


def test_what_is_sent_to_a_worker_is_the_network_once() -> None:
    """Parameters that are views of one vector would each be pickled with the whole vector."""
    sent: list[EvaluatorSpec] = []

    def executor(spec: EvaluatorSpec) -> Executor:
        sent.append(spec)
        return LocalExecutor(spec, CPU, print)

    net = nn.Sequential(*[nn.Linear(50, 50) for _ in range(20)])
    alone = len(pickle.dumps(net))
    EnginePopulation(net, WithLoss(), executor=executor)
    assert len(pickle.dumps(sent[0])) < 1.1 * alone


def test_what_cannot_be_sent_is_one_error(local_ray: None) -> None:
    lock = threading.Lock()

    def locked(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        with lock:
            return likelihood(network, case_N)

    with pytest.raises(InputError, match=r"^the network or the fitness cannot be sent to workers: .*lock") as caught:
        Population(network(), locked, cases=60, workers=1)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("scored", [2, 6])
def test_a_race_that_nobody_can_finish_leaves_the_parent(scored: int) -> None:
    """The fitness raises after two calls for the parent, or after four more for the first part of the members."""
    calls: list[int] = []

    class Racing(WithLoss):
        batch = None

        def __call__(self, network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
            calls.append(1)
            if len(calls) > scored:
                raise ArithmeticError("no")
            return likelihood(network, batch)

    net = network()
    before = FlatModel(copy.deepcopy(net), CPU).digest()
    strategy = RandomGradients(4, lr=0.5, racing=1)
    outcome = Population(net, Racing(), note=lambda text: None).step(strategy)
    assert np.isnan(outcome.fitness_K).sum() == (4 if scored == 2 else 2)
    assert (outcome.accepted, outcome.note) == (0, "no member is better than the parent")
    assert FlatModel(net, CPU).digest() == before


def test_a_phase_moves_the_network_in_place_by_the_formula() -> None:
    net = network()
    flat = torch.cat([parameter.detach().flatten() for parameter in net.parameters()]).numpy()
    population = Population(net, likelihood, cases=60, seed=5)
    outcome = population.step(EvolutionStrategies(6, sigma=0.1, lr=0.01))
    seed_K = member_seeds(5, 1, 6)
    fitness_K = []
    for seed in seed_K:
        other = network()
        vector_D = torch.from_numpy(flat + np.float32(0.1) * noise("uniform", int(seed), 0, len(flat)))
        nn.utils.vector_to_parameters(vector_D, other.parameters())
        fitness_K.append(likelihood(other.eval(), torch.arange(60)).mean().item())
    np.testing.assert_allclose(outcome.fitness_K, fitness_K, rtol=1e-5)
    z_K = (outcome.fitness_K - outcome.fitness_K.mean()) / outcome.fitness_K.std()
    move_D = (
        0.01 / (6 * 0.1) * sum(z * noise("uniform", int(s), 0, len(flat)) for z, s in zip(z_K, seed_K, strict=True))
    )
    now = torch.cat([parameter.detach().flatten() for parameter in net.parameters()]).numpy()
    np.testing.assert_allclose(now - flat, move_D, atol=1e-6)
    assert net.training


class Odd(nn.Module):
    """A network with a 4-D parameter outside a convolution, a tied parameter and a frozen one."""

    def __init__(self) -> None:
        super().__init__()
        self.position = nn.Parameter(torch.randn(1, 2, 3, 4))
        self.convolution = nn.Conv2d(2, 3, 3, padding=1)
        self.frozen = nn.Linear(36, 36).requires_grad_(False)
        self.first = nn.Linear(36, 36, bias=False)
        self.second = nn.Linear(36, 36, bias=False)
        self.second.weight = self.first.weight
        self.register_buffer("scale", torch.full((), 0.5))

    def forward(self, x_N: torch.Tensor) -> torch.Tensor:
        hidden = self.convolution(x_N.view(-1, 1, 1, 1) + self.position).flatten(1)
        out_N: torch.Tensor = self.second(self.first(self.frozen(hidden)).tanh()).sum(1) * self.get_buffer("scale")
        return out_N


def outputs(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
    dtype = next(network.parameters()).dtype
    error_N: torch.Tensor = network((case_N / 10).to(dtype)).float() - 1
    return -error_N.square()


def test_parameters_of_every_kind() -> None:
    net = Odd()
    before = copy.deepcopy(net.state_dict())
    population = Population(net, outputs, cases=20)
    sizes = {"position": 24, "convolution.weight": 54, "convolution.bias": 3, "first.weight": 36 * 36}
    assert population.model.names == list(sizes)
    assert len(population.model.theta_D) == sum(sizes.values())
    for name, value in net.state_dict().items():
        assert torch.equal(value, before[name])
    # The order of the noise contract: a convolution's weight is O, H, W, I, and the others are not permuted.
    start_D = torch.cat([
        before["position"].flatten(), before["convolution.weight"].permute(0, 2, 3, 1).flatten(),
        before["convolution.bias"], before["first.weight"].flatten(),
    ])  # fmt: skip
    assert torch.equal(population.model.theta_D, start_D)
    first = population.step(EvolutionStrategies(8, sigma=0.05, step="ratio"))
    assert first.after > first.before
    changed = {name for name, value in net.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {*sizes, "second.weight"}
    assert net.second.weight is net.first.weight


def test_a_network_in_half_precision_keeps_a_parent_in_single() -> None:
    """Steps that are too small for bfloat16 add up in the float32 parent."""
    net = Odd().bfloat16()
    population = Population(net, outputs, cases=20)
    assert population.model.theta_D.dtype == torch.float32
    start_D, before = population.model.theta_D.clone(), copy.deepcopy(net.state_dict())
    strategy = EvolutionStrategies(8, sigma=0.05, step="ratio", step_ratio=1e-3)
    for _ in range(3):
        population.step(strategy)
    moved_D = population.model.theta_D - start_D
    assert 0 < moved_D.norm() < 1e-2 * start_D.norm()
    for view, parameter in zip(
        population.model.views(population.model.theta_D), population.model.parameters, strict=True
    ):
        assert parameter.dtype == torch.bfloat16
        assert torch.equal(view.bfloat16(), parameter)
    # A change by another trainer is adopted, in the precision of the network.
    with torch.no_grad():
        net.first.weight.mul_(0)
    population.step(strategy)
    assert net.first.weight.abs().max() < 0.01
    assert torch.equal(net.frozen.weight, before["frozen.weight"])


class F1(Fitness):
    """The F1 score from true positives, false positives and false negatives. It is not a mean over cases."""

    cases = 60

    def __call__(self, network: nn.Module, batch: torch.Tensor) -> torch.Tensor:
        found_N, wanted_N = network(INPUTS_NI[batch]).argmax(1).bool(), TARGETS_N[batch].bool()
        return torch.stack([found_N & wanted_N, found_N & ~wanted_N, ~found_N & wanted_N], dim=1).float()

    def value(self, mean_M: NDArray[np.float64]) -> float:
        true, false, missed = mean_M
        return float(2 * true / (2 * true + false + missed))


def test_a_fitness_of_several_statistics_and_a_search_and_confirm_of_it() -> None:
    net = network()
    population = Population(net, F1(), fitness_cases=30)
    for _ in range(6):
        outcome = population.step(EvolutionStrategies(20, sigma=0.3, step="search", confirm=True))
        assert outcome.cases == 30
        sets = population.case_sets
        assert [len(sets[name]) for name in ("fitness", "search", "confirm")] == [30, 15, 15]
        assert len(np.unique(np.concatenate(list(sets.values())))) == 60
    found, wanted = net.eval()(INPUTS_NI).argmax(1).bool(), TARGETS_N.bool()
    expected = 2 * (found & wanted).sum() / (found.sum() + wanted.sum())
    scores = Population(net, F1()).step(EvolutionStrategies(2, sigma=1e-9))
    assert scores.before == pytest.approx(expected.item())


def test_what_a_fitness_lacks_is_named() -> None:
    with pytest.raises(InputError, match=r"^FunctionFitness has no loss\(network, case_N\), which gradients need$"):
        Population(network(), likelihood, cases=60).step(RandomGradients(4))
    with pytest.raises(InputError, match=r"^cases: a function does not say how many"):
        Population(network(), likelihood)
    with pytest.raises(RunError, match="expected one row per case"):
        Population(network(), lambda network, case_N: torch.zeros(1), cases=60).step(EvolutionStrategies(4))


@pytest.mark.parametrize(("make", "said"), [
    (lambda: Population(nn.Sequential(nn.ReLU()), likelihood, cases=3), "the network has no parameter that requires a"),
    (lambda: Population(network().double(), likelihood, cases=3), r"the network's 0\.weight is torch\.float64"),
    (lambda: Population(network().to(torch.float8_e5m2), likelihood, cases=3), r"network's 0\.weight is torch\.float8"),
    (lambda: Population(network(), likelihood, cases=3, mutate="9.*"), r"mutate '9\.\*': matches no parameter"),
    (lambda: Population(network(), likelihood, cases=0), r"cases \(0\) must be at least 1"),
    (lambda: Population(network(), WithLoss(), cases=3), r"cases \(3\): the fitness has 60"),
    (lambda: Population(network(), likelihood, cases=9, fitness_cases=10).step(EvolutionStrategies(2)),
     r"the cases of a generation \(fitness 10\) do not fit the 9"),
    (lambda: EvolutionStrategies(3, mirrored=True), r"^population \(3\) must be even when mirrored$"),
    (lambda: EvolutionStrategies(sigma=0), r"^sigma \(0\) must be above 0 and finite$"),
    (lambda: EvolutionStrategies(step="far"), r"^step \('far'\) must be one of lr, ratio, search$"),  # type: ignore[arg-type]
    (lambda: RandomGradients(low=2), r"^low \(2\) must be below high \(1\.0\), both finite$"),
    (lambda: RandomGradients(accept="chain", racing=2), r"^racing \(2\) has no effect with accept chain$"),
    (lambda: RandomGradients(wave=0), r"^wave \(0\) must be at least 1$"),
])  # fmt: skip
def test_settings_that_cannot_be_used_are_refused_by_name(make: Callable[[], Any], said: str) -> None:
    with pytest.raises(InputError, match=said) as caught:
        make()
    assert "\n" not in str(caught.value)


def test_a_member_for_which_the_fitness_raises_is_the_worst_and_the_parent_s_error_is_said() -> None:
    def touchy(network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        statistic_N = likelihood(network, case_N)
        if float(statistic_N.mean()) < level:
            raise ArithmeticError("out of range")
        return statistic_N

    level, notes = -math.inf, list[str]()
    calm = Population(network(), touchy, cases=60).step(EvolutionStrategies(20, sigma=0.3))
    level = float(np.median(calm.fitness_K))
    population = Population(network(), touchy, cases=60, note=notes.append)
    outcome = population.step(EvolutionStrategies(20, sigma=0.3))
    assert np.isnan(outcome.fitness_K).tolist() == (calm.fitness_K < level).tolist()
    assert (outcome.counts["members_failed"], len(notes)) == (10, 10)
    worst = int(np.argmin(calm.fitness_K))
    said = (
        f"the member of seed {outcome.members.seed_K[worst]} failed and is scored worst: ArithmeticError: out of range"
    )
    assert any(note.startswith(said) for note in notes)
    level = math.inf
    with pytest.raises(
        RunError,
        match=r"^the parent, or its update, failed: ArithmeticError: out of range \(test_population\.py:\d+\)$",
    ):
        population.step(EvolutionStrategies(20))


def test_a_value_that_raises_or_is_no_number_is_that_member_s_answer_alone() -> None:
    class Odd(WithLoss):
        def value(self, mean_M: NDArray[np.float64]) -> float:
            if mean_M[0] < level:
                raise ZeroDivisionError("no positives")
            return None if math.isinf(level) else super().value(mean_M)  # type: ignore[return-value]

    level, notes = -1e9, list[str]()
    calm = Population(network(), Odd()).step(EvolutionStrategies(20, sigma=0.3))
    level = float(np.median(calm.fitness_K))
    outcome = Population(network(), Odd(), note=notes.append).step(EvolutionStrategies(20, sigma=0.3))
    assert np.isnan(outcome.fitness_K).tolist() == (calm.fitness_K < level).tolist()
    assert len(notes) == 10
    assert all("is scored worst: ZeroDivisionError: no positives (test_population.py:" in note for note in notes)
    level = -math.inf
    with pytest.raises(RunError, match=r"failed: TypeError: value\(mean_M\) returned None: expected a number"):
        Population(network(), Odd()).score()


def test_a_loss_that_is_not_one_number_is_said() -> None:
    class Each(WithLoss):
        def loss(self, network: nn.Module, case_N: torch.Tensor) -> torch.Tensor:
            return -likelihood(network, case_N)

    with pytest.raises(InputError, match=r"^loss of \d+ cases is \(\d+,\): expected their mean$"):
        Population(network(), Each()).step(RandomGradients(4))


def trained(
    steps: int, saved: list[Any], from_: Any = None, moments: Any = "keep", half: bool = False
) -> tuple[nn.Module, EvolutionOptimizer]:
    """Run a training loop with a schedule, and return the network and the optimizer.

    Continue from the state `from_` if it is given. After step 5, append the state to `saved`."""
    net = network()
    base = torch.optim.Adam(net.parameters(), lr=0.05)
    population = Population(net, WithLoss(), seed=2)
    strategy = EvolutionStrategies(8, sigma=0.1, lr=0.01, optimizer="adam")
    optimizer = EvolutionOptimizer(base, population, strategy, every=3, moments=moments)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)
    first = 0
    if from_:
        first, *states = from_
        parts: tuple[Any, ...] = (net, optimizer, schedule)
        for part, state in zip(parts, states, strict=True):
            part.load_state_dict(copy.deepcopy(state))
    for step in range(first, steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(net(INPUTS_NI), TARGETS_N)
        loss.backward()
        optimizer.step()
        schedule.step()
        if step == 4:
            saved += [5, *(copy.deepcopy(part.state_dict()) for part in (net, optimizer, schedule))]
    return net, optimizer


@pytest.mark.parametrize("moments", ["keep", "reset", "rescale"])
def test_the_optimizer_evolves_every_so_many_steps_and_resumes_exactly(moments: str) -> None:
    saved: list[Any] = []
    net, optimizer = trained(8, saved, moments=moments)
    assert optimizer.outcome
    assert optimizer.population.generation == 2
    assert optimizer.base.param_groups[0]["lr"] == optimizer.param_groups[0]["lr"] == 0.05 * 0.5**4
    again, _ = trained(8, [], saved, moments)
    assert FlatModel(net, CPU).digest() == FlatModel(again, CPU).digest()
    assert net.training


def test_the_optimizer_is_the_base_s_steps_and_the_population_s_phases() -> None:
    """The same loop without the optimizer wrapper gives the same bits."""
    net, _ = trained(8, [])
    by_hand = network()
    base = torch.optim.Adam(by_hand.parameters(), lr=0.05)
    population = Population(by_hand, WithLoss(), seed=2)
    strategy = EvolutionStrategies(8, sigma=0.1, lr=0.01, optimizer="adam")
    for step in range(1, 9):
        base.zero_grad()
        F.cross_entropy(by_hand(INPUTS_NI), TARGETS_N).backward()
        base.step()
        if step % 3 == 0:
            population.step(strategy)
        base.param_groups[0]["lr"] = 0.05 * 0.5 ** (step // 2)
    assert FlatModel(net, CPU).digest() == FlatModel(by_hand, CPU).digest()


def test_a_closure_a_scaler_and_a_compiled_network() -> None:
    net = network()
    compiled = torch.compile(net, backend="eager")
    base = torch.optim.SGD(net.parameters(), lr=0.1)
    optimizer = EvolutionOptimizer(base, Population(compiled, WithLoss()), EvolutionStrategies(4), every=2)  # type: ignore[arg-type]
    scaler = torch.amp.GradScaler("cpu")
    for _ in range(4):
        optimizer.zero_grad()
        scaler.scale(F.cross_entropy(compiled(INPUTS_NI), TARGETS_N)).backward()
        scaler.step(optimizer)
        scaler.update()
    assert (optimizer.steps, optimizer.population.generation) == (4, 2)

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        loss = F.cross_entropy(net(INPUTS_NI), TARGETS_N)
        loss.backward()
        return loss

    assert isinstance(optimizer.step(closure), torch.Tensor)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(1))], "lr": 1.0})
    assert len(base.param_groups) == len(optimizer.param_groups) == 2
    with pytest.raises(InputError, match=r"^every \(0\) must be at least 1$"):
        EvolutionOptimizer(base, optimizer.population, EvolutionStrategies(4), every=0)
