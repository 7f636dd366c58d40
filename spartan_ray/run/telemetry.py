"""Gauges of a run in Ray's metrics, for Prometheus, Grafana and Ray's dashboard."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Gauge

# Gauges by the metric that each one shows. Ray exports them as ray_spartan_*.
GAUGES = {
    "epoch": ("spartan_epoch", "Finished epochs"),
    "train_loss": ("spartan_train_loss", "Loss on a sample of the SGD split"),
    "validation_loss": ("spartan_validation_loss", "Loss on the validation split"),
    "validation_accuracy": ("spartan_validation_accuracy", "Accuracy on the validation split"),
    "images_per_second": ("spartan_images_per_second", "Images per second, of gradient descent or of scoring"),
    "run_seconds": ("spartan_run_seconds", "Seconds spent on the run so far"),
    "population": ("spartan_population", "Members per generation"),
    "members_per_second": ("spartan_members_per_second", "Members scored per second"),
    "fitness_max": ("spartan_fitness_best", "Fitness of the best member"),
    "fitness_mean": ("spartan_fitness_mean", "Mean fitness of the members"),
    "parent_fitness_after": ("spartan_fitness_parent", "Fitness of the parent after the phase"),
    "step_ratio": ("spartan_step_ratio", "Length of the update divided by the length of one perturbation"),
    "workers": ("spartan_workers", "Workers in the phase"),
    "retries": ("spartan_retries", "Chunks of members that were scored again"),
    "fitness_nonfinite": ("spartan_members_not_finite", "Members whose fitness is not finite"),
    "scoring_seconds": ("spartan_scoring_seconds", "Seconds per phase to score the members"),
    "update_seconds": ("spartan_update_seconds", "Seconds per phase to sum the update"),
    "broadcast_seconds": ("spartan_broadcast_seconds", "Seconds per phase to send the parent"),
}


class Telemetry:
    """A logger that shows rows in Ray's metrics, tagged with the run's name and place."""

    def __init__(self, name: str, place: str) -> None:
        tags = {"run": name, "place": place}
        self.gauges = {key: Gauge(gauge, about, tuple(tags)) for key, (gauge, about) in GAUGES.items()}
        for gauge in self.gauges.values():
            gauge.set_default_tags(tags)

    def log(self, row: dict[str, Any]) -> None:
        if row.get("scoring_seconds"):
            members = row["population"] * row.get("generations", 1)
            row = row | {"members_per_second": members / row["scoring_seconds"]}
        for key, gauge in self.gauges.items():
            if isinstance(row.get(key), int | float):
                gauge.set(row[key])

    def close(self) -> None:
        pass
