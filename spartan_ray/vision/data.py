"""Data sets as uint8 tensors, and their split into disjoint parts.

Every data set is RGB of side data.image_size, stored as uint8 in (N, H, W, C) order, which is channels-last already.
`classification.py` and `training.py` normalise batches on the device.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, replace
from http.client import HTTPException
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from spartan_ray.engine.draws import permutation
from spartan_ray.errors import InputError
from spartan_ray.vision.images import Note, read_folder, resized, shortened

if TYPE_CHECKING:  # scoring must not import pydantic
    from spartan_ray.vision.config import Data

# What torchvision raises if a download fails or a file is not readable as the data set.
LOAD_ERRORS = (OSError, HTTPException, RuntimeError, EOFError, ValueError, KeyError, AssertionError, UnpicklingError)


@dataclass(frozen=True)
class Images:
    """N images and their labels."""

    pixels_NHWC: torch.Tensor  # uint8
    labels_N: torch.Tensor  # int64

    def __len__(self) -> int:
        return len(self.labels_N)

    def __getitem__(self, index_N: torch.Tensor | slice) -> Images:
        return Images(self.pixels_NHWC[index_N], self.labels_N[index_N])

    def to(self, device: torch.device) -> Images:
        return Images(self.pixels_NHWC.to(device), self.labels_N.to(device))


@dataclass(frozen=True)
class Splits:
    """The four disjoint splits, and what is known of them. With data.sgd_on_evolution, `sgd` includes `evolution`.

    `mean_C` and `std_C` are the mean and standard deviation of each colour over `sgd`, of pixels in [0, 1]."""

    sgd: Images
    evolution: Images
    validation: Images
    test: Images
    classes: tuple[str, ...]
    mean_C: tuple[float, ...]
    std_C: tuple[float, ...]

    @property
    def image_size(self) -> int:
        return self.sgd.pixels_NHWC.shape[1]

    def digest(self) -> str:
        """Return the SHA-256 of all images and labels, in their order."""
        digest = hashlib.sha256()
        for images in (self.sgd, self.evolution, self.validation, self.test):
            digest.update(images.pixels_NHWC.numpy().data)
            digest.update(images.labels_N.numpy().data)
        return digest.hexdigest()

    def to(self, device: torch.device) -> Splits:
        parts = {name: getattr(self, name).to(device) for name in ("sgd", "evolution", "validation", "test")}
        return replace(self, **parts)


@dataclass(frozen=True)
class Dataset:
    """A data set before it is split: a training part and a test part."""

    train: Images
    test: Images
    classes: tuple[str, ...]


def load_splits(config: Data, seed: int, note: Note = print) -> Splits:
    """Load the configured data set and split its training part, stratified by class, in an order drawn from the seed.

    `note` receives one-line messages for the user. Raises InputError for a missing, empty or corrupt data set, and for
    splits that it cannot fill."""
    dataset = _only(LOADERS[config.name](config, note), config.classes)
    sizes = _split_sizes(config, len(dataset.train))
    order_N = _stratified_order(dataset.train.labels_N.numpy(), seed)
    # The sgd split comes last, so that its size does not change the other two splits.
    ends = np.cumsum([sizes["validation"], sizes["evolution"], sizes["sgd"]])
    validation, evolution, sgd = (dataset.train[torch.from_numpy(part)] for part in np.split(order_N, ends)[:3])
    for name, split in (("sgd", sgd), ("evolution", evolution), ("validation", validation)):
        present = torch.bincount(split.labels_N, minlength=len(dataset.classes))
        if (present == 0).any():
            missing = dataset.classes[int((present == 0).nonzero()[0])]
            count = int((dataset.train.labels_N == dataset.classes.index(missing)).sum())
            raise InputError(
                f"class {missing!r} has too few training images ({count}) to be in all splits: "
                f"none is left for the {name} split of {len(split)} (data.{name}_images)"
            )
    if config.sgd_on_evolution:
        sgd = Images(torch.cat([sgd.pixels_NHWC, evolution.pixels_NHWC]), torch.cat([sgd.labels_N, evolution.labels_N]))
    mean_C, std_C = _colours(sgd)
    return Splits(sgd, evolution, validation, dataset.test, dataset.classes, mean_C, std_C)


def _only(dataset: Dataset, classes: str) -> Dataset:
    """Keep only the given classes, with labels in the given order. Raises InputError for an unknown class."""
    if classes == "all":
        return dataset
    names = tuple(name.strip() for name in classes.split(","))
    for name in names:
        if name not in dataset.classes:
            raise InputError(f"data.classes ({classes}): no class {name!r}: there are {shortened(dataset.classes)}")
    if len(set(names)) < max(2, len(names)):
        raise InputError(f"data.classes ({classes}): two or more different classes, or all")
    label_C = torch.full((len(dataset.classes),), -1)
    for label, name in enumerate(names):
        label_C[dataset.classes.index(name)] = label

    def part(images: Images) -> Images:
        label_N = label_C[images.labels_N]
        return Images(images.pixels_NHWC[label_N >= 0], label_N[label_N >= 0])

    return Dataset(part(dataset.train), part(dataset.test), names)


def _colours(images: Images) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Return the mean and standard deviation of each colour, of pixels in [0, 1], computed exactly from counts."""
    value_V = np.arange(256) / 255
    means, stds = [], []
    for colour in range(3):
        count_V = torch.bincount(images.pixels_NHWC[..., colour].flatten(), minlength=256).numpy()
        means.append(float(count_V @ value_V / count_V.sum()))
        stds.append(float(np.sqrt(count_V @ (value_V - means[-1]) ** 2 / (count_V.sum() - 1))))
    if min(stds) == 0:
        raise InputError("data: a colour has one value in all SGD images: there is nothing to learn from")
    return tuple(means), tuple(stds)


