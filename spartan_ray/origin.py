"""Which sources of the package run here, and the git commit that they are of. setup.py runs this file too, where
nothing is installed yet."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterator
from pathlib import Path
from urllib.parse import urlsplit
from urllib.request import url2pathname

HERE = Path(__file__).parent
# Written into wheels and source distributions, which have no git: the commit and the digest of its sources.
RECORD = "commit.txt"


def sources(folder: Path = HERE) -> str:
    """A digest of the package's sources."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """The git commit of the sources that run here, `-dirty` after it where they were changed since; None where it
    is not known.

    A Ray job's copy of the working directory comes without git: there it is the commit of the installed package,
    if that has the same sources."""
    ours = sources()
    for folder in (HERE, *_installed()):
        if folder.is_dir() and sources(folder) == ours and (found := _git_commit(folder) or _recorded(folder, ours)):
            return found
    return None


def _git_commit(folder: Path) -> str | None:
    """What git says, if it has the package itself and not only what lies around it, such as an environment."""
    try:
        head, _ = _git(folder, "rev-parse", "HEAD", "HEAD:./__init__.py").split()
        return head + "-dirty" * bool(_git(folder, "status", "--porcelain", "--", "."))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    # Without locks, for which a user's own git would have to wait.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _recorded(folder: Path, ours: str) -> str | None:
    try:
        found, digest = (folder / RECORD).read_text().split()
    except (OSError, ValueError):
        return None
    return found if digest == ours else None


def _installed() -> Iterator[Path]:
    """The folder of the installed package, and the one that an editable installation points to."""
    for package in importlib.metadata.distributions(name="spartan-ray"):
        yield Path(str(package.locate_file(HERE.name)))
        with contextlib.suppress(ValueError, AttributeError):  # what pip wrote there only informs
            origin = urlsplit(json.loads(package.read_text("direct_url.json") or "{}").get("url", ""))
            if origin.scheme == "file":
                yield Path(url2pathname(origin.path)) / HERE.name
