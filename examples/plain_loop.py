"""Evolution as a part of the optimizer: an ordinary training loop that runs an evolve phase every 100 steps.

python examples/plain_loop.py
"""

import torch
from sklearn.datasets import load_digits
from torch import nn

import spartan_ray as sr

PIXELS_NI, LABELS_N = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
INPUTS_NI = (PIXELS_NI / 16).float()
SGD, EVOLUTION, TEST = slice(0, 600), slice(600, 1000), slice(1000, None)  # SGD and evolution share no images


def minus_loss(network, case_N):
    """Return the fitness of a network on images of the evolution part; higher is better."""
    logits_NC = network(INPUTS_NI[EVOLUTION][case_N])
    return -nn.functional.cross_entropy(logits_NC, LABELS_N[EVOLUTION][case_N], reduction="none")


def main(evolve=True):
    """Train. Return the loss and the accuracy on the test images."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))
    base = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, 1000)
    population = sr.Population(network, minus_loss, cases=400, batch_members=20)
    strategy = sr.EvolutionStrategies(200, sigma=0.02, mirrored=True, step="search")
    optimizer = sr.EvolutionOptimizer(base, population, strategy, every=100 if evolve else None)
    for step in range(1, 1001):
        index_B = torch.randint(600, (32,))
        optimizer.zero_grad()
        nn.functional.cross_entropy(network(INPUTS_NI[SGD][index_B]), LABELS_N[SGD][index_B]).backward()
        optimizer.step()
        schedule.step()
        if evolve and step % 100 == 0:
            outcome = optimizer.outcome
            print(f"step {step}: fitness {outcome.before:.4f} -> {outcome.after:.4f}", flush=True)
    with torch.inference_mode():
        logits_NC = network(INPUTS_NI[TEST])
        loss = float(nn.functional.cross_entropy(logits_NC, LABELS_N[TEST]))
        accuracy = float((logits_NC.argmax(1) == LABELS_N[TEST]).float().mean())
    print(f"{'SGD and evolution' if evolve else 'SGD alone'}: test loss {loss:.4f}, accuracy {accuracy:.4f}")
    return loss, accuracy


if __name__ == "__main__":
    main(evolve=False)
    main()
