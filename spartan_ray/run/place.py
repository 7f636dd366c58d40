"""Where a run is written: a folder, or a URL of an object store.

For a URL a process works on a copy of its own. Who writes a run sends its files to the store after each epoch, the
checksums of a checkpoint last, so that a checkpoint is there whole or not at all; who reads one fetches it first.
"""

from __future__ import annotations

import contextlib
import fcntl
import itertools
import os
import re
import shutil
import socket
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath
from typing import IO

from spartan_ray.errors import InputError, RunError
from spartan_ray.run.loading import refuse_links
from spartan_ray.run.storage import LEASE, Lease, Store
from spartan_ray.section import is_url

# Of the folders that copies are in: their names, what is locked while they are used, and what says that one stays.
COPY, LOCK, KEPT = "spartan-ray-", "lock", "kept"


class Place:
    """Where a run is written: `path`, a folder that this process alone writes, and for a URL the store that what is in
    it goes to. Made by `new` or `existing`."""

    def __init__(self, where: str, path: Path, lock: IO[str] | Lease, note: Callable[[str], None] = print) -> None:
        self.where, self.path, self.lock, self.note = where, path, lock, note
        self.sent: dict[str, tuple[int, int]] = {}
        self.failed = False

    @classmethod
    def new(
        cls,
        out: str,
        name: str,
        only: bool = False,
        pause: Callable[[float], object] = time.sleep,
        note: Callable[[str], None] = print,
    ) -> Place:
        """A new run under a path or URL, with a number at its name when that is taken; InputError with `only`."""
        if not is_url(out):
            path = make_run_folder(Path(out), name, only)
            return cls(str(path), path, lock_folder(path), note)
        for number in itertools.count(1):
            called = name if number == 1 else f"{name}-{number}"
            store = Store(f"{out}/{called}", pause)
            if not store.sizes():
                store.check()
                if lease := Lease.begin(store):
                    return cls(store.url, _scratch(called), lease, note)
            if only:
                raise InputError(f"{store.url}: another process has just begun this run")
        raise AssertionError

    @classmethod
    def existing(
        cls,
        where: str,
        patience: float,
        pause: Callable[[float], object] = time.sleep,
        note: Callable[[str], None] = print,
    ) -> Place:
        """A run that goes on. Raises InputError when it is another process's, which may take `patience` seconds to let
        go of it."""
        if not is_url(where):
            return cls(where, Path(where), lock_folder(Path(where), patience), note)
        store = Store(where, pause)
        store.check()
        place = cls(where, _scratch(where.split("/")[-1]), Lease.take(store, patience, note), note)
        try:
            fetch(store, place.path, lambda name: True)
        except BaseException:
            place.failed = True
            place.close()
            shutil.rmtree(place.path.parent)
            raise
        place.sent = place._files()
        return place

    def named(self, text: str) -> str:
        """A message with the name that the user knows the folder by."""
        return text.replace(str(self.path), self.where)

    def push(self) -> None:
        """Have the store have what the folder has: what is new, checksums after what they are of, and then without
        what is gone. Raises RunError, with the folder and the store's last checkpoint as they are."""
        if not isinstance(self.lock, Lease):
            return
        files = self._files()
        try:
            for name in sorted(files, key=_order):
                if files[name] != self.sent.get(name):
                    with contextlib.suppress(FileNotFoundError):  # gone meanwhile
                        self.lock.write(name, (self.path / name).read_bytes())
                        self.sent[name] = files[name]
            for name in sorted(self.sent.keys() - files.keys(), key=_order, reverse=True):
                self.lock.delete(name)
                del self.sent[name]
        except RunError as error:
            self.failed = True
            (self.path.parent / KEPT).touch()
            # By the folder around it, whose name is not taken for that of the run.
            raise RunError(f"{error}; what it could not take is in {self.path.parent}") from None

    def close(self) -> None:
        """Send what is left, and let go of the run. The copy of a URL's run stays where it could not be sent."""
        if not isinstance(self.lock, Lease):
            self.lock.close()
            return
        if not self.failed:
            try:
                self.push()
            except RunError as error:
                self.note(str(error))
        if self.failed:
            self.lock.abandon()
            return
        self.lock.release()
        shutil.rmtree(self.path.parent, ignore_errors=True)

    def _files(self) -> dict[str, tuple[int, int]]:
        """What is to be sent, each with what changes when it does."""
        found = {}
        for path in self.path.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.suffix != ".tmp":
                about = path.stat()
                found[path.relative_to(self.path).as_posix()] = about.st_mtime_ns, about.st_size
        return found


