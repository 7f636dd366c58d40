"""Tests of whole runs through the driver: the record, the same bits however a run is executed, and resuming."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
import torchvision
from local import scored
from ray.exceptions import RayTaskError
from safetensors.torch import load_file
from whole_runs import change, metrics, outcome, run_here, same_result, thresholds_of

from spartan_ray.cli.train import begun, is_finished
from spartan_ray.engine.draws import draw_cases
from spartan_ray.engine.flat import FlatModel
from spartan_ray.errors import Diverged, InputError
from spartan_ray.noise.contract import noise
from spartan_ray.report.page import write_report
from spartan_ray.report.reading import read_run, unique_frames
from spartan_ray.report.tables import final_table
from spartan_ray.run import driver
from spartan_ray.run.checkpoint import Checkpoint, latest_checkpoint, save_checkpoint
from spartan_ray.run.config import Config, Run
from spartan_ray.run.journal import read_journal
from spartan_ray.run.loading import differences, load_config, load_run_config
from spartan_ray.run.place import make_run_folder
from spartan_ray.run.record import RunFolder, is_over
from spartan_ray.run.replay import Replay
from spartan_ray.run.supervisor import Supervisor
from spartan_ray.vision.classification import Normaliser, score
from spartan_ray.vision.data import Images, Splits, load_splits
from spartan_ray.vision.models import initial_model


def test_a_run_leaves_a_complete_folder(small_run: Path) -> None:
    folder = small_run
    assert {path.name for path in folder.iterdir()} == {
        "config.yaml",
        "environment.json",
        "metrics.jsonl",
        "journal",
        "checkpoints",
        "lock",
        "tensorboard",
        "final.safetensors",
        "log.txt",
    }
    rows = metrics(folder)
    assert [row["kind"] for row in rows] == ["sgd", "evolve", "sgd", "evolve"]
    everywhere = {"epoch", "kind", "train_loss", "seconds", "images_per_second"}
    everywhere |= {
        f"{split}_{measure}" for split in ("evolution", "validation", "test") for measure in ("loss", "accuracy")
    }
    evolve = {"population", "fitness_images", "fitness_min", "fitness_mean", "fitness_max", "fitness_std", "accepted",
              "parent_fitness_before", "parent_fitness_after", "step_ratio", "scoring_seconds", "update_seconds",
              "broadcast_seconds", "retries", "workers", "images_scored", "chosen_member", "confirm_fitness_before",
              "confirm_fitness_after"}  # fmt: skip
    assert all(everywhere <= row.keys() for row in rows)
    assert evolve <= rows[1].keys()
    assert read_run(folder).metrics.shape[0] == 4
    assert list((folder / "tensorboard").iterdir())
    environment = json.loads((folder / "environment.json").read_text())
    assert [(worker["device"], worker["threads"]) for worker in environment["workers"]] == [
        (f"cpu {torch.backends.cpu.get_cpu_capability()}", 1)
    ] * 2

    # The journal agrees with the record, and the final weights give the test results of the last row.
    journal = read_journal(folder / "journal" / "000004.npz")
    assert journal["fitness"].max() == rows[3]["fitness_max"]
    config = load_config(str(folder / "config.yaml"))
    assert (config.cluster.workers, config.parent.threads) == ("auto", 1)
    splits = load_splits(config.data, 0)
    model = FlatModel(initial_model(config.parent, 10, 9)[0], torch.device("cpu"))
    model.module.load_state_dict(load_file(folder / "final.safetensors"))
    result = score(model.module, splits.test, Normaliser(splits.mean_C, splits.std_C, torch.device("cpu")))
    assert (result.loss, result.accuracy) == (rows[3]["test_loss"], rows[3]["test_accuracy"])


def test_the_update_is_made_again_from_the_journal_with_numpy(small_run: Path) -> None:
    """The parent after generation 2 follows from the parent before it and the journal's seeds, gains and weights."""
    journal = read_journal(small_run / "journal" / "000002.npz")
    config = load_config(str(small_run))
    model = FlatModel(initial_model(config.parent, 10, 0)[0], torch.device("cpu"))
    model.module.load_state_dict(load_file(small_run / "checkpoints" / "epoch-000001.safetensors"))
    before_D = model.theta_D.numpy().astype(np.float64)
    update_D = sum(
        weight * gain * noise("uniform", int(seed), 0, len(before_D)).astype(np.float64)
        for seed, gain, weight in zip(journal["seed"], journal["gain"], journal["weight"], strict=True)
    )
    expected_D = before_D + float(journal["rate"][0]) * float(journal["length"][0]) * update_D
    model.module.load_state_dict(load_file(small_run / "checkpoints" / "epoch-000002.safetensors"))
    np.testing.assert_allclose(model.theta_D.numpy(), expected_D, atol=1e-6)
    row = metrics(small_run)[1]
    # The recorded fitness after the phase is the fitness of the new parent on the generation's images.
    splits = load_splits(config.data, 0)
    image_N = draw_cases({"fitness": 64}, 143, 0, 2)["fitness"]
    images = splits.evolution[torch.from_numpy(image_N)]
    normalise = Normaliser(splits.mean_C, splits.std_C, torch.device("cpu"))
    assert row["parent_fitness_after"] == -scored(model.module, images, normalise).loss
    assert row["parent_fitness_after"] != row["parent_fitness_before"]
    one = float(journal["gain"][0]) * np.linalg.norm(noise("uniform", int(journal["seed"][0]), 0, len(before_D)))
    ratio = np.linalg.norm(expected_D - before_D) / one
    assert abs(row["step_ratio"] / ratio - 1) < 0.02
    shaped = journal["fitness"] - journal["fitness"].mean()
    np.testing.assert_allclose(journal["weight"] / journal["weight"].std(), shaped / shaped.std(), atol=1e-9)


