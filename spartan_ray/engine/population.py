"""Population: a parent, what its descendants are scored by, and what evaluates them.

Shapes: D parameters, T parameter tensors, K members, N cases, U seeds.
"""

from __future__ import annotations

import copy
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spartan_ray.engine.draws import draw_cases, gradient_cases, random_key, share_cases
from spartan_ray.engine.evaluator import EvaluatorSpec, ParentState, Scale, batched, packed, pooled
from spartan_ray.engine.executor import Executor, LocalExecutor
from spartan_ray.engine.fitness import Fitness, as_fitness
from spartan_ray.engine.flat import FlatModel, norm, norm_tensor
from spartan_ray.engine.guards import keeping_gradients, keeping_modes
from spartan_ray.engine.strategies.requests import (
    PARENT,
    CaseSet,
    Generation,
    Members,
    Outcome,
    Request,
    Score,
    Scores,
    SetDirection,
    SetScale,
    Strategy,
    Take,
    refuse,
)
from spartan_ray.engine.updates import Updates
from spartan_ray.errors import Diverged, InputError
from spartan_ray.noise.contract import RMS, NoiseKind
from spartan_ray.noise.kernels import kernel_for

# Cases of the gradient, if there are so many.
GRADIENT_CASES = 512
# Purpose of the key of what a fitness draws from torch, beside the seed.
RANDOM_OF_GENERATION = 1 << 42

Gradient = Callable[[nn.Module, int], None]
LOG = logging.getLogger("spartan_ray")


