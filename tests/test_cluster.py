"""Tests that Ray, Kubernetes, Docker and Slurm accept the cluster files, as far as this can be checked offline."""

from __future__ import annotations

import shlex
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml
from conftest import free_port
from ray._private.runtime_env.packaging import create_package
from ray.autoscaler._private.util import prepare_config, validate_config
from safetensors.torch import load_file
from whole_runs import ROOT, SMALL, environment, parse_config

from spartan_ray import __version__

CLUSTER = ROOT / "cluster"
TOOLS = Path(sys.executable).parent


@pytest.mark.parametrize("name", ["aws", "gcp", "on-prem"])
def test_a_ray_up_file_passes_ray_s_schema(name: str) -> None:
    config = yaml.safe_load((CLUSTER / f"{name}.yaml").read_text())
    validate_config(prepare_config(config))
    assert all("RAY_AUTH_MODE=token" in config[f"{kind}_start_ray_commands"][-1] for kind in ("head", "worker"))
    assert "--dashboard-host=127.0.0.1" in config["head_start_ray_commands"][-1]
    if name != "on-prem":
        types = config["available_node_types"]
        assert types[config["head_node_type"]]["resources"] == {"CPU": 0}
        assert types["gpu"]["min_workers"] == 0
        assert types["gpu"]["resources"]["GPU"] == 1
    with pytest.raises(Exception, match="Additional properties are not allowed"):
        validate_config(prepare_config(config) | {"nonsense": 1})


def test_what_a_job_brings_is_the_package_and_not_what_lies_beside_it(tmp_path: Path) -> None:
    """Ray limits the size of the package."""
    for name in (".rayignore", ".gitignore"):
        shutil.copy(ROOT / name, tmp_path)
    wanted = {"spartan_ray/run/presets/article-es.yaml", "examples/tune.py", "mine.py"}
    beside = {"images/train/cat/1.jpg", "runs/a/metrics.jsonl", ".venv/bin/python", "data/x.bin", ".git/objects/1"}
    for name in wanted | beside:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("content")
    package = tmp_path.parent / f"{tmp_path.name}.zip"
    create_package(str(tmp_path), package, include_gitignore=True)
    sent = {name for name in zipfile.ZipFile(package).namelist() if not name.endswith("/")}
    assert sent - {".rayignore", ".gitignore"} == wanted


def kuberay(name: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the specification in a KubeRay file, and the specification of its cluster."""
    document = yaml.safe_load((CLUSTER / f"kuberay-{name}.yaml").read_text())
    assert document["apiVersion"] == "ray.io/v1"
    spec = document["spec"]
    return spec, spec.get("rayClusterSpec", spec)


@pytest.mark.parametrize("name", ["rayjob", "cluster"])
def test_a_kuberay_cluster_has_a_token_and_gpu_nodes_from_none_upward(name: str) -> None:
    _, cluster = kuberay(name)
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["enableInTreeAutoscaling"] is True
    (group,) = cluster["workerGroupSpecs"]
    assert group["minReplicas"] == 0 < group["replicas"] <= group["maxReplicas"]
    images = set()
    for part in (cluster["headGroupSpec"], group):
        (container,) = part["template"]["spec"]["containers"]
        assert container["resources"]["requests"] == container["resources"]["limits"]
        assert container["envFrom"] == [{"secretRef": {"name": "spartan-storage"}}]
        images.add(container["image"])
    assert container["resources"]["limits"]["nvidia.com/gpu"] == "1"
    assert images == {f"REGISTRY/spartan-ray:{__version__}"}


def test_the_rayjob_s_command_goes_on_where_it_was_and_is_tried_again() -> None:
    spec, _ = kuberay("rayjob")
    command = shlex.split(spec["entrypoint"])
    assert command[:4] == ["python", "-m", "spartan_ray", "train"]
    config = parse_config(command[4:])
    assert (config.run.resume, config.run.out, config.run.name) == ("auto", "s3://BUCKET/runs", "article-es")
    assert spec["backoffLimit"] > 0
    assert spec["shutdownAfterJobFinishes"] is True


def test_the_dockerfile_and_the_scripts_pass_their_linters() -> None:
    subprocess.run([TOOLS / "hadolint", CLUSTER / "Dockerfile"], check=True)
    text = (CLUSTER / "Dockerfile").read_text()
    assert f"spartan-ray:{__version__} " in text
    scripts = [CLUSTER / "slurm.sh", ROOT / ".ci" / "run", *(ROOT / "scripts").iterdir()]
    subprocess.run([TOOLS / "shellcheck", *scripts], check=True)


@pytest.mark.ray
def test_the_slurm_script_starts_a_ray_trains_on_it_and_leaves_nothing(tmp_path: Path) -> None:
    """Slurm's commands are replaced. This machine is the only node."""
    for name, text in (
        ("scontrol", "echo 127.0.0.1"),
        ("srun", 'while [[ $1 == --* ]]; do shift; done; exec "$@"'),
    ):
        (tmp_path / name).write_text(f"#!/usr/bin/env bash\n{text}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_NODELIST": "one", "SLURM_NNODES": "1", "SLURM_CPUS_PER_TASK": "2"}
    given = environment() | slurm | {"SPARTAN_PYTHON": sys.executable, "SPARTAN_PORT": str(free_port())}
    given["PATH"] = f"{tmp_path}:{given['PATH']}"
    flags = [*SMALL, "--run.epochs", "2", "--run.out", str(tmp_path / "runs"), "--cluster.workers", "1"]
    before = {process.pid for process in psutil.process_iter()}
    for expected in ("run folder: ", "finished, all 2 epochs are done"):
        said = tmp_path / "said"  # not a pipe, which a leftover process would keep open
        with said.open("w") as file:
            done = subprocess.run(
                [CLUSTER / "slurm.sh", *flags], stdout=file, stderr=file, env=given, cwd=tmp_path, check=False
            )
        assert done.returncode == 0, said.read_text()
        assert expected in said.read_text()
    assert load_file(tmp_path / "runs" / "run" / "final.safetensors")
    left = [process for process in psutil.process_iter(["cmdline"]) if process.pid not in before]
    assert not [one for one in left if "raylet" in " ".join(one.info["cmdline"] or [])]
