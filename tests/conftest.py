"""Shared by the tests: one local Ray a session, a small folder of images, a small run."""

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

# Read where Triton is first imported: without a GPU its kernels run in the interpreter.
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

# Timings are not asserted: the first call of a kernel compiles it. In CI the examples are the same each time.
settings.register_profile("spartan", deadline=None, derandomize=bool(os.environ.get("CI")))
settings.load_profile("spartan")
# The cores are shared with the workers of Ray, and threads that wait for each other make small work slow.
set_up(threads=1)
os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
# Workers import what the tests define from where the tests lie.
os.environ["PYTHONPATH"] = os.pathsep.join(sys.path)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--long", action="store_true", help="storms and soaks of full length")


@pytest.fixture
def long(request: pytest.FixtureRequest) -> bool:
    """Whether a test may take minutes."""
    return bool(request.config.getoption("--long"))


def pytest_report_header() -> str:
    """What the arithmetic is done with."""
    onednn = os.environ.get("ONEDNN_MAX_CPU_ISA", "all")
    compiler: Any = numba.config
    return f"instructions: torch {torch.backends.cpu.get_cpu_capability()}, oneDNN {onednn}, numba {compiler.CPU_NAME}"


@pytest.hookimpl(tryfirst=True)  # before xdist reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What uses a Ray is not for the fast tier; the rest must not start one, and may run beside it."""
    for item in items:
        if "local_ray" in getattr(item, "fixturenames", ()):
            item.add_marker(pytest.mark.ray)
        if item.get_closest_marker("ray"):
            item.add_marker(pytest.mark.xdist_group("ray"))


@pytest.fixture(autouse=True)
def gpu(request: pytest.FixtureRequest) -> Iterator[None]:
    """A test on a GPU computes as a run does there."""
    if not request.node.get_closest_marker("gpu"):
        yield
        return
    deterministic = torch.are_deterministic_algorithms_enabled()
    set_up(gpu=True)
    yield
    torch.use_deterministic_algorithms(deterministic)


@pytest.fixture(autouse=True)
def no_ray(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """A test that is not marked and starts a Ray fails."""
    if not request.node.get_closest_marker("ray"):
        monkeypatch.setattr(ray, "init", lambda *_, **__: pytest.fail("starts a Ray without the marker `ray`"))


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A Ray of this session of tests alone."""
    ray.init(address="local", num_cpus=2, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    yield
    WarmTransport.idle.clear()
    ray.shutdown()


@pytest.fixture(autouse=True)
def free_cores(request: pytest.FixtureRequest) -> None:
    """A test finds the cores of the tests' Ray free, unless a pool of its module has them: `auto` takes what is free,
    and what the test before it had may still be ending."""
    if "local_ray" not in request.fixturenames or "running" in request.fixturenames:
        return
    request.getfixturevalue("local_ray")
    deadline = time.monotonic() + 30
    while ray.available_resources().get("CPU", 0) < 2 and time.monotonic() < deadline:
        time.sleep(0.05)


@dataclass
class Head:
    """A Ray of its own, as `ray start --head` makes it, and the environment that reaches it."""

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
    """A Ray that takes in who has its token, with a dashboard and a Ray Client server."""
    gcs, client, dashboard, agent = (free_port() for _ in range(4))
    # Unix sockets lie below: the path must be short.
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
        "RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S": "120",  # on busy cores Ray's 30 s are too few
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
    # The Ray Client server starts a little after the head says that it is there.
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
    """Caches go to a temporary folder."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture
def image_folder(tmp_path: Path) -> Path:
    """Two classes of 30 training and 6 test images each, of two sizes."""
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
    """Digits on the small network: two SGD epochs and two evolve phases of 16 members."""
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
    """The folder of a run of that configuration, to look at and to compare with."""
    return run(small(tmp_path_factory.mktemp("small")))