class Population:
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
        FlatModel's are used as they are, and its evaluators are made by the `factory`.

        mutate           what evolution moves: all, no-batchnorm, or a pattern of parameter names
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
        if isinstance(network, FlatModel):
            self.model = network
        else:
            network = getattr(network, "_orig_mod", network)
            device = next((parameter.device for parameter in network.parameters()), torch.device("cpu"))
            self.model = FlatModel(network, device, views=False)
            factory = factory or copy.deepcopy(network)
        assert factory, "a FlatModel comes with one"
        device = self.model.theta_D.device
        spec = EvaluatorSpec(factory, fitness, noise, threads, batch_members, self.model.layout)
        self.seed, self.noise = seed, noise
        self.fitness_cases, self.confirm_cases = fitness_cases, confirm_cases
        self.gradient, self.gradient_cases = gradient or self._loss_gradient, gradient_cases
        self.kernel = kernel_for(noise, device)
        self.mutated_T = self.model.mutated(mutate)
        # In this process the update is scored, which is not worth sending.
        pool = executor(spec) if executor else None  # first, since workers take their time to start
        here = LocalExecutor(spec, device, note)
        self.executor: Executor = pool or here
        self.here: LocalExecutor | None = here
        self.fitness = here.evaluator.fitness
        self.generation, self.closed = 0, False
        self.updates = Updates(self.model.theta_D)
        self.parent_changed = self.scale_changed = self.scale_is_gradient = self.scale_is_update = False
        # What multiplies noise, and what multiplies all that is added now: the same, or the update.
        self.noise_scale: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None

    def step(self, strategy: Strategy, generation: int | None = None) -> Outcome:
        """One evolve phase: the network moves as the strategy says. Returns the account of it.

        Generations are numbered from 1; what a generation draws is a function of the seed and its number. Raises
        Diverged when the parent's own fitness is not finite. After an error all is as it was before the phase."""
        refuse(
            isinstance(strategy, type) or not isinstance(strategy, Strategy),
            f"{strategy!r:.60} is no strategy: it needs population, case_sets and generation(seed, number)",
        )
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
        outcome.step_ratio = moved / self.mutation_norm if self.mutation_norm else 0.0
        outcome.cases, outcome.cases_scored = len(self.case_sets["fitness"]), self.cases_scored
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
        case_N = np.arange(self.fitness.cases) if case_N is None else np.asarray(case_N)
        outside = (case_N < 0) | (case_N >= self.fitness.cases)
        refuse(len(case_N) == 0 or bool(outside.any()), f"case_N: expected numbers below {self.fitness.cases}")
        self._set_out({"fitness": case_N}, self.generation if generation is None else generation)
        with keeping_modes(self.model.module):
            if scale:
                self.answer(SetScale(scale))
            return self._score(Score(members))

    def begin(self, sets: tuple[CaseSet, ...], generation: int) -> None:
        """Be before a generation: draw what it is scored on."""
        counts = share_cases(sets, self.fitness_cases, self.confirm_cases, self.fitness.cases)
        self._set_out(draw_cases(counts, self.fitness.cases, self.seed, generation), generation)

    def _set_out(self, case_sets: dict[CaseSet, NDArray[np.int64]], generation: int) -> None:
        """Take the network as it is now for the parent, and these cases."""
        refuse(self.closed, "the population is closed: its workers have ended")
        self.model.read()
        self.generation_begun, self.case_sets = generation, case_sets
        self.cases_scored, self.mutation_norm = 0, 0.0
        self.seconds = dict.fromkeys(("scoring", "update", "gradient"), 0.0)
        self.parent_changed = True
        self._set_scale("none")

    def answer(self, request: Request) -> Scores | float | None:
        """Do what the strategy asks."""
        match request:
            case Score():
                refuse(request.cases not in self.case_sets, f"cases {request.cases!r}: not in the strategy's case_sets")
                scores = self._score(request)
                return scores if request.onto is None else pooled(self.fitness, request.onto, scores)
            case SetScale(kind):
                self._set_scale(kind)
            case SetDirection():
                if self.scale_changed:
                    self.take_gradient()
                with self._timed("update"):
                    self.scale, factor = self._direction(request)
                self.scale_is_update = self.scale_changed = True
                return factor
            case Take(member):
                refuse(len(member) != 1, f"Take: expected one member, got {len(member)}: members[k : k + 1] is one")
                with self._timed("update"):
                    self._take(member)
                self.parent_changed = True
                if self.scale_is_update or self.scale_is_gradient:
                    self.scale, self.scale_is_update, self.scale_changed = self.noise_scale, False, True
            case _:
                raise InputError(f"the strategy yielded {request!r:.60}: expected Score, Take, SetScale, SetDirection")
        return None

    def _set_scale(self, kind: Literal["none", "rms", "gradient"]) -> None:
        """What multiplies noise from here on; the gradient is taken when it is needed."""
        self.scale_is_gradient, self.scale_is_update, self.scale_changed = kind == "gradient", False, True
        plain = None if self.mutated_T.all() else self.mutated_T
        self.scale = self.noise_scale = self.model.rms() * self.mutated_T if kind == "rms" else plain

    def gradient_norms(self) -> torch.Tensor:
        """The norm of each parameter tensor's gradient, T in float64, on the same cases every time."""
        module, self.case_sets = self.model.module, {"fitness": np.arange(self.fitness.cases)}
        with keeping_modes(module), keeping_gradients(module):
            self.gradient(module, 0)
            gradient_D = self.model.gradient()
        return torch.stack([norm_tensor(view) for view in self.model.views(gradient_D)])

    def state_dict(self) -> dict[str, Any]:
        """What the next generations depend on beside the settings and the network, whose own `state_dict` is to be
        kept too: the number of the last generation, the moments of the optimizer of the estimate, and the parameters
        in float32 where the network's are in half precision."""
        return {
            "generation": self.generation,
            "optimizer": self.updates.moments(),
            "theta_D": self.model.theta_D.clone() if self.model.half else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on exactly where `state_dict` was taken, with the network as it was there."""
        self.generation = state["generation"]
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

    def _score(self, request: Score) -> Scores:
        members = request.members
        without_noise = len(members) == 1 and not members.gain_K[0]
        here = self.here if self.here is not self.executor else None
        if here and without_noise and self.scale_changed and self.executor.devices == here.devices:
            # An update's score keeps one worker busy, and all else that it would cost is to send the update.
            try:
                with self._timed("scoring"):
                    here.broadcast(self._parent_state())
                    here.broadcast_scale(self._scale())
                    scores = here.evaluate(members, request.cases, request.threshold, request.part)
                self.cases_scored += int(scores.cases_K.sum())
                return scores
            except torch.OutOfMemoryError:  # a driver has little of a GPU
                self.here = None
        self.broadcast()
        self.mutation_norm = self.mutation_norm or self._mutation_norm(members)
        with self._timed("scoring"):
            scores = self.executor.evaluate(members, request.cases, request.threshold, request.part)
        self.cases_scored += int(scores.cases_K.sum())
        return scores

    def broadcast(self) -> None:
        """Give the executor what members are made and scored from now, as far as it changed."""
        if self.scale_changed:
            self.take_gradient()
            self.executor.broadcast_scale(self._scale())
        if self.parent_changed:
            self.executor.broadcast(self._parent_state())
        self.parent_changed = self.scale_changed = False

    def take_gradient(self) -> None:
        """Where the scale is the gradient: make it that of the parent as it is now."""
        if not self.scale_is_gradient or self.scale_is_update:
            return
        with self._timed("gradient"), keeping_gradients(self.model.module):
            self.gradient(self.model.module, self.generation_begun)
            gradient_D = self.model.gradient()
        if not self.mutated_T.all():
            self.model.multiply(gradient_D, self.mutated_T)
        self.noise_scale = self.scale = gradient_D

    def _loss_gradient(self, network: nn.Module, generation: int) -> None:
        """Of the fitness cases of a generation, since those that confirm must have chosen nothing."""
        case_N = gradient_cases(self.case_sets["fitness"], self.gradient_cases, self.seed, generation)
        network.eval()
        for batch_N in batched(torch.from_numpy(case_N).to(self.model.theta_D.device), self.fitness.batch):
            loss = self.fitness.loss(network, batch_N)
            refuse(loss.numel() != 1, f"loss of {len(batch_N)} cases is {tuple(loss.shape)}: expected their mean")
            (loss * (len(batch_N) / len(case_N))).backward()

    def _scale(self) -> Scale:
        return None if self.scale is None else self.scale.cpu().numpy()

    def _parent_state(self) -> ParentState:
        return ParentState(
            self.model.theta_D.cpu().numpy(),
            [packed(buffer) for buffer in self.model.buffers],
            self.case_sets,
            random_key(self.seed, RANDOM_OF_GENERATION + self.generation_begun),
        )

    def _direction(self, wanted: SetDirection) -> tuple[torch.Tensor, float]:
        """The update, as long as the learning rate makes it or as the ratio that is wanted, and the factor of
        the latter."""
        theta_D = self.model.theta_D
        sum_D = self.executor.weighted_sum(wanted.seed_U, wanted.weight_U, theta_D.numel())
        estimate_D = torch.from_numpy(sum_D).to(theta_D.device)
        if self.noise_scale is not None and len(self.noise_scale) == len(theta_D):
            estimate_D *= self.noise_scale
        elif self.noise_scale is not None:
            self.model.multiply(estimate_D, self.noise_scale)
        if not estimate_D.isfinite().all():  # the optimizer's moments would never be finite again
            return torch.full_like(estimate_D, math.nan), 1.0
        if wanted.weight_decay:
            decay_D = wanted.weight_decay * theta_D
            self.model.multiply(decay_D, self.mutated_T)
            estimate_D -= decay_D
        update_D = self.updates.make(estimate_D, wanted.optimizer, wanted.rate)
        if wanted.ratio is None:
            return update_D, 1.0
        length = norm(update_D)
        factor = wanted.ratio * self.mutation_norm / length if length else 1.0
        return update_D * factor, factor

    def _take(self, member: Members) -> None:
        theta_D = self.model.theta_D
        scale = self.scale if self.scale is None or len(self.scale) == len(theta_D) else self.model.spread(self.scale)
        self.kernel.descend(
            theta_D, scale, int(member.seed_K[0]), float(member.offset_K[0]), float(member.gain_K[0]), theta_D
        )
        self.model.write()
        self.fitness.moved(self.model.module)

    def _mutation_norm(self, members: Members) -> float:
        """The norm to expect of scale * (offset + gain * noise) for members with noise."""
        with_noise = np.flatnonzero(members.gain_K)
        if not len(with_noise):
            return 0.0
        offset, gain = float(members.offset_K[with_noise[0]]), float(members.gain_K[with_noise[0]])
        return math.hypot(offset, gain * RMS[self.noise]) * self.model.scale_norm(self.scale)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started