def test_the_same_bits_with_one_worker_and_with_two_and_others_with_another_seed(
    local_ray: None, small_config: Config
) -> None:
    config = change(small_config, evolution={"population": 60}, cluster={"chunk": 1})
    one, _ = run_here(change(config, cluster={"workers": 1}))
    two, _ = run_here(change(config, cluster={"workers": 2, "chunk": 7}))
    assert same_result(one, two)
    assert sum(row.get("retries", 0) for row in metrics(two)) == 0
    other, notes = run_here(change(config, run={"seed": 1}, evolution={"lr": 1.0}))
    assert outcome(other)[0] != outcome(one)[0]
    assert any("the step ratio" in note and "evolution.lr" in note for note in notes)


CHAIN: dict[str, Any] = {
    "strategy": "random-gradients", "accept": "chain", "population": 20, "lr": 0.1, "low": -1.0, "gradient_images": 64,
    "temperature": "error", "fitness_images": 70,
}  # fmt: skip


def test_a_chain_is_the_same_for_every_wave_and_number_of_workers(local_ray: None, small_config: Config) -> None:
    folders = [
        run_here(change(small_config, evolution=CHAIN | {"wave": wave}, cluster={"workers": workers}))[0]
        for wave, workers in ((1, 1), (4, 2), (16, 2))
    ]
    assert len({(folder / "final.safetensors").read_bytes() for folder in folders}) == 1
    assert len({json.dumps(outcome(folder)) for folder in folders}) == 1
    phases = [row for row in metrics(folders[0]) if row["kind"] == "evolve"]
    assert sum(row["accepted_members"] for row in phases) > 2
    assert all(row["parent_fitness_after"] >= row["parent_fitness_before"] for row in phases)
    discarded = [sum(row["images_discarded"] for row in metrics(folder)[1::2]) for folder in folders[:3]]
    assert discarded[0] == 0 < discarded[1] < discarded[2]
    journals = [read_journal(folder / "journal" / "000002.npz") for folder in folders]
    assert all(journal[name].tolist() == journals[0][name].tolist() for journal in journals for name in journal)


