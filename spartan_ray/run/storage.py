"""The files of a run in an object store, through fsspec, and the lease that lets only one process write them."""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
import threading
import time
import uuid
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from typing import Any, TypeVar

import fsspec

from spartan_ray.errors import InputError, RunError, one_line

T = TypeVar("T")
# Seconds to wait between attempts when a store fails.
RETRIES = (1.0, 2.0, 4.0, 8.0, 16.0, 30.0)
# Seconds after which a lease that is not renewed expires, between two renewals, and that one renewal may take.
LEASE_SECONDS, RENEW_SECONDS, RENEWAL_SECONDS = 45.0, 10.0, 10.0
LEASE = re.compile(r"lease/(\d{6})\.json")
RELEASED = b'{"released": true}\n'
# Time limit of a call: fixed seconds, plus time for the bytes it moves. The timeouts of libraries do not catch every
# hang.
CALL_SECONDS, BYTES_PER_SECOND = 60.0, 1e6
# Stores that can create a file only if there is none, with the package that each needs, and its options. The libraries
# must not retry, because this module does. `memory` is for tests.
PACKAGES = {"s3": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "memory": "fsspec"}
OPTIONS: dict[str, dict[str, Any]] = {"s3": {"config_kwargs": {"retries": {"max_attempts": 1}}}}


class Store:
    """The files under a URL, named relative to it. Raises InputError for a URL that cannot be used.

    A call that fails is retried for about a minute. Between attempts it calls `pause` with the seconds to wait; if that
    returns a true value, it gives up. A call that gives up, or is not permitted, raises RunError."""

    def __init__(self, url: str, pause: Callable[[float], object] = time.sleep) -> None:
        self.url, self.pause = url, pause
        kind = url.split("://")[0].lower()
        if kind not in PACKAGES:
            raise InputError(f"{url}: expected a path, s3:// or gs://")
        try:
            # Cached listings would hide the files of other processes, and a cached instance a server that is back.
            options = {"skip_instance_cache": True, "use_listings_cache": False} | OPTIONS.get(kind, {})
            self.fs, self.root = fsspec.core.url_to_fs(url, **options)
        except ImportError:
            raise InputError(f"{url}: needs the package {PACKAGES[kind]}") from None
        except ValueError as error:
            raise InputError(f"{url}: {error}") from None
        if kind == "s3":
            self.fs.retries = 1

    def sizes(self) -> dict[str, int]:
        """Return the size in bytes of each file, by name."""
        return self._patiently("list", "", self.sizes_now)

    def sizes_now(self) -> dict[str, int]:
        """Return the same as `sizes`, in a single attempt."""
        self.fs.invalidate_cache()
        try:
            found = self.fs.find(self.root, detail=True)
        except FileNotFoundError:
            return {}
        return {path.removeprefix(self.root).lstrip("/"): int(about["size"] or 0) for path, about in found.items()}

    def read(self, name: str, size: int = 0) -> bytes:
        """Return the content of a file. `size` is its approximate size, which extends the time limit. Raises
        FileNotFoundError if there is none."""
        return self._patiently("read", name, lambda: bytes(self.fs.cat_file(self._path(name))), size)

    def write(self, name: str, content: bytes, before: Callable[[], None] = lambda: None) -> None:
        """Write a file atomically, as object stores do. `before` is called before each attempt and may raise
        RunError."""

        def write() -> None:
            before()
            self.put(name, content)

        self._patiently("write", name, write, len(content))

    def create(self, name: str, content: bytes) -> bool:
        """Write a file unless there is one, and return whether it was written. Of several processes, only one succeeds.
        `content` must be unique to this call."""

        def create() -> bool:
            try:
                self.put(name, content, mode="create")
            except FileExistsError:  # perhaps created by our own attempt that seemed to fail
                return bool(self.fs.cat_file(self._path(name)) == content)
            return True

        return self._patiently("create", name, create)

    def delete(self, name: str, before: Callable[[], None] = lambda: None) -> None:
        """Delete a file if it exists. `before` is as in `write`."""

        def delete() -> None:
            before()
            self.fs.rm_file(self._path(name))

        with contextlib.suppress(FileNotFoundError):
            self._patiently("delete", name, delete)

    def check(self) -> None:
        """Raise RunError if files cannot be written or deleted, and InputError if the store would let two processes
        create the same file."""
        name = f"spartan-{uuid.uuid4().hex}"
        try:
            if not self.create(name, b"one") or self.create(name, b"two"):
                raise InputError(f"{self.url}: this store overwrites existing files on create: two could write one run")
        finally:
            self.delete(name)

    def put(self, name: str, content: bytes, **mode: str) -> None:
        """Write a file in a single attempt."""
        try:
            self.fs.pipe_file(self._path(name), content, **mode)
        except FileNotFoundError as error:  # no such bucket
            raise PermissionError(str(error)) from None

    def _path(self, name: str) -> str:
        return f"{self.root}/{name}"

    def _patiently(self, what: str, name: str, action: Callable[[], T], size: int = 0) -> T:
        for wait in (*RETRIES, None):
            try:
                return within(CALL_SECONDS + size / BYTES_PER_SECOND, action)
            except (FileNotFoundError, RunError):
                raise
            except PermissionError as error:
                raise RunError(f"{self.url}/{name}: cannot {what}: {one_line(str(error))}") from None
            except Exception as error:  # each file system raises its own errors
                if wait is None or self.pause(wait):
                    said = one_line(f"{type(error).__name__}: {error}")
                    raise RunError(f"{self.url}/{name}: cannot {what}: {said}") from None
        raise AssertionError


