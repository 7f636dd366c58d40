"""Torn, changed, fuzzed and hostile files are never used without a message, and never executed."""

from __future__ import annotations

import hashlib
import io
import json
import os
import pickle
import random
import resource
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from whole_runs import parse_config

from spartan_ray.engine.moments import load_optimizer, optimizer_state
from spartan_ray.engine.strategies.requests import Outcome, noisy
from spartan_ray.errors import InputError, RunError
from spartan_ray.report.reading import read_run
from spartan_ray.report.tables import evolve_table, final_table
from spartan_ray.run.checkpoint import (
    Checkpoint,
    CheckpointError,
    Loop,
    MetricsState,
    epochs_kept,
    latest_checkpoint,
    load_checkpoint,
    load_network,
    prune,
    save_checkpoint,
)
from spartan_ray.run.config import Config, Run
from spartan_ray.run.files import write_whole
from spartan_ray.run.journal import read_journal, write_journal
from spartan_ray.run.loading import differences, load_config, load_run_config
from spartan_ray.run.place import lock_folder, make_run_folder
from spartan_ray.run.record import RunFolder
from spartan_ray.run.replay import Replay
from spartan_ray.vision.config import Data, Parent
from spartan_ray.vision.data import load_splits
from spartan_ray.vision.models import initial_model

pytestmark = pytest.mark.faults
HEALTH = (HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.filter_too_much)


def checkpoint(epoch: int, metrics: MetricsState) -> Checkpoint:
    random = torch.Generator().manual_seed(epoch)
    tensors = {
        "network": {"weight": torch.randn(7, 5, generator=random), "count": torch.tensor(epoch)},
        "optimizer": {"0.exp_avg": torch.randn(7, 5, generator=random)},
        "evolution": {"0.momentum_buffer": torch.randn(40, generator=random)},
        "average": {"theta": torch.randn(40, generator=random)},
    }
    loop = Loop(
        epoch=epoch, generation=0, steps=9, device="cpu", data="", optimizers={}, metrics=metrics, config=Config()
    )
    return Checkpoint(tensors, loop)


