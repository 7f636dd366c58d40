"""Tests of image files, which give the right pixels or a one-line message, and of the cache of decoded images."""

from __future__ import annotations

import fcntl
import io
import os
import shutil
import struct
import subprocess
import sys
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from numpy.typing import NDArray
from PIL import Image
from torchvision.datasets.folder import pil_loader

from spartan_ray.errors import InputError
from spartan_ray.vision import images
from spartan_ray.vision.images import read_folder

RANDOM = np.random.default_rng(0)
WIDE = RANDOM.integers(0, 2**16, (32, 32), dtype=np.uint16)
COLOURS = RANDOM.integers(0, 2**8, (32, 32, 4), dtype=np.uint8)


def read(root: Path) -> tuple[NDArray[np.uint8], list[str]]:
    """Return all pixels, the training part first, and the messages."""
    notes: list[str] = []
    train, test, _ = read_folder(root, 32, notes.append)
    return np.concatenate([train[0], test[0]]), notes


def first(folder: Path) -> Path:
    return folder / "train" / "cat" / "000.png"


@pytest.fixture(autouse=True)
def fresh_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> list[Path]:
    """Return a list that grows by the path of each file that is decoded."""
    paths: list[Path] = []
    real = images._decode

    def counted(path: Path, *rest: Any) -> NDArray[np.uint8]:
        paths.append(path)
        return real(path, *rest)

    monkeypatch.setattr(images, "_decode", counted)
    return paths


