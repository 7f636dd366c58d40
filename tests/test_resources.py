"""The number of workers that fit the nodes of a cluster, and requests that are refused."""

from __future__ import annotations

import pytest

from spartan_ray.distributed.config import Cluster
from spartan_ray.distributed.placement import Resources, pool_size, resolve_cluster, workers_that_fit
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
        # On several nodes, no process spans two of them, and the driver goes to the first with room.
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


def test_where_nodes_are_started_when_asked_for_nothing_is_refused_but_what_is_not_known_yet() -> None:
    nodes: list[Resources] = [{"CPU": 0.0}]
    resolved = resolve_cluster(Cluster(workers=64, gpus_per_worker=0.9), nodes, grows=True)
    assert (resolved.workers, resolved.gpus_per_worker, resolved.driver_gpus) == (64, 0.9, 0.1)
    assert resolve_cluster(Cluster(gpus_per_worker=0), nodes, grows=True).driver_gpus == 0
    with pytest.raises(InputError, match=r"cluster\.gpus_per_worker is not given, and this Ray has no GPU now"):
        resolve_cluster(Cluster(), nodes, grows=True)
    assert resolve_cluster(Cluster(), [{"CPU": 8.0, "GPU": 1.0}], grows=True).gpus_per_worker == 0.9


EIGHT = [{"CPU": 16.0, "GPU": 8.0}]


@pytest.mark.parametrize(
    ("asked", "nodes", "free", "workers", "starting", "grows", "size"),
    [
        # Only free resources count, beside those of the workers that the run has.
        ("auto", EIGHT, [{"CPU": 15.0, "GPU": 7.9}], 0, 0, False, 8),
        ("auto", EIGHT, [{"CPU": 7.0, "GPU": 2.8}], 0, 0, False, 2),
        ("auto", EIGHT, [{"CPU": 7.0, "GPU": 2.8}], 5, 0, False, 7),
        ("auto", EIGHT, [{"CPU": 2.0, "GPU": 7.9}], 0, 0, False, 2),
        ("auto", EIGHT, [], 3, 0, False, 3),
        # Workers that have not joined may hold their resources already or still wait for them.
        ("auto", EIGHT, [{"CPU": 7.0, "GPU": 3.7}], 0, 4, False, 4),
        ("auto", EIGHT, [{"CPU": 7.0, "GPU": 6.0}], 1, 2, False, 7),
        # On a busy or an empty cluster, one worker is requested.
        ("auto", EIGHT, [], 0, 0, False, 1),
        ("auto", [{"CPU": 0.0}], [{"CPU": 0.0}], 0, 0, True, 1),
        # A number is taken as it is, and a range limits the number.
        (5, EIGHT, [], 0, 0, False, 5),
        ("2..4", EIGHT, [{"CPU": 15.0, "GPU": 7.9}], 0, 0, False, 4),
        ("2..4", EIGHT, [{"CPU": 15.0, "GPU": 3.0}], 0, 0, False, 3),
        ("2..4", EIGHT, [], 0, 0, False, 2),
        ("2..4", EIGHT, [{"CPU": 15.0, "GPU": 3.0}], 0, 0, True, 4),
    ],
)
def test_a_pool_has_as_many_workers_as_are_asked_for_and_free(
    asked: int | str,
    nodes: list[Resources],
    free: list[Resources],
    workers: int,
    starting: int,
    grows: bool,
    size: int,
) -> None:
    cluster = Cluster(workers=asked, gpus_per_worker=0.9, driver_gpus=0.1)
    assert pool_size(cluster, nodes, free, workers, starting, grows) == size


@pytest.mark.parametrize("workers", ["0..4", "4..2", "4..", "..4", "2...4", "many", 0])
def test_no_range_of_workers(workers: int | str) -> None:
    with pytest.raises(InputError, match=r"^cluster\.workers: "):
        Cluster(workers=workers)