def evolve_row(epoch: int) -> dict[str, Any]:
    numbers = dict.fromkeys(
        ("train_loss", "evolution_loss", "evolution_accuracy", "validation_loss", "validation_accuracy", "test_loss",
         "test_accuracy", "seconds", "evaluation_seconds", "images_per_second", "fitness_min", "fitness_mean",
         "fitness_max", "fitness_std", "parent_fitness_before", "parent_fitness_after", "step_ratio", "scoring_seconds",
         "update_seconds"), 0.5,
    )  # fmt: skip
    counts = {"population": 9, "fitness_images": 5, "retries": 0, "accepted_members": 1}
    return numbers | counts | {"epoch": epoch, "kind": "evolve", "accepted": True, "note": None, "chosen_member": None}


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a run folder with three checkpoints, a record and a journal."""
    path = make_run_folder(tmp_path, "run")
    folder = RunFolder.create(path, Config(run=Run(out=str(tmp_path))), {"driver": {"device": "cpu"}})
    for epoch in (1, 2, 3):
        folder.append(evolve_row(epoch))
        save_checkpoint(folder.path / "checkpoints", checkpoint(epoch, folder.metrics_state()))
    seed_K = np.arange(9, dtype=np.uint64)
    numbers_K = np.linspace(-1, 1, 9)
    outcome = Outcome(noisy(seed_K, 0.0, 0.01), numbers_K, np.full(9, 5), numbers_K, -1.0, -0.5)
    write_journal(folder.path / "journal", 3, outcome, "a" * 64, "b" * 64)
    folder.close()
    return folder.path


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_used(run: Path) -> None:
    """Each file is truncated at 10 places, and has one bit flipped at 20 random places."""
    chance = random.Random(0)
    files = sorted((run / "checkpoints").glob("epoch-000003*"))
    assert len(files) == 6
    for path in files:
        content = path.read_bytes()
        damaged = [content[: len(content) * part // 10] for part in range(10)]
        damaged += [flipped(content, chance.randrange(8 * len(content))) for _ in range(20)]
        for wrong in damaged:
            path.write_bytes(wrong)
            with pytest.raises(CheckpointError, match=path.name):
                load_checkpoint(run / "checkpoints", 3)
            warnings: list[str] = []
            found, metrics = latest_checkpoint(run, warnings.append)
            assert (found.epoch, metrics.count(b"\n")) == (2, 2)
            assert [path.name in warning for warning in warnings] == [True]
        path.unlink()
        assert latest_checkpoint(run, lambda warning: None)[0].epoch == 2
        path.write_bytes(content)
    assert latest_checkpoint(run, lambda warning: None)[0].epoch == 3


def test_a_record_that_is_not_the_checkpoint_s_is_not_used(run: Path) -> None:
    metrics = run / "metrics.jsonl"
    lines = metrics.read_bytes().splitlines(keepends=True)
    warnings: list[str] = []
    metrics.write_bytes(b"".join(lines[:2]) + lines[2].replace(b"0.5", b"0.6", 1))
    assert latest_checkpoint(run, warnings.append)[0].epoch == 2
    metrics.write_bytes(b"".join(lines) + b'{"epoch": 4, "ki')  # a torn line after the checkpoint is cut off
    assert latest_checkpoint(run, warnings.append)[1] == b"".join(lines)
    metrics.unlink()
    with pytest.raises(InputError, match=f"{run}: no intact checkpoint to go on from"):
        latest_checkpoint(run, warnings.append)
    assert len(warnings) == 1 + 3


def test_checkpoints_are_pruned_but_for_what_replay_needs(run: Path) -> None:
    folder = run / "checkpoints"
    prune(folder, 3, 1, lambda epoch: epoch == 2)
    assert epochs_kept(folder) == [2, 3]
    assert load_checkpoint(folder, 2, ("network", "evolution")).epoch == 2
    with pytest.raises(CheckpointError, match=r"epoch-000002\.optimizer\.safetensors: not readable"):
        load_checkpoint(folder, 2)
    assert not list(folder.glob("epoch-000001*"))
    prune(folder, 2, 1, lambda epoch: True)  # later checkpoints are left over from before a resume
    assert epochs_kept(folder) == [2]


@pytest.mark.parametrize("kind", ["sgd", "adam"])
def test_an_optimizer_goes_on_as_if_it_had_never_stopped(kind: str) -> None:
    """The state has the same values and the same memory layout, here channels-last."""

    def start() -> tuple[torch.Tensor, torch.optim.Optimizer]:
        weight = torch.linspace(-1, 1, 4 * 3 * 3 * 3).view(4, 3, 3, 3).permute(0, 3, 1, 2).requires_grad_()
        make = torch.optim.Adam if kind == "adam" else lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9)
        return weight, make([weight])

    def step(weight: torch.Tensor, optimizer: torch.optim.Optimizer, count: int) -> None:
        for number in range(count):
            weight.grad = torch.empty_like(weight).copy_(weight.detach() ** 2 + number)
            optimizer.step()

    weight, optimizer = start()
    step(weight, optimizer, 3)
    other, resumed = start()
    with torch.no_grad():
        other.copy_(weight)
    optimizer.param_groups[0]["lr"] = 0.07  # as a schedule sets it
    tensors, rest = optimizer_state(optimizer)
    rest = json.loads(json.dumps(rest))
    load_optimizer(resumed, {name: value.clone() for name, value in tensors.items()}, rest)
    assert resumed.param_groups[0]["lr"] == 0.07
    state, again = optimizer.state[weight], resumed.state[other]
    assert all(again[name].stride() == state[name].stride() for name in state)
    step(weight, optimizer, 3)
    step(other, resumed, 3)
    assert torch.equal(weight, other)


def test_a_write_that_fails_leaves_the_file_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_whole(path, b"before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
    try:
        with pytest.raises(RunError, match=f"{path}: cannot be written: File too large"):
            write_whole(path, b"after" * 1000)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert path.read_bytes() == b"before"
    assert list(tmp_path.iterdir()) == [path]
    # The new file replaces the old one atomically. A reader that has the old one open can read it to its end.
    with open(path, "rb") as old:
        write_whole(path, b"after")
        assert old.read() == b"before"
    assert path.read_bytes() == b"after"


def test_a_checkpoint_with_right_checksums_and_wrong_content_is_refused(run: Path) -> None:
    """An attacker or another version could write these files."""
    path = run / "checkpoints" / "epoch-000003.json"
    checksums = path.with_suffix(".sha256")
    whole, sums = path.read_bytes(), checksums.read_text()
    changes: list[Callable[[Any], Any]] = [
        lambda loop: loop.pop("optimizers"),
        lambda loop: loop.pop("metrics"),
        lambda loop: loop.update(steps="nine"),
        lambda loop: loop["config"].update(evolution=5),
        lambda loop: loop.update(epoch=2),
    ]
    contents = [b"{", b"[" * 100_000, b"5"]
    for change_it in changes:
        loop = json.loads(whole)
        change_it(loop)
        contents.append(json.dumps(loop).encode())
    for content in contents:
        path.write_bytes(content)
        checksums.write_text(sums.replace(hashlib.sha256(whole).hexdigest(), hashlib.sha256(content).hexdigest()))
        with pytest.raises(CheckpointError, match=r"epoch-000003.json: (of epoch 2|not a checkpoint of this version)"):
            load_checkpoint(run / "checkpoints", 3)
    found = latest_checkpoint(run, lambda warning: None)[0]
    with pytest.raises(InputError, match="the checkpoint of epoch 2 is of another network"):
        load_network(torch.nn.Linear(2, 2), found)
    optimizer = torch.optim.Adam([torch.zeros(3, 3)])
    rest = optimizer_state(optimizer)[1]
    for name in ("7.exp_avg", "x", "0.exp_avg"):
        with pytest.raises(InputError, match="of another optimizer"):
            load_optimizer(optimizer, {name: torch.zeros(2)}, rest)
    with pytest.raises(InputError, match="of another optimizer"):
        load_optimizer(optimizer, {}, rest | {"param_groups": []})


def test_a_run_folder_does_not_say_which_ray_gets_the_token(run: Path) -> None:
    path = run / "config.yaml"
    path.write_text(path.read_text().replace("address: null", "address: ray://203.0.113.1:10001"))
    assert "203.0.113.1" in path.read_text()
    assert load_run_config(run).cluster.address is None
    assert load_config(str(run)).cluster.address is None
    assert load_config(str(path)).cluster.address == "ray://203.0.113.1:10001"  # a file that the user names may set it


def test_a_run_that_is_named_like_a_preset_is_read_itself(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run.rename(run.parent / "sgd")
    monkeypatch.chdir(run.parent)
    assert read_run(Path("sgd")).config.run.name == "run"
    assert load_run_config(Path("sgd")) != load_config("sgd")


def test_a_file_that_is_renamed_while_the_folder_is_looked_through_is_no_fault(
    run: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process that writes a run renames files while another process locks or reads the folder."""
    listed = [*run.rglob("*"), run / "checkpoints" / "epoch-000009.safetensors.tmp"]
    monkeypatch.setattr(Path, "rglob", lambda folder, pattern: iter(listed))
    lock_folder(run).close()
    assert read_run(run).config.run.name == "run"


