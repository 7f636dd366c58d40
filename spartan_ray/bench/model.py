"""A model of a generation on many GPUs, from what was measured here and what is on paper. Shapes: W workers."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

# What a GPU and a network of 2024 do, for the model: NVIDIA's data sheet of the H100 SXM, and counts of ResNet18 at
# 32x32 (see docs/scaling.md).
PARENT_BYTES = 4 * 11_181_642
NETWORK_BYTES_A_SECOND = 100e9 / 8
GPUS_A_NODE = 8


def seconds_of_generation(
    workers_W: NDArray[np.float64],
    population: int,
    seconds_a_member: float,
    update_seconds_a_member: float,
    answers_a_second: float,
    chunk_seconds: float,
) -> dict[str, NDArray[np.float64]]:
    """The parts of a generation's time over workers, none of which overlaps another.

    broadcast  the parent goes from the driver's node to every other one, one after another: Ray may do better
    scoring    every worker its share, and half a chunk until the last one is done
    dispatch   what the driver needs for its answers beyond the time that scoring takes
    update     every worker its slice of all members, and a parent's bytes back to the driver
    """
    nodes_W = np.ceil(workers_W / GPUS_A_NODE)
    share_W = population / workers_W
    chunk_W = np.clip(chunk_seconds / seconds_a_member, 1, np.maximum(1, share_W / 4))
    scoring_W = seconds_a_member * (share_W + chunk_W / 2 * (workers_W > 1))
    answers_W = np.maximum(population / chunk_W, workers_W)
    return {
        "broadcast": (nodes_W - 1) * PARENT_BYTES / NETWORK_BYTES_A_SECOND,
        "scoring": scoring_W,
        "dispatch": np.maximum(0, answers_W / answers_a_second - scoring_W),
        "update": share_W * update_seconds_a_member
        + workers_W / answers_a_second
        + PARENT_BYTES / NETWORK_BYTES_A_SECOND,
    }
