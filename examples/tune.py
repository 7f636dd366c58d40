"""A search over sigma with Ray Tune: each trial is a whole run on the Ray that Tune uses.

.venv/bin/pip install -e '.[examples]'
python examples/tune.py
"""

from __future__ import annotations

import logging
import tempfile
from typing import Any

import ray
from ray import tune

import spartan_ray as sr

FOLDER = tempfile.mkdtemp()


def trial(values: dict[str, Any]) -> None:
    """Do a run and report each epoch. The run's worker has its own core, so the trial itself needs almost no CPU."""
    sr.train(
        "quickstart",
        progress=False,
        run={"out": FOLDER, "name": f"sigma-{values['sigma']}", "epochs": 4},
        evolution={"sigma": values["sigma"], "every": 2},
        cluster={"workers": 1},
        callbacks=[lambda row: tune.report({"accuracy": row["validation_accuracy"], "kind": row["kind"]})],
    )


ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
tuner = tune.Tuner(
    tune.with_resources(trial, {"cpu": 0.1}),
    param_space={"sigma": tune.grid_search([0.001, 0.02])},
    tune_config=tune.TuneConfig(metric="accuracy", mode="max", max_concurrent_trials=1),
    run_config=tune.RunConfig(storage_path=FOLDER, verbose=0),
)
results = tuner.fit()
best = results.get_best_result()
assert best.config
assert best.metrics
epochs = sum(len(result.metrics_dataframe) for result in results if result.metrics_dataframe is not None)
ray.shutdown()
print(f"sigma {best.config['sigma']}: validation accuracy {best.metrics['accuracy']:.3f}; {epochs} epochs in all")