def test_no_link_leads_out_of_a_run_folder(run: Path, tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("keep me")
    (run / "metrics.jsonl").unlink()
    (run / "metrics.jsonl").symlink_to(tmp_path / "precious")
    with pytest.raises(InputError, match=r"metrics\.jsonl: a link out of the run folder"):
        lock_folder(run)
    with pytest.raises(InputError, match=r"metrics\.jsonl: a link out of the run folder"):
        read_run(run)
    (run / "metrics.jsonl").unlink()
    (run / "checkpoints" / "epoch-000004.json.tmp").symlink_to("../../precious")
    with pytest.raises(InputError, match=r"epoch-000004\.json\.tmp: a link out of the run folder"):
        Replay(run, lambda note: None)
    assert (tmp_path / "precious").read_text() == "keep me"
    (run / "checkpoints" / "epoch-000004.json.tmp").unlink()
    (run / "loop").symlink_to("loop")
    with pytest.raises(InputError, match="loop: neither a file nor a folder"):
        lock_folder(run)
    (run / "loop").unlink()
    os.mkfifo(run / "pipe")
    with pytest.raises(InputError, match="pipe: neither a file nor a folder"):
        read_run(run)
    (run / "pipe").unlink()
    (run / "lock").unlink(missing_ok=True)
    os.link(tmp_path / "precious", run / "lock")
    with pytest.raises(InputError, match="lock: is a hard link to another file"):
        lock_folder(run)
    assert (tmp_path / "precious").read_text() == "keep me"
    with pytest.raises(InputError, match=r"run\.name"):
        load_config(str(write(tmp_path / "escape.yaml", b"run: {name: ../../elsewhere}")))


def write(path: Path, content: bytes) -> Path:
    path.write_bytes(content)
    return path


# Fuzzing: reading any content gives a result or an InputError.

FIELDS = {name: list(type(getattr(Config(), name)).model_fields) for name in Config.model_fields}
SCALARS = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=20), st.just("self"), st.dates(),
    st.sampled_from(["auto", "none", "es", "search", "chain", "1e999", "0x10", "layer4.*"]),
)  # fmt: skip
VALUES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(SCALARS, inner, max_size=3))
SECTIONS = st.fixed_dictionaries(
    {},
    optional={
        name: st.one_of(
            VALUES, st.dictionaries(st.one_of(st.sampled_from(fields), st.text(max_size=5)), VALUES, max_size=4)
        )
        for name, fields in FIELDS.items()
    },
)


