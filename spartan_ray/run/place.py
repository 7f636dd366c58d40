"""The place a run is written to: a folder, or a URL of an object store.

For a URL, each process works on a local copy. The process that writes a run uploads its files to the store after each
epoch. It uploads the checksums of a checkpoint last, so that checkpoints appear atomically. A process that reads a run
downloads it first.
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

# Local copies of URLs: the prefix of their folders, the file locked while one is in use, and the file that marks one
# to keep.
COPY, LOCK, KEPT = "spartan-ray-", "lock", "kept"
# Longest time in seconds that a process takes to look whether a folder is locked.
LOOK = 0.2


class Place:
    """The place of a run: `path`, a folder that only this process writes, and for a URL the store to which its content
    is uploaded. Use `new` or `existing` to make one."""

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
        """Make the place of a new run under a path or URL. If the name is taken, append a number to it, or with `only`
        raise InputError."""
        if not is_url(out):
            path = make_run_folder(Path(out), name, only)
            return cls(str(path), path, lock_folder(path), note)
        for number in itertools.count(1):
            called = name if number == 1 else f"{name}-{number}"
            store = Store(f"{out}/{called}", pause)
            if not store.sizes():
                store.check()
                if lease := Lease.begin(store):
                    return cls(store.url, _scratch(called)[0], lease, note)
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
        """Open the place of an existing run, to continue it. Raises InputError if another process writes it and does
        not release it within `patience` seconds."""
        if not is_url(where):
            return cls(where, Path(where), lock_folder(Path(where), patience), note)
        store = Store(where, pause)
        store.check()
        place = cls(where, _scratch(where.split("/")[-1])[0], Lease.take(store, patience, note), note)
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
        """Return the text with the local folder replaced by the path or URL that the user knows."""
        return text.replace(str(self.path), self.where)

    def push(self) -> None:
        """Upload new and changed files to the store, checksums last, then delete from it what the folder no longer has.
        Do nothing without a URL. Raises RunError on failure; the folder is kept, and the store's last checkpoint stays
        intact."""
        if not isinstance(self.lock, Lease):
            return
        files = self._files()
        try:
            for name in sorted(files, key=_order):
                if files[name] != self.sent.get(name):
                    with contextlib.suppress(FileNotFoundError):  # deleted in the meantime
                        self.lock.write(name, (self.path / name).read_bytes())
                        self.sent[name] = files[name]
            for name in sorted(self.sent.keys() - files.keys(), key=_order, reverse=True):
                self.lock.delete(name)
                del self.sent[name]
        except RunError as error:
            self.failed = True
            (self.path.parent / KEPT).touch()
            # Name the folder around the copy: `named` would replace the copy itself by the URL.
            raise RunError(f"{error}; unsent files are in {self.path.parent}") from None

    def close(self) -> None:
        """Upload what is left, and release the run. Delete the local copy of a URL unless the upload failed."""
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
        """Return the files to upload, each with its modification time and size."""
        found = {}
        for path in self.path.rglob("*"):
            if path.is_file() and not path.is_symlink() and path.suffix != ".tmp":
                about = path.stat()
                found[path.relative_to(self.path).as_posix()] = about.st_mtime_ns, about.st_size
        return found


def make_run_folder(out: Path, name: str, only: bool = False) -> Path:
    """Make the folder out/name, or out/name-2 and so on if it is taken. Raises InputError if it cannot be made, or if
    it is taken and `only` is true."""
    number = 1
    while True:
        folder = out / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(parents=True)
            return folder
        except FileExistsError as error:
            if not folder.exists():  # `out` exists and is a file
                raise InputError(f"run.out {out}: cannot make a run folder: {error}") from None
            if only:
                raise InputError(f"{folder}: another process has just begun this run") from None
            number += 1
        except OSError as error:
            raise InputError(f"run.out {out}: cannot make a run folder: {error}") from None


def lock_folder(path: Path, patience: float = 0.0) -> IO[str]:
    """Lock a run folder for this process until the returned file is closed or the process ends.

    Wait up to `patience` seconds for a process that is ending, and at least for one that only looks (`is_written`).
    Raises InputError if another process holds the lock, or if a link in the folder leads out of it."""
    refuse_links(path)
    try:
        file = os.fdopen(os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o644), "r+")
    except OSError as error:
        raise InputError(f"{path}: cannot be locked: {error.strerror}") from None
    if os.fstat(file.fileno()).st_nlink > 1:
        file.close()
        raise InputError(f"{path / 'lock'}: is a hard link to another file")
    deadline = time.monotonic() + max(patience, LOOK)
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
    """Yield the folder of a run. For a URL, it is a temporary copy of the files whose names `wanted` accepts. Raises
    InputError if there is no run at the URL."""
    if not is_url(where):
        yield Path(where)
        return
    path, lock = _scratch(where.split("/")[-1])
    try:
        fetch(Store(where), path, wanted)
        yield path
    except (InputError, RunError) as error:
        raise type(error)(str(error).replace(str(path), where)) from None
    finally:
        shutil.rmtree(path.parent, ignore_errors=True)
        os.close(lock)


def is_written(path: Path) -> bool | None:
    """Return whether a process writes the run in a folder. None if the file system has no locks to tell."""
    try:
        with open(path / "lock") as lock:
            fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except FileNotFoundError:
        return False
    except BlockingIOError:
        return True
    except OSError:
        return None
    return False


def exists(where: str) -> bool:
    """Return whether there is anything at the place of a run."""
    return bool(Store(where).sizes()) if is_url(where) else Path(where).exists()


def last_epoch(where: str) -> Callable[[str], bool]:
    """Return a filter for `reading` that accepts what tells how far a run is. For a URL these are the last checkpoint,
    the configuration, metrics.jsonl and the final network."""
    if not is_url(where):
        return lambda name: True
    kept = [name for name in Store(where).sizes() if re.fullmatch(r"checkpoints/epoch-\d+\.sha256", name)]
    last = max(kept, default="").removesuffix(".sha256")
    named = {"config.yaml", "metrics.jsonl", "final.safetensors"}
    return lambda name: name in named or bool(last and name.startswith(f"{last}."))


def in_report(name: str) -> bool:
    """Return whether a report needs a file of a run."""
    return not name.startswith(("checkpoints/", "tensorboard/"))


def fetch(store: Store, path: Path, wanted: Callable[[str], bool]) -> None:
    """Download the files whose names `wanted` accepts into a folder. Raises InputError if the store has no files, or
    one whose name leads out of the folder, and RunError if a file cannot be written."""
    sizes = store.sizes()
    if not sizes:
        raise InputError(f"{store.url}: there is no run")
    for name in sorted(sizes):
        if LEASE.fullmatch(name) or not wanted(name):
            continue
        if ".." in PurePosixPath(name).parts or name.startswith("/") or not name:
            raise InputError(f"{store.url}: {name!r} is not a file of a run")
        with contextlib.suppress(FileNotFoundError):  # deleted since it was listed
            content = store.read(name, sizes[name])
            try:
                (path / name).parent.mkdir(parents=True, exist_ok=True)
                (path / name).write_bytes(content)
            except OSError as error:
                raise RunError(f"{path / name}: cannot be written: {error.strerror}") from None


def _order(name: str) -> tuple[bool, str]:
    return name.endswith(".sha256"), name


def _scratch(name: str) -> tuple[Path, int]:
    """Make an empty folder of this name for a local copy. Delete copies of processes that have ended, except those with
    files that could not be uploaded. Return the folder and the descriptor that holds its lock."""
    for folder in Path(tempfile.gettempdir()).glob(f"{COPY}*"):
        with contextlib.suppress(OSError), open(folder / LOCK, "r+") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not (folder / KEPT).exists():
                shutil.rmtree(folder, ignore_errors=True)
    folder = Path(tempfile.mkdtemp(prefix=COPY))
    # The lock holds until the descriptor is closed or this process ends, however it ends.
    lock_file = os.open(folder / "making", os.O_RDWR | os.O_CREAT, 0o600)
    fcntl.flock(lock_file, fcntl.LOCK_EX)
    (folder / "making").rename(folder / LOCK)  # renamed after locking: no process sees it unlocked
    path = folder / name
    path.mkdir()
    return path, lock_file