@pytest.mark.parametrize(
    ("parent", "evolution"),
    [
        (
            {"optimizer": "adam", "moments_after_evolution": "rescale", "gradient_noise": 0.01},
            {
                "sigma_scale": "relative",
                "optimizer": "adam",
                "step": "ratio",
                "weight_decay": 0.01,
                "sigma_decay": 0.9,
            },
        ),
        (
            {"moments_after_evolution": "reset"},
            {"step": "search", "confirm": True, "batchnorm": "recalibrate", "optimizer": "momentum", "mutate": "?.*"},
        ),
        (
            {},
            CHAIN
            | {"batchnorm": "batch", "gradient_split": "evolution", "mutate": "no-batchnorm", "fitness": "accuracy"},
        ),
    ],
)
def test_options_hold_together_and_a_resumed_run_has_the_bits_of_one_that_was_not_stopped(
    local_ray: None, small_config: Config, tmp_path: Path, parent: dict[str, Any], evolution: dict[str, Any]
) -> None:
    """One run uses one worker. A copy of it, as if it had been lost after an epoch, is resumed with two workers."""
    config = change(
        small_config,
        run={"epochs": 5, "keep": 9},
        data={"sgd_images": 600, "evolution_images": 600},  # several passes, so that members can be rejected early
        parent=parent,
        evolution={"fitness_images": None} | evolution,
        cluster={"workers": 1},
    )
    whole, _ = run_here(config)
    epoch = 0 if evolution.get("accept") == "chain" else 3
    lost = Path(shutil.copytree(whole, tmp_path / "lost"))
    (lost / "final.safetensors").unlink()
    for path in (lost / "checkpoints").glob("*.sha256"):
        if int(path.stem.removeprefix("epoch-")) > epoch:
            path.unlink()
    with open(lost / "metrics.jsonl", "a") as lines:
        lines.write('{"epoch": 6, "kind": "ev')
    again, _ = run_here(change(load_config(str(lost)), cluster={"workers": 2}), folder=lost)
    assert again == lost
    assert same_result(lost, whole)
    environment = json.loads((lost / "environment.json").read_text())
    assert [resumed["epoch"] for resumed in environment["resumed"]] == [epoch]
    assert [len(resumed["workers"]) for resumed in (environment, *environment["resumed"])] == [1, 2]

    replay = Replay(whole, lambda note: None)
    thresholds = thresholds_of(replay)
    assert replay.generations == [2, 4]
    assert all(replay.verify(generation) for generation in replay.generations)
    moved = 0
    for generation in replay.generations:
        journal = read_journal(whole / "journal" / f"{generation:06d}.npz")
        for member in (0, 7, len(journal["member"]) - 1):
            recorded, scored = replay.descendant(generation, member, tmp_path / "descendant.safetensors")
            assert recorded == scored
            # A member of a chain had to beat the fitness of the parent that it descends from.
            taken = np.flatnonzero(journal["weight"][:member]).tolist()
            moved += len(taken)
            bar = journal["fitness"][taken[-1]] if taken else journal["before"]
            assert thresholds.pop() == (bar if evolution.get("accept") == "chain" else -math.inf)
    assert moved  # otherwise the last member of a chain would descend from the first parent
    runs = [read_run(whole)]
    assert (whole / "report" / "report.html") in write_report(runs, whole / "report")


def test_a_run_goes_on_only_with_its_own_images_and_kind_of_device(
    local_ray: None, small_run: Path, tmp_path: Path
) -> None:
    folder = Path(shutil.copytree(small_run, tmp_path / "run"))
    config = load_run_config(folder)
    checkpoint = latest_checkpoint(folder, print)[0]
    for changed, said in (
        ({"data": "other"}, "the images are not those"),
        ({"device": "cuda"}, "the run began on cuda"),
    ):
        loop = checkpoint.loop.model_copy(update=changed)
        save_checkpoint(folder / "checkpoints", Checkpoint(checkpoint.tensors, loop))
        with pytest.raises(InputError, match=said):
            run_here(config, folder)


