"""What a strategy of one's own is made of: docs/howto/own-strategy.md shows one."""

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