def png_of_16_bits(pixels: NDArray[np.uint16], colour_type: int) -> bytes:
    """Return a 16-bit PNG file, built from the PNG standard because Pillow writes 16 bits only for grey."""
    height, width = pixels.shape[:2]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    content = b"\x89PNG\r\n\x1a\n"
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    for kind, chunk in ((b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")):
        content += struct.pack(">I", len(chunk)) + kind + chunk + struct.pack(">I", zlib.crc32(kind + chunk))
    return content


def saved(image: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    image.save(file, format, **options)
    return file.getvalue()


def with_tag(content: bytes, tag: int, value: int) -> bytes:
    """Return a little-endian TIFF file with another value in a tag that holds one short integer."""
    (at,) = (i for i in range(len(content)) if content[i : i + 8] == struct.pack("<HHI", tag, 3, 1))
    return content[: at + 8] + struct.pack("<H", value) + content[at + 10 :]


GREY = Image.fromarray(WIDE)
SIXTEEN_BITS = {
    "png": saved(GREY, "PNG"),
    "tiff": saved(GREY, "TIFF"),
    "tiff, lzw": saved(GREY, "TIFF", compression="tiff_lzw"),
    "tiff, big-endian": saved(Image.frombytes("I;16B", (32, 32), WIDE.astype(">u2").tobytes()), "TIFF"),
    "pgm": b"P5 32 32 65535 " + WIDE.astype(">u2").tobytes(),
    "png, alpha": png_of_16_bits(np.dstack([WIDE, WIDE | 0xFF00]), 4),
    "png, colour": png_of_16_bits(np.dstack([WIDE] * 3), 2),
}


@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_16_bits_are_scaled_by_their_full_range(image_folder: Path, kind: str) -> None:
    """The result does not depend on how they are stored. Pillow alone clips grey values above 255 to white."""
    first(image_folder).write_bytes(SIXTEEN_BITS[kind])
    pixels, notes = read(image_folder)
    np.testing.assert_array_equal(pixels[0], np.dstack([WIDE >> 8] * 3))
    assert ("of 72 images: 1 in 16-bit grey (the high byte is used)" in notes) == (
        kind not in ("png, alpha", "png, colour")
    )


UNKNOWN_RANGE = {
    "floats": saved(Image.fromarray(WIDE / np.float32(65535)), "TIFF"),
    "floats of pfm": saved(Image.fromarray(WIDE / np.float32(65535)), "PPM"),
    "32 bits": saved(Image.fromarray(WIDE.astype(np.int32)), "TIFF"),
    "12 bits": with_tag(saved(GREY, "TIFF"), 258, 12),
    "0 is white": with_tag(saved(GREY, "TIFF"), 262, 0),
    "signed 16 bits": saved(GREY, "TIFF", tiffinfo={339: 2}),
    "signed 8 bits": saved(Image.fromarray(COLOURS[..., 0]), "TIFF", tiffinfo={339: 2}),
}


@pytest.mark.parametrize("kind", UNKNOWN_RANGE)
def test_values_of_unknown_range_are_refused_by_name(image_folder: Path, kind: str) -> None:
    first(image_folder).write_bytes(UNKNOWN_RANGE[kind])
    with pytest.raises(InputError, match=r"1 of 72 .*cat/000\.png \(.*which values are black and white is not known"):
        read(image_folder)


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("format", ["PNG", "TIFF", "WEBP"])
def test_images_are_turned_upright(image_folder: Path, format: str, orientation: int) -> None:
    stored = COLOURS[..., :3]
    upright = {
        1: stored,
        2: stored[:, ::-1],
        3: stored[::-1, ::-1],
        4: stored[::-1],
        5: stored.swapaxes(0, 1),
        6: np.rot90(stored, -1),
        7: stored[::-1, ::-1].swapaxes(0, 1),
        8: np.rot90(stored),
    }[orientation]
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(stored).save(first(image_folder), format, exif=exif, lossless=True)
    np.testing.assert_array_equal(read(image_folder)[0][0], upright)


def test_16_bit_grey_is_turned_too(image_folder: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(WIDE).save(first(image_folder), exif=exif)
    np.testing.assert_array_equal(read(image_folder)[0][0, ..., 0], np.rot90(WIDE >> 8, -1))


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
@pytest.mark.parametrize("mode", ["RGBA", "LA", "P", "CMYK"])
def test_colours_are_torchvision_s_and_transparency_is_said(image_folder: Path, mode: str) -> None:
    path = first(image_folder)
    image = Image.fromarray(COLOURS).quantize(64) if mode == "P" else Image.fromarray(COLOURS).convert(mode)
    image.save(path, "TIFF" if mode == "CMYK" else "PNG", **({"transparency": bytes(range(64))} if mode == "P" else {}))
    pixels, notes = read(image_folder)
    np.testing.assert_array_equal(pixels[0], pil_loader(str(path)))
    assert any("1 with transparent pixels" in note for note in notes) == (mode != "CMYK")


def test_an_alpha_channel_that_hides_nothing_is_not_spoken_of(image_folder: Path) -> None:
    Image.fromarray(COLOURS | np.array([0, 0, 0, 255], np.uint8)).save(first(image_folder))
    assert len(read(image_folder)[1]) == 1


@pytest.mark.parametrize("format", ["GIF", "WEBP", "PNG", "TIFF"])
def test_the_first_of_several_frames_is_used_and_it_is_said(image_folder: Path, format: str) -> None:
    frames = [Image.new("RGB", (32, 32), (value, value, value)) for value in (200, 100, 50)]
    frames[0].save(first(image_folder), format, save_all=True, append_images=frames[1:], lossless=True)
    pixels, notes = read(image_folder)
    assert (pixels[0] == 200).all()
    assert "of 72 images: 1 with several frames or pages (the first is used)" in notes


def test_all_that_cannot_be_read_is_counted_and_five_are_named(image_folder: Path) -> None:
    cats = image_folder / "train" / "cat"
    (cats / "000.png").write_bytes(first(image_folder).read_bytes()[:200])
    (cats / "001.png").write_bytes(b"not an image")
    (cats / "002.png").write_bytes(b"")
    (cats / "003.png").unlink()
    (cats / "003.png").symlink_to(image_folder / "nowhere.png")
    # This is an image, but in a format that Pillow passes to Ghostscript.
    Image.new("RGB", (8, 8)).save(cats / "004.png", "EPS")
    for name in ("005.png", "006.png"):
        (cats / name).write_bytes(b"not an image")
    with pytest.raises(InputError) as error:
        read(image_folder)
    formats = "none of BMP, GIF, JPEG, PNG, PPM, TIFF, WEBP"
    assert str(error.value) == (
        f"data.root: 7 of 72 files are not readable as images: {cats}/000.png (image file is truncated), "
        f"{cats}/001.png ({formats}), {cats}/002.png ({formats}), {cats}/003.png (No such file or directory), "
        f"{cats}/004.png ({formats}) and 2 more"
    )


def test_what_is_left_out_is_counted_and_hidden_files_are_not(image_folder: Path) -> None:
    cats = image_folder / "train" / "cat"
    (cats / "000.png").rename(cats / "000.PNG")
    (cats / "._000.png").write_bytes(b"of another system")
    (cats / "notes.txt").write_text("")
    (cats / "more").mkdir()
    shutil.copy(cats / "001.png", cats / "more" / "001.png")
    (image_folder / "test" / "list.csv").write_text("")
    pixels, notes = read(image_folder)
    assert len(pixels) == 72
    (left_out,) = (note for note in notes if "left out" in note)
    assert left_out == (
        f"data.root {image_folder}: left out, not images by suffix or place: "
        "3 (train/cat/more, train/cat/notes.txt, test/list.csv)"
    )


def test_classes_must_be_the_same_and_full_and_more_than_one(image_folder: Path) -> None:
    shutil.rmtree(image_folder / "test" / "dog")
    with pytest.raises(InputError, match="class 'dog' is not in both train and test"):
        read(image_folder)
    shutil.rmtree(image_folder / "train" / "dog")
    with pytest.raises(InputError, match=f"^data.root {image_folder}: one class only .'cat'.: .*nothing to tell apart"):
        read(image_folder)
    for image in (image_folder / "train" / "cat").iterdir():
        image.unlink()
    with pytest.raises(InputError, match="class 'cat' has no images"):
        read(image_folder)


def test_a_folder_that_cannot_be_looked_at_is_named(tmp_path: Path) -> None:
    for root in (tmp_path / "nowhere", tmp_path / ("long" * 100)):
        with pytest.raises(InputError, match=f"data.root.*{root}"):
            read(root)


def test_images_are_decoded_once_and_it_is_said_before(image_folder: Path, decoded: list[Path]) -> None:
    said: list[tuple[str, int]] = []
    read_folder(image_folder, 32, lambda note: said.append((note, len(decoded))))
    (cache,) = Path(os.environ["XDG_CACHE_HOME"]).glob("spartan-ray/*.pixels")
    assert said == [(f"decoding 72 images into the cache at {cache} (once)", 0)]
    assert len(decoded) == 72
    before = decoded.copy()
    pixels, notes = read(image_folder)
    assert decoded == before
    assert notes == []
    shutil.rmtree(cache.parent)
    np.testing.assert_array_equal(read(image_folder)[0], pixels)
    assert len(decoded) == 144


def test_a_cache_of_another_decoder_is_not_used(
    image_folder: Path, decoded: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    for times, (module, name, value) in enumerate(
        [(images, "DECODER", images.DECODER), (images, "DECODER", -1), (PIL, "__version__", "other")], start=1
    ):
        monkeypatch.setattr(module, name, value)
        read(image_folder)
        assert len(decoded) == 72 * times


def test_a_file_of_the_same_size_and_time_is_read_again(image_folder: Path) -> None:
    path = first(image_folder)
    for value in (10, 200):
        before = path.stat()
        while path.stat().st_ctime_ns == before.st_ctime_ns:
            Image.new("RGB", (32, 32), (value, value, value)).save(path, "BMP")
            os.utime(path, ns=(1, 1))
        assert (read(image_folder)[0][0] == value).all()


@pytest.mark.parametrize("damage", ["digest", "first pixel", "last pixel", "torn", "longer", "empty"])
def test_a_damaged_cache_is_written_anew(image_folder: Path, decoded: list[Path], damage: str) -> None:
    pixels, _ = read(image_folder)
    (cache,) = Path(os.environ["XDG_CACHE_HOME"]).glob("spartan-ray/*.pixels")
    whole = cache.read_bytes()
    flipped = bytearray(whole)
    flipped[{"digest": 0, "first pixel": 32, "last pixel": -1}.get(damage, 0)] ^= 1
    cache.write_bytes({"torn": whole[:1000], "longer": whole + b"\0", "empty": b""}.get(damage, bytes(flipped)))
    for _ in range(2):
        np.testing.assert_array_equal(read(image_folder)[0], pixels)
        assert len(decoded) == 144
    assert cache.read_bytes() == whole


def test_runs_at_once_leave_one_whole_cache(image_folder: Path, decoded: list[Path]) -> None:
    program = (
        "import hashlib, sys; from pathlib import Path; from spartan_ray.vision.images import read_folder;"
        "train, test, _ = read_folder(Path(sys.argv[1]), 32, lambda note: None);"
        "print(hashlib.sha256(train[0].tobytes() + test[0].tobytes()).hexdigest())"
    )
    command = [sys.executable, "-c", program, str(image_folder)]
    runs = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(3)]
    assert len({run.communicate()[0] for run in runs}) == 1
    assert all(run.returncode == 0 for run in runs)
    assert len(list(Path(os.environ["XDG_CACHE_HOME"]).rglob("*.*"))) == 1
    read(image_folder)
    assert decoded == []


def test_who_finds_a_cache_being_written_leaves_it_alone(image_folder: Path) -> None:
    pixels, _ = read(image_folder)
    (cache,) = Path(os.environ["XDG_CACHE_HOME"]).glob("spartan-ray/*.pixels")
    whole = cache.read_bytes()
    with open(cache, "wb") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        file.write(whole[:1000])
        file.flush()
        again, notes = read(image_folder)
        np.testing.assert_array_equal(again, pixels)
        assert len(notes) == 1
        assert cache.read_bytes() == whole[:1000]
        file.write(whole[1000:])
    assert cache.read_bytes() == whole


def test_no_room_for_a_cache_is_said(image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    pixels, notes = read(image_folder)
    assert len(pixels) == 72
    assert notes[-1].startswith("no cache of decoded images, decoding again next time: ")
