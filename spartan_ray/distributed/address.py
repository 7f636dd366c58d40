"""Check whether a Ray can be joined at an address, and explain in one line why not.

Ray itself retries a wrong address for minutes, and reports a wrong token as a server that does not answer."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import socket
from typing import Any

from spartan_ray.errors import InputError

# Timeouts in seconds: to connect, to get an answer from Ray, and to find out whether a server speaks HTTP.
CONNECT_SECONDS = 2.0
ANSWER_SECONDS = 4.0
HTTP_SECONDS = 2.0

ADDRESS = re.compile(r"(?P<client>ray://)?(?P<host>[^\s:/@\[\]]+|\[[0-9A-Fa-f:.]+\]):(?P<port>[0-9]{1,5})")
EXPECTED = (
    "expected host:port of a Ray's GCS (the port is usually 6379), ray://host:port of its Ray Client server "
    "(usually 10001), auto or local"
)
HTTP = "this port speaks HTTP; use the dashboard's address with `ray job submit`"
CLUSTER_TOKEN = "`ray get-auth-token` on the head node prints the cluster's token"


def ray_address(flag: str | None) -> tuple[str, str]:
    """Return the address of the Ray to join, or `local`, and the name of the setting that it comes from.

    As in Ray, RAY_ADDRESS applies if the flag is missing or `auto`."""
    variable = os.environ.get("RAY_ADDRESS")
    if variable and flag in (None, "", "auto"):
        return variable, "RAY_ADDRESS"
    return flag or "local", "cluster.address"


def check_address(address: str, named_by: str) -> str:
    """Return the address to give to `ray.init`, with `auto` resolved. Raises InputError, within ten seconds, if no
    Ray there accepts this process."""
    label = f"{named_by} {address}"
    if address == "auto":
        return check_address(_address_here(label), f"{label},")
    if address.startswith(("http://", "https://")):
        raise InputError(f"{label}: {HTTP}: {EXPECTED}")
    parts = ADDRESS.fullmatch(address)
    if not parts or int(parts["port"]) > 65535:
        raise InputError(f"{label}: not an address: {EXPECTED}")
    host, port = parts["host"].strip("[]"), int(parts["port"])
    try:  # first, because importing Ray takes longer
        socket.create_connection((host, port), CONNECT_SECONDS).close()
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{label}: nothing answers there: {reason}: {EXPECTED}") from None

    import grpc

    check, server = (_check_client_server, "Ray Client server") if parts["client"] else (_check_gcs, "GCS")
    try:
        check(address.removeprefix("ray://"))
    except InputError as error:
        raise InputError(f"{label}: {error}") from None
    except grpc.RpcError:
        silent = f"something listens there, but no {server} answers {'with' if _uses_tls() else 'without'} TLS"
        raise InputError(f"{label}: {HTTP if _speaks_http(host, port) else silent}: {EXPECTED}") from None
    return address


def _address_here(label: str) -> str:
    """Return the address of a Ray that runs on this machine. Raises InputError if there is none."""
    from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
    from ray._private.services import canonicalize_bootstrap_address

    try:
        address = canonicalize_bootstrap_address("auto")
    except ConnectionError:
        raise InputError(
            f"{label}: no Ray runs on this machine: start one with `ray start --head`, or use local to start one for "
            "this run"
        ) from None
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)  # as Ray does, for `auto` only
    return str(address)


def _check_client_server(target: str) -> None:
    """Call a Ray Client server. It accepts any process that has its token."""
    from ray.core.generated.ray_client_pb2 import ClusterInfoRequest, ClusterInfoType
    from ray.core.generated.ray_client_pb2_grpc import RayletDriverStub

    with _channel(target) as channel:
        _answer(RayletDriverStub(channel).ClusterInfo, ClusterInfoRequest(type=ClusterInfoType.PING))


def _check_gcs(target: str) -> None:
    """Call a GCS. It accepts a process that has its token and runs on one of its nodes."""
    from ray._private.authentication.authentication_utils import is_token_auth_enabled
    from ray._private.services import canonicalize_bootstrap_address, find_node_ids
    from ray.core.generated.gcs_service_pb2 import GetAllNodeInfoRequest
    from ray.core.generated.gcs_service_pb2_grpc import NodeInfoGcsServiceStub

    here = [GetAllNodeInfoRequest.NodeSelector(node_id=bytes.fromhex(node)) for node in find_node_ids()]
    nodes_here = GetAllNodeInfoRequest(node_selectors=here, limit=1)
    # Ray replaces 127.0.0.1 with another address of this machine, so do the same here.
    with _channel(canonicalize_bootstrap_address(target)) as channel:
        answer, asked_for_token = _answer(NodeInfoGcsServiceStub(channel).GetAllNodeInfo, nodes_here)
    if not here or not answer.node_info_list:
        raise InputError(
            "this machine is not a node of that Ray: submit a job (`ray job submit`), or give the address of its "
            "Ray Client server, ray://host:port (usually 10001)"
        )
    if is_token_auth_enabled() and not asked_for_token:  # its workers would be unable to call this process
        raise InputError(
            "that Ray has no token, and RAY_AUTH_MODE is token here: start it with RAY_AUTH_MODE=token too, "
            "or export RAY_AUTH_MODE=disabled here"
        )


def _answer(call: Any, request: Any) -> tuple[Any, bool]:
    """Return the answer of a server, and whether it asked for the token. Raises InputError if this process lacks
    a valid token."""
    import grpc

    try:
        return call(request, timeout=ANSWER_SECONDS), False
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            raise
    try:
        token = _token()
        if not token:
            mode = os.environ.get("RAY_AUTH_MODE") or "not set"
            raise InputError(
                f"RAY_AUTH_MODE is {mode} here: export RAY_AUTH_MODE=token and put the token in {_token_place()}"
            )
    except InputError as error:
        raise InputError(f"that Ray requires a token, and {error}: {CLUSTER_TOKEN}") from None
    try:
        return call(request, timeout=ANSWER_SECONDS, metadata=token), True
    except grpc.RpcError as error:
        if error.code() is not grpc.StatusCode.UNAUTHENTICATED:
            raise
        raise InputError(f"that Ray refuses the token in {_token_place()}: {CLUSTER_TOKEN}") from None


def check_token() -> None:
    """Raise InputError if a Ray that is started here would find no valid token."""
    from ray._private.authentication.authentication_token_setup import ensure_token_if_auth_enabled
    from ray.exceptions import AuthenticationError

    with contextlib.suppress(AuthenticationError, OSError):
        ensure_token_if_auth_enabled()  # fills an empty file
    try:
        _token()
    except InputError as error:
        raise InputError(f"RAY_AUTH_MODE is token, and {error}") from None


def _token() -> list[tuple[str, str]]:
    """Return the token as the metadata of a call; empty unless RAY_AUTH_MODE is token. Raises InputError if the token
    is missing or invalid."""
    from ray._private.authentication.http_token_authentication import get_auth_headers_if_auth_enabled
    from ray.exceptions import AuthenticationError

    try:
        headers = get_auth_headers_if_auth_enabled({})
    except AuthenticationError:
        raise InputError(f"there is none in {_token_place()}") from None
    if not all(value.isascii() and value.isprintable() for value in headers.values()):  # gRPC would abort the process
        raise InputError(f"the token in {_token_place()} has characters that are not printable ASCII")
    return list(headers.items())


def _token_place() -> str:
    """Return where Ray looks for the token."""
    if os.environ.get("RAY_AUTH_TOKEN", "").strip():
        return "RAY_AUTH_TOKEN"
    path = os.environ.get("RAY_AUTH_TOKEN_PATH")
    return f"RAY_AUTH_TOKEN_PATH {path}" if path else "~/.ray/auth_token"


def _channel(target: str | None) -> Any:
    """Open a gRPC channel as Ray does, but without the token."""
    import grpc
    from ray._common.tls_utils import load_certs_from_env
    from ray._private.ray_constants import GLOBAL_GRPC_OPTIONS

    if not _uses_tls():
        return grpc.insecure_channel(target, GLOBAL_GRPC_OPTIONS)
    try:
        certificate, key, authority = load_certs_from_env()
    except (OSError, RuntimeError) as error:
        raise InputError(f"RAY_USE_TLS: {error}") from None
    return grpc.secure_channel(target, grpc.ssl_channel_credentials(authority, key, certificate), GLOBAL_GRPC_OPTIONS)


def _uses_tls() -> bool:
    return os.environ.get("RAY_USE_TLS", "0").lower() in ("1", "true")


def _speaks_http(host: str, port: int) -> bool:
    connection = http.client.HTTPConnection(host, port, timeout=HTTP_SECONDS)
    try:
        connection.request("GET", "/")
        connection.getresponse()
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    return True