def test_moments_matter_after_a_phase_that_moved_the_parent(local_ray: None, small_config: Config) -> None:
    config = change(small_config, run={"epochs": 3}, cluster={"workers": 1})
    rows = {
        moments: outcome(run_here(change(config, parent={"optimizer": "adam", "moments_after_evolution": moments}))[0])
        for moments in ("keep", "reset", "rescale")
    }
    assert rows["keep"][:2] == rows["reset"][:2] == rows["rescale"][:2]
    assert len({row[2]["train_loss"] for row in rows.values()}) == 3


def test_a_run_starts_from_torchvision_s_weights_of_a_thousand_classes(
    local_ray: None, small_config: Config, tmp_path: Path
) -> None:
    """The run starts from a ResNet18 state dict in torchvision's format, here with random weights."""
    network = torchvision.models.resnet18()
    assert network.fc.weight.shape == (1000, 512)
    torch.save(network.state_dict(), tmp_path / "resnet18.pth")
    config = change(
        small_config,
        run={"epochs": 2},
        data={"sgd_images": 64, "validation_images": 40},
        parent={"model": "resnet18", "weights": str(tmp_path / "resnet18.pth"), "lr": 1e-12},
        evolution={"population": 4, "lr": 1e-12, "sigma": 1e-6},
    )
    folder, notes = run_here(config)
    assert any("fc.weight: 1000 classes" in note and "10 here: re-initialised" in note for note in notes)
    final = load_file(folder / "final.safetensors")
    assert final["fc.weight"].shape == (10, 512)
    torch.testing.assert_close(final["layer2.0.conv1.weight"], network.layer2[0].conv1.weight.detach())
    assert [row["kind"] for row in metrics(folder)] == ["sgd", "evolve"]
    torchvision.models.resnet18(num_classes=10).load_state_dict(final)


def test_a_run_s_own_configuration_repeats_it(small_run: Path) -> None:
    again, _ = run_here(load_config(str(small_run / "config.yaml")))
    assert again.name == "small-2"
    assert same_result(again, small_run)


def test_strategy_none_is_sgd_alone_and_equals_es_up_to_its_first_phase(small_run: Path, small_config: Config) -> None:
    alone, _ = run_here(change(small_config, evolution={"strategy": "none"}))
    assert [row["kind"] for row in metrics(alone)] == ["sgd"] * 4
    assert not (alone / "journal").exists()
    assert outcome(alone)[0] == outcome(small_run)[0]


def test_every_image_of_a_run_is_scored_alike_and_the_parent_with_it(local_ray: None, small_config: Config) -> None:
    """If a phase does not move the parent, the parent's fitness after it has the same bits as before it."""
    config = change(small_config, evolution={"fitness": "accuracy", "sigma": 1e-12, "lr": 1e-12})
    rows = [row for row in metrics(run_here(config)[0]) if row["kind"] == "evolve"]
    for row in rows:
        assert row["accepted"] is False
        assert row["note"] == "no update: all members have equal fitness"
        assert row["fitness_min"] == row["fitness_max"] == row["parent_fitness_before"] == row["parent_fitness_after"]


def test_a_run_that_diverged_stops_with_the_checkpoint_before_it(local_ray: None, small_config: Config) -> None:
    """The run stops before a phase with only NaN scores. Its log names the epoch, and a report can be written."""
    config = change(small_config, run={"seed": 2**63 - 1}, data={"augment": True}, parent={"lr": 1e30})
    with pytest.raises(Diverged, match=r"the network diverged in epoch 1 \(sgd\): .* parent\.lr \(1e\+30\)") as caught:
        run_here(config)
    folder = Path(config.run.out) / "small"
    assert str(folder / "checkpoints" / "epoch-000000.safetensors") in str(caught.value)
    assert latest_checkpoint(folder, pytest.fail)[0].epoch == 0
    (row,) = metrics(folder)
    assert row["train_loss"] is None
    assert (folder / "log.txt").read_text().splitlines()[-1].endswith(f" Diverged: {caught.value}")
    runs = [read_run(folder)]
    assert final_table(unique_frames(runs))["train loss"].tolist() == ["not finite"]
    page = next(path for path in write_report(runs, folder / "report") if path.suffix == ".html")
    assert "not finite" in page.read_text()
    with pytest.raises(Diverged):  # the resumed run diverges again
        run_here(config, folder)


