"""Scores members on one device: parent + seed -> descendant -> fitness, and its slice of the update.

Knows nothing of Ray; a worker is the Ray actor around one evaluator. Shapes: D parameters, K members,
N images of a generation.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from spartan_ray.config import FitnessKind, NoiseKind
from spartan_ray.data import Images
from spartan_ray.fitness import Normaliser, score
from spartan_ray.model import FlatModel
from spartan_ray.noise import kernel_for
from spartan_ray.strategies.base import Members


@dataclass(frozen=True)
class ParentState:
    """The parent as it is broadcast, and the evolution images that score its generation."""

    key: int  # tells one broadcast from another
    theta_D: NDArray[np.float32]
    buffers: list[NDArray[np.generic]]
    image_N: NDArray[np.int64]  # indices into the evolution split


class Evaluator:
    """Builds descendants in place in its own module, always from the pristine parent."""

    def __init__(
        self,
        module: nn.Module,
        images: Images,
        normalise: Normaliser,
        noise: NoiseKind,
        fitness: FitnessKind,
        device: torch.device,
    ) -> None:
        self.model = FlatModel(module, device)
        self.split = images.to(device)
        self.images = self.split
        self.normalise = normalise
        self.fitness: FitnessKind = fitness
        self.device = device
        self.kernel = kernel_for(noise, device)
        self.theta_D = self.model.theta_D

    def load(self, parent: ParentState) -> None:
        """Take a new parent. On a CPU its parameters stay where they are, shared with other workers."""
        with warnings.catch_warnings():
            # Shared memory is read-only, and so is what is done with theta_D.
            warnings.filterwarnings("ignore", message="The given (NumPy array|buffer) is not writable")
            self.theta_D = torch.from_numpy(parent.theta_D).to(self.device)
        self.model.load_buffers([torch.from_numpy(buffer.copy()) for buffer in parent.buffers])
        self.images = self.split[torch.from_numpy(parent.image_N.copy()).to(self.device)]

    def evaluate(self, members: Members) -> NDArray[np.float64]:
        """The fitness of each member, higher is better."""
        fitness_K = np.empty(len(members))
        for k, (seed, sign) in enumerate(zip(members.seed_K, members.sign_K, strict=True)):
            self.kernel.descend(self.theta_D, members.scale, int(seed), int(sign), self.model.theta_D)
            fitness_K[k] = score(self.model.module, self.images, self.normalise).fitness(self.fitness)
        return fitness_K

    def accumulate(
        self, seed_K: NDArray[np.uint64], weight_K: NDArray[np.float32], start: int, stop: int
    ) -> NDArray[np.float32]:
        """Elements [start, stop) of sum_k weight_k * noise_k."""
        return self.kernel.accumulate(seed_K, weight_K, start, stop).cpu().numpy()
