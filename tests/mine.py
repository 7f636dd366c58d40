"""Code as a user supplies it: two networks and a strategy."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from spartan_ray.strategies import PARENT, Outcome, Score, Take, joined, member_seeds, noisy


class Small(nn.Module):
    """A network for images of any size, with dropout and a second output in training."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(3, 8, 4, stride=4), nn.BatchNorm2d(8), nn.ReLU())
        self.dropout = nn.Dropout(0.3)
        self.aux, self.fc = nn.Linear(8, num_classes), nn.Linear(8 * 64, num_classes)

    def forward(self, images_NCHW: torch.Tensor) -> Any:
        maps_NCHW = nn.functional.adaptive_avg_pool2d(self.features(images_NCHW), 8)
        logits_NC = self.fc(self.dropout(maps_NCHW).flatten(1))
        return (logits_NC, self.aux(maps_NCHW.mean((2, 3)))) if self.training else logits_NC


class Branches(nn.Module):
    """A network whose convolutions feed BatchNorm in different ways.

    `alone` has a bias, and its output goes only into BatchNorm. The output of the convolution of `beside` is also used
    elsewhere. `twice` is applied several times. `grouped` has groups."""

    def __init__(self, num_classes: int) -> None:
        super().__init__()
        self.alone = nn.Sequential(nn.Conv2d(3, 8, 3, stride=4, padding=1, bias=True), nn.BatchNorm2d(8))
        self.beside = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8))
        self.twice = nn.Sequential(nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.BatchNorm2d(8))
        self.grouped = nn.Sequential(nn.Conv2d(8, 8, 3, groups=4), nn.BatchNorm2d(8))
        self.fc = nn.Linear(8, num_classes)

    def forward(self, images_NCHW: torch.Tensor) -> Any:
        maps_NCHW = self.alone(images_NCHW).relu()
        inner_NCHW = self.beside[0](maps_NCHW)
        maps_NCHW = (self.beside[1](inner_NCHW) + inner_NCHW).relu()
        maps_NCHW = self.grouped(maps_NCHW)
        for _ in range(3):  # down to a map of one pixel
            maps_NCHW = self.twice(maps_NCHW)
        return self.fc(maps_NCHW.mean((2, 3)))


class Halves:
    """A strategy that scores the members in two halves. The best of each half becomes the parent if it is better."""

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
