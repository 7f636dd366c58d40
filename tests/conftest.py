"""Fixtures shared by the tests: one local Ray instance per session, a small image folder and a small run."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

# Triton reads this variable at its first import. Without a GPU, its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

import numba
import numpy as np
import psutil
import pytest
import ray
from hypothesis import settings
from PIL import Image
from whole_runs import WarmTransport, environment, run

from spartan_ray.engine.process import set_up
from spartan_ray.run.config import Config, Evolution, Run
from spartan_ray.vision.config import Data, Parent

# No deadline, because the first call of a kernel compiles it. In CI, the examples are the same in each run.
settings.register_profile("spartan", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("spartan")
# Ray workers share the cores. With several threads, small operations become slow because threads wait for each other.
set_up(threads=1)
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Workers need the path of the test modules to import classes and functions from them.
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="storms and soaks of full length")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Return whether a test may take minutes."""
    return bool(request.config.getoption("--long"))


def pytest_report_header() -> str:
    """Return the CPU instruction sets that torch, oneDNN and Numba use."""
    onednn = os.environ.get("ONEDNN_MAX_CPU_ISA", "all")
    compiler: Any = numba.config
    return f"instructions: torch {torch.backends.cpu.get_cpu_capability()}, oneDNN {onednn}, numba {compiler.CPU_NAME}"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the tests that use Ray, and run them in one xdist group. The fast tier leaves them out."""
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """Set up the process for a GPU test as for a run on a GPU."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    set_up(gpu=True)
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Fail a test that starts Ray without the marker `ray`."""
    if not request.node.get_closest_marker("ray"):
        monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("starts a Ray without the marker `ray`"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """Start a local Ray instance for this test session."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    WarmTransport.idle.clear()
    ray.shutdown()


@pytest.fixture(autouse=True)
def free_cores(request: pytest.FixtureRequest) -> None:
    """Wait until the cores of the local Ray instance are free, unless a pool of the test's module uses them.

    `auto` takes the free cores, and the workers of the previous test may still be ending."""
    if "local_ray" not in request.fixturenames or "running" in request.fixturenames:
        return
    request.getfixturevalue("local_ray")
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)


@dataclass
class Head:
    """A separate Ray instance, started by `ray start --head`, and the environment variables to connect to it."""

    gcs: str
    client: str
    dashboard: str
    folder: Path
    environment: dict[str, str]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def ray_head() -> Iterator[Head]:
    """Start a Ray instance with token authentication, a dashboard and a Ray Client server."""
    gcs, client, dashboard, agent = (free_port() for _ in range(4))
    # Ray creates Unix sockets in this folder, so the path must be short.
    folder = Path("/tmp") / f"spartan-{secrets.token_hex(4)}"
    command = [
        str(Path(sys.executable).parent / "ray"), "start", "--head", "--block", "--num-cpus=2", f"--port={gcs}",
        f"--ray-client-server-port={client}", f"--dashboard-port={dashboard}",
        f"--dashboard-agent-listen-port={agent}", f"--temp-dir={folder}", "--disable-usage-stats",
    ]  # fmt: skip
    reach = environment() | {
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
        "RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{dashboard}",
        "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120",  # Ray's default of 30 s is too short on busy cores
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
    }
    head = subprocess.Popen(
        command, env=reach, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    assert head.stdout
    said = ""
    for line in head.stdout:
        said += line
        if "will now block" in line:
            break
    else:
        pytest.fail(f"no Ray starts: {said}")
    # The Ray Client server starts shortly after the head reports that it runs.
    while head.poll() is None:
        with contextlib.suppress(ConnectionRefusedError):
            socket.create_connection(("127.0.0.1", client)).close()
            break
        time.sleep(0.1)
    else:
        pytest.fail(f"Ray ended: {said}{head.stdout.read()}")
    started = psutil.Process(head.pid).children(recursive=True)
    yield Head(f"127.0.0.1:{gcs}", f"ray://127.0.0.1:{client}", f"127.0.0.1:{dashboard}", folder, reach)
    head.terminate()
    head.wait(timeout=60)
    head.stdout.close()
    for process in psutil.wait_procs(started, timeout=30)[1]:
        process.kill()
    shutil.rmtree(folder)


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """Set the cache folder to a temporary folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Make an image folder: two classes, each with 30 training and 6 test images of two sizes."""
    random = np.random.default_rng(0)
    for part, count in (("train", 30), ("test", 6)):
        for number, name in enumerate(("cat", "dog")):
            folder = tmp_path / "images" / part / name
            folder.mkdir(parents=True)
            for index in range(count):
                side = 32 if index % 2 else 48
                pixels = random.integers(0, 120, (side, side, 3)) + 100 * number
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{index:03d}.png")
    return tmp_path / "images"


def small(folder: Path) -> Config:
    """Return a small configuration: digits, the convnet, two SGD epochs and two evolve phases of 16 members."""
    return Config(
        run=Run(name="small", out=str(folder / "runs"), epochs=4),
        data=Data(name="digits"),
        parent=Parent(model="convnet", threads=1),
        evolution=Evolution(every=2, population=16, fitness_images=64),
    )


@pytest.fixture
def small_config(tmp_path: Path) -> Config:
    return small(tmp_path)


@pytest.fixture(scope="session")
def small_run(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the small configuration and return the run folder, for tests to inspect and compare with."""
    return run(small(tmp_path_factory.mktemp("small")))