def _split_sizes(config: Data, available: int) -> dict[str, int]:
    tenth = available // 10
    sizes = {"evolution": config.evolution_images or tenth, "validation": config.validation_images or tenth}
    # By default the sgd split has 80 %, or what the others leave of it.
    rest = available - sum(sizes.values())
    sizes["sgd"] = config.sgd_images or max(0, min(available - 2 * tenth, rest))
    if sum(sizes.values()) > available or min(sizes.values()) == 0:
        given = {name: size for name, size in sizes.items() if size}  # the sgd split may be left nothing
        wanted = " + ".join(f"data.{name}_images ({size})" for name, size in given.items())
        wanted += "" if sizes["sgd"] else " and an SGD split"
        raise InputError(f"{wanted} do not fit the {available} training images of {config.root or config.name}")
    return sizes


def _stratified_order(labels_N: NDArray[np.int64], seed: int) -> NDArray[np.int64]:
    """Return an order of all images in which every stretch has the classes in proportion, to within one image per
    class: image r of a shuffled class of c images is placed at (r + 1/2) / c."""
    shuffled_N = permutation(len(labels_N), seed, 0)
    place_N = np.empty(len(labels_N))
    for label in np.unique(labels_N):
        members = shuffled_N[labels_N[shuffled_N] == label]
        place_N[members] = (np.arange(len(members)) + 0.5) / len(members)
    return shuffled_N[np.argsort(place_N[shuffled_N], kind="stable")]


def _images(pixels: NDArray[np.uint8], labels: NDArray[np.int64], side: int) -> Images:
    if pixels.shape[1] != side:
        pixels = np.stack([resized(Image.fromarray(image), side) for image in pixels])
    return Images(torch.from_numpy(np.ascontiguousarray(pixels)), torch.from_numpy(labels.astype(np.int64)))


