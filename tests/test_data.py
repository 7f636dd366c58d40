"""Tests of splits, data sets, and the messages about data that cannot be used."""

from __future__ import annotations

import hashlib
import pickle
import re
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
import torchvision
from hypothesis import given
from hypothesis import strategies as st

from spartan_ray.engine.draws import permutation
from spartan_ray.errors import InputError
from spartan_ray.vision import data
from spartan_ray.vision.config import Data
from spartan_ray.vision.data import Images, load_splits


def keys(images: Images) -> set[bytes]:
    return {pixels.numpy().tobytes() for pixels in images.pixels_NHWC}


def folder_config(root: Path, **fields: int | bool) -> Data:
    return Data(name="folder", root=str(root), **fields)  # type: ignore[arg-type]


def test_splits_are_disjoint_and_complete(image_folder: Path) -> None:
    splits = load_splits(folder_config(image_folder, sgd_images=40, evolution_images=10, validation_images=10), 3)
    parts = [keys(part) for part in (splits.sgd, splits.evolution, splits.validation, splits.test)]
    assert [len(part) for part in parts] == [40, 10, 10, 12]
    assert len(set.union(*parts)) == 72
    assert splits.classes == ("cat", "dog")


@given(
    st.lists(st.integers(20, 80), min_size=2, max_size=6),
    st.tuples(st.floats(0.2, 0.6), st.floats(0.05, 0.2), st.floats(0.05, 0.2)),
    st.integers(0, 100),
)
def test_every_stretch_of_the_order_is_stratified(counts: list[int], shares: tuple[float, ...], seed: int) -> None:
    labels = np.repeat(np.arange(len(counts)), counts)
    order = data._stratified_order(labels, seed)
    assert sorted(order) == list(range(len(labels)))
    start = 0
    for share in shares:
        stop = start + int(share * len(labels))
        expected = (stop - start) / len(labels) * np.array(counts)
        found = np.bincount(labels[order[start:stop]], minlength=len(counts))
        assert np.abs(found - expected).max() <= 2
        start = stop


def test_splits_are_a_function_of_the_seed_and_sgd_s_size_leaves_the_others() -> None:
    first = load_splits(Data(name="digits"), 1)
    again = load_splits(Data(name="digits", sgd_images=100), 1)
    other = load_splits(Data(name="digits"), 2)
    assert torch.equal(first.evolution.pixels_NHWC, again.evolution.pixels_NHWC)
    assert torch.equal(first.sgd.pixels_NHWC[:100], again.sgd.pixels_NHWC)
    assert not torch.equal(first.evolution.pixels_NHWC, other.evolution.pixels_NHWC)
    assert torch.equal(first.test.pixels_NHWC, other.test.pixels_NHWC)


def test_sgd_on_evolution_adds_exactly_that_split(image_folder: Path) -> None:
    apart = load_splits(folder_config(image_folder), 0)
    both = load_splits(folder_config(image_folder, sgd_on_evolution=True), 0)
    assert keys(both.sgd) == keys(apart.sgd) | keys(apart.evolution)
    assert keys(both.validation) == keys(apart.validation)


def test_permutation_is_pinned() -> None:
    """The order is part of the guarantee of equal bits. If it changes, every run changes."""
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, 1, 2**33 + 5).tolist() == [7, 0, 2, 6, 3, 1, 5, 4]
    assert sorted(permutation(1000, 5, 7)) == list(range(1000))
    assert permutation(1000, 5, 7).tolist() != permutation(1000, 5, 8).tolist()


def test_what_cannot_be_used_is_named(image_folder: Path, tmp_path: Path) -> None:
    cases: list[tuple[Data, str]] = [
        (folder_config(tmp_path / "nowhere"), f"{tmp_path}/nowhere: no such folder"),
        (folder_config(tmp_path), "train: no such folder"),
        (folder_config(image_folder, sgd_images=100), r"data.sgd_images \(100\) do not fit the 60 training images"),
        (
            folder_config(image_folder, evolution_images=60),
            r"\(60\) \+ .*\(6\) and an SGD split do not fit the 60 training",
        ),
        (folder_config(image_folder, evolution_images=1), "too few training images .* evolution split of 1"),
    ]
    for config, message in cases:
        with pytest.raises(InputError, match=message):
            load_splits(config, 0)


