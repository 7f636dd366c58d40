"""Replay of descendants and updates from the journal, compared with NumPy, and its errors."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from whole_runs import change, run_here, thresholds_of

from spartan_ray.engine.flat import FlatModel
from spartan_ray.errors import InputError
from spartan_ray.noise.contract import noise
from spartan_ray.run.checkpoint import prune
from spartan_ray.run.config import Config
from spartan_ray.run.journal import read_journal
from spartan_ray.run.loading import dump_config, load_config
from spartan_ray.run.replay import Replay
from spartan_ray.vision.config import Parent
from spartan_ray.vision.models import initial_model


@pytest.fixture
def folder(small_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_run, tmp_path / "run"))


def flat(path: Path) -> FlatModel:
    model = FlatModel(initial_model(Parent(model="convnet"), 10, 9)[0], torch.device("cpu"))
    model.module.load_state_dict(load_file(path))
    return model


def test_a_descendant_is_its_parent_and_its_noise(folder: Path) -> None:
    """The parent before generation 4 is the network of the checkpoint of epoch 3."""
    replay = Replay(folder, lambda note: None)
    thresholds = thresholds_of(replay)
    recorded, scored = replay.descendant(4, 11, folder / "descendant.safetensors")
    assert recorded == scored
    assert thresholds == [-math.inf]  # es has no early rejection
    parent = flat(folder / "checkpoints" / "epoch-000003.safetensors")
    journal = read_journal(folder / "journal" / "000004.npz")
    assert recorded == journal["fitness"][11]
    theta_D = parent.theta_D.numpy()
    noise_D = noise("uniform", int(journal["seed"][11]), 0, len(theta_D))
    expected_D = theta_D + np.float32(0.01) * noise_D
    assert flat(folder / "descendant.safetensors").theta_D.numpy().tobytes() == expected_D.tobytes()


def test_a_member_that_lost_a_race_is_scored_on_what_it_was_scored_on(local_ray: None, small_config: Config) -> None:
    evolution = {"strategy": "random-gradients", "racing": 2, "gradient_images": 64, "low": -1.0, "lr": 0.1}
    run, _ = run_here(change(small_config, run={"epochs": 2}, evolution=evolution))
    journal = read_journal(run / "journal" / "000002.npz")
    assert sorted(journal["images"]) == [16] * 8 + [32] * 4 + [64] * 4
    replay = Replay(run, lambda note: None)
    for images in (16, 32, 64):
        member = int(np.flatnonzero(journal["images"] == images)[0])
        recorded, scored = replay.descendant(2, member, run / "descendant.safetensors")
        assert recorded == scored == journal["fitness"][member]
    assert replay.verify(2)


def test_every_update_agrees_unless_the_journal_was_changed(folder: Path) -> None:
    said: list[str] = []
    replay = Replay(folder, said.append)
    assert [replay.verify(generation) for generation in (2, 4)] == [True, True]
    assert said == [f"generation {g}: 16 of 16 members have weight; agrees" for g in (2, 4)]
    path = folder / "journal" / "000004.npz"
    journal = read_journal(path)
    journal["weight"][3] *= 1.001
    np.savez(path, allow_pickle=False, **journal)
    assert replay.verify(4) is False
    assert said[-1].endswith("DIFFERS from the recorded parent")


def test_what_cannot_be_replayed_is_said(folder: Path, tmp_path: Path) -> None:
    replay = Replay(folder, lambda note: None)
    with pytest.raises(InputError, match=r"--generation 3: .* has 2, 4"):
        replay.verify(3)
    with pytest.raises(InputError, match="--member 16: generation 2 has the members 0 to 15"):
        replay.descendant(2, 16, tmp_path / "x.safetensors")
    shutil.copy(folder / "journal" / "000002.npz", folder / "journal" / "000004.npz")
    with pytest.raises(InputError, match="the journal of another parent"):
        replay.verify(4)
    shutil.rmtree(folder / "journal")
    with pytest.raises(InputError, match=r"000002\.npz: not readable as a journal"):
        replay.verify(2)
    shutil.rmtree(folder / "checkpoints")
    with pytest.raises(InputError, match="has had no evolve phase"):
        Replay(folder, lambda note: None)


def test_without_the_parents_there_is_no_replay(folder: Path) -> None:
    prune(folder / "checkpoints", 4, 2, lambda epoch: False)
    with pytest.raises(
        InputError, match=r"the parent before generation 2 is missing: .*epoch-000001\.sha256: not readable"
    ):
        Replay(folder, lambda note: None).verify(2)
    config = change(load_config(str(folder)), run={"keep_parents": False})
    (folder / "config.yaml").write_text(dump_config(config))
    replay = Replay(folder, lambda note: None)
    with pytest.raises(
        InputError, match=r"before generation 2 was not kept \(run\.keep_parents is false; .*epochs 3, 4\)"
    ):
        replay.verify(2)
    assert replay.verify(4)


def test_other_images_are_noticed(folder: Path) -> None:
    config = change(load_config(str(folder)), data={"sgd_images": 100})
    (folder / "config.yaml").write_text(dump_config(config))
    with pytest.raises(InputError, match=r"data\.root: the images are not those that the run had"):
        Replay(folder, lambda note: None).verify(2)
