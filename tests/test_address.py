"""Tests of connecting to Ray. Any problem with the address or the token gives one line of output and exit code 2."""

from __future__ import annotations

import contextlib
import http.server
import re
import shutil
import socket
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import grpc
import pytest
import ray
from conftest import Head
from ray._private import services
from ray.core.generated.gcs_pb2 import GcsNodeInfo
from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoReply
from ray.core.generated.gcs_service_pb2_grpc import (
    NodeInfoGcsServiceServicer,
    add_NodeInfoGcsServiceServicer_to_server,
)
from whole_runs import SMALL, command, environment, spartan

from spartan_ray.distributed import address as address_module
from spartan_ray.distributed.address import ray_address


def refusal(address: str, cwd: Path, named_by: str = "cluster.address", **more: str) -> str:
    """Run the command in this process, check that it refuses the address, and return the reason."""
    flags = [] if named_by == "RAY_ADDRESS" else ["--cluster.address", address]
    code, out, err = command("train", *SMALL, *flags, cwd=cwd, **more)
    assert (code, out) == (2, "")
    return one_line(err, f"{named_by} {address}: ")


def refused(ended: subprocess.CompletedProcess[str], beginning: str) -> str:
    """Check that an ended process refused the address, and return the reason."""
    assert ended.returncode == 2, ended.stdout + ended.stderr
    assert ended.stdout == ""
    return one_line(ended.stderr, beginning)


def one_line(err: str, beginning: str) -> str:
    assert err.count("\n") == 1, err
    assert err.startswith(f"spartan: {beginning}")
    return err.removeprefix(f"spartan: {beginning}")


