"""Reads a folder of images as arrays: train/<class>/* and test/<class>/*, of any size, decoded once into a cache.

Anything that would silently change an image is refused with the file's name, or reported in one line through `note`.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import PIL
from numpy.typing import NDArray
from PIL import Image, ImageOps, UnidentifiedImageError
from PIL import TiffImagePlugin as tiff

from spartan_ray.errors import InputError

Note = Callable[[str], None]
SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".ppm", ".pgm"}
# Formats with known value ranges, and none for which Pillow runs another program.
FORMATS = ("BMP", "GIF", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
# Version of the decoder, a part of the cache's digest. Raise it whenever `_decode` returns other pixels.
DECODER = 2
NAMED = 5

Arrays = tuple[NDArray[np.uint8], NDArray[np.int64]]


def list_folder(root: Path) -> tuple[dict[str, list[Path]], dict[str, list[Path]], list[Path]]:
    """Return the image files of each class in train and in test, and the other files, which are no images by their
    suffix or place.

    Raises InputError if the folder does not have this structure."""
    try:
        if not root.is_dir():
            raise InputError(f"data.root {root}: no such folder")
        left_out: list[Path] = []
        train, test = (_list_images(root / part, left_out) for part in ("train", "test"))
    except OSError as error:
        raise InputError(f"data.root: {error.filename}: cannot be read: {error.strerror}") from None
    classes = tuple(train)
    if classes != tuple(test):
        odd = sorted(set(classes) ^ set(test))
        raise InputError(f"data.root {root}: class {odd[0]!r} is not in both train and test")
    if len(classes) == 1:
        raise InputError(f"data.root {root}: one class only ({classes[0]!r}): there is nothing to tell apart")
    return train, test, left_out


def read_folder(root: Path, side: int, note: Note) -> tuple[Arrays, Arrays, tuple[str, ...]]:
    """Return pixels (N, side, side, 3) and labels of train, those of test, and the classes.

    Raises InputError if the folder does not have the structure of `list_folder`, and for unreadable files."""
    train, test, left_out = list_folder(root)
    classes = tuple(train)
    if left_out:
        names = shortened([str(path.relative_to(root)) for path in left_out])
        note(f"data.root {root}: left out, not images by suffix or place: {len(left_out)} ({names})")
    counts = [len(paths) for part in (train, test) for paths in part.values()]
    labels_N = np.repeat(np.tile(np.arange(len(classes)), 2), counts)
    paths = [path for part in (train, test) for paths in part.values() for path in paths]
    pixels_NHWC = _pixels(root, paths, side, note)
    cut = sum(counts[: len(classes)])
    return (pixels_NHWC[:cut], labels_N[:cut]), (pixels_NHWC[cut:], labels_N[cut:]), classes


def _list_images(part: Path, left_out: list[Path]) -> dict[str, list[Path]]:
    """Return the image files of each class, classes and files sorted by name. Add all other files to `left_out`."""
    if not part.is_dir():
        raise InputError(f"data.root: {part}: no such folder (expected {part.name}/<class>/<image>)")
    by_class: dict[str, list[Path]] = {}
    for folder in _visible(part):
        if not folder.is_dir():
            left_out.append(folder)
            continue
        by_class[folder.name] = []
        for path in _visible(folder):
            (by_class[folder.name] if path.suffix.lower() in SUFFIXES else left_out).append(path)
        if not by_class[folder.name]:
            raise InputError(f"data.root: {folder}: class {folder.name!r} has no images")
    if not by_class:
        raise InputError(f"data.root: {part}: holds no class folders")
    return by_class


def _visible(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if not path.name.startswith("."))


def shortened(names: Sequence[str]) -> str:
    """Return the first few names and the number of the others."""
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more


def _pixels(root: Path, paths: list[Path], side: int, note: Note) -> NDArray[np.uint8]:
    """Return the pixels of the files, from the cache if neither they nor the decoder have changed since."""
    listing = [(str(path.relative_to(root)), _stamp(path)) for path in paths]
    state = json.dumps([DECODER, PIL.__version__, side, listing])
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spartan-ray"
    cache = folder / f"{hashlib.sha256(os.fsencode(root.resolve())).hexdigest()[:16]}-{side}.pixels"
    with contextlib.suppress(OSError):
        digest, pixels = np.split(np.fromfile(cache, np.uint8), [32])
        if digest.tobytes() == _digest(state, pixels):
            return pixels.reshape(-1, side, side, 3)
    note(f"decoding {len(paths)} images into the cache at {cache} (once)")
    pixels_NHWC = _decode_all(paths, side, note)
    _write_cache(cache, _digest(state, pixels_NHWC), pixels_NHWC, note)
    return pixels_NHWC


def _digest(state: str, pixels: NDArray[np.uint8]) -> bytes:
    """Return the digest at the start of a cache. It differs if the cache is damaged or belongs to other files."""
    digest = hashlib.sha256(state.encode())
    digest.update(pixels.data)
    return digest.digest()


def _stamp(path: Path) -> tuple[int, ...] | None:
    """Return a stamp that changes with the file, or None if the file has no status; decoding then reports why. Other
    content may have the same size and, if copied with its times, the same modification time, but not the same change
    time."""
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def _write_cache(cache: Path, digest: bytes, pixels_NHWC: NDArray[np.uint8], note: Note) -> None:
    try:
        cache.parent.mkdir(parents=True, exist_ok=True)
        with open(cache, "ab") as file:
            # One writer at a time. A reader that comes meanwhile, or after a writer was killed, finds a wrong digest.
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            file.truncate(0)
            file.write(digest)
            file.write(pixels_NHWC.data)
    except BlockingIOError:
        pass  # Another run is writing it.
    except OSError as error:
        note(f"no cache of decoded images, decoding again next time: {error}")


def _decode_all(paths: list[Path], side: int, note: Note) -> NDArray[np.uint8]:
    pixels_NHWC = np.empty((len(paths), side, side, 3), np.uint8)
    unreadable: list[str] = []
    changes: Counter[str] = Counter()
    for index, path in enumerate(paths):
        try:
            pixels_NHWC[index] = _decode(path, side, changes)
        except Exception as error:  # For damaged files Pillow raises struct.error, zlib.error, KeyError and others.
            reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
            unreadable.append(f"{path} ({reason})")
    if unreadable:
        raise InputError(
            f"data.root: {len(unreadable)} of {len(paths)} files are not readable as images: {shortened(unreadable)}"
        )
    if changes:
        counts = ", ".join(f"{count} {change}" for change, count in changes.items())
        note(f"of {len(paths)} images: {counts}")
    return pixels_NHWC


def _decode(path: Path, side: int, changes: Counter[str]) -> NDArray[np.uint8]:
    """Return the pixels of one image, upright, as 8-bit RGB at side x side. Count what is lost in `changes`."""
    try:
        opened = Image.open(path, formats=FORMATS)
    except UnidentifiedImageError:
        raise ValueError(f"none of {', '.join(FORMATS)}") from None
    with opened:
        _check_range(opened)
        if getattr(opened, "is_animated", False):
            changes["with several frames or pages (the first is used)"] += 1
        image: Image.Image = ImageOps.exif_transpose(opened)
        if image.mode.startswith("I"):
            changes["in 16-bit grey (the high byte is used)"] += 1
            # Pillow's own conversion clips at 255. Take the high byte, as Pillow does for 16-bit colours.
            image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            if image.getchannel("A").getextrema() != (255, 255):
                changes["with transparent pixels (shown opaque)"] += 1
        return resized(image.convert("RGB"), side)


def resized(rgb: Image.Image, side: int) -> NDArray[np.uint8]:
    """Return the pixels of an image at side x side. Pillow computes in integers, so they are equal on every
    processor."""
    if rgb.size != (side, side):
        rgb = rgb.resize((side, side), Image.Resampling.BILINEAR)
    return np.asarray(rgb)


def _check_range(image: Image.Image) -> None:
    """Raises ValueError if it is unknown which values of the image are black and white."""
    known = image.mode != "F"
    if isinstance(image, tiff.TiffImageFile):
        # Pillow scales PNG and PPM of more than 8 bits to 0..65535, but not TIFF: 12 bits, signed, 0 as white.
        tags = image.tag_v2
        layout = tags.get(tiff.BITSPERSAMPLE), tags.get(tiff.PHOTOMETRIC_INTERPRETATION)
        unsigned = set(tags.get(tiff.SAMPLEFORMAT, (1,))) == {1}
        known = unsigned and (not image.mode.startswith("I") or layout == ((16,), 1))
    if not known:
        kind = f"{image.format} of mode {image.mode}"
        raise ValueError(f"{kind}: which values are black and white is not known; save it as PNG of 8 or 16 bits")
