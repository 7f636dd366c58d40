"""Splits, data sets, and what is said of data that cannot be used."""

from __future__ import annotations

import gzip
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

from spartan_ray import data
from spartan_ray.config import Data, InputError
from spartan_ray.data import Images, load_splits, permutation


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
    """The order is part of the promise of equal bits: a change of it is a change of every run."""
    assert permutation(8, 0, 0).tolist() == [0, 2, 1, 5, 4, 3, 6, 7]
    assert permutation(8, 1, 2**33 + 5).tolist() == [7, 0, 2, 6, 3, 1, 5, 4]
    assert sorted(permutation(1000, 5, 7)) == list(range(1000))
    assert permutation(1000, 5, 7).tolist() != permutation(1000, 5, 8).tolist()


def test_what_cannot_be_used_is_named(image_folder: Path, tmp_path: Path) -> None:
    cases: list[tuple[Data, str]] = [
        (folder_config(tmp_path / "nowhere"), f"{tmp_path}/nowhere: no such folder"),
        (folder_config(tmp_path), "train: no such folder"),
        (folder_config(image_folder, sgd_images=100), r"data.sgd_images \(100\) do not fit the 60 training images"),
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


def test_cifar10_is_read_from_verified_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """torchvision's own format and checksums, on files that the test makes."""
    kind = torchvision.datasets.CIFAR10
    folder = tmp_path / kind.base_folder
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
    config = Data(name="cifar10", root=str(tmp_path), download=False)
    splits = load_splits(config, 0)
    assert (len(splits.sgd), len(splits.evolution), len(splits.test)) == (160, 20, 100)
    assert splits.sgd.pixels_NHWC.shape == (160, 32, 32, 3)
    (folder / "data_batch_2").write_bytes(b"damaged")
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: cifar10 is missing or corrupt")):
        load_splits(config, 0)


def test_fashion_mnist_is_padded_to_32(tmp_path: Path) -> None:
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for part, count in (("train", 200), ("t10k", 50)):
        pixels = np.full((count, 28, 28), 9, np.uint8)
        labels = np.arange(count, dtype=np.uint8) % 10
        for name, array in (("images-idx3", pixels), ("labels-idx1", labels)):
            header = struct.pack(">HBB", 0, 8, array.ndim) + struct.pack(f">{array.ndim}I", *array.shape)
            (raw / f"{part}-{name}-ubyte").write_bytes(header + array.tobytes())
            with gzip.open(raw / f"{part}-{name}-ubyte.gz", "wb") as packed:
                packed.write(header + array.tobytes())
    splits = load_splits(Data(name="fashion-mnist", root=str(tmp_path), download=False), 0)
    image = splits.sgd.pixels_NHWC[0]
    assert image.shape == (32, 32, 3)
    assert (image[2:30, 2:30] == 9).all()
    assert image.sum() == 28 * 28 * 3 * 9


def test_a_data_set_that_is_not_there_names_the_path(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"data.root {tmp_path}: cifar10 is missing or corrupt")):
        load_splits(Data(name="cifar10", root=str(tmp_path), download=False), 0)


def test_digits_keep_their_pixels() -> None:
    splits = load_splits(Data(name="digits"), 0)
    assert sum(len(part) for part in (splits.sgd, splits.evolution, splits.validation)) + len(splits.test) == 1797
    assert int(splits.sgd.pixels_NHWC.max()) == 255
    blocks = splits.sgd.pixels_NHWC.reshape(-1, 8, 4, 8, 4, 3)
    assert (blocks == blocks[:, :, :1, :, :1]).all()