def answers(call: Callable[[], Any]) -> bool:
    """Return whether a call returned. If it did not, it must raise an InputError of one line."""
    try:
        call()
    except InputError as error:
        said = str(error)
    else:
        return True
    assert "\n" not in said
    assert len(said) < 2000
    return False


@settings(max_examples=700, suppress_health_check=HEALTH)
@given(SECTIONS | st.dictionaries(SCALARS, VALUES, max_size=3) | VALUES)
def test_a_fuzzed_configuration_is_read_or_refused(tmp_path: Path, sections: Any) -> None:
    path = write(tmp_path / "fuzz.yaml", yaml.safe_dump(sections).encode())
    if answers(lambda: load_config(str(path))):
        config = load_config(str(path))
        assert differences(config, config) == []


@settings(max_examples=300, suppress_health_check=HEALTH)
@given(st.binary(max_size=200) | st.text(max_size=200).map(lambda text: text.encode("utf-8", "surrogatepass")))
def test_fuzzed_bytes_are_no_configuration(tmp_path: Path, content: bytes) -> None:
    answers(lambda: load_config(str(write(tmp_path / "fuzz.yaml", content))))


@pytest.mark.parametrize(
    "content",
    [
        b"[" * 20_000,
        b"run: {epochs: " + b"9" * 5000 + b"}",
        b"run: {name: 2020-13-45}",
        b"a: &a [x, x]\nb: &b [*a, *a]\n" + b"".join(
            b"%c: &%c [*%c, *%c, *%c, *%c]\n" % (c, c, c - 1, c - 1, c - 1, c - 1) for c in range(ord("c"), ord("z"))
        ) + b"run: {name: *y}",
        b"run: {? [1, 2] : 3}",
        b"run: !!python/object/apply:os.system ['true']",
    ],
    ids=["deep", "large", "date", "laughs", "key", "object"],
)  # fmt: skip
def test_a_hostile_configuration_is_refused_in_a_line(tmp_path: Path, content: bytes) -> None:
    assert not answers(lambda: load_config(str(write(tmp_path / "hostile.yaml", content))))


@settings(max_examples=60, suppress_health_check=HEALTH)
@given(
    st.lists(
        st.tuples(st.sampled_from([f"--{s}.{f}" for s in FIELDS for f in FIELDS[s]]), st.text(max_size=8)), max_size=3
    )
)
def test_fuzzed_flags_are_read_or_refused(flags: list[tuple[str, str]]) -> None:
    answers(
        lambda: parse_config(
            [word.replace("_", "-") if word.startswith("--") else word for pair in flags for word in pair]
        )
    )


def test_the_error_of_a_journal_is_short_whatever_numpy_quotes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with zipfile.ZipFile(tmp_path / "000001.npz", "w") as archive:
        archive.writestr("member.npy", b"")

    def quote(*_: Any, **__: Any) -> None:
        raise ValueError("x" * 10_000)

    monkeypatch.setattr(np, "load", quote)
    with pytest.raises(InputError) as caught:
        read_journal(tmp_path / "000001.npz")
    assert len(str(caught.value)) < 1000


@settings(max_examples=300, suppress_health_check=HEALTH)
@given(data=st.data())
def test_fuzzed_files_of_a_run_are_read_or_refused(run: Path, data: st.DataObject) -> None:
    """A few bytes of one file are replaced, removed or inserted."""
    name = data.draw(st.sampled_from(["metrics.jsonl", "environment.json", "config.yaml", "journal/000003.npz"]))
    path = run / name
    whole = path.read_bytes()
    content = whole
    for _ in range(data.draw(st.integers(1, 3))):
        start = data.draw(st.integers(0, len(content)))
        stop = data.draw(st.integers(start, min(len(content), start + 30)))
        content = (
            content[:start]
            + data.draw(st.binary(max_size=12) | st.sampled_from([b"null", b"[]", b"{}", b"-1"]))
            + content[stop:]
        )
    path.write_bytes(content)
    try:
        if name.startswith("journal"):
            answers(lambda: read_journal(path))
        elif answers(lambda: read_run(run)):
            frames = {"x": read_run(run).metrics}
            final_table(frames)
            evolve_table(frames)
    finally:
        path.write_bytes(whole)


