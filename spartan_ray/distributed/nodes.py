"""The nodes of a Ray: their resources, how much is free, which nodes are about to leave, and whether more can start."""

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

# Prefix of the types that Ray's autoscaler gives to nodes that it did not start and cannot start again.
BY_HAND = "node_"
STATUS_SECONDS = 10

Found = TypeVar("Found")


def nodes_here_first() -> list[dict[str, Any]]:
    """Return the nodes of the Ray that are alive, the node of this process first."""
    here = ray.get_runtime_context().get_node_id()
    return sorted((node for node in ray.nodes() if node["Alive"]), key=lambda node: node["NodeID"] != here)


def leaving_nodes() -> set[str]:
    """Return the IDs of the draining nodes, which are about to be taken away, such as spot instances."""
    return _within(_leaving_nodes)


def free_resources() -> list[Resources]:
    """Return the free resources of each node that is not draining."""
    return _within(_free_resources)


def grows() -> bool:
    """Whether an autoscaler adds nodes."""
    return _within(_grows)


def is_impossible(wanted: Resources) -> bool:
    """Whether no node has the wanted resources, and the autoscaler cannot start one that has them."""
    return _within(_is_impossible, wanted)


def _within(look: Callable[..., Found], *arguments: Any) -> Found:
    """Return the result of `look`, called in a process of the Ray. A Ray Client is not one: it has no connection to the
    GCS, so a task calls `look`."""
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
    # With the autoscaler's second version the nodes report their type. The first version stores a list of its types.
    if any(node.ray_node_type_name for node in _status().cluster_resource_state.node_states):
        return True
    written = json.loads(_internal_kv_get(ray_constants.DEBUG_AUTOSCALING_STATUS) or "{}")
    types = (written.get("autoscaler_report") or {}).get("active_nodes") or {}
    return any(not name.startswith(BY_HAND) for name in types)


def _is_impossible(wanted: Resources) -> bool:
    # The autoscaler also reports requests as infeasible that only wait for room in a full cluster. A node that is up
    # could hold those.
    if any(holds(node["Resources"], wanted) for node in nodes_here_first()):
        return False
    infeasible = _status().autoscaling_state.infeasible_resource_requests
    bundles = [dict(request.resources_bundle) for request in infeasible]
    return any(holds(bundle, wanted) and holds(wanted, bundle) for bundle in bundles)


def _status() -> GetClusterStatusReply:
    reply = internal_kv_get_gcs_client().get_cluster_status(timeout_s=STATUS_SECONDS)
    return GetClusterStatusReply.FromString(reply)
