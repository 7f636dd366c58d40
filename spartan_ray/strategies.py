"""The building blocks of your own strategies: members, requests, answers and the outcome.

The guide docs/howto/own-strategy.md shows how to write a strategy. `PARENT` is the parent itself, as a table of one
member.
"""

from spartan_ray.engine.strategies.requests import (
    PARENT,
    Compare,
    DrawCases,
    Members,
    Outcome,
    Request,
    Score,
    Scores,
    SetDirection,
    SetScale,
    Strategy,
    Take,
    confirm,
    is_better,
    joined,
    line,
    noisy,
)
from spartan_ray.engine.strategies.shaping import centered_rank, zscore
from spartan_ray.noise.contract import member_seeds

__all__ = [
    "PARENT",
    "Compare",
    "DrawCases",
    "Members",
    "Outcome",
    "Request",
    "Score",
    "Scores",
    "SetDirection",
    "SetScale",
    "Strategy",
    "Take",
    "centered_rank",
    "confirm",
    "is_better",
    "joined",
    "line",
    "member_seeds",
    "noisy",
    "zscore",
]