def within(seconds: float, action: Callable[[], T]) -> T:
    """Run an action in a thread and return its result or raise its error. Raises TimeoutError if it takes longer than
    `seconds`; the thread is then left running."""
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
    """Lets only one process write a run.

    The lease is the last of the files lease/000001.json, lease/000002.json and so on in the store. Only one process can
    create each file, and its holder rewrites it as long as it lives. Clocks need not agree: a lease has ended if it was
    released, or if another process watched it for `LEASE_SECONDS` without a change. A holder that has not renewed its
    lease for half that time checks that it still has it before it writes."""

    def __init__(self, store: Store, number: int, token: str) -> None:
        self.store, self.number, self.token = store, number, token
        self.renewals, self.renewed, self.lost = 0, time.monotonic(), False
        self.ended = threading.Event()
        self.thread = threading.Thread(target=self._renew_again_and_again, daemon=True)
        self.thread.start()

    @classmethod
    def begin(cls, store: Store) -> Lease | None:
        """Create and return the first lease of a run, or return None if there is one."""
        token = uuid.uuid4().hex
        return cls(store, 1, token) if store.create(_name(1), _content(token, 0)) else None

    @classmethod
    def take(cls, store: Store, patience: float = 0.0, note: Callable[[str], None] = lambda text: None) -> Lease:
        """Wait until the last lease of a run has ended, and return a new one. Raises InputError if its holder still
        renews it after `patience` seconds, and RunError if the store's `pause` gives up."""
        started = watched = time.monotonic()
        last, seen, token = _last(store.sizes()), b"", uuid.uuid4().hex
        while True:
            content = store.read(_name(last)) if last else RELEASED
            now = time.monotonic()
            if content == RELEASED or (seen == content and now > watched + LEASE_SECONDS):
                if store.create(_name(last + 1), _content(token, 0)):
                    return cls(store, last + 1, token)
                last, seen = _last(store.sizes()), b""
                continue
            if seen and content != seen and now > started + patience:
                raise InputError(f"{store.url}: another process writes this run: {_holder(content)}")
            if not seen:
                note(f"{store.url}: watching for {LEASE_SECONDS:.0f} s if {_holder(content)} still writes this run")
            if content != seen:
                seen, watched = content, now
            if store.pause(min(1.0, RENEW_SECONDS)):
                raise RunError(f"{store.url}: stopped while waiting for the run's lease")

    def write(self, name: str, content: bytes) -> None:
        """Write a file of the run. Raises RunError if another process has taken the run over, or if the store fails."""
        self.store.write(name, content, self.hold)

    def delete(self, name: str) -> None:
        """Delete a file of the run. Raises the same errors as `write`."""
        self.store.delete(name, self.hold)

    def hold(self) -> None:
        """Raise RunError if another process has taken the run over. If the last renewal is too old, renew and check
        first, in a single attempt."""
        if not self.lost and self._has_lapsed():
            self._renew()
        if self.lost:
            raise RunError(f"{self.store.url}: another process has taken this run over")

    def abandon(self) -> None:
        """Stop renewing. The lease ends when another process has noticed."""
        self.ended.set()
        self.thread.join(2 * RENEWAL_SECONDS)

    def release(self) -> None:
        """Stop renewing and end the lease at once, so that the next process need not wait."""
        self.abandon()
        with contextlib.suppress(RunError):
            self.store.write(_name(self.number), RELEASED)

    def _has_lapsed(self) -> bool:
        return time.monotonic() > self.renewed + LEASE_SECONDS / 2

    def _renew(self) -> None:
        started, self.renewals = time.monotonic(), self.renewals + 1
        content = _content(self.token, self.renewals)
        within(RENEWAL_SECONDS, lambda: self.store.put(_name(self.number), content))
        if self._has_lapsed():
            names = within(RENEWAL_SECONDS, self.store.sizes_now)
            self.lost = self.lost or _last(names) != self.number
        self.renewed = started

    def _renew_again_and_again(self) -> None:
        while not self.ended.wait(RENEW_SECONDS):
            with contextlib.suppress(Exception):  # tried again next time; `hold` checks the age of the last renewal
                self._renew()


def _name(number: int) -> str:
    return f"lease/{number:06d}.json"


def _content(token: str, renewals: int) -> bytes:
    holder = f"process {os.getpid()} on {socket.gethostname()}"
    return (json.dumps({"holder": holder, "token": token, "renewals": renewals}) + "\n").encode()


def _holder(content: bytes) -> str:
    try:
        return one_line(str(json.loads(content)["holder"]))
    except (ValueError, TypeError, KeyError):
        return "unknown"


def _last(names: Iterable[str]) -> int:
    """Return the number of the last lease among file names, 0 if there is none."""
    return max((int(match[1]) for match in map(LEASE.fullmatch, names) if match), default=0)
