"""The executor, which evaluates members in this process or on a pool of workers.

Both give the same bits. Shapes: D parameters, K members, U seeds.
"""

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
    """The interface of an executor: scores members and sums updates, both from seeds."""

    counts: dict[str, float]
    """Counters since the start, by name, such as retries or seconds of broadcasting."""

    @property
    def workers(self) -> int:
        """The present number of evaluators."""

    @property
    def devices(self) -> set[str]:
        """Names of the devices on which members are scored."""

    def broadcast(self, parent: ParentState) -> None:
        """Set the parent of the members that are evaluated from now on, and their cases."""

    def broadcast_scale(self, scale: Scale) -> None:
        """Set the scale of what is added to the parent."""

    def broadcast_basis(self, basis: Basis | None) -> None:
        """Set the subspace of the noise. None is the whole space."""

    def evaluate(
        self,
        members: Members,
        cases: CaseSet = "fitness",
        threshold: float = -math.inf,
        part: Part = WHOLE,
        own: int | None = None,
    ) -> Scores:
        """Score members on a set of cases. Return their scores in the order of the members.

        Args:
            members: The members, K rows.
            cases: Name of the set.
            threshold: Scoring of a member may stop once its fitness can no longer exceed this.
            part: Part of the set.
            own: Number of cases that each seed draws from the set for its members. None: the part.
        """

    def weighted_sum(
        self, seed_U: NDArray[np.uint64], weight_U: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        """Return elements [start, stop) of sum_u weight_u * noise(seed_u), in float32, added in the order of u."""

    def close(self) -> None:
        """Stop everything that the executor started."""


def given_up(members: Members, k: int, tries: int, reason: str, stop: bool = False) -> str:
    """Return the message about a member that could not be scored and is therefore the worst.

    Raises RunError if `stop` is true, or if the member has no noise. It is then the parent or its update, and the phase
    cannot continue without its score."""
    who = f"the member of seed {members.seed_K[k]}" if members.gain_K[k] else "the parent, or its update,"
    said = f"{who} failed" + f" on {tries} workers" * (tries > 1)
    if stop or not members.gain_K[k]:
        raise RunError(f"{said}: {reason}")
    return f"{said} and is scored worst: {reason}"


class LocalExecutor:
    """One evaluator in this process. It scores members in their order."""

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
