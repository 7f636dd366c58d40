"""Tests of a user's networks and strategies, from the command line and from Python."""

from __future__ import annotations

import importlib
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from local import CPU, NORMALISE, SPLITS
from safetensors.torch import load_file
from whole_runs import ROOT, change, command, environment, metrics, parse_config, run_here, same_result

import spartan_ray as sr
from spartan_ray import InputError, Population, Strategy
from spartan_ray.engine.flat import FlatModel
from spartan_ray.run.checkpoint import load_checkpoint, load_network
from spartan_ray.run.config import Config, Evolution
from spartan_ray.run.loading import configuration
from spartan_ray.run.replay import Replay
from spartan_ray.run.setup import make_fitness, make_strategy
from spartan_ray.vision.classification import recalibrate, statistics_of
from spartan_ray.vision.config import Data, Parent
from spartan_ray.vision.data import load_splits
from spartan_ray.vision.folding import Folding
from spartan_ray.vision.leaves import Leaves
from spartan_ray.vision.models import build_model, initial_model, refuse_unfit
from spartan_ray.vision.training import Trainer, lr_factor

PROGRAM = """
import os
import ray  # before the token is known
import torch
import spartan_ray as sr

before = set(os.environ)
seen = []
result = sr.train(
    {"data": {"name": "digits", "sgd_images": 200, "evolution_images": 60, "validation_images": 60}},
    progress=False, run={"epochs": 4}, data={"image_size": 40},
    parent={"model": "mine:Small", "schedule": "cosine"},
    evolution={"strategy": "mine:Halves", "every": 2, "population": 6}, callbacks=[seen.append],
)
assert [(row["epoch"], row["kind"]) for row in seen] == [(1, "sgd"), (2, "evolve"), (3, "sgd"), (4, "evolve")]
assert not ray.is_initialized()
assert not {name for name in os.environ if name.startswith("RAY_")} - before
with sr.Population(torch.nn.Linear(2, 1), lambda network, case_N: network(torch.ones(len(case_N), 2))[:, 0], cases=3,
                   workers=1) as population:
    assert population.step(sr.EvolutionStrategies(4, sigma=0.1)).accepted
try:
    population.score()
except sr.InputError as error:
    assert "closed" in str(error)
assert not ray.is_initialized()
print(result.path)
print(result.best_epoch, len(result.metrics), len(result.weights), result.metrics["lr"].tolist())
"""


@pytest.fixture
def own_config(tmp_path: Path) -> Config:
    return configuration(
        {
            "run": {"out": str(tmp_path), "epochs": 4, "keep": 9},
            "data": {"name": "digits", "sgd_images": 200, "evolution_images": 60, "validation_images": 60},
            "parent": {"model": "mine:Small", "threads": 1, "schedule": "cosine"},
            "evolution": {"strategy": "mine:Halves", "every": 2, "population": 6, "sigma": 0.05},
            "cluster": {"workers": 1},
        }
    )


@pytest.mark.ray
def test_train_from_python_runs_what_the_command_line_runs(tmp_path: Path) -> None:
    """The program runs in a separate process, in which Ray is imported but not running."""
    shutil.copy(Path(__file__).parent / "mine.py", tmp_path)
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM],
        capture_output=True, text=True, cwd=tmp_path, env=environment() | {"HOME": str(tmp_path)}, check=False,
    )  # fmt: skip
    assert ended.returncode == 0, ended.stderr
    assert not ended.stderr
    path, said = ended.stdout.splitlines()
    assert Path(path).parent == tmp_path / "runs"
    best, epochs, tensors, *rates = re.split(r"[ ,\[\]]+", said.strip("]"))
    rows = metrics(Path(path))
    accuracy = [row["validation_accuracy"] for row in rows]
    assert (int(best), epochs, tensors) == (accuracy.index(max(accuracy)) + 1, "4", "11")
    assert [float(rate) for rate in rates] == pytest.approx([0.01, 0.01, 0.005, 0.005])  # epochs 2 and 4 have no SGD
    for arguments in (("replay", path, "--verify"), ("resume", path), ("train", "--config", path)):
        code, _, said = command(*arguments, cwd=tmp_path)
        assert (code, said.count("\n")) == (2, 1)
        assert "its configuration names code, mine:Small, which would be run: " in said
    code, out, _ = command("replay", path, "--verify", "--code", cwd=tmp_path)
    assert (code, "2 of 2 updates agree" in out) == (0, True)


