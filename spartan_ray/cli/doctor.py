"""`spartan doctor`: check whether a run would start here, and show what it would run on."""

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
    """Runs checks and prints one line for each; `fine` turns False when one fails."""

    def __init__(self, say: Callable[[str], None] = print) -> None:
        self.say, self.fine = say, True

    def check(self, name: str, look: Callable[[], str]) -> bool:
        """Print what `look` returns, or the InputError or RunError that it raised. Return whether the check passed."""
        try:
            self.say(f"ok  {name}: {look()}")
        except (InputError, RunError) as error:
            self.fine = False
            self.say(f"NO  {name}: {error}")
            return False
        return True


def diagnose(config: Config, say: Callable[[str], None] = print) -> bool:
    """Check everything that a run with this configuration needs, print a line per check, and return whether it would
    start."""
    import ray

    doctor = Doctor(say)
    doctor.check("versions", _versions)
    leave: list[Callable[[], None]] = []

    def join() -> str:
        if ray.is_initialized():
            return "the one that this process is connected to"
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
        return f"{found}; same versions and noise as here"

    for node in nodes:
        has = node["Resources"]
        name = f"node with {has.get('CPU', 0):g} CPUs, {has.get('GPU', 0):g} GPUs"
        doctor.check(name, partial(node_of, node))

    def workers() -> str:
        cluster = resolve_cluster(config.cluster, [node["Resources"] for node in nodes], grows())
        count, each = room_for(cluster).workers, described(worker_resources(cluster))
        more = "; the autoscaler adds nodes for workers that do not fit now" if grows() else ""
        driver = f"a driver with {cluster.driver_cpus} CPUs and {cluster.driver_gpus:g} GPUs"
        return f"{count} with {each} each, and {driver}{more}"

    def paths() -> str:
        on_node(nodes[0], check_paths, config, True)
        root = "" if config.data.name == "digits" else f" in {config.data.root}"
        if config.data.name not in ("digits", "folder"):
            root += ", read or downloaded when a run starts"
        return f"run.out {config.run.out} is writable; data {config.data.name}{root}"

    doctor.check("workers", workers)
    doctor.check("paths", paths)


def _versions() -> str:
    from spartan_ray.distributed.joining import versions

    found = {"python": platform.python_version(), "spartan-ray": __version__} | {
        name: version for name, version in versions().items() if name != "spartan-ray"
    }
    return ", ".join(f"{name} {version}" for name, version in found.items())
