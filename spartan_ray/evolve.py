"""An evolve phase: answers what the strategy asks with the parent and the pool.

Shapes: D parameters, T parameter tensors, K members, N images.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray

from spartan_ray.checkpoint import TensorDict, load_optimizer, optimizer_tensors
from spartan_ray.config import BatchNormKind, Diverged, Evolution, ImageSet, InputError
from spartan_ray.data import Images, Splits, permutation
from spartan_ray.evaluator import LocalPool, ParentState, Scale, reference_images
from spartan_ray.fitness import Normaliser, recalibrate
from spartan_ray.model import FlatModel
from spartan_ray.noise import RMS, kernel_for
from spartan_ray.parent import mean_gradient
from spartan_ray.pool import Pool
from spartan_ray.record import Row
from spartan_ray.strategies import Aim, Gradient, Members, Outcome, Score, Scores, Strategy, Take
from spartan_ray.strategies.base import Request

# Keys of `permutation` for the images of a generation.
IMAGES_OF_GENERATION = 1 << 33
GRADIENT_IMAGES_OF_GENERATION = 1 << 35
# Images of the gradient, if there are so many.
GRADIENT_IMAGES = 512


class Evolver:
    """Moves the parent, in place, as the strategy asks."""

    def __init__(
        self,
        config: Evolution,
        run_seed: int,
        strategy: Strategy,
        model: FlatModel,
        splits: Splits,
        normalise: Normaliser,
        pool: Pool | LocalPool,
        here: LocalPool | None = None,
    ) -> None:
        """`here` scores in this process what is not worth sending."""
        self.config = config
        self.run_seed = run_seed
        self.strategy = strategy
        self.model = model
        self.splits = splits
        self.normalise = normalise
        self.pool = pool
        self.here = here
        self.kernel = kernel_for(config.noise, model.theta_D.device)
        self.mutated_T = model.mutated(config.mutate)
        self.counts = image_counts(config, len(splits.evolution), len(splits.sgd))

    @cached_property
    def optimizer(self) -> torch.optim.Optimizer:
        """What turns the estimated gradient into the update. It moves a vector of zeros, so that the update
        can be had alone; its moments are of all estimates, whether their update was taken or not."""
        update_D = torch.zeros_like(self.model.theta_D)
        if self.config.optimizer == "adam":
            return torch.optim.Adam([update_D])
        return torch.optim.SGD([update_D], momentum=0.9 if self.config.optimizer == "momentum" else 0.0)

    def optimizer_state(self) -> TensorDict:
        """What the update of the next generation depends on beside the parent; only es has it."""
        return optimizer_tensors(self.optimizer) if self.config.strategy == "es" else {}

    def load_optimizer_state(self, tensors: TensorDict) -> None:
        if self.config.strategy == "es":
            load_optimizer(self.optimizer, tensors)

    def begin(self, generation: int) -> None:
        """Draw what the generation is scored on."""
        self.images_scored, self.mutation_norm = 0, 0.0
        self.seconds = dict.fromkeys(("scoring", "update", "gradient"), 0.0)
        self.image_sets = image_sets(self.counts, len(self.splits.evolution), self.run_seed, generation)
        self.gradient_images = self._gradient_images(generation)
        self.scale, self.scale_is_gradient = self._tensor_scale(), False
        self.parent_changed = self.scale_changed = True

    def evolve(self, generation: int) -> tuple[Outcome, Row]:
        """One phase: its account, and what the record says of it."""
        theta_D = self.model.theta_D.clone()
        counts = dict(self.pool.counts)
        self.begin(generation)
        phase, answer = self.strategy.phase(self.run_seed, generation), None
        while True:
            try:
                request = phase.send(answer)
            except StopIteration as end:
                outcome: Outcome = end.value
                break
            answer = self.answer(request)

        if not math.isfinite(outcome.before):
            raise Diverged(f"the parent's own fitness in generation {generation} is not finite")
        moved = float((self.model.theta_D - theta_D).double().norm())
        images, scored = len(self.image_sets["fitness"]), self.images_scored
        row = {
            "images_per_second": scored / self.seconds["scoring"],
            "population": len(outcome.members),
            "fitness_images": images,
            **fitness_statistics(outcome.fitness_K),
            "parent_fitness_before": outcome.before,
            "parent_fitness_after": outcome.after,
            "accepted": outcome.accepted > 0,
            "accepted_members": outcome.accepted,
            "chosen_member": outcome.chosen,
            "note": outcome.note,
            "confirm_fitness_before": outcome.confirm[0] if outcome.confirm else None,
            "confirm_fitness_after": outcome.confirm[1] if outcome.confirm else None,
            "search_ratios": outcome.search[0] if outcome.search else None,
            "search_fitness": outcome.search[1] if outcome.search else None,
            "step_ratio": moved / self.mutation_norm if self.mutation_norm else 0.0,
            "images_scored": scored - outcome.discarded_images,
            "images_saved": int((images - outcome.images_K[outcome.images_K > 0]).sum()),
            "images_discarded": outcome.discarded_images,
            **{f"{name}_seconds": seconds for name, seconds in self.seconds.items()},
            **{name: count - counts[name] for name, count in self.pool.counts.items()},
            "workers": len(self.pool.infos),
        }
        return outcome, row

    def answer(self, request: Request) -> Scores | float | None:
        """Do what the strategy asks."""
        match request:
            case Score():
                return self._score(request)
            case Gradient():
                self.scale_is_gradient = self.scale_changed = True
            case Aim():
                with self._timed("update"):
                    self.scale, factor = self._aim(request)
                self.scale_changed = True
                return factor
            case Take(member):
                with self._timed("update"):
                    self._take(member)
                self.parent_changed = True
                self.scale_changed = self.scale_changed or self.scale_is_gradient
        return None

    def _score(self, request: Score) -> Scores:
        members = request.members
        bar = request.bar if self.config.early_rejection else -math.inf
        without_noise = len(members) == 1 and not members.gain_K[0]
        if self.here and without_noise and self.scale_changed and self.pool.devices == self.here.devices:
            # An update's score keeps one worker busy, and all else that it would cost is to send the update.
            try:
                with self._timed("scoring"):
                    self.here.broadcast(self._parent_state())
                    self.here.broadcast_scale(self._scale())
                    scores = self.here.evaluate(members, request.images, bar, request.part)
                self.images_scored += int(scores.images_K.sum())
                return scores
            except torch.OutOfMemoryError:  # a driver has little of a GPU
                self.here = None
        self.broadcast()
        self.mutation_norm = self.mutation_norm or self._mutation_norm(members)
        with self._timed("scoring"):
            scores = self.pool.evaluate(members, request.images, bar, request.part)
        self.images_scored += int(scores.images_K.sum())
        return scores

    def broadcast(self) -> None:
        """Give the pool what members are made and scored from now, as far as it changed."""
        if self.scale_changed:
            self.take_gradient()
            self.pool.broadcast_scale(self._scale())
        if self.parent_changed:
            self.pool.broadcast(self._parent_state())
        self.parent_changed = self.scale_changed = False

    def take_gradient(self) -> None:
        """Where the scale is the gradient: make it that of the parent as it is now."""
        if self.scale_is_gradient:
            with self._timed("gradient"):
                self.scale = self._gradient()

    def _scale(self) -> Scale:
        return None if self.scale is None else self.scale.cpu().numpy()

    def _parent_state(self) -> ParentState:
        buffers = [buffer.cpu().numpy() for buffer in self.model.buffers]
        return ParentState(self.model.theta_D.cpu().numpy(), buffers, self.image_sets)

    def _gradient(self) -> torch.Tensor:
        """The parent's gradient; 0 for what evolution leaves. Where members have statistics of their own, it
        is the gradient through those of its batches: with fixed ones it would be another function's."""
        kind: BatchNormKind = "running" if self.config.batchnorm == "running" else "batch"
        gradient_D = mean_gradient(self.model, self.gradient_images, self.normalise, kind)
        return gradient_D.mul_(self.model.spread(self.mutated_T))

    def _aim(self, aim: Aim) -> tuple[torch.Tensor, float]:
        """The update, as long as the learning rate makes it or as the ratio that is wanted, and the factor of
        the latter."""
        theta_D = self.model.theta_D
        sum_D = self.pool.weighted_sum(aim.seed_U, aim.weight_U, theta_D.numel())
        estimate_D = torch.from_numpy(sum_D).to(theta_D.device)
        if self.scale is not None:
            estimate_D *= self.model.spread(self.scale)
        if not estimate_D.isfinite().all():  # the optimizer's moments would never be finite again
            return torch.full_like(estimate_D, math.nan), 1.0
        if self.config.weight_decay:
            estimate_D -= self.config.weight_decay * theta_D * self.model.spread(self.mutated_T)
        (group,) = self.optimizer.param_groups
        (update_D,) = group["params"]
        group["lr"] = aim.rate
        update_D.zero_()
        update_D.grad = estimate_D.neg_()
        self.optimizer.step()
        update_D.grad = None
        if aim.ratio is None:
            return update_D, 1.0
        norm = float(update_D.double().norm())
        factor = aim.ratio * self.mutation_norm / norm if norm else 1.0
        return update_D * factor, factor

    def _take(self, member: Members) -> None:
        theta_D = self.model.theta_D
        scale = self.scale if self.scale is None or len(self.scale) == len(theta_D) else self.model.spread(self.scale)
        self.kernel.descend(
            theta_D, scale, int(member.seed_K[0]), float(member.offset_K[0]), float(member.gain_K[0]), theta_D
        )
        if self.config.batchnorm != "running":
            self._recalibrate()

    def _recalibrate(self) -> None:
        recalibrate(self.model.module, self.normalise(reference_images(self.splits).pixels_NHWC))

    def _tensor_scale(self) -> torch.Tensor | None:
        """1, or a number a tensor where tensors differ: its RMS, 0 for those that evolution leaves."""
        if self.config.sigma_scale == "relative":
            rms = [view.double().square().mean().sqrt() for view in self.model.views(self.model.theta_D)]
            return torch.stack(rms).float() * self.mutated_T
        return None if self.mutated_T.all() else self.mutated_T

    def _mutation_norm(self, members: Members) -> float:
        """The norm to expect of scale * (offset + gain * noise) for members with noise."""
        with_noise = np.flatnonzero(members.gain_K)
        if not len(with_noise):
            return 0.0
        offset, gain = float(members.offset_K[with_noise[0]]), float(members.gain_K[with_noise[0]])
        size = self.model.theta_D.numel()
        scale_D = torch.ones(size) if self.scale is None else self.scale
        if len(scale_D) != size:
            scale_D = self.model.spread(scale_D)
        return math.hypot(offset, gain * RMS[self.config.noise]) * float(scale_D.double().norm())

    def _gradient_images(self, generation: int) -> Images:
        """Drawn anew. Of the evolution split they are fitness images, since those that confirm must have
        chosen nothing."""
        split, index_N = self.splits.sgd, np.arange(len(self.splits.sgd))
        if self.config.gradient_split == "evolution":
            split, index_N = self.splits.evolution, self.image_sets["fitness"]
        drawn_N = permutation(len(index_N), self.run_seed, GRADIENT_IMAGES_OF_GENERATION + generation)
        return split[torch.from_numpy(index_N[drawn_N[: self.config.gradient_images or GRADIENT_IMAGES]])]

    @contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[part] += time.perf_counter() - started