@pytest.mark.ray
def test_a_run_of_one_s_own_network_and_strategy_resumes_and_replays(own_config: Config, local_ray: None) -> None:
    whole, _ = run_here(own_config)
    assert sum(row["accepted"] for row in metrics(whole) if row["kind"] == "evolve") > 0
    lost = Path(shutil.copytree(whole, whole.parent / "lost"))
    (lost / "final.safetensors").unlink()
    for path in (lost / "checkpoints").glob("epoch-*.sha256"):
        if path.stem > "epoch-000001":
            path.unlink()
    run_here(change(own_config, cluster={"workers": 2}), folder=lost)
    assert same_result(lost, whole)
    replay = Replay(whole, print)
    assert [replay.verify(generation) for generation in replay.generations] == [True, True]
    code, _, said = command("report", str(whole), cwd=whole.parent)
    assert (code, said) == (0, "")
    for member in range(6):  # some of the second half descend from a parent that the first half made
        recorded, scored = replay.descendant(4, member, whole / "descendant.safetensors")
        assert recorded == scored


def test_the_command_line_and_the_library_make_the_same_bytes(local_ray: None, tmp_path: Path) -> None:
    """A run has an epoch of SGD and a phase. The phase is repeated alone, by a population and by an optimizer."""
    config = parse_config(
        ["--data.name", "digits", "--data.sgd-images", "200", "--data.evolution-images", "300", "--parent.model",
         "convnet", "--parent.threads", "1", "--evolution.every", "2", "--evolution.population", "10", "--run.epochs",
         "2", "--evolution.mirrored", "--evolution.optimizer", "momentum", "--evolution.step", "ratio", "--run.out",
         str(tmp_path), "--cluster.workers", "2"]
    )  # fmt: skip
    folder, _ = run_here(config)
    ends = {load_file(folder / "final.safetensors")["0.weight"].numpy().tobytes()}
    assert metrics(folder)[-1]["accepted"]
    splits = load_splits(config.data, config.run.seed)
    before, settings = load_checkpoint(folder / "checkpoints", 1), config.evolution
    for workers in ("local", 1, 2, "optimizer"):
        network = build_model(config.parent, 10)
        load_network(network, before)
        strategy = sr.EvolutionStrategies(10, mirrored=True, optimizer="momentum", step="ratio")
        given: Any = "local" if workers == "optimizer" else workers
        with Population(network, make_fitness(settings, splits), workers=given, threads=1) as population:
            population.generation = 1
            if workers == "optimizer":
                base = torch.optim.SGD(network.parameters(), lr=0.1)
                sr.EvolutionOptimizer(base, population, strategy).evolve()
            else:
                population.step(strategy)
        ends.add(network.state_dict()["0.weight"].contiguous().numpy().tobytes())
    assert len(ends) == 1


def test_the_strategy_of_the_docs_is_one() -> None:
    text = (ROOT / "docs" / "howto" / "own-strategy.md").read_text()
    program = re.findall(r"```python\n(.*?)```", text, re.S)[0]
    assert len([line for line in program.splitlines() if line.strip()]) <= 32
    names: dict[str, Any] = {}
    exec(program, names)
    strategy: Strategy = names["Elite"](40, sigma=0.05)
    assert isinstance(strategy, Strategy)
    inputs_NI = torch.linspace(-1, 1, 60).view(20, 3)
    network = torch.nn.Linear(3, 1)
    torch.nn.init.zeros_(network.weight)
    torch.nn.init.zeros_(network.bias)

    def closeness(network: torch.nn.Module, case_N: torch.Tensor) -> torch.Tensor:
        error_N: torch.Tensor = (network(inputs_NI[case_N]) - 3).abs().squeeze(1)
        return -error_N

    population = Population(network, closeness, cases=20)
    outcomes = [population.step(strategy) for _ in range(8)]
    assert outcomes[0].before == -3
    assert outcomes[-1].after > -2.9
    assert all(outcome.after >= outcome.before for outcome in outcomes)