def test_normalisation_is_numpy_s_mean_and_std_of_the_sgd_images() -> None:
    splits = load_splits(Data(name="digits"), 0)
    pixels = splits.sgd.pixels_NHWC.numpy().reshape(-1, 3) / 255
    np.testing.assert_allclose(splits.mean_C, pixels.mean(0), rtol=1e-12)
    np.testing.assert_allclose(splits.std_C, pixels.std(0, ddof=1), rtol=1e-12)
    black = Images(torch.zeros_like(splits.sgd.pixels_NHWC), splits.sgd.labels_N)
    with pytest.raises(InputError, match="one value"):
        data._colours(black)


@pytest.fixture
def cifar10(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a small CIFAR-10 with torchvision's format and checksums, and make downloads fail."""
    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    random = np.random.default_rng(0)
    lists: dict[str, list[list[str]]] = {"train_list": [], "test_list": []}
    for attribute, names in (("train_list", ["data_batch_1", "data_batch_2"]), ("test_list", ["test_batch"])):
        for name in names:
            batch = {
                "data": random.integers(0, 256, (100, 3072), dtype=np.uint8),
                "labels": [i % 10 for i in range(100)],
            }
            content = pickle.dumps(batch)
            (folder / name).write_bytes(content)
            lists[attribute].append([name, hashlib.md5(content).hexdigest()])
    meta = pickle.dumps({"label_names": [f"class{i}" for i in range(10)]})
    (folder / "batches.meta").write_bytes(meta)
    for attribute, value in lists.items():
        monkeypatch.setattr(kind, attribute, value)
    monkeypatch.setattr(kind, "meta", kind.meta | {"md5": hashlib.md5(meta).hexdigest()})
    monkeypatch.setattr(kind, "url", (tmp_path / "no-network" / kind.filename).as_uri())
    return folder


@pytest.fixture
def fashion_mnist(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Make a small Fashion-MNIST, and make downloads fail."""
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 200), ("t10k", 50)):
        write_idx(raw / f"{part}-images-idx3-ubyte", np.full((count, 28, 28), 9, np.uint8))
        write_idx(raw / f"{part}-labels-idx1-ubyte", np.arange(count, dtype=np.uint8) % 10)
    monkeypatch.setattr(torchvision.datasets.FashionMNIST, "mirrors", [(tmp_path / "no-network").as_uri() + "/"])
    return raw


def write_idx(path: Path, array: np.ndarray) -> None:
    header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
    path.write_bytes(header + array.tobytes())


@pytest.mark.parametrize("download", [False, True])
def test_cifar10_is_read_from_verified_files(cifar10: Path, download: bool) -> None:
    splits = load_splits(Data(name="cifar10", root=str(cifar10.parent), download=download), 0)
    assert (len(splits.sgd), len(splits.evolution), len(splits.test)) == (160, 20, 100)
    assert splits.sgd.pixels_NHWC.shape == (160, 32, 32, 3)


def test_fashion_mnist_is_padded_to_32(fashion_mnist: Path) -> None:
    splits = load_splits(Data(name="fashion-mnist", root=str(fashion_mnist.parents[1]), download=False), 0)
    image = splits.sgd.pixels_NHWC[0]
    assert image.shape == (32, 32, 3)
    assert (image[2:30, 2:30] == 9).all()
    assert image.sum() == 28 * 28 * 3 * 9


@pytest.mark.parametrize(
    ("download", "trouble"),
    [
        (False, r" \(data.download is off\): no {path}"),
        (True, r", and could not be downloaded \(.*urlopen error.*\): put {path} there"),
    ],
)
def test_a_data_set_that_is_not_there_is_not_called_corrupt(
    cifar10: Path, fashion_mnist: Path, download: bool, trouble: str
) -> None:
    root = cifar10.parent
    for config, path in (
        (Data(name="cifar10", root=str(root), download=download), cifar10 / "data_batch_2"),
        (Data(name="fashion-mnist", root=str(root), download=download), fashion_mnist / "t10k-labels-idx1-ubyte"),
    ):
        path.unlink()
        expected = f"^data.root {root}: {config.name} is not there{trouble.format(path=re.escape(str(path)))}"
        with pytest.raises(InputError, match=expected):
            load_splits(config, 0)


def test_a_damaged_data_set_is_not_called_missing(cifar10: Path, fashion_mnist: Path) -> None:
    root = str(cifar10.parent)
    (cifar10 / "data_batch_2").write_bytes(b"damaged")
    corrupt = f"cifar10 is corrupt: {re.escape(str(cifar10))}/data_batch_2 does not have the published MD5"
    with pytest.raises(InputError, match=f"{corrupt}$"):
        load_splits(Data(name="cifar10", root=root, download=False), 0)
    with pytest.raises(InputError, match=f"{corrupt}, and could not be downloaded again: .*urlopen error"):
        load_splits(Data(name="cifar10", root=root), 0)
    images = fashion_mnist / "train-images-idx3-ubyte"
    images.write_bytes(images.read_bytes()[:-1])
    with pytest.raises(InputError, match=r"fashion-mnist is corrupt: .*delete it to download it again"):
        load_splits(Data(name="fashion-mnist", root=root), 0)


@pytest.mark.parametrize(
    ("file", "array"),
    [
        ("labels-idx1", np.arange(199, dtype=np.uint8) % 10),
        ("labels-idx1", np.arange(200, dtype=np.uint8) % 11),
        ("images-idx3", np.zeros((200, 27, 28), np.uint8)),
    ],
    ids=["a label less", "a label too high", "another size"],
)
def test_images_and_labels_that_do_not_match_are_refused(fashion_mnist: Path, file: str, array: np.ndarray) -> None:
    """Fashion-MNIST's unpacked files have no checksums."""
    write_idx(fashion_mnist / f"train-{file}-ubyte", array)
    with pytest.raises(InputError, match="fashion-mnist is corrupt: images, labels and classes do not match"):
        load_splits(Data(name="fashion-mnist", root=str(fashion_mnist.parents[1]), download=False), 0)


def test_only_some_classes_in_their_order() -> None:
    whole, part = (load_splits(Data(name="digits", classes=classes), 0) for classes in ("all", "7,1, 4"))
    assert part.classes == ("7", "1", "4")
    for label, digit in enumerate((7, 1, 4)):
        mine, all_of_it = part.test.labels_N == label, whole.test.labels_N == digit
        assert torch.equal(part.test.pixels_NHWC[mine], whole.test.pixels_NHWC[all_of_it])
    names = ("sgd", "evolution", "validation", "test")
    of_digits = sum(int(torch.isin(getattr(whole, name).labels_N, torch.tensor([7, 1, 4])).sum()) for name in names)
    assert sum(len(getattr(part, name)) for name in names) >= 0.99 * of_digits


@pytest.mark.parametrize(
    ("classes", "wrong"), [("1,x", "no class 'x': there are 0, 1"), ("3", "two or"), ("3,3", "two")]
)
def test_classes_that_are_not_there_are_named(classes: str, wrong: str) -> None:
    with pytest.raises(InputError, match=f"data.classes \\({classes}\\): {wrong}"):
        load_splits(Data(name="digits", classes=classes), 0)


def test_digits_keep_their_pixels() -> None:
    splits = load_splits(Data(name="digits"), 0)
    assert sum(len(part) for part in (splits.sgd, splits.evolution, splits.validation)) + len(splits.test) == 1797
    assert int(splits.sgd.pixels_NHWC.max()) == 255
    blocks = splits.sgd.pixels_NHWC.reshape(-1, 8, 4, 8, 4, 3)
    assert (blocks == blocks[:, :, :1, :, :1]).all()
