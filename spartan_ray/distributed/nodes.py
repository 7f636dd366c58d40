"""What a Ray says of its nodes: what they have, what is free, which will go, and whether there will be more."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any, TypeVar

import ray
import ray.util.client
from ray._private import ray_constants
from ray._private.state import available_resources_per_node, state
from ray.core.generated.autoscaler_pb2 import GetClusterStatusReply
from ray.experimental.internal_kv import _internal_kv_get, internal_kv_get_gcs_client

from spartan_ray.distributed.placement import Resources, holds

# What Ray's autoscaler calls the nodes that it did not start, and cannot start again.
BY_HAND = "node_"
STATUS_SECONDS = 10

Found = TypeVar("Found")


def nodes_here_first() -> list[dict[str, Any]]:
    """The nodes of the Ray that are up, this one first."""
    here = ray.get_runtime_context().get_node_id()
    return sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here)


def leaving_nodes() -> set[str]:
    """The nodes that are about to be taken away, as spot instances are."""
    return _within(_leaving_nodes)


def free_resources() -> list[Resources]:
    """What is free on each node that stays."""
    return _within(_free_resources)


def grows() -> bool:
    """Whether an autoscaler adds nodes."""
    return _within(_grows)


def is_impossible(wanted: Resources) -> bool:
    """Whether no node has so much, and the autoscaler cannot start one that has."""
    return _within(_is_impossible, wanted)


def _within(look: Callable[..., Found], *arguments: Any) -> Found:
    """What a function finds in a process of the Ray: a Ray Client is none, and has no connection to what knows it."""
    if not ray.util.client.ray.is_connected():
        return look(*arguments)
    task: Any = ray.remote(look)
    found: Found = ray.get(task.options(num_cpus=0).remote(*arguments))
    return found


def _leaving_nodes() -> set[str]:
    return set(state.get_draining_nodes())


def _free_resources() -> list[Resources]:
    leaving = _leaving_nodes()
    return [free for node, free in available_resources_per_node().items() if node not in leaving]


def _grows() -> bool:
    # The nodes of the second version say their type, the first one writes down which types it has.
    if any(node.ray_node_type_name for node in _status().cluster_resource_state.node_states):
        return True
    written = json.loads(_internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS) or "{}")
    types = (written.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(not name.startswith(BY_HAND) for name in types)


def _is_impossible(wanted: Resources) -> bool:
    # It calls what has to wait for a node of a full cluster the same: there the nodes that are up would hold it.
    if any(holds(node["Resources"], wanted) for node in nodes_here_first()):
        return False
    infeasible = _status().autoscaling_state.infeasible_resource_requests
    bundles = [dict(request.resources_bundle) for request in infeasible]
    return any(holds(bundle, wanted) and holds(wanted, bundle) for bundle in bundles)


def _status() -> GetClusterStatusReply:
    reply = internal_kv_get_gcs_client().get_cluster_status(timeout_s=STATUS_SECONDS)
    return GetClusterStatusReply.FromString(reply)
