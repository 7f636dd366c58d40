"""Telemetry of a run: the gauges that Ray exports, and the dashboard that reads them."""

from __future__ import annotations

import json
import re
import time
import urllib.request

import pytest
import ray
from whole_runs import ROOT, run_here

from spartan_ray.run import telemetry
from spartan_ray.run.config import Config
from spartan_ray.run.telemetry import GAUGES, Telemetry


def test_every_query_of_the_dashboard_names_a_gauge_that_is_set() -> None:
    dashboard = json.loads((ROOT / "cluster" / "grafana.json").read_text())
    queries = [target["expr"] for panel in dashboard["panels"] for target in panel["targets"]]
    queries += [variable["query"] for variable in dashboard["templating"]["list"] if variable["name"] == "run"]
    named = {name for query in queries for name in re.findall(r"ray_(\w+)", query)}
    gauges = {name for name, _ in GAUGES.values()}
    assert named <= gauges
    assert gauges - named == {"spartan_run_seconds"}


def test_a_row_sets_the_gauges_of_the_numbers_that_it_has(monkeypatch: pytest.MonkeyPatch) -> None:
    found: dict[str, float] = {}

    class Gauge:
        def __init__(self, name: str, about: str, keys: tuple[str, ...]) -> None:
            assert keys == ("run", "place")
            self.name = name

        def set_default_tags(self, tags: dict[str, str]) -> None:
            assert tags == {"run": "mine", "place": "s3://bucket/mine"}

        def set(self, value: float) -> None:
            found[self.name] = value

    monkeypatch.setattr(telemetry, "Gauge", Gauge)
    operator = Telemetry("mine", "s3://bucket/mine")
    operator.log({"epoch": 1, "kind": "sgd", "train_loss": None, "validation_accuracy": 0.5})
    assert found == {"spartan_epoch": 1, "spartan_validation_accuracy": 0.5}
    operator.log({"epoch": 2, "population": 30, "generations": 4, "scoring_seconds": 2.0, "fitness_max": -1.0})
    assert found["spartan_members_per_second"] == 60
    assert found["spartan_fitness_best"] == -1


def test_ray_exports_them(local_ray: None, small_config: Config) -> None:
    """The node's agent returns the gauges to Prometheus after some seconds."""
    folder, _ = run_here(small_config)
    (node,) = (node for node in ray.nodes() if node["Alive"])
    address = f"http://{node['NodeManagerAddress']}:{node['MetricsExportPort']}/metrics"
    found: dict[str, str] = {}
    while len(found) < len(GAUGES):
        lines = urllib.request.urlopen(address).read().decode().splitlines()
        mine = (line for line in lines if line.startswith("ray_spartan") and f'place="{folder}"' in line)
        found = {line.split("{")[0].removeprefix("ray_"): line for line in mine}
        time.sleep(0.2)
    assert found.keys() == {name for name, _ in GAUGES.values()}
    assert float(found["spartan_epoch"].split()[-1]) == small_config.run.epochs
    assert 'run="small"' in found["spartan_epoch"]
