"""Join a Ray, or start one on this machine."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
from collections.abc import Callable
from pathlib import Path
from typing import Any

from spartan_ray.distributed.address import check_address, check_token, ray_address
from spartan_ray.errors import InputError


def reach_ray(flag: str | None) -> tuple[str, str]:
    """Return the address of the Ray that a flag or RAY_ADDRESS names, or `local`, and the name of that setting.

    Raises InputError if that Ray does not answer. A wrong address is refused before Ray and torch are imported, which
    takes seconds."""
    address, named_by = ray_address(flag)
    if address == "local":
        make_token()
    # This logger warns about the token, which protects the user.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    return (address if address == "local" else check_address(address, named_by)), named_by


def start_ray(address: str, named_by: str) -> None:
    """Join the Ray at an address, or start one on this machine. That one accepts nobody without the token, unless the
    user turned tokens off. Raises InputError if Ray fails."""
    import ray
    from ray.exceptions import RayError

    read_token_mode()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, dashboard_host="127.0.0.1", **quiet)
        else:
            ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise InputError(f"{named_by} {address}: {error.__cause__ or error}") from None


def read_token_mode() -> None:
    """Make Ray read its token settings again. It read them when it was imported, which may be long ago."""
    from ray._raylet import AuthenticationTokenLoader, Config  # type: ignore[attr-defined]

    Config.initialize("")
    AuthenticationTokenLoader.instance().reset_cache()


def join_ray(flag: str | None) -> Callable[[], None]:
    """Join the Ray that a flag or RAY_ADDRESS names, or start one. Return a function that leaves or ends it and removes
    the RAY_ environment variables that were added since."""
    before = dict(os.environ)
    start_ray(*reach_ray(flag))

    def leave() -> None:
        import ray

        ray.shutdown()
        for name in os.environ.keys() - before.keys():
            if name.startswith("RAY_"):
                del os.environ[name]

    return leave


def make_token() -> None:
    """Turn on Ray's token authentication for a local Ray, unless RAY_AUTH_MODE is set. Make the token file readable by
    its owner alone: Ray itself leaves that to the umask. Raises InputError if the token cannot be stored or used."""
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    if not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        path = Path.home() / ".ray" / "auth_token"
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                os.write(file, secrets.token_hex(32).encode())
                os.close(file)
            path.chmod(0o600)
        except OSError as error:
            raise InputError(f"{path}: cannot store Ray's token there: {error.strerror}") from None
    check_token()
