"""How many workers fit which nodes, and what is refused."""

from __future__ import annotations

import pytest

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.placement import resolve_cluster, workers_that_fit
from spartan_ray.errors import InputError


@pytest.mark.parametrize(
    ("asked", "resources", "workers", "gpus_per_worker", "driver_gpus"),
    [
        ({}, [{"CPU": 2.0}], 2, 0.0, 0.0),
        ({"cpus_per_worker": 4, "driver_cpus": 2}, [{"CPU": 16.0}], 3, 0.0, 0.0),
        ({}, [{"CPU": 16.0, "GPU": 1.0}], 1, 0.9, 0.1),
        ({}, [{"CPU": 64.0, "GPU": 8.0}], 8, 0.9, 0.1),
        ({"gpus_per_worker": 1}, [{"CPU": 64.0, "GPU": 8.0}], 7, 1.0, 0.1),
        ({"gpus_per_worker": 0.25}, [{"CPU": 64.0, "GPU": 2.0}], 7, 0.25, 0.1),
        ({"gpus_per_worker": 1, "driver_gpus": 0}, [{"CPU": 64.0, "GPU": 8.0}], 8, 1.0, 0.0),
        ({"gpus_per_worker": 0, "driver_gpus": 0}, [{"CPU": 6.0, "GPU": 8.0}], 6, 0.0, 0.0),
        ({"workers": 3}, [{"CPU": 8.0}], 3, 0.0, 0.0),
        # Several nodes: nothing spans two of them, and the driver goes to the first with room.
        ({}, [{"CPU": 8.0, "GPU": 1.0}] * 4, 4, 0.9, 0.1),
        ({}, [{"CPU": 4.0}, {"CPU": 8.0, "GPU": 1.0}, {"CPU": 8.0, "GPU": 1.0}], 2, 0.9, 0.1),
        ({"gpus_per_worker": 1}, [{"CPU": 8.0, "GPU": 1.0}] * 4, 3, 1.0, 0.1),
        ({"cpus_per_worker": 3}, [{"CPU": 4.0}] * 5, 5, 0.0, 0.0),
    ],
)
def test_resources_are_shared_out(
    asked: dict[str, float], resources: list[dict[str, float]], workers: int, gpus_per_worker: float, driver_gpus: float
) -> None:
    resolved = resolve_cluster(Cluster(**asked), resources)  # type: ignore[arg-type]
    assert (resolved.gpus_per_worker, resolved.driver_gpus) == (gpus_per_worker, driver_gpus)
    assert resolved.workers in ("auto", workers)
    assert workers_that_fit(resolved, resources) >= workers


@pytest.mark.parametrize(
    ("asked", "resources"),
    [
        ({"gpus_per_worker": 1}, [{"CPU": 2.0}]),
        ({"workers": 3}, [{"CPU": 2.0}]),
        ({"driver_gpus": 1}, [{"CPU": 2.0}]),
        ({"driver_cpus": 3}, [{"CPU": 2.0}, {"CPU": 2.0}]),
        ({"gpus_per_worker": 1}, [{"CPU": 8.0, "GPU": 1.0}]),
        ({"gpus_per_worker": 1, "driver_gpus": 1}, [{"CPU": 8.0, "GPU": 1.0}]),
        ({"workers": 2}, [{"CPU": 8.0, "GPU": 1.0}]),
        ({"cpus_per_worker": 3}, [{"CPU": 2.0}, {"CPU": 2.0}]),
    ],
)
def test_resources_that_are_not_there_are_refused(asked: dict[str, float], resources: list[dict[str, float]]) -> None:
    with pytest.raises(InputError, match="do not fit the"):
        resolve_cluster(Cluster(**asked), resources)  # type: ignore[arg-type]