@pytest.mark.parametrize(("name", "more", "said"), [
    ("mine:Halves", {"lr": 0.5}, r"evolution\.lr \(0\.5\) has no effect: mine:Halves takes population, sigma"),
    ("mine:Nothing", {}, r"evolution\.strategy \(mine:Nothing\): mine has no Nothing"),
    ("nowhere:Halves", {}, r"evolution\.strategy \(nowhere:Halves\): cannot import nowhere: ModuleNotFoundError: .*"),
    ("mine:Small", {}, r"evolution\.strategy \(mine:Small\): .*num_classes.*"),
    ("collections:Counter", {}, r"evolution\.strategy \(collections:Counter\): expected population, case_sets and .*"),
])  # fmt: skip
def test_a_strategy_that_cannot_be_used_is_one_line(name: str, more: dict[str, Any], said: str) -> None:
    with pytest.raises(InputError, match=f"^{said}$") as caught:
        make_strategy(Evolution(strategy=name, **more), 10)
    assert "\n" not in str(caught.value)


def test_a_strategy_that_cannot_be_used_is_refused_before_ray_starts(tmp_path: Path) -> None:
    arguments = ("train", "--config", "quickstart", "--evolution.strategy", "mine:Halves", "--evolution.mirrored")
    code, out, err = command(*arguments, cwd=tmp_path)
    said = "spartan: evolution.mirrored (True) has no effect: mine:Halves takes population, sigma\n"
    assert (code, out, err) == (2, "", said)


@pytest.mark.parametrize("name", ["es2", "a b:C", "mine:", ":C", "mine:a.b"])
def test_a_name_that_is_none_is_refused_with_the_field(name: str) -> None:
    with pytest.raises(InputError, match=r"^parent\.model \('.*'\): expected resnet18, convnet, or package"):
        Parent(model=name)
    with pytest.raises(
        InputError, match=r"^evolution\.strategy \('.*'\): expected es, random-gradients, esgd, none, or "
    ):
        Evolution(strategy=name)


def test_a_field_that_is_given_as_on_the_command_line_is_said_how_to_write() -> None:
    with pytest.raises(InputError, match=r'^run\.epochs: write run=\{"epochs": \.\.\.\}$'):
        sr.train("quickstart", **{"run.epochs": 3})  # type: ignore[arg-type]


@pytest.mark.parametrize(("name", "said"), [
    ("torch.nn:Linear", "cannot be made with num_classes=10: TypeError: .*"),
    ("builtins:dict", r"made a dict: expected an nn\.Module"),
    ("mine:Nothing", "mine has no Nothing"),
    ("torchvision.models:alexnet", r"cannot take images of 32 x 32 pixels \(data\.image_size\): RuntimeError: .*"),
    ("torch.nn:Identity", r"returns \(2, 3, 32, 32\) for 2 images: expected \(2, 10\)"),
])  # fmt: skip
def test_a_network_that_cannot_be_used_is_one_line(name: str, said: str) -> None:
    config = Parent(model=name)
    with pytest.raises(InputError, match=rf"^parent\.model \({name}\): {said}$") as caught:
        refuse_unfit(initial_model(config, 10, 0)[0], config, 32, 10)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["mine:Small", "torchvision.models:shufflenet_v2_x0_5"])
def test_a_network_of_another_package_trains_to_the_same_bits_again(name: str) -> None:
    """Random draws in training, here those of dropout, are a function of the seed and the epoch."""
    config = Parent(model=name, batch_size=16)
    digests = set()
    for _ in range(2):
        torch.rand(3)
        model = FlatModel(initial_model(config, 10, 0)[0], CPU)
        before = model.digest()
        trainer = Trainer(config, model, SPLITS.sgd[slice(0, 32)], NORMALISE, 0, False)
        trainer.train_epoch(1, lambda count: None)
        digests.add(model.digest())
    assert len(digests) == 1
    assert before not in digests


@pytest.mark.parametrize(("name", "folded"), [
    ("mine:Branches", 1), ("torchvision.models:resnet18", 20), ("torchvision.models:shufflenet_v2_x0_5", 37),
])  # fmt: skip
def test_a_network_of_another_package_computes_as_it_does_there_in_less_time(name: str, folded: int) -> None:
    """Its folded outputs and its gradients equal those of torch's own layers."""
    network, _ = initial_model(Parent(model=name), 10, 0)
    module, attribute = name.split(":")
    plain = getattr(importlib.import_module(module), attribute)(num_classes=10)
    chance = torch.Generator().manual_seed(0)
    for layer in network.modules():
        if isinstance(layer, torch.nn.BatchNorm2d):
            for tensor in (layer.weight, layer.bias, layer.running_mean, layer.running_var):
                assert tensor is not None
                tensor.data.uniform_(0.5, 1.5, generator=chance)
    plain.load_state_dict(network.state_dict())
    images_NCHW = torch.randn(8, 3, 32, 32, generator=chance)
    folding = Folding(network, images_NCHW[:1])
    assert len(folding.pairs) == folded
    expected_NC = plain.eval()(images_NCHW)
    with folding(torch.float32), torch.inference_mode():
        torch.testing.assert_close(network(images_NCHW), expected_NC.detach(), rtol=1e-4, atol=1e-4)
    leaves, other = Leaves(FlatModel(network, CPU), images_NCHW[:1]), FlatModel(plain, CPU)
    with leaves():
        for one in (network, plain):
            torch.nn.functional.cross_entropy(one.train()(images_NCHW), torch.arange(8)).backward()
    for leaf, expected in zip(leaves.tensors, leaves.parts(other.gradient()), strict=True):
        torch.testing.assert_close(leaf.grad, expected, rtol=1e-3, atol=1e-5 + 1e-3 * float(expected.abs().max()))


