"""What carries tasks to workers, as the dispatcher sees it: Ray, or a scripted one of the tests."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Protocol


class Lost(Exception):
    """A worker's process was killed, or cannot be reached. That says nothing of its work."""


class Failed(Exception):
    """What a worker's own code raised, at its start or in its work."""


@dataclass
class Room:
    """What the Ray has room for: how many workers there are to be now, the names of the nodes that are up, and those
    of them that are about to go."""

    workers: int
    up: set[str]
    leaving: set[str]


class Transport(Protocol):
    """What starts the workers and carries tasks to them. A reference stands for an answer that is to come."""

    def start(self) -> tuple[Any, Any]:
        """A new worker, and the reference of the WorkerInfo that it sends when it is there."""

    def joined(self, worker: Any, node: str) -> None:
        """A worker is there, on a node of this name."""

    def answers_per_second(self, method: str) -> float:
        """How many answers of a method can be heard, with some to spare."""

    def wait(self, references: list[Any], seconds: float) -> list[Any]:
        """The references that are ready, as soon as one is, or none after so many seconds."""

    def put(self, value: Any) -> Any:
        """What stands for a value in the arguments of tasks: it is sent to each node once."""

    def submit(self, worker: Any, method: str, *arguments: Any) -> Any:
        """Have a worker do something after what it has to do already; the reference of its answer."""

    def result(self, reference: Any) -> Any:
        """The answer behind a reference that is ready. Raises Lost or Failed."""

    def kill(self, worker: Any) -> None:
        """End a worker, in whatever state it is."""

    def end(self, workers: list[Any]) -> None:
        """End workers that have nothing to do."""

    def now(self) -> float:
        """Seconds on a clock that never goes back."""

    def room(self, workers: int, starting: int) -> Room:
        """What there is room for, with so many workers that have joined and so many that have not."""

    def impossible(self) -> str:
        """Why there will never be room for a worker; nothing where there may be."""
