"""The git commit and the digest of the package sources that are running.

setup.py runs this file too, when nothing is installed yet: import only the standard library."""

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
# File in wheels and source distributions, which have no git: the commit and the digest of its sources.
RECORD = "commit.txt"


def sources(folder: Path = HERE) -> str:
    """Return a digest of the Python sources in a folder of the package."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def commit() -> str | None:
    """Return the git commit of the running sources, followed by `-dirty` if they have changed since, or None if it is
    unknown.

    A Ray job's copy of the working directory has no git. In that case the commit of the installed package is returned,
    if its sources are the same."""
    ours = sources()
    for folder in (HERE, *_installed()):
        if folder.is_dir() and sources(folder) == ours and (found := _git_commit(folder) or _recorded(folder, ours)):
            return found
    return None


def _git_commit(folder: Path) -> str | None:
    """Return the commit from git, or None. The package itself must be in git, not only a folder around it, such as one
    that holds a virtual environment."""
    try:
        head, _ = _git(folder, "rev-parse", "HEAD", "HEAD:./__init__.py").split()
        return head + "-dirty" * bool(_git(folder, "status", "--porcelain", "--", "."))
    except (OSError, subprocess.CalledProcessError):
        return None


def _git(folder: Path, *arguments: str) -> str:
    # Take no locks: the user's own git would have to wait for them.
    command = ["git", "--no-optional-locks", "-C", str(folder), *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def _recorded(folder: Path, ours: str) -> str | None:
    try:
        found, digest = (folder / RECORD).read_text().split()
    except (OSError, ValueError):
        return None
    return found if digest == ours else None


def _installed() -> Iterator[Path]:
    """Yield the folder of the installed package, and the one that an editable installation points to."""
    for package in importlib.metadata.distributions(name="spartan-ray"):
        yield Path(str(package.locate_file(HERE.name)))
        with contextlib.suppress(ValueError, AttributeError):  # pip's record is optional
            origin = urlsplit(json.loads(package.read_text("direct_url.json") or "{}").get("url", ""))
            if origin.scheme == "file":
                yield Path(url2pathname(origin.path)) / HERE.name
