"""Evolution inside Lightning: the module's optimizer runs an evolve phase every 100 steps.

.venv/bin/pip install -e '.[examples]'
python examples/lightning_digits.py
"""

import lightning
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import spartan_ray as sr

PIXELS_NI, LABELS_N = (torch.from_numpy(array) for array in load_digits(return_X_y=True))
INPUTS_NI = (PIXELS_NI / 16).float()
PARTS = slice(0, 600), slice(600, 1000), slice(1000, None)
SGD, EVOLUTION, TEST = (TensorDataset(INPUTS_NI[part], LABELS_N[part]) for part in PARTS)


def accuracy(network, case_N):
    inputs_NI, labels_N = EVOLUTION[case_N]
    return (network(inputs_NI).argmax(1) == labels_N).float()


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.network = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10))

    def training_step(self, batch, number):
        inputs_BI, labels_B = batch
        return nn.functional.cross_entropy(self.network(inputs_BI), labels_B)

    def test_step(self, batch, number):
        inputs_BI, labels_B = batch
        self.log("accuracy", (self.network(inputs_BI).argmax(1) == labels_B).float().mean())

    def configure_optimizers(self):
        base = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        population = sr.Population(self.network, accuracy, cases=len(EVOLUTION), batch_members=20)
        strategy = sr.EvolutionStrategies(200, sigma=0.02, mirrored=True, step="search")
        return sr.EvolutionOptimizer(base, population, strategy, every=100)


def main():
    """Train. Return the accuracy on the test images and the number of evolve phases."""
    lightning.seed_everything(0, verbose=False)
    quiet = dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False)
    trainer, classifier = lightning.Trainer(max_steps=500, accelerator="cpu", devices=1, **quiet), Classifier()
    trainer.fit(classifier, DataLoader(SGD, batch_size=32, shuffle=True))
    phases = trainer.optimizers[0].population.generation
    (result,) = trainer.test(classifier, DataLoader(TEST, batch_size=797), verbose=False)
    print(f"test accuracy {result['accuracy']:.4f} after {trainer.global_step} steps and {phases} phases")
    return result["accuracy"], phases


if __name__ == "__main__":
    main()