def make_run_folder(out: Path, name: str, only: bool = False) -> Path:
    """A new folder out/name, or out/name-2, ... when it is taken; with `only` InputError then."""
    number = 1
    while True:
        folder = out / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError as error:
            if not folder.exists():  # it is `out` that is there, as a file
                raise InputError(f"run.out {out}: cannot make a run folder: {error}") from None
            if only:
                raise InputError(f"{folder}: another process has just begun this run") from None
            number += 1
        except OSError as error:
            raise InputError(f"run.out {out}: cannot make a run folder: {error}") from None


def lock_folder(path: Path, patience: float = 0.0) -> IO[str]:
    """Lock a run folder for this process until the file is closed, or the process ends in whatever way.

    Waits so many seconds for a process that is ending. Raises InputError when another one holds it, and for
    a folder that a link would let us write out of."""
    refuse_links(path)
    try:
        file = os.fdopen(os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
    except OSError as error:
        raise InputError(f"{path}: cannot be locked: {error.strerror}") from None
    if os.fstat(file.fileno()).st_nlink > 1:
        file.close()
        raise InputError(f"{path / 'lock'}: is another file too")
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            break
        except BlockingIOError:
            if time.monotonic() > deadline:
                with file:
                    holder = file.read().strip()
                raise InputError(f"{path}: another process writes this run: {holder or 'unknown'}") from None
            time.sleep(0.1)
        except OSError as error:  # a file system without locks
            file.close()
            raise InputError(f"{path}: cannot be locked: {error.strerror}") from None
    file.truncate(0)
    file.write(f"process {os.getpid()} on {socket.gethostname()}\n")
    file.flush()
    return file


@contextlib.contextmanager
def reading(where: str, wanted: Callable[[str], bool] = lambda name: True) -> Iterator[Path]:
    """The folder of a run, for a URL as a copy of those of its files that are wanted, by their names. Raises InputError
    where there is none."""
    if not is_url(where):
        yield Path(where)
        return
    path = _scratch(where.split("/")[-1])
    try:
        fetch(Store(where), path, wanted)
        yield path
    except (InputError, RunError) as error:
        raise type(error)(str(error).replace(str(path), where)) from None
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)


def exists(where: str) -> bool:
    """Whether something is where a run would be."""
    return bool(Store(where).sizes()) if is_url(where) else Path(where).exists()


def last_epoch(where: str) -> Callable[[str], bool]:
    """What is wanted of a run to see how far it is: by a URL its last checkpoint, and what has no epoch."""
    if not is_url(where):
        return lambda name: True
    kept = [name for name in Store(where).sizes() if re.fullmatch(r"checkpoints/epoch-\d+\.sha256", name)]
    last = max(kept, default="").removesuffix(".sha256")
    named = {"config.yaml", "metrics.jsonl", "final.safetensors"}
    return lambda name: name in named or bool(last and name.startswith(f"{last}."))


def in_report(name: str) -> bool:
    """Whether a report needs a file of a run."""
    return not name.startswith(("checkpoints/", "tensorboard/"))


def fetch(store: Store, path: Path, wanted: Callable[[str], bool]) -> None:
    """Copy the wanted files of a store into a folder. Raises InputError where there are none at all."""
    sizes = store.sizes()
    if not sizes:
        raise InputError(f"{store.url}: there is no run")
    for name in sorted(sizes):
        if LEASE.fullmatch(name) or not wanted(name):
            continue
        if ".." in PurePosixPath(name).parts or name.startswith("/") or not name:
            raise InputError(f"{store.url}: {name!r} is no file of a run")
        with contextlib.suppress(FileNotFoundError):  # its writer has deleted it since
            content = store.read(name, sizes[name])
            try:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content)
            except OSError as error:
                raise RunError(f"{path / name}: cannot be written: {error.strerror}") from None


def _order(name: str) -> tuple[bool, str]:
    return name.endswith(".sha256"), name


def _scratch(name: str) -> Path:
    """An empty folder of this name, for a copy. Copies of processes that are gone are deleted, but for those that hold
    what could not be sent."""
    for folder in Path(tempfile.gettempdir()).glob(f"{COPY}*"):
        with contextlib.suppress(OSError), open(folder / LOCK, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (folder / KEPT).exists():
                shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=COPY))
    # Until this process ends, in whatever way.
    fcntl.flock(os.open(folder / "making", os.O_RDWR | os.O_CREAT, 0o600), fcntl.LOCK_EX)
    (folder / "making").rename(folder / LOCK)  # so that it is never seen unlocked
    path = folder / name
    path.mkdir()
    return path
