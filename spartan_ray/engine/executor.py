"""What evaluates members: a pool of workers, or this process. Both give the same bits. Shapes: D parameters,
K members, U seeds."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray

from spartan_ray.engine.evaluator import Evaluator, EvaluatorSpec, ParentState, Scale
from spartan_ray.engine.process import as_in_a_worker
from spartan_ray.engine.strategies.requests import WHOLE, CaseSet, Members, Part, Scores
from spartan_ray.engine.subspace import Basis
from spartan_ray.errors import RunError


class Executor(Protocol):
    """Scores members and sums updates, from seeds."""

    counts: dict[str, float]
    """What happened so far, by name: retries, seconds of broadcasting and the like."""

    @property
    def workers(self) -> int:
        """How many evaluators there are now."""

    @property
    def devices(self) -> set[str]:
        """The names of the devices that score."""

    def broadcast(self, parent: ParentState) -> None:
        """Make this the parent of the members that are evaluated from here on."""

    def broadcast_scale(self, scale: Scale) -> None:
        """Make this the scale of what is added to the parent."""

    def broadcast_basis(self, basis: Basis | None) -> None:
        """Make this the subspace of the noise; None is the whole space."""

    def evaluate(
        self,
        members: Members,
        cases: CaseSet = "fitness",
        threshold: float = -math.inf,
        part: Part = WHOLE,
        own: int | None = None,
    ) -> Scores:
        """The scores of every member on a part of the cases, in their order; one that can no longer exceed the
        threshold may be left. With `own` each seed draws so many of them for its members."""

    def weighted_sum(
        self, seed_U: NDArray[np.uint64], weight_U: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        """Elements [start, stop) of sum_u weight_u * noise(seed_u), in float32, added in the order of u."""

    def close(self) -> None:
        """End what was started."""


def given_up(members: Members, k: int, tries: int, reason: str, stop: bool = False) -> str:
    """What is said of a member that could not be scored, and is the worst. Raises RunError to stop, and for one without
    noise, which is the parent or its update: there is no phase without its score."""
    who = f"the member of seed {members.seed_K[k]}" if members.gain_K[k] else "the parent, or its update,"
    said = f"{who} failed" + f" on {tries} workers" * (tries > 1)
    if stop or not members.gain_K[k]:
        raise RunError(f"{said}: {reason}")
    return f"{said} and is scored worst: {reason}"


class LocalExecutor:
    """One evaluator in this process, in the order of the members."""

    workers = 1

    def __init__(self, spec: EvaluatorSpec, device: torch.device, note: Callable[[str], None]) -> None:
        self.evaluator: Evaluator = spec.make(device)
        self.threads, self.note = spec.threads, note
        self.counts: dict[str, float] = {"retries": 0, "members_failed": 0}

    @property
    def devices(self) -> set[str]:
        return {self.evaluator.device_name}

    def broadcast(self, parent: ParentState) -> None:
        self.evaluator.load(parent)

    def broadcast_scale(self, scale: Scale) -> None:
        self.evaluator.load_scale(scale)

    def broadcast_basis(self, basis: Basis | None) -> None:
        self.evaluator.load_basis(basis)

    def evaluate(
        self,
        members: Members,
        cases: CaseSet = "fitness",
        threshold: float = -math.inf,
        part: Part = WHOLE,
        own: int | None = None,
    ) -> Scores:
        with as_in_a_worker(self.threads, self.evaluator.device):
            scores, failed = self.evaluator.evaluate(members, cases, threshold, part, own)
        for k, text in failed.items():
            self.counts["members_failed"] += 1
            self.note(given_up(members, k, 1, text))
        return scores

    def weighted_sum(
        self, seed_U: NDArray[np.uint64], weight_U: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        return self.evaluator.accumulate(seed_U, weight_U, start, stop)

    def close(self) -> None:
        pass
