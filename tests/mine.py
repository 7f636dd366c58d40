"""What a user brings along: a network with dropout and two outputs in training, and a strategy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from spartan_ray.strategies import PARENT, Outcome, Score, Take, joined, member_seeds, noisy


class Small(nn.Module):
    """For images of any size."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.dropout = nn.Dropout(0.3)
        self.aux, self.fc = nn.Linear(8, num_classes), nn.Linear(8 * 64, num_classes)

    def forward(self, images_NCHW: torch.Tensor) -> Any:
        maps_NCHW = nn.functional.adaptive_avg_pool2d(self.features(images_NCHW), 8)
        logits_NC = self.fc(self.dropout(maps_NCHW).flatten(1))
        return (logits_NC, self.aux(maps_NCHW.mean((2, 3)))) if self.training else logits_NC


class Halves:
    """The best of each half of the members becomes the parent if it is better, one half after the other."""

    case_sets = ("fitness",)

    def __init__(self, population: int, sigma: float) -> None:
        self.population, self.sigma = population, sigma

    def generation(self, seed: int, number: int) -> Any:
        scores = yield Score(PARENT)
        (before,) = scores.fitness_K
        seed_K, weight_K, after, found = member_seeds(seed, number, self.population), [], before, []
        for half_K in np.split(seed_K, 2):
            members = noisy(half_K, 0.0, self.sigma)
            found.append((members, (yield Score(members))))
            fitness_K = found[-1][1].fitness_K
            best = int(np.argmax(fitness_K))
            weight_K.append(np.eye(len(half_K))[best] * (fitness_K[best] > after))
            if fitness_K[best] > after:
                after = fitness_K[best]
                yield Take(members[best : best + 1])
        members, scores = (joined(*column) for column in zip(*found, strict=True))
        return Outcome(members, scores.fitness_K, scores.cases_K, np.concatenate(weight_K), before, after)
