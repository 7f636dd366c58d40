"""A small transformer learns to read numbers written in words. Adam trains it on the cross-entropy; evolution trains it
on exact matches (all three digits are right), which have no gradient.

    python examples/transformer.py
"""

import torch
from torch import nn

import spartan_ray as sr

ONES = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
TENS = ["_", "ten", "twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
DIGITS_N3 = torch.cartesian_prod(*[torch.arange(10)] * 3)
WORDS = [f"{ONES[h]} hundred {TENS[t]} {ONES[o]}".ljust(30) for h, t, o in DIGITS_N3.tolist()]  # "four hundred _ two"
TEXT_NL = torch.tensor([list(words.encode()) for words in WORDS])
ADAM, EVOLUTION, TEST = torch.randperm(1000, generator=torch.Generator().manual_seed(0)).split([300, 500, 200])


class Reader(nn.Module):
    def __init__(self):
        super().__init__()
        self.letters, self.places = nn.Embedding(128, 32), nn.Parameter(torch.randn(30, 32) * 0.1)
        layer = nn.TransformerEncoderLayer(32, 2, 64, dropout=0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.digits = nn.Linear(32, 30)

    def forward(self, text_NL):
        return self.digits(self.encoder(self.letters(text_NL) + self.places).mean(1)).unflatten(1, (3, 10))


def exact(network, index_N):
    return (network(TEXT_NL[index_N]).argmax(2) == DIGITS_N3[index_N]).all(1).float()


def main():
    """Train and evolve. Return the share of exact matches on the test numbers before and after evolution."""
    torch.manual_seed(0)
    network = Reader()
    adam = torch.optim.Adam(network.parameters(), lr=3e-3)
    for _ in range(150):
        index_B = ADAM[torch.randint(len(ADAM), (64,))]
        adam.zero_grad()
        nn.functional.cross_entropy(network(TEXT_NL[index_B]).flatten(0, 1), DIGITS_N3[index_B].flatten()).backward()
        adam.step()
    before = float(exact(network.eval(), TEST).mean())
    strategy = sr.EvolutionStrategies(100, sigma=0.01, mirrored=True, shaping="centered-rank", step="ratio")
    fitness = lambda network, case_N: exact(network, EVOLUTION[case_N])  # noqa: E731
    with sr.Population(network, fitness, cases=500, workers=2) as population:
        for _ in range(20):
            outcome = population.step(strategy)
            print(f"generation {population.generation}: {outcome.before:.3f} -> {outcome.after:.3f}", flush=True)
    after = float(exact(network, TEST).mean())
    print(f"exact matches of the test numbers: {before:.3f} -> {after:.3f}")
    return before, after


if __name__ == "__main__":
    main()
