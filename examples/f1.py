"""F1 as the fitness: find the eights among all digits. F1 suits this unbalanced task and is no mean over images.

python examples/f1.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import spartan_ray as sr

PIXELS_NI, DIGITS_N = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
INPUTS_NI, EIGHT_N = (PIXELS_NI / 16).float(), DIGITS_N == 8
SGD, EVOLUTION, TEST = slice(0, 400), slice(400, 1000), slice(1000, None)


class F1(sr.Fitness):
    """Hits, false alarms and misses of each image; F1 is a function of their means."""

    cases = 600
    vmap = True  # lets `batch_members` score many small networks at once

    def __call__(self, network, case_N):
        said_N, is_N = network(INPUTS_NI[EVOLUTION][case_N]).squeeze(1) > 0, EIGHT_N[EVOLUTION][case_N]
        return torch.stack([said_N & is_N, said_N & ~is_N, ~said_N & is_N], dim=1).float()

    def value(self, mean_M):
        hits, false_alarms, misses = mean_M
        return 2 * hits / max(2 * hits + false_alarms + misses, 1e-9)


def f1_of(network, part):
    said_N, is_N = network(INPUTS_NI[part]).squeeze(1) > 0, EIGHT_N[part]
    return float(2 * (said_N & is_N).sum() / (said_N.sum() + is_N.sum()))


def main():
    """Train and evolve. Return F1 on the test images before and after evolution."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 1))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    for _ in range(200):
        optimizer.zero_grad()
        logit_N = network(INPUTS_NI[SGD]).squeeze(1)
        nn.functional.binary_cross_entropy_with_logits(logit_N, EIGHT_N[SGD].float()).backward()
        optimizer.step()
    before = f1_of(network, TEST)
    strategy = sr.EvolutionStrategies(400, sigma=0.02, mirrored=True, shaping="centered-rank", step="ratio")
    population = sr.Population(network, F1(), batch_members=50)
    for _ in range(60):
        outcome = population.step(strategy)
        print(f"generation {population.generation}: F1 {outcome.before:.3f} -> {outcome.after:.3f}", flush=True)
    print(f"test F1 {before:.3f} -> {f1_of(network, TEST):.3f}")
    return before, f1_of(network, TEST)


if __name__ == "__main__":
    main()
