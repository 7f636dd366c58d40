"""The progress of a run, as its driver reports it."""

from __future__ import annotations

import os
from dataclasses import dataclass, field

from spartan_ray.run.record import Row


@dataclass
class Progress:
    """The progress of a run. `rows` and `said` only grow, so that a reader can ask for the new entries."""

    folder: str | None = None
    phase: str = "starting"
    epoch: int = 0
    epochs: int = 0
    unit: str = ""
    done: int = 0
    total: int = 0
    images: int = 0
    started: float = 0.0
    rows: list[Row] = field(default_factory=list)  # metrics of the whole run
    said: list[Row | str] = field(default_factory=list)  # rows and notes of this driver, in order
    driver_pid: int = field(default_factory=os.getpid)
    worker_pids: list[int] = field(default_factory=list)

    @property
    def notes(self) -> list[str]:
        """The one-line messages for the user."""
        return [said for said in self.said if isinstance(said, str)]
