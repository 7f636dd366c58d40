"""Runs on a Ray whose autoscaler starts nodes on demand. The autoscaler is real, and its nodes are local processes."""

from __future__ import annotations

import json
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest
from conftest import free_port
from ray.autoscaler._private.fake_multi_node.node_provider import FAKE_HEAD_NODE_ID
from whole_runs import SMALL, environment, metrics, spartan

pytestmark = [pytest.mark.faults, pytest.mark.ray]


@pytest.fixture(scope="module")
def growing() -> Iterator[dict[str, str]]:
    """Start a head without cores, to which the autoscaler can add two nodes with one core each.

    Return the environment variables that connect to it."""
    port = free_port()
    folder = Path("/tmp") / f"spartan-{secrets.token_hex(4)}"  # it holds Unix sockets, whose paths must be short
    folder.mkdir()
    provider = {
        "type": "external",
        "module": "ray.autoscaler._private.fake_multi_node.node_provider.FakeMultiNodeProvider",
        "head_node_id": FAKE_HEAD_NODE_ID,
        "gcs_address": f"127.0.0.1:{port}",
        "launch_multiple": True,
    }
    head = {"resources": {"CPU": 0}, "node_config": {}, "max_workers": 0}
    small = {"resources": {"CPU": 1}, "node_config": {}, "min_workers": 0, "max_workers": 2}
    lists = ["setup_commands", "head_setup_commands", "worker_setup_commands", "initialization_commands"]
    lists += ["head_start_ray_commands", "worker_start_ray_commands", "cluster_synced_files"]
    lists += ["rsync_exclude", "rsync_filter"]
    config = {
        "cluster_name": "growing",
        "max_workers": 2,
        "upscaling_speed": 10,
        "idle_timeout_minutes": 60,
        "provider": provider,
        "available_node_types": {"ray.head.default": head, "small": small},
        "head_node_type": "ray.head.default",
        "auth": {},
        "docker": {},
        "file_mounts": {},
        "file_mounts_sync_continuously": False,
    } | {name: [] for name in lists}
    (folder / "config.json").write_text(json.dumps(config))
    reach = environment() | {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32)}
    as_ray_up = {
        "RAY_enable_autoscaler_v2": "1",
        "RAY_NODE_TYPE_NAME": "ray.head.default",
        "RAY_CLOUD_INSTANCE_ID": FAKE_HEAD_NODE_ID,
        "RAY_OVERRIDE_NODE_ID_FOR_TESTING": FAKE_HEAD_NODE_ID,
        "AUTOSCALER_UPDATE_INTERVAL_S": "1",
        "RAY_FAKE_CLUSTER": "1",
    }
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=0", f"--port={port}",
        "--include-dashboard=false", f"--temp-dir={folder}", f"--autoscaling-config={folder / 'config.json'}",
        "--disable-usage-stats",
    ]  # fmt: skip
    log = folder / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=reach | as_ray_up, stdout=file, stderr=file)
    while "will now block" not in log.read_text():
        assert process.poll() is None, log.read_text()
        time.sleep(0.1)
    yield reach | {"RAY_ADDRESS": f"127.0.0.1:{port}"}
    process.terminate()
    process.wait(timeout=60)
    # The nodes outlive their autoscaler.
    for left in psutil.process_iter(["cmdline"]):
        if str(folder) in " ".join(left.info["cmdline"] or []):
            left.kill()
    shutil.rmtree(folder, ignore_errors=True)


def test_a_run_asks_for_nodes_waits_for_them_and_ends(growing: dict[str, str], tmp_path: Path) -> None:
    flags = [*SMALL, "--run.out", str(tmp_path), "--cluster.workers", "2..8", "--cluster.gpus-per-worker", "0"]
    ended = spartan("train", *flags, cwd=tmp_path, **growing)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    (folder,) = tmp_path.glob("*/metrics.jsonl")
    assert {row["workers"] for row in metrics(folder.parent) if row["kind"] == "evolve"} == {2}


def test_what_no_node_can_have_is_refused(growing: dict[str, str], tmp_path: Path) -> None:
    flags = [*SMALL, "--run.out", str(tmp_path), "--cluster.cpus-per-worker", "3", "--cluster.gpus-per-worker", "0"]
    ended = spartan("train", *flags, cwd=tmp_path, **growing)
    assert ended.returncode == 1
    assert "no node of this Ray has 3 CPUs and 0 GPUs, and its autoscaler cannot start one that has" in ended.stderr


def test_what_kind_of_nodes_it_is_to_start_is_asked(growing: dict[str, str], tmp_path: Path) -> None:
    """The two nodes may have started by now. They have no GPU either."""
    ended = spartan("train", *SMALL, "--run.out", str(tmp_path), cwd=tmp_path, **growing)
    assert ended.returncode == 2
    assert "cluster.gpus_per_worker is not given, and this Ray has no GPU now" in ended.stderr
