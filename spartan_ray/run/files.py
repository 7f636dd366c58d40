"""Writing files atomically."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from spartan_ray.errors import RunError


def write_whole(path: Path, content: bytes) -> None:
    """Write a file atomically: after a crash it has either its new or its old content. Raises RunError if it cannot be
    written."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
        folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
        raise RunError(f"{path}: cannot be written: {error.strerror}") from None
