"""The transport that carries tasks to workers, as the dispatcher sees it: Ray, or a scripted one in the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Lost(Exception):
    """A worker's process was killed or cannot be reached. Its work is not necessarily at fault."""


class Failed(Exception):
    """A worker's own code raised an exception, during its start or its work."""


@dataclass
class Room:
    """The room in a Ray: the number of workers that the run should have now, the IDs of the nodes that are up, and the
    IDs of those that are draining."""

    workers: int
    up: set[str]
    leaving: set[str]


class Transport(Protocol):
    """Starts workers and carries tasks to them. A reference stands for an answer that is still to come."""

    def start(self) -> tuple[Any, Any]:
        """Start a worker. Return it, and the reference of the WorkerInfo that it sends when it has started."""

    def joined(self, worker: Any, node: str) -> None:
        """Take note that a worker has joined, on the node with this ID."""

    def answers_per_second(self, method: str) -> float:
        """Return how many answers of a method can be received per second, with some to spare."""

    def wait(self, references: list[Any], seconds: float) -> list[Any]:
        """Return ready references as soon as there is one, or an empty list after this many seconds."""

    def put(self, value: Any) -> Any:
        """Return a stand-in for a value in the arguments of tasks. The value is sent to each node once."""

    def submit(self, worker: Any, method: str, *arguments: Any) -> Any:
        """Queue a method call on a worker, behind its other tasks. Return the reference of the answer."""

    def result(self, reference: Any) -> Any:
        """Return the answer of a reference that is ready. Raises Lost or Failed."""

    def kill(self, worker: Any) -> None:
        """End a worker, whatever its state."""

    def end(self, workers: list[Any]) -> None:
        """End idle workers."""

    def now(self) -> float:
        """Return the seconds of a monotonic clock."""

    def room(self, workers: int, starting: int) -> Room:
        """Return the room for workers, given that `workers` have joined and `starting` have not."""

    def impossible(self) -> str:
        """Return why there will never be room for a worker; empty if there may be."""
