"""Compares evolutionary SGD with plain SGD for the same number of epochs: `python benchmarks/esgd.py IMAGES RUNS`.

IMAGES is a folder as for `data.name folder`. Runs are written to RUNS; existing ones are not repeated. Evolutionary SGD
with four parents is compared with plain SGD at four learning rates of the same range, of which the evolution split
chooses the best, and with SGD at the best rate for as many epochs as the four parents have together. Each SGD run also
has the average of its last epochs' weights. Prints means over the seeds, with minimum and maximum."""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import numpy as np
import pandas as pd

import spartan_ray
from spartan_ray.report.reading import read_run

PARENTS, GENERATIONS, EVERY = 4, 4, 5
LOW, HIGH = 0.003, 0.1
EPOCHS = GENERATIONS * (EVERY - 1)
IMAGES = {"sgd_images": 10_000, "evolution_images": 5_000, "validation_images": 5_000}
ESGD = {
    "strategy": "esgd", "every": EVERY, "parents": PARENTS, "population": 32, "recombine": 2, "elite": 2,
    "batchnorm": "recalibrate", "noise": "gaussian", "sigma_decay": 0.7, "optimizers": f"sgd:{LOW}..{HIGH}",
}  # fmt: skip
AVERAGED = 4
MEASURES = ("test_accuracy", "test_loss")


class Bench:
    """The runs of one seed."""

    def __init__(self, images: str, runs: Path, model: str, seed: int) -> None:
        self.images, self.runs, self.model, self.seed = images, runs, model, seed

    def run(self, name: str, epochs: int, evolution: dict[str, object], lr: float | None = None) -> pd.DataFrame:
        """Return the metrics of a run. Do the run first if it is missing."""
        folder = self.runs / f"{name}-{self.seed}"
        if not (folder / "final.safetensors").exists():
            shutil.rmtree(folder, ignore_errors=True)
            spartan_ray.train(
                run={"name": folder.name, "out": str(self.runs), "epochs": epochs, "seed": self.seed, "keep": 1},
                data={"name": "folder", "root": self.images} | IMAGES,
                parent={"model": self.model} | ({} if lr is None else {"lr": lr, "average": f"epochs:{AVERAGED}"}),
                evolution=evolution,
                cluster={"workers": 2},
            )
        return read_run(folder).metrics

    def rows(self) -> list[dict[str, float | str]]:
        """Return one row per way: its measures in the last epoch, and its test accuracy in the epoch of the best
        validation accuracy."""
        found = {"ESGD, four parents": self.run("esgd", GENERATIONS * EVERY, ESGD)}
        rates = np.geomspace(LOW, HIGH, PARENTS).round(4).tolist()
        alone = {rate: self.run(f"sgd-{rate:g}", EPOCHS, {"strategy": "none"}, rate) for rate in rates}
        best = min(rates, key=lambda rate: float(alone[rate]["evolution_loss"].iloc[-1]))
        found |= {"SGD, the best of four learning rates": alone[best]}
        long = self.run(f"long-{best:g}", EPOCHS * PARENTS, {"strategy": "none"}, best)
        found |= {"SGD at that rate, four times the epochs": long}
        for rate in rates:
            found[f"SGD at {rate:g}"] = alone[rate]
        rows: list[dict[str, float | str]] = []
        for way, frame in found.items():
            at_best = frame.iloc[int(frame["validation_accuracy"].argmax())]
            row = {"way": way} | {name: float(frame[name].iloc[-1]) for name in MEASURES}
            rows.append(row | {"best validation: test_accuracy": float(at_best["test_accuracy"])})
            if "average_test_loss" in frame:
                last = {name: float(frame[f"average_{name}"].iloc[-1]) for name in MEASURES}
                rows.append({"way": f"{way}: average of {AVERAGED} epochs", **last})
        return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("images", help="a folder with train/<class>/* and test/<class>/*")
    parser.add_argument("runs", type=Path, help="folder of the runs")
    parser.add_argument("--model", default="convnet", help="the network (default: convnet)")
    parser.add_argument("--seeds", type=int, default=3, help="number of seeds (default: 3)")
    arguments = parser.parse_args()
    rows = [
        row
        for seed in range(arguments.seeds)
        for row in Bench(arguments.images, arguments.runs, arguments.model, seed).rows()
    ]
    frame = pd.DataFrame(rows)
    columns = [str(name) for name in frame if name != "way"]
    print("| | " + " | ".join(columns) + " |\n| --- |" + " --- |" * len(columns))
    for way, group in frame.groupby("way", sort=False):
        cells = [f"{group[name].mean():.3f} ({group[name].min():.3f} - {group[name].max():.3f})" for name in columns]
        print(f"| {way} | " + " | ".join(cells) + " |")


if __name__ == "__main__":
    main()
