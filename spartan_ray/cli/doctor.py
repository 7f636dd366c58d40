"""`spartan doctor`: whether a run would start here, and what it would run on."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable
from functools import partial
from typing import Any

from spartan_ray import __version__
from spartan_ray.cli.train import check_paths
from spartan_ray.distributed.start import join_ray
from spartan_ray.errors import InputError, RunError
from spartan_ray.run.config import Config


class Doctor:
    """Says how one thing after another is."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say, self.fine = say, True

    def check(self, name: str, look: Callable[[], str]) -> bool:
        """Say what `look` finds, or why it raised InputError or RunError; whether all is well."""
        try:
            self.say(f"ok  {name}: {look()}")
        except (InputError, RunError) as error:
            self.fine = False
            self.say(f"NO  {name}: {error}")
            return False
        return True


def diagnose(config: Config, say: Callable[[str], None] = print) -> bool:
    """Whether a run with this configuration would start, with a line for each thing that it needs."""
    import ray

    doctor = Doctor(say)
    doctor.check("versions", _versions)
    leave: list[Callable[[], None]] = []

    def join() -> str:
        if ray.is_initialized():
            return "this process's own"
        leave.append(join_ray(config.cluster.address))
        token = "with its token" if os.environ.get("RAY_AUTH_MODE") == "token" else "without a token"
        return f"{ray.get_runtime_context().gcs_address}, {token}"

    if doctor.check("Ray", join):
        try:
            _look_at_nodes(config, doctor)
        finally:
            for end in leave:
                end()
    say("a run would start" if doctor.fine else "a run would not start")
    return doctor.fine


def _look_at_nodes(config: Config, doctor: Doctor) -> None:
    from spartan_ray.distributed.examine import examined, on_node
    from spartan_ray.distributed.nodes import grows, nodes_here_first
    from spartan_ray.distributed.placement import described, resolve_cluster, worker_resources
    from spartan_ray.distributed.transport import room_for

    nodes = nodes_here_first()

    def node_of(node: dict[str, Any]) -> str:
        found = examined(node, config.evolution.noise)
        if found.objections:
            raise InputError(f"{found}: {found.objections}")
        return f"{found}; versions and noise are the same as here"

    for node in nodes:
        has = node["Resources"]
        name = f"node with {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs"
        doctor.check(name, partial(node_of, node))

    def workers() -> str:
        cluster = resolve_cluster(config.cluster, [node["Resources"] for node in nodes], grows())
        count, each = room_for(cluster).workers, described(worker_resources(cluster))
        more = "; an autoscaler starts nodes for those that do not fit now" if grows() else ""
        driver = f"a driver of {cluster.driver_cpus} CPUs and {cluster.driver_gpus:g} GPUs"
        return f"{count} of {each} each, beside {driver}{more}"

    def paths() -> str:
        on_node(nodes[0], check_paths, config, True)
        root = "" if config.data.name == "digits" else f" in {config.data.root}"
        if config.data.name not in ("digits", "folder"):
            root += ", which is read, or downloaded, when a run starts"
        return f"run.out {config.run.out} can be written; data {config.data.name}{root}"

    doctor.check("workers", workers)
    doctor.check("paths", paths)


def _versions() -> str:
    from spartan_ray.distributed.joining import versions

    found = {"python": platform.python_version(), "spartan-ray": __version__} | {
        name: version for name, version in versions().items() if name != "spartan-ray"
    }
    return ", ".join(f"{name} {version}" for name, version in found.items())