# Loading a pickle can run code. The code here would make a folder, which the tests look for.


class Malice:
    """An object that makes a folder when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.marker),)


def hostile_files(folder: Path, marker: Path) -> dict[str, Path]:
    payload = {"weight": Malice(marker)}
    files = {name: folder / name for name in ("raw.pt", "zip.pth", "legacy.pt", "pickle.safetensors")}
    files["raw.pt"].write_bytes(pickle.dumps(payload, protocol=2))
    torch.save(payload, files["zip.pth"])
    torch.save(payload, files["legacy.pt"], _use_new_zipfile_serialization=False)
    files["pickle.safetensors"].write_bytes(pickle.dumps(payload, protocol=2))
    return files


def test_the_payload_would_run(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Malice(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()


def test_a_hostile_weights_file_is_refused_and_does_not_run(tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    for path in hostile_files(tmp_path, marker).values():
        with pytest.raises(InputError, match=r"parent\.weights .*: cannot be read as weights"):
            initial_model(Parent(weights=str(path)), 10, 0)
    assert not marker.exists()


def test_a_hostile_journal_is_refused_and_does_not_run(run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    path = run / "journal" / "000003.npz"
    columns = dict(np.load(path))
    columns["fitness"] = np.array([Malice(marker)] * 9, dtype=object)
    np.savez(path, allow_pickle=True, **columns)
    with zipfile.ZipFile(path) as archive:
        assert b"mkdir" in archive.read("fitness.npy")
    with pytest.raises(InputError, match="not a journal"):
        read_journal(path)
    path.write_bytes(pickle.dumps(Malice(marker)))
    with pytest.raises(InputError, match="not a journal"):
        read_journal(path)
    array = io.BytesIO()
    np.save(array, np.array([Malice(marker)], dtype=object), allow_pickle=True)
    path.write_bytes(array.getvalue())
    with pytest.raises(InputError, match="not a journal"):
        read_journal(path)
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])}
    ended = subprocess.run(
        [sys.executable, "-m", "spartan_ray", "replay", str(run), "--generation", "3", "--member", "0"],
        capture_output=True, text=True, check=False, env=environment, cwd=tmp_path,
    )  # fmt: skip
    assert ended.returncode == 2
    assert len(ended.stderr.splitlines()) == 1
    assert not marker.exists()


def test_a_hostile_checkpoint_and_data_folder_are_refused_and_do_not_run(run: Path, tmp_path: Path) -> None:
    marker = tmp_path / "ran"
    content = pickle.dumps({"weight": Malice(marker)})
    for path in (run / "checkpoints").iterdir():
        path.write_bytes(content)
    with pytest.raises(InputError, match="no intact checkpoint"):
        latest_checkpoint(run, lambda warning: None)
    batches = tmp_path / "cifar" / "cifar-10-batches-py"
    batches.mkdir(parents=True)
    for name in (
        "data_batch_1",
        "data_batch_2",
        "data_batch_3",
        "data_batch_4",
        "data_batch_5",
        "test_batch",
        "batches.meta",
    ):
        (batches / name).write_bytes(content)
    with pytest.raises(InputError, match=r"data\.root .*: cifar10 is corrupt"):
        load_splits(Data(root=str(tmp_path / "cifar"), download=False), 0)
    processed = tmp_path / "fashion" / "FashionMNIST" / "processed"
    processed.mkdir(parents=True)
    for name in ("training.pt", "test.pt"):
        torch.save({"weight": Malice(marker)}, processed / name)
    with pytest.raises(InputError, match=r"data\.root .*: fashion-mnist is corrupt"):
        load_splits(Data(name="fashion-mnist", root=str(tmp_path / "fashion"), download=False), 0)
    assert not marker.exists()


def test_weights_that_are_safe_are_still_read(tmp_path: Path) -> None:
    network = initial_model(Parent(model="convnet"), 10, 1)[0]
    save_file(network.state_dict(), tmp_path / "good.safetensors")
    again, _ = initial_model(Parent(model="convnet", weights=str(tmp_path / "good.safetensors")), 10, 0)
    assert all(
        torch.equal(a, b) for a, b in zip(network.state_dict().values(), again.state_dict().values(), strict=True)
    )
    shutil.rmtree(tmp_path)
