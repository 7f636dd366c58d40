"""The files of a run in an object store, of any kind that fsspec knows, and the lease by which one process writes
them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any, TypeVar

import fsspec

from spartan_ray.errors import InputError, RunError, one_line

T = TypeVar("T")
# Seconds between tries when a store fails.
RETRIES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# Seconds after which a lease that is not renewed is nobody's, and between two renewals.
LEASE_SECONDS, RENEW_SECONDS = 45.0, 10.0
TOKEN = uuid.uuid4().hex
LEASE = re.compile(r"lease/(\d{6})\.json")
# A call may take so many seconds, and more for what it sends: the timeouts of libraries don't see every silence.
CALL_SECONDS, BYTES_PER_SECOND = 60.0, 1e6
# Options of file systems: we try again ourselves.
OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"retries": {"max_attempts": 1}}}}
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


class Store:
    """The files under a URL, by their names below it. What fails is tried again for about a minute, or until `pause`,
    which waits so many seconds, says that nobody wants to wait."""

    def __init__(self, url: str, pause: Callable[[float], object] = time.sleep) -> None:
        self.url, self.pause = url, pause
        kind = url.split("://")[0].lower()
        try:
            # Another process's files are not seen in listings that were kept, nor is a server that has come back.
            options = {"skip_instance_cache": True, "use_listings_cache": False} | OPTIONS.get(kind, {})
            self.fs, self.root = fsspec.core.url_to_fs(url, **options)
        except ImportError as error:
            raise InputError(f"{url}: needs the package {PACKAGES.get(kind, one_line(str(error)))}") from None
        except ValueError as error:
            raise InputError(f"{url}: {error}") from None
        if kind == "s3":
            self.fs.retries = 1

    def names(self) -> set[str]:
        """Of all files."""

        def found() -> set[str]:
            self.fs.invalidate_cache()
            try:
                paths = self.fs.find(self.root)
            except FileNotFoundError:
                return set()
            return {path.removeprefix(self.root).lstrip("/") for path in paths}

        return self._patiently("list", "", found)

    def read(self, name: str) -> bytes:
        """A file. Raises FileNotFoundError."""
        return self._patiently("read", name, lambda: bytes(self.fs.cat_file(self._path(name))))

    def write(self, name: str, content: bytes) -> None:
        """Write a file, whole or not at all as object stores do."""
        self._patiently("write", name, lambda: self._put(name, content), len(content))

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one, which only one of several processes does. The content is unlike that of any
        other process."""

        def create() -> bool:
            try:
                self._put(name, content, mode="create")
            except FileExistsError:  # perhaps made by a try of ours that seemed to fail
                return bool(self.fs.cat_file(self._path(name)) == content)
            return True

        return self._patiently("create", name, create)

    def delete(self, name: str) -> None:
        """Delete a file if it is there."""
        with contextlib.suppress(FileNotFoundError):
            self._patiently("delete", name, lambda: self.fs.rm_file(self._path(name)))

    def check(self) -> None:
        """Raises RunError where files cannot be written, or deleted."""
        name = f"spartan-{TOKEN}"
        self.write(name, b"")
        self.delete(name)

    def _put(self, name: str, content: bytes, **mode: str) -> None:
        try:
            self.fs.pipe_file(self._path(name), content, **mode)
        except FileNotFoundError as error:  # no such bucket
            raise PermissionError(str(error)) from None

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _patiently(self, what: str, name: str, action: Callable[[], T], size: int = 0) -> T:
        for wait in (*RETRIES, None):
            try:
                return _within(CALL_SECONDS + size / BYTES_PER_SECOND, action)
            except FileNotFoundError:
                raise
            except PermissionError as error:
                raise RunError(f"{self.url}/{name}: cannot {what}: {one_line(str(error))}") from None
            except Exception as error:  # each file system has errors of its own
                if wait is None or self.pause(wait):
                    said = one_line(f"{type(error).__name__}: {error}")
                    raise RunError(f"{self.url}/{name}: cannot {what}: {said}") from None
        raise AssertionError


def _within(seconds: float, action: Callable[[], T]) -> T:
    """What an action returns, or its error. Raises TimeoutError when it takes longer: it is left to itself then."""
    ended: Future[T] = Future()

    def act() -> None:
        try:
            ended.set_result(action())
        except BaseException as error:
            ended.set_exception(error)

    threading.Thread(target=act, daemon=True).start()
    try:
        return ended.result(seconds)
    except TimeoutError:
        raise TimeoutError(f"no answer in {seconds:.0f} s") from None


class Lease:
    """That one process alone writes a run: the last of the store's files lease/000001.json, ..., each of which only one
    process can create, renewed as long as its holder lives.

    Clocks need not agree: a lease is over when it was released, or was watched for `LEASE_SECONDS` without a change."""

    def __init__(self, store: Store, number: int) -> None:
        self.store, self.number = store, number
        self.renewals = 0
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._renew, daemon=True)
        self.thread.start()

    @classmethod
    def take(cls, store: Store, note: Callable[[str], None] = lambda text: None) -> Lease:
        """The lease of a run, as soon as the last one is over. Raises InputError where that is renewed."""
        last = cls._last(store)
        seen = b""
        watched = time.monotonic()
        while True:
            content = store.read(lease_name(last)) if last else b""
            if not last or content == lease_content(0, released=True):
                pass
            elif seen and content != seen:
                holder = json.loads(content).get("holder", "unknown")
                raise InputError(f"{store.url}: another process writes this run: {holder}")
            elif time.monotonic() < watched + LEASE_SECONDS:
                if not seen:
                    holder = json.loads(content).get("holder", "unknown")
                    note(f"{store.url}: seeing for {LEASE_SECONDS:.0f} s whether {holder} still writes this run")
                seen = content
                if store.pause(min(1.0, RENEW_SECONDS)):
                    raise RunError(f"{store.url}: not waited for")
                continue
            if store.create(lease_name(last + 1), lease_content(0)):
                return cls(store, last + 1)
            seen, watched, last = b"", time.monotonic(), cls._last(store)

    @staticmethod
    def _last(store: Store) -> int:
        numbers = (LEASE.fullmatch(name) for name in store.names())
        return max((int(match[1]) for match in numbers if match), default=0)

    def _renew(self) -> None:
        while not self.ended.wait(RENEW_SECONDS):
            self.renewals += 1
            with contextlib.suppress(RunError):  # the next time, and who waits for `check` learns of it
                self.store.write(lease_name(self.number), lease_content(self.renewals))

    def check(self) -> None:
        """Raises RunError when another process has taken the run over."""
        if self._last(self.store) != self.number:
            raise RunError(f"{self.store.url}: another process has taken this run over")

    def abandon(self) -> None:
        """Renew it no more: it is over when that has been seen."""
        self.ended.set()
        self.thread.join(RENEW_SECONDS)

    def release(self) -> None:
        """Let the next one have it at once."""
        self.abandon()
        with contextlib.suppress(RunError):
            self.store.write(lease_name(self.number), lease_content(0, released=True))


def lease_name(number: int) -> str:
    """Of the file of a lease."""
    return f"lease/{number:06d}.json"


def lease_content(renewals: int, released: bool = False) -> bytes:
    if released:
        return b'{"released": true}\n'
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    return (json.dumps({"holder": holder, "token": TOKEN, "renewals": renewals}) + "\n").encode()