def test_images_have_the_size_that_is_asked_for() -> None:
    """Digits consist of squares of four by four equal pixels. In images twice as large, the squares have eight by eight
    pixels and are blurred at the edges."""
    small, large = (load_splits(Data(name="digits", image_size=size), 0) for size in (32, 64))
    assert large.sgd.pixels_NHWC.shape[1:] == (64, 64, 3)
    assert torch.equal(large.sgd.labels_N, small.sgd.labels_N)
    assert torch.equal(large.sgd.pixels_NHWC[:, 3::8, 3::8], small.sgd.pixels_NHWC[:, 1::4, 1::4])


def test_the_cosine_falls_from_the_first_epoch_to_nearly_nothing() -> None:
    assert [lr_factor("constant", epoch, 4) for epoch in (1, 4)] == [1.0, 1.0]
    factors = [lr_factor("cosine", epoch, 4) for epoch in range(1, 6)]
    assert factors == pytest.approx([1.0, 0.8535534, 0.5, 0.1464466, 0.0])
    trainer = Trainer(
        Parent(model="convnet", lr=0.3, schedule="cosine"),
        FlatModel(initial_model(Parent(model="convnet"), 10, 0)[0], CPU),
        SPLITS.sgd[slice(0, 8)], NORMALISE, 0, False, 4,
    )  # fmt: skip
    trainer.train_epoch(3, lambda count: None)
    assert trainer.optimizer.param_groups[0]["lr"] == pytest.approx(0.15)


def test_statistics_of_batchnorm_of_every_kind_are_those_that_are_asked_for() -> None:
    network = torch.nn.Sequential(
        torch.nn.Flatten(2), torch.nn.BatchNorm1d(3), torch.nn.BatchNorm1d(3, track_running_stats=False)
    )
    images_NCHW = torch.randn(40, 3, 4, 4, generator=torch.Generator().manual_seed(0)) * 3 + 5
    recalibrate(network, images_NCHW)
    torch.testing.assert_close(network[1].running_mean, images_NCHW.mean((0, 2, 3)))
    with statistics_of(network, "batch"):
        torch.testing.assert_close(network(images_NCHW).mean((0, 2)), torch.zeros(3), atol=1e-5, rtol=0)
    assert [layer.track_running_stats for layer in network[1:]] == [True, False]


def test_gradient_noise_leaves_an_output_that_the_loss_does_not_use() -> None:
    config = Parent(model="mine:Small", gradient_noise=0.1, batch_size=16)
    model = FlatModel(initial_model(config, 10, 0)[0], CPU)
    before = {name: parameter.clone() for name, parameter in model.module.named_parameters()}
    Trainer(config, model, SPLITS.sgd[slice(0, 32)], NORMALISE, 0, False).train_epoch(1, lambda count: None)
    moved = {name for name, parameter in model.module.named_parameters() if not torch.equal(parameter, before[name])}
    assert before.keys() - moved == {"aux.weight", "aux.bias"}


def test_a_module_in_the_directory_of_a_command_stands_for_no_installed_one(tmp_path: Path) -> None:
    """The directory may be a run folder from somebody else, in which a report is made."""
    (tmp_path / "pandas.py").write_text("raise SystemExit('ran')")
    program = str(Path(sys.executable).parent / "spartan")
    ended = subprocess.run([program, "report", "."], capture_output=True, text=True, cwd=tmp_path, check=False)
    assert (ended.returncode, ended.stderr.count("\n")) == (2, 1)
    assert "not a run folder" in ended.stderr
