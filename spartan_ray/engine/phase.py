"""`Phase`: answers the requests of a strategy by scoring members, computing updates and moving the parent.

Shapes: D parameters, T parameter tensors, K members, N cases, U seeds.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spartan_ray.engine.cases import batched
from spartan_ray.engine.draws import DRAWS_APART, draw_cases, gradient_cases, random_key, share_cases
from spartan_ray.engine.evaluator import ParentState, Scale, packed, pooled
from spartan_ray.engine.executor import Executor, LocalExecutor
from spartan_ray.engine.flat import FlatModel, dot, norm
from spartan_ray.engine.guards import keeping_gradients
from spartan_ray.engine.strategies.requests import (
    WHOLE,
    CaseSet,
    Compare,
    DrawCases,
    Members,
    Request,
    Score,
    Scores,
    SetDirection,
    SetScale,
    Take,
    refuse,
)
from spartan_ray.engine.subspace import Basis, Subspace
from spartan_ray.engine.updates import Updates
from spartan_ray.errors import InputError
from spartan_ray.noise.contract import RMS, NoiseKind
from spartan_ray.noise.kernels import Kernel

# Purposes of keys, each used together with the seed: the random numbers that a fitness draws from torch,
RANDOM_OF_GENERATION = 1 << 42
# and the directions of a random subspace.
BASIS_OF_GENERATION = 1 << 41

Gradient = Callable[[nn.Module, int], None]


class Phase:
    """A parent and its evolve phases, one after another. `begin` starts a phase; `answer` answers each request.

    `here` is the executor in this process. It scores updates, so that they need not be sent to the workers."""

    def __init__(
        self,
        model: FlatModel,
        executor: Executor,
        here: LocalExecutor,
        kernel: Kernel,
        *,
        seed: int,
        noise: NoiseKind,
        fitness_cases: int | None,
        confirm_cases: int | None,
        gradient: Gradient | None,
        gradient_cases: int,
        subspace: Subspace | None,
    ) -> None:
        self.model, self.executor, self.kernel = model, executor, kernel
        self.here: LocalExecutor | None = here
        self.fitness = here.evaluator.fitness
        self.seed, self.noise = seed, noise
        self.fitness_cases, self.confirm_cases = fitness_cases, confirm_cases
        self.gradient, self.gradient_cases = gradient or self._loss_gradient, gradient_cases
        self.updates = Updates(model.theta_D)
        self.subspace = subspace
        self.basis: Basis | None = None  # of this phase; made when it is first needed
        self.basis_sent = False
        self.parent_changed = self.scale_changed = self.scale_is_gradient = self.scale_is_update = False
        # `noise_scale` multiplies the noise of members. `scale` is the present scale: the same, or the update.
        self.noise_scale: torch.Tensor | None = None
        self.scale: torch.Tensor | None = None

    def begin(self, sets: tuple[CaseSet, ...], generation: int) -> None:
        """Start a generation: take the network as its parent, and draw the cases that score it."""
        self.case_counts = share_cases(sets, self.fitness_cases, self.confirm_cases, self.fitness.cases)
        self.set_out(draw_cases(self.case_counts, self.fitness.cases, self.seed, generation), generation)

    def _draw_cases(self, draw: int) -> None:
        refuse(not 0 <= draw < 2**19, f"DrawCases: the number of a draw ({draw}) must be at least 0 and below 2^19")
        generation = self.generation_begun
        self.case_sets = draw_cases(self.case_counts, self.fitness.cases, self.seed, generation, draw)
        self.random = random_key(self.seed, RANDOM_OF_GENERATION + generation + draw * DRAWS_APART)
        self.parent_changed = True
        if draw:
            self.mutation_norm = 0.0
        if self.scale_is_update:  # the generation before did not take its update
            self.scale, self.scale_is_update, self.scale_changed = self.noise_scale, False, True

    def set_out(self, case_sets: dict[CaseSet, NDArray[np.int64]], generation: int) -> None:
        """Take the network as it is now as the parent, with these cases."""
        self.model.read()
        self.generation_begun, self.case_sets = generation, case_sets
        self.random = random_key(self.seed, RANDOM_OF_GENERATION + generation)
        self.cases_scored, self.mutation_norm = 0, 0.0
        self.seconds = dict.fromkeys(("scoring", "update", "gradient"), 0.0)
        self.parent_changed, self.basis, self.basis_sent = True, None, False
        self._set_scale("none")

    def answer(self, request: Request) -> Scores | float | None:
        """Carry out a request and return its answer. The requests are described in `strategies.requests`.

        Raises InputError if the request cannot be used."""
        match request:
            case Score():
                refuse(request.cases not in self.case_sets, f"cases {request.cases!r}: not in the strategy's case_sets")
                own = request.own
                refuse(own is not None and own < 1, f"Score: own ({own}) must be at least 1")
                refuse(
                    own is not None and request.part != WHOLE, "Score: own cases are drawn of the whole set, not a part"
                )
                scores = self.score_members(request)
                return scores if request.onto is None else pooled(self.fitness, request.onto, scores)
            case DrawCases(draw):
                self._draw_cases(draw)
            case SetScale(kind):
                self._set_scale(kind)
            case SetDirection():
                if self.scale_changed:
                    self.take_gradient()
                with self._timed("update"):
                    self.scale, factor = self._direction(request)
                self.scale_is_update = self.scale_changed = True
                return factor
            case Compare():
                return self._cosine()
            case Take(member):
                refuse(len(member) != 1, f"Take: expected one member, got {len(member)}: members[k : k + 1] is one")
                with self._timed("update"):
                    self._take(member)
                self.parent_changed = True
                if self.scale_is_update or self.scale_is_gradient:
                    self.scale, self.scale_is_update, self.scale_changed = self.noise_scale, False, True
            case _:
                raise InputError(f"the strategy yielded {request!r:.60}: expected a request of spartan_ray.strategies")
        return None

    def _set_scale(self, kind: Literal["none", "rms", "gradient"]) -> None:
        """Set the scale of the noise from now on. The gradient is computed when it is needed."""
        refuse(kind != "none" and self.subspace is not None, f"a subspace cannot be combined with the scale {kind!r}")
        self.scale_is_gradient, self.scale_is_update, self.scale_changed = kind == "gradient", False, True
        self.scale = self.noise_scale = self.model.rms() if kind == "rms" else None

    def score_members(self, request: Score) -> Scores:
        members = request.members
        without_noise = len(members) == 1 and not members.gain_K[0]
        here = self.here if self.here is not self.executor else None
        if here and without_noise and self.scale_changed and self.executor.devices == here.devices:
            # Scoring an update keeps only one worker busy. Scored here, the update need not be sent.
            try:
                with self._timed("scoring"):
                    here.broadcast(self._parent_state(here))
                    here.broadcast_scale(self._scale(here))
                    scores = here.evaluate(members, request.cases, request.threshold, request.part, request.own)
                self.cases_scored += int(scores.cases_K.sum())
                return scores
            except torch.OutOfMemoryError:  # the driver may have only a small share of a GPU
                self.here = None
        self.broadcast(bool(members.gain_K.any()))
        self.mutation_norm = self.mutation_norm or self._mutation_norm(members)
        with self._timed("scoring"):
            scores = self.executor.evaluate(members, request.cases, request.threshold, request.part, request.own)
        self.cases_scored += int(scores.cases_K.sum())
        return scores

    def broadcast(self, with_noise: bool = True) -> None:
        """Send the executor the parent, the scale and the subspace, as far as they changed."""
        if self.subspace and with_noise and not self.basis_sent:
            self.executor.broadcast_basis(self.take_basis())
            self.basis_sent = True
        if self.scale_changed:
            self.take_gradient()
            self.executor.broadcast_scale(self._scale(self.executor))
        if self.parent_changed:
            self.executor.broadcast(self._parent_state(self.executor))
        self.parent_changed = self.scale_changed = False

    def take_gradient(self) -> None:
        """If the scale is the gradient, compute it for the present parent."""
        if not self.scale_is_gradient or self.scale_is_update:
            return
        with self._timed("gradient"), keeping_gradients(self.model.module):
            self.gradient(self.model.module, self.generation_begun)
            self.noise_scale = self.scale = self.model.gradient()

    def take_basis(self) -> Basis:
        """Return the subspace of the phase, made at the first call."""
        assert self.subspace
        if self.basis is None:
            with self._timed("gradient"):
                self.basis = self.subspace.basis(self._random_direction, self._gradient_direction)
        return self.basis

    def _random_direction(self, number: int) -> torch.Tensor:
        """Return random direction `number` of unit variance, shape (D,)."""
        key = random_key(self.seed, BASIS_OF_GENERATION + self.generation_begun + number * DRAWS_APART)
        weight_1 = np.array([1 / RMS[self.noise]], np.float32)
        return self.kernel.accumulate(np.array([key], np.uint64), weight_1, 0, self.model.theta_D.numel())

    def _gradient_direction(self, number: int) -> torch.Tensor:
        """Return gradient `number`, shape (D,). By default each is computed on its own draw of cases."""
        with keeping_gradients(self.model.module):
            self.gradient(self.model.module, self.generation_begun + number * DRAWS_APART)
            return self.model.gradient()

    def _loss_gradient(self, network: nn.Module, generation: int) -> None:
        """Compute the default gradient, on fitness cases only: confirm cases must not influence any choice."""
        case_N = gradient_cases(self.case_sets["fitness"], self.gradient_cases, self.seed, generation)
        self._backward(network, case_N)

    def _backward(self, network: nn.Module, case_N: NDArray[np.int64]) -> None:
        network.eval()
        for batch_N in batched(torch.from_numpy(case_N).to(self.model.theta_D.device), self.fitness.batch):
            loss = self.fitness.loss(network, batch_N)
            refuse(loss.numel() != 1, f"loss of {len(batch_N)} cases is {tuple(loss.shape)}: expected their mean")
            (loss * (len(batch_N) / len(case_N))).backward()

    def _cosine(self) -> float:
        """Return the cosine between the update and the direction in which the loss of the fitness cases falls."""
        refuse(not self.scale_is_update or self.scale is None, "Compare: there is no update before SetDirection")
        assert self.scale is not None
        with self._timed("gradient"), keeping_gradients(self.model.module):
            self._backward(self.model.module, self.case_sets["fitness"])
            gradient_D = self.model.gradient()
        lengths = norm(self.scale) * norm(gradient_D)
        return -dot(self.scale, gradient_D) / lengths if lengths else math.nan

    def _scale(self, executor: Executor) -> Scale:
        """Return the scale as an executor needs it: a tensor for the one in this process, else an array."""
        scale = self.scale
        return scale if scale is None or executor is self.here else scale.cpu().numpy()

    def _parent_state(self, executor: Executor) -> ParentState:
        theta_D, buffers = self.model.theta_D, [buffer.detach() for buffer in self.model.buffers]
        if executor is self.here:
            return ParentState(theta_D, buffers, self.case_sets, self.random)
        return ParentState(theta_D.cpu().numpy(), [packed(buffer) for buffer in buffers], self.case_sets, self.random)

    def _direction(self, wanted: SetDirection) -> tuple[torch.Tensor, float]:
        """Return the update, and the factor that gives it the wanted step ratio.

        Without a ratio, the learning rate determines its length, and the factor is 1."""
        theta_D = self.model.theta_D
        estimate_D = self._estimate(wanted)
        if self.noise_scale is not None and len(self.noise_scale) == len(theta_D):
            estimate_D *= self.noise_scale
        elif self.noise_scale is not None:
            self.model.multiply(estimate_D, self.noise_scale)
        if not estimate_D.isfinite().all():  # keep the moments of the optimizer finite
            return torch.full_like(estimate_D, math.nan), 1.0
        if wanted.weight_decay:
            estimate_D -= wanted.weight_decay * theta_D
        update_D = self.updates.make(estimate_D, wanted.optimizer, wanted.rate)
        if wanted.ratio is None:
            return update_D, 1.0
        length = norm(update_D)
        factor = wanted.ratio * self.mutation_norm / length if length else 1.0
        return update_D * factor, factor

    def _estimate(self, wanted: SetDirection) -> torch.Tensor:
        """Return sum_u weight_u * noise(seed_u), shape (D,), with the noise of the subspace if there is one."""
        size, basis = self.model.theta_D.numel(), self.take_basis() if self.subspace else None
        start, stop = basis.elements if basis else (0, size)
        sum_S = torch.from_numpy(self.executor.weighted_sum(wanted.seed_U, wanted.weight_U, start, stop))
        return basis.combine(sum_S.to(self.model.theta_D.device)) if basis else sum_S.to(self.model.theta_D.device)

    def _take(self, member: Members) -> None:
        theta_D = self.model.theta_D
        scale = self.scale if self.scale is None or len(self.scale) == len(theta_D) else self.model.spread(self.scale)
        self.kernel.descend(
            theta_D, scale, int(member.seed_K[0]), float(member.offset_K[0]), float(member.gain_K[0]), theta_D
        )
        self.model.write()
        self.fitness.moved(self.model.module)

    def _mutation_norm(self, members: Members) -> float:
        """Return the expected norm of scale * (offset + gain * noise).

        Offset and gain are those of the first member with noise. 0 if no member has noise."""
        with_noise = np.flatnonzero(members.gain_K)
        if not len(with_noise):
            return 0.0
        offset, gain = float(members.offset_K[with_noise[0]]), float(members.gain_K[with_noise[0]])
        if self.basis is not None:
            return gain * RMS[self.noise] * self.basis.norm()
        return math.hypot(offset, gain * RMS[self.noise]) * self.model.scale_norm(self.scale)

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started