@pytest.mark.parametrize(
    ("flag", "variable", "expected"),
    [
        (None, None, ("local", "cluster.address")),
        (None, "", ("local", "cluster.address")),
        (None, "head:6379", ("head:6379", "RAY_ADDRESS")),
        ("auto", "head:6379", ("head:6379", "RAY_ADDRESS")),
        ("auto", None, ("auto", "cluster.address")),
        ("local", "head:6379", ("local", "cluster.address")),
        ("other:6379", "head:6379", ("other:6379", "cluster.address")),
    ],
)
def test_the_flag_or_the_variable_names_the_address(
    flag: str | None, variable: str | None, expected: tuple[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if variable is not None:
        monkeypatch.setenv("RAY_ADDRESS", variable)
    assert ray_address(flag) == expected


@pytest.mark.parametrize(
    ("address", "said"),
    [
        ("head", "not an address: expected host:port of a Ray's GCS (the port is usually 6379)"),
        ("head:port", "not an address"),
        ("head:65536", "not an address"),
        ("a head:6379", "not an address"),
        (":6379", "not an address"),
        ("head:6379/path", "not an address"),
        ("ray://head", "not an address"),
        ("redis://head:6379", "not an address"),
        ("http://127.0.0.1:8265", "this port speaks HTTP; use the dashboard's address with `ray job submit`"),
        ("https://head", "this port speaks HTTP"),
        ("127.0.0.1:1", "nothing answers there: Connection refused: expected host:port"),
        ("ray://127.0.0.1:1", "nothing answers there: Connection refused"),
        ("no-such-host.invalid:6379", "nothing answers there: "),
        (f"{'a' * 64}:6379", "nothing answers there: "),
    ],
)
def test_what_no_ray_can_be_at_is_said_before_ray_is_imported(
    address: str, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert refusal(address, tmp_path).startswith(said)
    assert refusal(address, tmp_path, "RAY_ADDRESS", RAY_ADDRESS=address).startswith(said)


@contextlib.contextmanager
def listening(handler: type[http.server.BaseHTTPRequestHandler] | None) -> Iterator[str]:
    """Start a server that answers HTTP, or one that never answers if `handler` is None. Yield its address."""
    if handler is None:
        with socket.create_server(("", 0)) as silent:
            yield f"127.0.0.1:{silent.getsockname()[1]}"
        return
    with http.server.ThreadingHTTPServer(("", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


class Quiet(http.server.BaseHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        pass


@pytest.mark.parametrize("scheme", ["", "ray://"])
@pytest.mark.parametrize(
    ("handler", "said"),
    [
        (None, "something listens there, but no {} answers without TLS: expected host:port"),
        (Quiet, "this port speaks HTTP; use the dashboard's address with `ray job submit`: expected host:port"),
    ],
)
def test_a_server_that_is_no_ray(
    scheme: str, handler: Any, said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(address_module, "ANSWER_SECONDS", 1.0)
    monkeypatch.setattr(address_module, "HTTP_SECONDS", 1.0)
    with listening(handler) as address:
        answer = refusal(scheme + address, tmp_path)
    assert answer.startswith(said.format("Ray Client server" if scheme else "GCS"))


def test_auto_where_no_ray_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(services, "find_gcs_addresses", lambda: frozenset())
    monkeypatch.setattr(services, "find_bootstrap_address", lambda folder: None)
    assert refusal("auto", tmp_path).startswith("no Ray runs on this machine: start one with `ray start --head`")


class Gcs(NodeInfoGcsServiceServicer):  # type: ignore[misc]
    """A GCS without a token, which reports the given nodes."""

    def __init__(self, *nodes: GcsNodeInfo) -> None:
        self.nodes = nodes

    def GetAllNodeInfo(self, request: Any, context: Any) -> GetAllNodeInfoReply:
        return GetAllNodeInfoReply(node_info_list=self.nodes)


@contextlib.contextmanager
def serving(gcs: Gcs, credentials: Any = None) -> Iterator[str]:
    """Start a server for a GCS and yield its address."""
    server = grpc.server(ThreadPoolExecutor(1))
    add_NodeInfoGcsServiceServicer_to_server(gcs, server)
    port = server.add_secure_port("[::]:0", credentials) if credentials else server.add_insecure_port("[::]:0")
    server.start()
    try:
        yield f"127.0.0.1:{port}"
    finally:
        server.stop(None).wait()


def test_a_machine_that_is_no_node_of_the_ray(tmp_path: Path) -> None:
    with serving(Gcs()) as address:
        said = refusal(address, tmp_path)
    assert said.startswith("this machine is not a node of that Ray: submit a job (`ray job submit`)")


@pytest.mark.skipif(not shutil.which("openssl"), reason="openssl makes the certificate")
def test_tls_is_that_of_rays_variables(tmp_path: Path) -> None:
    certificate, key, host = tmp_path / "certificate.pem", tmp_path / "key.pem", ray.util.get_node_ip_address()
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=ray", "-days", "1",
         "-addext", f"subjectAltName=IP:{host}", "-keyout", key, "-out", certificate],
        check=True, capture_output=True,
    )  # fmt: skip
    tls = {"RAY_USE_TLS": "1", "RAY_TLS_SERVER_CERT": str(certificate), "RAY_TLS_CA_CERT": str(certificate)}
    credentials = grpc.ssl_server_credentials([(key.read_bytes(), certificate.read_bytes())])
    with serving(Gcs(), credentials) as address:
        assert refusal(address, tmp_path).startswith("something listens there, but no GCS answers without TLS")
        assert refusal(address, tmp_path, **tls).startswith("RAY_USE_TLS: ")
        assert refusal(address, tmp_path, **tls, RAY_TLS_SERVER_KEY=str(key)).startswith("this machine is not a node")


def test_a_local_ray_and_a_token_that_is_none(tmp_path: Path) -> None:
    file = tmp_path / "token"
    file.write_text("no tokén\n")
    ended = spartan("train", *SMALL, cwd=tmp_path, RAY_AUTH_TOKEN_PATH=str(file))
    assert "has characters that are not printable ASCII" in refused(
        ended, f"RAY_AUTH_MODE is token, and the token in RAY_AUTH_TOKEN_PATH {file} "
    )


def test_an_empty_token_file_is_filled(tmp_path: Path) -> None:
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.touch()
    program = "from spartan_ray.distributed.start import make_token; make_token()"
    subprocess.run([sys.executable, "-c", program], env=environment() | {"HOME": str(tmp_path)}, check=True)
    assert len(token.read_text()) >= 32
    assert stat.S_IMODE(token.stat().st_mode) == 0o600


@pytest.mark.ray
@pytest.mark.parametrize("server", ["gcs", "client"])
@pytest.mark.parametrize(
    ("token", "said"),
    [
        ({}, "requires a token, and RAY_AUTH_MODE is not set here: export RAY_AUTH_MODE=token"),
        ({"RAY_AUTH_MODE": "disabled"}, "requires a token, and RAY_AUTH_MODE is disabled here"),
        ({"RAY_AUTH_MODE": "token"}, "requires a token, and there is none in ~/.ray/auth_token"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": "empty"}, "and there is none in RAY_AUTH_TOKEN_PATH empty"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "no tokén"}, "and the token in RAY_AUTH_TOKEN has characters"),
        ({"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "another"}, "refuses the token in RAY_AUTH_TOKEN"),
    ],
)
def test_a_ray_that_wants_its_token(
    server: str, token: dict[str, str], said: str, ray_head: Head, tmp_path: Path
) -> None:
    (tmp_path / "empty").touch()
    address = getattr(ray_head, server)
    named = {"RAY_ADDRESS": address, "HOME": str(tmp_path)}
    line = refused(spartan("train", *SMALL, cwd=tmp_path, **named, **token), f"RAY_ADDRESS {address}: that Ray ")
    assert said in line
    assert "`ray get-auth-token` on the head node prints the cluster's token" in line


@pytest.mark.ray
def test_auto_finds_a_ray_and_asks_it_too(ray_head: Head, tmp_path: Path) -> None:
    """`auto` may find any Ray instance on this machine. The one of the other tests also refuses this token."""
    given = ray_head.environment | {"RAY_AUTH_TOKEN": "another"}
    ended = spartan("train", *SMALL, "--cluster.address", "auto", cwd=tmp_path, **given)
    assert ended.returncode == 2
    assert re.search(r"cluster\.address auto, \S+:\d+: that Ray refuses the token in RAY_AUTH_TOKEN", ended.stderr)


@pytest.mark.ray
def test_the_wrong_port_of_a_ray(ray_head: Head, tmp_path: Path) -> None:
    for address, said in (
        (ray_head.dashboard, "this port speaks HTTP; use the dashboard's address with `ray job submit`"),
        (ray_head.client.removeprefix("ray://"), "something listens there, but no GCS answers without TLS"),
        (f"ray://{ray_head.gcs}", "something listens there, but no Ray Client server answers without TLS"),
    ):
        assert refusal(address, tmp_path).startswith(said)


@pytest.mark.ray
def test_a_token_here_and_none_there(ray_head: Head, tmp_path: Path) -> None:
    with serving(Gcs(GcsNodeInfo())) as address:  # this machine is a node of the fixture's instance
        given = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": "a token"}
        ended = spartan("train", *SMALL, "--cluster.address", address, cwd=tmp_path, **given)
    line = refused(ended, f"cluster.address {address}: ")
    assert line.startswith("that Ray has no token, and RAY_AUTH_MODE is token here: ")


@pytest.mark.ray
def test_another_version_of_ray_is_said(ray_head: Head, tmp_path: Path) -> None:
    program = "import ray; ray.__version__ = '2.0.0'; from spartan_ray.cli.main import main; main()"
    command = [sys.executable, "-c", program, "train", *SMALL, "--cluster.address", ray_head.gcs]
    ended = subprocess.run(command, env=ray_head.environment, cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 2
    line = one_line(ended.stderr, f"cluster.address {ray_head.gcs}: Version mismatch: ")
    assert f"started with: Ray: {ray.__version__}" in line
    assert "started with: Ray: 2.0.0" in line


@pytest.mark.ray
def test_a_run_through_ray_client(ray_head: Head, tmp_path: Path) -> None:
    flags = ["--cluster.address", ray_head.client, "--run.epochs", "2"]
    for _ in range(3):
        ended = spartan("train", *SMALL, *flags, cwd=tmp_path, **ray_head.environment)
        if "Starting Ray client server failed" not in ended.stderr:  # it may fail on busy cores
            break
    assert ended.returncode == 0, ended.stderr
    assert "| run | 2 | 1 moved: " in ended.stdout
    assert (tmp_path / "runs" / "run" / "final.safetensors").exists()
