"""Population: a parent, what its descendants are scored by, and what evaluates them.

Shapes: D parameters, T parameter tensors, K members, N cases, U seeds.
"""

from __future__ import annotations

import copy
import logging
import math
from collections.abc import Callable
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spartan_ray.engine.evaluator import EvaluatorSpec
from spartan_ray.engine.executor import Executor, LocalExecutor
from spartan_ray.engine.fitness import Fitness, as_fitness
from spartan_ray.engine.flat import FlatModel, norm, norm_tensor
from spartan_ray.engine.guards import keeping_gradients, keeping_modes
from spartan_ray.engine.phase import Gradient, Phase
from spartan_ray.engine.strategies.requests import (
    PARENT,
    Generation,
    Members,
    Outcome,
    Score,
    Scores,
    SetScale,
    Strategy,
    refuse,
)
from spartan_ray.engine.subspace import parse_subspace
from spartan_ray.errors import Diverged, InputError
from spartan_ray.noise.contract import NoiseKind
from spartan_ray.noise.kernels import kernel_for

# Cases of the gradient, if there are so many.
GRADIENT_CASES = 512
LOG = logging.getLogger("spartan_ray")


class Population(Phase):
    """A parent network and its descendants. `step` runs one evolve phase and moves the network in place.

    Descendants are functions of the seed, so that they are scored wherever there is room and cost nothing to send."""

    def __init__(
        self,
        network: nn.Module | FlatModel,
        fitness: Fitness | Callable[[nn.Module, torch.Tensor], torch.Tensor],
        *,
        cases: int | None = None,
        seed: int = 0,
        noise: NoiseKind = "uniform",
        mutate: str = "all",
        subspace: str = "none",
        fitness_cases: int | None = None,
        confirm_cases: int | None = None,
        gradient: Gradient | None = None,
        gradient_cases: int = GRADIENT_CASES,
        factory: Callable[[], nn.Module] | None = None,
        threads: int | None = None,
        batch_members: int = 1,
        executor: Callable[[EvaluatorSpec], Executor] | None = None,
        note: Callable[[str], None] = LOG.warning,
    ) -> None:
        """`fitness` is a Fitness, or a function of a network and case numbers (N) that returns one number a case (N)
        or M statistics a case (N x M), with `cases` the number of cases. A network's parameters keep their memory; a
        FlatModel's are used as they are, where evolution moves all of them, and its evaluators are made by the
        `factory`.

        mutate           what evolution moves: all, batchnorm, no-batchnorm, classifier, biases, a pattern of
                         parameter names, or several of these with commas between them
        subspace         directions that members differ in: none, the whole space; random:m; trajectory:m, the steps
                         between the parents that were remembered; guided:m, gradients and the whole space in equal
                         parts (Maheswaranathan et al., arXiv 1806.10230). Each is a vector as long as what is moved in
                         the memory of every evaluator
        fitness_cases    how many cases score a generation, and `confirm_cases` how many others choose a length or
                         confirm; by default all cases, in equal shares
        gradient         `gradient(network, generation)` calls backward on the loss that random gradients descend; by
                         default that of the fitness on `gradient_cases` of the cases that score the generation
        factory          makes the network anew, with any parameters, where a copy of it would be larger
        threads          torch's while descendants are scored
        batch_members    descendants of a pass: faster for small networks, where `torch.func.vmap` can run the fitness;
                         the bits depend on it
        executor         makes what evaluates descendants; by default it is this process
        note             takes one-line messages; by default they are warnings of the logger `spartan_ray`

        Raises InputError for what cannot be used."""
        fitness = as_fitness(fitness, cases)
        refuse(batch_members < 1, f"batch_members ({batch_members}) must be at least 1")
        refuse(
            batch_members > 1 and not fitness.vmap,
            f"batch_members ({batch_members}): {type(fitness).__name__} does not say vmap = True",
        )
        for name, count in (
            ("fitness_cases", fitness_cases), ("confirm_cases", confirm_cases), ("gradient_cases", gradient_cases)
        ):  # fmt: skip
            refuse(count is not None and count < 1, f"{name} ({count}) must be at least 1")
        refuse(not 0 <= seed < 2**63, f"seed ({seed}) must be at least 0 and below 2^63")
        if isinstance(network, FlatModel) and mutate == "all":
            model = network
        else:
            network = network.module if isinstance(network, FlatModel) else getattr(network, "_orig_mod", network)
            device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
            model = FlatModel(network, device, views=False, mutate=mutate)
            factory = factory or copy.deepcopy(network)
        assert factory, "a FlatModel comes with one"
        device = model.theta_D.device
        spec = EvaluatorSpec(factory, fitness, noise, threads, batch_members, mutate, model.layout)
        kernel, directions = kernel_for(noise, device), parse_subspace(subspace)
        # In this process the update is scored, which is not worth sending.
        pool = executor(spec) if executor else None  # first, since workers take their time to start
        here = LocalExecutor(spec, device, note)
        super().__init__(
            model,
            pool or here,
            here,
            kernel,
            seed=seed,
            noise=noise,
            fitness_cases=fitness_cases,
            confirm_cases=confirm_cases,
            gradient=gradient,
            gradient_cases=gradient_cases,
            subspace=directions,
        )
        self.generation, self.closed = 0, False

    def step(self, strategy: Strategy, generation: int | None = None) -> Outcome:
        """One evolve phase: the network moves as the strategy says. Returns the account of it.

        Generations are numbered from 1; what a generation draws is a function of the seed and its number. Raises
        Diverged when the parent's own fitness is not finite. After an error all is as it was before the phase."""
        refuse(
            isinstance(strategy, type) or not isinstance(strategy, Strategy),
            f"{strategy!r:.60} is no strategy: it needs population, case_sets and generation(seed, number)",
        )
        refuse(self.closed, "the population is closed: its workers have ended")
        number = self.generation + 1 if generation is None else generation
        counts = dict(self.executor.counts)
        self.begin(strategy.case_sets, number)
        theta_D, buffers = self.model.theta_D.clone(), [buffer.clone() for buffer in self.model.buffers]
        moments = self.updates.moments()
        try:
            with keeping_modes(self.model.module):
                outcome = self._run(strategy.generation(self.seed, number))
            if not math.isfinite(outcome.before):
                raise Diverged(f"the parent's own fitness in generation {number} is not finite")
        except BaseException:
            self.model.theta_D.copy_(theta_D)
            self.model.write()
            self.model.load_buffers(buffers)
            self.updates.load_moments(moments)
            raise
        self.generation = number
        moved = norm(theta_D.sub_(self.model.theta_D))
        if outcome.cosine is not None:
            last = (outcome.generations or [outcome])[-1]
            if self.subspace is None:
                outcome.cosine_expected = math.sqrt(min(1.0, len(np.unique(last.members.seed_K)) / len(theta_D)))
        outcome.step_ratio = moved / self.mutation_norm if self.mutation_norm else 0.0
        outcome.cases, outcome.cases_scored = outcome.cases or len(self.case_sets["fitness"]), self.cases_scored
        outcome.seconds, outcome.workers = self.seconds, self.executor.workers
        outcome.counts = {name: count - counts[name] for name, count in self.executor.counts.items()}
        return outcome

    def _run(self, phase: Generation) -> Outcome:
        """Answer what a phase asks until it ends."""
        answer = None
        while True:
            try:
                request = phase.send(answer)
            except StopIteration as end:
                outcome: Outcome = end.value
                refuse(not isinstance(outcome, Outcome), "the strategy's generation did not return an Outcome")
                columns = (outcome.fitness_K, outcome.cases_K, outcome.weight_K)
                sizes = [len(outcome.members), *map(len, columns)]
                refuse(len(set(sizes)) > 1, f"the strategy's Outcome has {sizes} members, fitnesses, cases and weights")
                return outcome
            answer = self.answer(request)

    def score(
        self,
        members: Members = PARENT,
        case_N: NDArray[np.int64] | None = None,
        *,
        scale: Literal["rms", "gradient"] | None = None,
        generation: int | None = None,
    ) -> Scores:
        """The scores of members of the parent as it is now, of the parent itself by default, on all cases or on those
        given. `scale` is what their strategy multiplies noise by, with the gradient of a generation. To score a member
        of a phase again, be where the phase began and give its cases and its number:
        `population.score(outcome.members[3:4], case_N, generation=7)`."""
        refuse(self.closed, "the population is closed: its workers have ended")
        case_N = np.arange(self.fitness.cases) if case_N is None else np.asarray(case_N)
        outside = (case_N < 0) | (case_N >= self.fitness.cases)
        refuse(len(case_N) == 0 or bool(outside.any()), f"case_N: expected numbers below {self.fitness.cases}")
        self.set_out({"fitness": case_N}, self.generation if generation is None else generation)
        with keeping_modes(self.model.module):
            if scale:
                self.answer(SetScale(scale))
            return self.score_members(Score(members))

    def gradient_norms(self) -> torch.Tensor:
        """The norm of the gradient of each of the network's parameters, whether evolution moves it or not, on the same
        cases every time: float64, in the order of `parameters()`."""
        module, self.case_sets = self.model.module, {"fitness": np.arange(self.fitness.cases)}
        with keeping_modes(module), keeping_gradients(module):
            self.gradient(module, 0)
            zero = torch.zeros((), dtype=torch.float64, device=self.model.theta_D.device)
            return torch.stack([zero if p.grad is None else norm_tensor(p.grad) for p in module.parameters()])

    def state_dict(self) -> dict[str, Any]:
        """What the next generations depend on beside the settings and the network, whose own `state_dict` is to be
        kept too: the number of the last generation, the parents that were remembered, the moments of the optimizer of
        the estimate, and the parameters in float32 where the network's are in half precision."""
        return {
            "generation": self.generation,
            "trajectory": [theta_D.clone() for theta_D in self.subspace.trajectory] if self.subspace else [],
            "optimizer": self.updates.moments(),
            "theta_D": self.model.theta_D.clone() if self.model.half else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, with the network as it was there."""
        self.generation = state["generation"]
        if self.subspace:
            self.subspace.trajectory.clear()
            device = self.model.theta_D.device
            self.subspace.trajectory.extend(theta_D.to(device) for theta_D in state["trajectory"])
        self.updates.load_moments(state["optimizer"])
        self.model.read()
        if state["theta_D"] is not None:
            self.model.theta_D.copy_(state["theta_D"])
            self.model.write()

    def close(self) -> None:
        """End the workers. The network keeps its parameters."""
        self.closed = True
        self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def remember(self) -> None:
        """Take the parent as it is now for a point of the trajectory, whose last steps span the subspace
        `trajectory:m`: to be called after each epoch, or each so many steps."""
        if self.subspace is None or self.subspace.kind != "trajectory":
            raise InputError("remember is for a subspace trajectory:m")
        self.model.read()
        self.subspace.trajectory.append(self.model.theta_D.clone())
