"""`Population`: a parent, the fitness of its descendants, and the executor that scores them.

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

# Number of cases of the gradient, if there are at least as many.
GRADIENT_CASES = 512
LOG = logging.getLogger("spartan_ray")


class Population(Phase):
    """A parent network and its descendants. `step` runs one evolve phase and changes the network in place.

    A descendant is a function of the parent and a seed. Any process can therefore rebuild and score it, and only seeds
    are sent.

    Attributes:
        generation: Number of the last generation; 0 before the first.
        closed: Whether `close` was called.
    """

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
        """Build the population, and its executor if one is given.

        Args:
            network: The parent. The parameters of a module keep their memory. A `FlatModel` is used as it is if
                `mutate` is "all"; it needs a `factory`.
            fitness: A `Fitness`, or a function `fitness(network, case_N)` that returns one number per case, shape
                (N,), or M statistics per case, shape (N, M). Higher is better.
            cases: Number of cases. Required if `fitness` is a function; a `Fitness` has its own.
            seed: Seed of the noise, and of the cases drawn for each generation: at least 0, less than 2**63.
            noise: Distribution of the noise: "uniform" in [-1, 1), "gaussian" (standard normal), or "rademacher"
                (-1 or 1).
            mutate: Parameters that evolution moves: "all", "batchnorm", "no-batchnorm", "classifier" (the last layer),
                "biases", a shell pattern of parameter names, or several of these separated by commas.
            subspace: Directions in which members differ: "none" (the whole space), "random:m" (m random directions),
                "trajectory:m" (the last m steps between calls of `remember`), or "guided:m" (m gradients, plus the
                whole space with half of the variance: Guided ES, Maheswaranathan et al., arXiv 1806.10230). Each
                direction takes 4 bytes per moved parameter in the memory of every evaluator.
            fitness_cases: Number of cases that score a generation, drawn anew for each. None: an equal share of the
                cases that the other sets leave.
            confirm_cases: Number of further cases for each of the sets "search" and "confirm", if the strategy uses
                them. None: an equal share, as for `fitness_cases`.
            gradient: A function `gradient(network, generation)` that calls `backward` on the loss whose gradient
                `RandomGradients` and the subspace "guided" use. None: `Fitness.loss` on `gradient_cases` of the fitness
                cases.
            gradient_cases: Number of cases of that default gradient, or all fitness cases if there are fewer.
            factory: A function that builds the network, with any parameters. None: evaluators copy the network.
            threads: CPU threads of torch while members are scored. None leaves torch's setting unchanged.
            batch_members: Members scored per forward pass. More than 1 is faster for small networks and needs a fitness
                that `torch.func.vmap` can run. The bits of the result depend on it.
            executor: A function that builds the executor from an `EvaluatorSpec`. None: score in this process.
            note: A function that receives one-line messages. Default: warnings of the logger `spartan_ray`.

        Raises:
            InputError: A setting cannot be used. The message names it.
        """
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
        # This process scores the update, because sending it would cost more.
        pool = executor(spec) if executor else None  # first, because workers take a while to start
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
        """Run one evolve phase. The strategy decides how the network changes.

        After an error, the network and the population are as they were before the phase.

        Args:
            strategy: `EvolutionStrategies`, `RandomGradients`, or a strategy of your own.
            generation: Number of the phase. Default: the last one plus 1, beginning with 1. All random choices of a
                phase are functions of the population's seed and this number.

        Returns:
            The outcome, with the members, fitnesses and weights, and the parent's fitness before and after.

        Raises:
            InputError: The strategy or one of its requests cannot be used, or the population is closed.
            Diverged: The fitness of the parent is not finite. A subclass of `RunError`.
            RunError: The parent or its update cannot be scored, or the workers are lost.
        """
        refuse(
            isinstance(strategy, type) or not isinstance(strategy, Strategy),
            f"{strategy!r:.60} is not a strategy: it needs population, case_sets and generation(seed, number)",
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
        """Answer the requests of a phase until it ends, and return its outcome."""
        answer = None
        while True:
            try:
                request = phase.send(answer)
            except StopIteration as end:
                outcome: Outcome = end.value
                refuse(not isinstance(outcome, Outcome), "the strategy's generation did not return an Outcome")
                for name in ("fitness_K", "cases_K", "weight_K"):
                    count, wanted = len(getattr(outcome, name)), len(outcome.members)
                    refuse(count != wanted, f"the strategy's Outcome has {wanted} members, but {count} in {name}")
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
        """Score the current parent, or members that descend from it, on any cases.

        To score a member of an earlier phase again, restore the parent of that phase and pass its cases and its
        number: `population.score(outcome.members[3:4], case_N, generation=7)`.

        Args:
            members: Members to score. Default: the parent alone.
            case_N: Numbers of the cases, shape (N,). Default: all cases.
            scale: Scale of the noise of these members: None (1), "rms" (of each parameter tensor), or "gradient" (the
                parent's, as in the given generation).
            generation: Number of the generation whose gradient, and random numbers of the fitness, are used. Default:
                the last one.

        Returns:
            One row per member, with the means of the statistics, the fitness, and the number of cases.

        Raises:
            InputError: A case number is out of range, or the population is closed.
        """
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
        """Return the norm of the gradient of each parameter tensor of the network, also of those not evolved.

        Every call uses the same cases, so that the norms before and after a phase can be compared.

        Returns:
            Float64, one value per tensor, in the order of `parameters()`. 0 for a parameter without a gradient.
        """
        module, self.case_sets = self.model.module, {"fitness": np.arange(self.fitness.cases)}
        with keeping_modes(module), keeping_gradients(module):
            self.gradient(module, 0)
            zero = torch.zeros((), dtype=torch.float64, device=self.model.theta_D.device)
            return torch.stack([zero if p.grad is None else norm_tensor(p.grad) for p in module.parameters()])

    def state_dict(self) -> dict[str, Any]:
        """Return the state that the next generations depend on. Save the `state_dict` of the network with it.

        Returns:
            A dict with the number of the last generation, the remembered parents, the moments of the strategy's
            optimizer, and a float32 copy of the evolved parameters if the network is in half precision. The settings
            are not included.
        """
        return {
            "generation": self.generation,
            "trajectory": [theta_D.clone() for theta_D in self.subspace.trajectory] if self.subspace else [],
            "optimizer": self.updates.moments(),
            "theta_D": self.model.theta_D.clone() if self.model.half else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue exactly from a saved state. Restore the network's own `state_dict` before this call.

        Args:
            state: The result of `state_dict`.
        """
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
        """Stop the workers. The network keeps its parameters."""
        self.closed = True
        self.executor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()

    def remember(self) -> None:
        """Add the current parent to the trajectory, whose last m steps span the subspace "trajectory:m".

        Call it after each epoch, or every N training steps.

        Raises:
            InputError: The subspace is not a trajectory.
        """
        if self.subspace is None or self.subspace.kind != "trajectory":
            raise InputError("remember is for a subspace trajectory:m")
        self.model.read()
        self.subspace.trajectory.append(self.model.theta_D.clone())