def test_weights_that_are_not_finite_are_refused(local_ray: None, small_config: Config, tmp_path: Path) -> None:
    network = initial_model(small_config.parent, 10, 0)[0]
    list(network.parameters())[-1].data[3] = math.nan
    torch.save(network.state_dict(), tmp_path / "nan.pt")
    with pytest.raises(InputError, match=r"parent\.weights .*/nan\.pt: 11\.bias is not finite everywhere"):
        run_here(change(small_config, parent={"weights": str(tmp_path / "nan.pt")}))


def test_the_test_split_chooses_nothing(
    local_ray: None, small_run: Path, small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run with permuted test labels gives the same bytes.

    One of the runs moves the parent in every phase, the other makes many choices."""
    choosing = change(
        small_config, evolution={"step": "search", "confirm": True, "accept": "if-better", "fitness_images": None}
    )
    runs = [(small_run, small_config), (run_here(choosing)[0], choosing)]
    assert all(row["accepted"] for row in metrics(small_run)[1::2])

    def permuted(*arguments: Any) -> Splits:
        splits = load_splits(*arguments)
        order_N = torch.randperm(len(splits.test), generator=torch.Generator().manual_seed(0))
        return replace(splits, test=Images(splits.test.pixels_NHWC, splits.test.labels_N[order_N]))

    monkeypatch.setattr(driver, "load_splits", permuted)
    for folder, config in runs:
        other, _ = run_here(config)
        assert (folder / "final.safetensors").read_bytes() == (other / "final.safetensors").read_bytes()
        for row, another in zip(outcome(folder), outcome(other), strict=True):
            differ = {key for key in row if row[key] != another[key]}
            assert {"test_loss"} <= differ <= {"test_loss", "test_accuracy"}


def test_a_run_keeps_its_log_and_its_time(small_run: Path) -> None:
    lines = (small_run / "log.txt").read_text().splitlines()
    assert any(line.endswith(f" 359 test images of 10 classes; 2 workers; {small_run}") for line in lines)
    assert lines[-1].endswith(" finished")
    rows = metrics(small_run)
    stamps = [datetime.fromisoformat(text) for text in [lines[0].split()[0], *(row["time"] for row in rows)]]
    assert stamps == sorted(stamps)
    assert all(stamp.utcoffset() == timedelta(0) for stamp in stamps)
    seconds = [row["run_seconds"] for row in rows]
    assert seconds == sorted(seconds)
    assert all(total >= row["seconds"] for total, row in zip(seconds, rows, strict=True))
    assert {row["lr"] for row in rows} == {0.01}


def test_stop_ends_a_run_with_its_record_whole(local_ray: None, small_config: Config) -> None:
    """The run has no evolve phase. Its messages say so, and give the sizes of the splits."""
    supervisor = Supervisor(change(small_config, run={"epochs": 10_000}, evolution={"every": 10_001}))
    rows, notes = 0, []
    while rows < 3:
        _, progress = supervisor.watch(0.05, 0)
        rows = len(progress.rows)
        notes += progress.notes
    sizes = "1152 sgd, 143 evolution, 143 validation, 359 test images of 10 classes; 2 workers; "
    assert any(note.startswith(sizes) for note in notes)
    assert "no evolve phase: evolution.every (10001) > run.epochs (10000)" in notes
    supervisor.stop()
    assert supervisor.result() is False
    pids = progress.worker_pids
    _, progress = supervisor.watch(0, 0)
    assert progress.folder
    assert len(metrics(Path(progress.folder))) == len(progress.rows) >= 3
    workers = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    assert psutil.wait_procs(workers, timeout=60)[1] == []
    supervisor.close()


def test_too_many_fitness_images_are_refused_before_a_folder_is_made(local_ray: None, small_config: Config) -> None:
    supervisor = Supervisor(change(small_config, evolution={"fitness_images": 100_000}))
    with pytest.raises(RayTaskError) as caught:
        supervisor.result()
    assert isinstance(caught.value.cause, InputError)
    assert "evolution.fitness_images (100000) do not fit data.evolution_images (143)" in str(caught.value.cause)
    assert not Path(small_config.run.out).exists()
    supervisor.close()


def test_run_folders_are_never_shared(tmp_path: Path) -> None:
    names = [make_run_folder(tmp_path / "a" / "b", "x").name for _ in range(3)]
    assert names == ["x", "x-2", "x-3"]
    (tmp_path / "file").write_text("")
    with pytest.raises(InputError, match=r"run\.out"):
        make_run_folder(tmp_path / "file", "x")
    with pytest.raises(InputError, match=r"a/b/x: another process has just begun this run$"):
        make_run_folder(tmp_path / "a" / "b", "x", only=True)


def test_json_has_no_word_for_nan(small_config: Config, tmp_path: Path) -> None:
    record = RunFolder.create(tmp_path, small_config, {})
    row = record.append(
        {
            "epoch": 1,
            "train_loss": float("nan"),
            "fitness_min": float("-inf"),
            "test_loss": 1.5,
            "search_fitness": [0.5, float("nan")],
        }
    )
    record.close()
    expected = {"epoch": 1, "train_loss": None, "fitness_min": None, "test_loss": 1.5, "search_fitness": [0.5, None]}
    assert [row] == metrics(record.path)
    assert {key: row[key] for key in row.keys() - {"time", "run_seconds"}} == expected


def test_epochs_may_be_added_to_a_run(local_ray: None, small_config: Config) -> None:
    """A finished run with added epochs has the same bits as a run that had all epochs from the beginning."""
    whole, _ = run_here(change(small_config, run={"epochs": 5, "name": "whole"}))
    short, _ = run_here(change(small_config, run={"epochs": 3, "name": "short"}))
    run_here(change(load_config(str(short)), run={"epochs": 5}), folder=short)
    assert same_result(short, whole)
    assert load_config(str(short)).run.epochs == 5


def test_a_run_whose_added_epochs_were_not_finished_is_not_finished(
    local_ray: None, small_config: Config, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The longer run is lost after its last checkpoint. The final weights of the shorter run are not its end."""
    folder, _ = run_here(change(small_config, run={"epochs": 2}))
    longer = change(load_config(str(folder)), run={"epochs": 3})
    assert is_finished(str(folder), load_config(str(folder)))
    with monkeypatch.context() as patched:
        patched.setattr(driver.Driver, "_finish", lambda self: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run_here(longer, folder=folder)
    assert not is_finished(str(folder), longer)
    run_here(longer, folder=folder)
    assert is_finished(str(folder), longer)
    final, last = (load_file(folder / name) for name in ("final.safetensors", "checkpoints/epoch-000003.safetensors"))
    assert all(torch.equal(final[name], last[name]) for name in last)


def test_epochs_are_raised_and_only_where_the_learning_rate_does_not_depend_on_them() -> None:
    before = Config(run=Run(epochs=5, keep=2, out="/there", name="one"))
    may = change(before, run={"epochs": 9, "keep": 1, "out": "/here"}, data={"root": "/elsewhere"})
    assert differences(before, may) == []
    patient = change(before, run={"patience": 3})
    assert differences(patient, change(patient, run={"patience": None})) == []
    less = ["run.patience was None and is 3: it can only be raised"]
    assert differences(before, patient) == less
    assert differences(before, change(before, run={"epochs": 4})) == [
        "run.epochs was 5 and is 4: it can only be raised"
    ]
    cosine = change(before, parent={"schedule": "cosine"})
    expected = "run.epochs was 5, and parent.schedule cosine depends on it"
    assert differences(cosine, change(cosine, run={"epochs": 9})) == [expected]
    assert differences(before, change(before, run={"seed": 4})) == ["run.seed was 0 and is 4"]


def test_a_run_ends_when_validation_has_not_become_better_for_so_long_and_its_best_network_is_kept(
    local_ray: None, small_config: Config
) -> None:
    """The learning rate is almost zero, so the run soon stops improving."""
    config = change(
        small_config,
        run={"epochs": 60, "patience": 2, "keep": 60, "keep_best": True},
        parent={"lr": 1e-12, "momentum": 0.0},
        evolution={"strategy": "none"},
    )
    folder, _ = run_here(config)
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    best = int(np.argmax([row["validation_accuracy"] for row in rows])) + 1
    assert len(rows) == best + 2 < 60
    names = "best.safetensors", f"checkpoints/epoch-{best:06d}.safetensors", "final.safetensors"
    kept, then, last = (load_file(folder / name) for name in names)
    assert all(torch.equal(kept[name], then[name]) for name in then)
    assert not all(torch.equal(kept[name], last[name]) for name in then)
    assert [is_over(rows[:count], config.run) for count in range(best, best + 3)] == [False, False, True]
    assert not is_over(rows, config.run.model_copy(update={"patience": 3}))
    assert is_over(rows[:2], config.run.model_copy(update={"epochs": 2}))
    assert not is_over([], config.run)


def test_the_same_command_begins_a_run_goes_on_and_is_finished(
    local_ray: None, small_config: Config, tmp_path: Path
) -> None:
    config = change(small_config, run={"out": str(tmp_path), "name": "again", "epochs": 3, "resume": "auto"})
    assert begun(config) == (None, False)
    whole, _ = run_here(config)
    assert whole == tmp_path / "again"
    final = (whole / "final.safetensors").read_bytes()
    assert run_here(config)[0] == whole
    assert (whole / "final.safetensors").read_bytes() == final
    assert begun(config) == (str(whole), True)
    assert begun(change(config, run={"epochs": 4})) == (str(whole), False)
    for wrong, said in (
        ({"run": {"seed": 1}}, r"run\.seed was 0 and is 1"),
        ({"evolution": {"fitness_images": None}}, r"evolution\.fitness_images was \d+ and is None"),
    ):
        for what in (begun, run_here):  # the program checks before Ray starts, and the driver checks again
            with pytest.raises(InputError, match=rf"again: only .* may change on resume: {said}$"):
                what(change(config, **wrong))

    lost = tmp_path / "elsewhere" / "again"
    shutil.copytree(whole, lost)
    (lost / "final.safetensors").unlink()
    (lost / "checkpoints" / "epoch-000003.sha256").unlink()
    there = change(config, run={"out": str(lost.parent)})
    assert begun(there) == (str(lost), False)
    run_here(there, folder=lost)
    assert same_result(lost, whole)

    # A copy is a separate run, even if its configuration names the folder of the original.
    copy = Path(shutil.copytree(whole, tmp_path / "copy"))
    digests = {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()}
    run_here(change(load_config(str(copy)), run={"epochs": 4}), folder=copy)
    assert len((copy / "metrics.jsonl").read_text().splitlines()) == 4
    assert {path: path.read_bytes() for path in whole.rglob("*") if path.is_file()} == digests

    # A folder with a record but no checkpoint is refused.
    shutil.rmtree(copy / "checkpoints")
    with pytest.raises(InputError, match=r"copy: has metrics\.jsonl and no checkpoint to go on from"):
        run_here(change(config, run={"name": "copy"}))

    # A run that was lost before its first checkpoint leaves an empty folder, and starts from the beginning.
    shutil.rmtree(lost)
    lost.mkdir()
    assert begun(there) == (str(lost), False)
    run_here(there, folder=lost)
    assert same_result(lost, whole)


def test_a_run_waits_for_nodes_and_can_be_stopped_before_there_is_room(local_ray: None, small_config: Config) -> None:
    config = change(small_config, cluster={"workers": 99})
    with pytest.raises(InputError, match="do not fit the 1 nodes"):
        Supervisor(config)
    supervisor = Supervisor(config, room_seconds=3600.0)
    assert supervisor.watch(0.01)[0] is False
    (said,) = supervisor.unsaid  # the message is not repeated
    assert str(said).startswith("waiting for nodes: cluster.workers (99)")
    supervisor.stop()
    assert supervisor.watch(3600.0)[0] is True
    supervisor.close()