def image_counts(config: Evolution, evolution_images: int, sgd_images: int) -> dict[ImageSet, int]:
    """How many images each set of a generation has. Raises InputError when they are not there."""
    try:
        counts = config.image_counts(evolution_images)
    except ValueError as error:
        raise InputError(str(error)) from None
    in_fitness = config.gradient_split == "evolution"
    name, available = ("fitness images", counts["fitness"]) if in_fitness else ("SGD split", sgd_images)
    if config.gradient_images and config.gradient_images > available:
        raise InputError(
            f"evolution.gradient_images ({config.gradient_images}) is larger than the {name} ({available})"
        )
    return counts


def image_sets(
    counts: dict[ImageSet, int], split: int, run_seed: int, generation: int
) -> dict[ImageSet, NDArray[np.int64]]:
    """Disjoint sets of indices into an evolution split of so many images, drawn anew for each generation."""
    drawn_N = permutation(split, run_seed, IMAGES_OF_GENERATION + generation)
    parts = np.split(drawn_N, np.cumsum(list(counts.values())))
    return {name: np.sort(part) for name, part in zip(counts, parts, strict=False)}


def fitness_statistics(fitness_K: NDArray[np.float64]) -> Row:
    """What the record says of the members' fitnesses; the finite ones make the statistics."""
    finite_K = fitness_K[np.isfinite(fitness_K)]
    statistics = {
        f"fitness_{name}": float(getattr(finite_K, name)()) if len(finite_K) else math.nan
        for name in ("min", "mean", "max", "std")
    }
    return statistics | {"fitness_nonfinite": len(fitness_K) - len(finite_K)}