def _digits(config: Data, note: Note) -> Dataset:
    """Load scikit-learn's 1,797 digits of 8x8 pixels, enlarged four times. A fixed fifth is the test part."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    small_NHW = np.round(digits.images * (255 / 16)).astype(np.uint8)
    pixels_NHWC = np.repeat(np.kron(small_NHW, np.ones((1, 4, 4), np.uint8))[..., None], 3, axis=3)
    order_N = _stratified_order(digits.target, seed=0)
    test_N, train_N = np.split(order_N, [len(order_N) // 5])
    classes = tuple(str(name) for name in digits.target_names)
    return Dataset(
        _images(pixels_NHWC[train_N], digits.target[train_N], config.image_size),
        _images(pixels_NHWC[test_N], digits.target[test_N], config.image_size),
        classes,
    )


def _torchvision(config: Data, note: Note) -> Dataset:
    """Load CIFAR-10, or Fashion-MNIST padded to 32x32 and converted from grey to RGB, through torchvision. It verifies
    the checksums of downloads, and those of CIFAR-10's files at each load."""
    import torchvision

    kind = {"cifar10": torchvision.datasets.CIFAR10, "fashion-mnist": torchvision.datasets.FashionMNIST}[config.name]
    root = Path(config.root or Path("data") / config.name).expanduser()
    parts = []
    for train in (True, False):
        try:
            part = kind(str(root), train=train, download=config.download)
        except LOAD_ERRORS as error:
            trouble = _trouble(error, _published(kind, root), config.download)
            raise InputError(f"data.root {root}: {config.name} {trouble}") from None
        pixels, labels = np.asarray(part.data), np.asarray(part.targets)
        if pixels.ndim == 3:
            pixels = np.repeat(np.pad(pixels, ((0, 0), (2, 2), (2, 2)))[..., None], 3, axis=3)
        strange = set(labels.tolist()) - set(range(len(part.classes)))
        if pixels.shape != (len(labels), 32, 32, 3) or strange:
            raise InputError(f"data.root {root}: {config.name} is corrupt: images, labels and classes do not match")
        parts.append(_images(pixels, labels, config.image_size))
    return Dataset(parts[0], parts[1], tuple(part.classes))


def _published(kind: Any, root: Path) -> dict[Path, str | None]:
    """Return the files of a data set with their MD5, or None if no MD5 is published."""
    if hasattr(kind, "resources"):  # Fashion-MNIST: only its archives have checksums
        return {root / kind.__name__ / "raw" / Path(name).stem: None for name, _ in kind.resources}
    checksums = [*kind.train_list, *kind.test_list, (kind.meta["filename"], kind.meta["md5"])]
    return {root / kind.base_folder / name: md5 for name, md5 in checksums}


def _trouble(error: Exception, published: dict[Path, str | None], download: bool) -> str:
    """Say what is wrong with a data set: torchvision's error is the same for missing and for damaged files."""
    from torchvision.datasets.utils import check_integrity

    reason = str(error).strip() or type(error).__name__
    missing = [path for path in published if not path.is_file()]
    if missing and isinstance(error, (OSError, HTTPException, RuntimeError)):
        if download:
            return f"is not there, and could not be downloaded ({reason}): put {missing[0]} there"
        return f"is not there (data.download is off): no {missing[0]}"
    if isinstance(error, PermissionError):
        return f"cannot be read: {reason}"
    damaged = [path for path, md5 in published.items() if md5 and not check_integrity(path, md5)]
    if not damaged:
        return f"is corrupt: {reason} (delete it to download it again)"
    again = f", and could not be downloaded again: {reason}" if download else ""
    return f"is corrupt: {damaged[0]} does not have the published MD5{again}"


def _folder(config: Data, note: Note) -> Dataset:
    """Load the images train/<class>/* and test/<class>/* of a folder."""
    train, test, classes = read_folder(Path(str(config.root)), config.image_size, note)
    return Dataset(_images(*train, config.image_size), _images(*test, config.image_size), classes)


LOADERS: dict[str, Callable[[Data, Note], Dataset]] = {
    "cifar10": _torchvision,
    "fashion-mnist": _torchvision,
    "digits": _digits,
    "folder": _folder,
}
