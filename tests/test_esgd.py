"""Tests of evolutionary SGD: its draws, training and selection against plain implementations of the paper, the paper's
guarantee, and runs that give the same bits however they are executed."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from local import CPU, NORMALISE, PARENT, SPLITS, trained
from safetensors.torch import load_file
from whole_runs import change, metrics, run_here, same_result

from spartan_ray.engine.breeding import Breeding, Individual, LocalBreeders, OptimizerState
from spartan_ray.engine.evaluator import packed
from spartan_ray.engine.flat import FlatModel
from spartan_ray.engine.strategies.esgd import EvolutionarySGD, Settings
from spartan_ray.errors import InputError
from spartan_ray.noise.contract import noise
from spartan_ray.report.page import write_report
from spartan_ray.report.reading import read_run
from spartan_ray.run.checkpoint import load_checkpoint
from spartan_ray.run.config import Config, Evolution, Run
from spartan_ray.run.esgd import Parents
from spartan_ray.run.journal import read_journal
from spartan_ray.run.loading import load_config
from spartan_ray.run.replay_esgd import EsgdReplay
from spartan_ray.run.setup import REFERENCE_IMAGES, make_breeder
from spartan_ray.vision.classification import recalibrate, score
from spartan_ray.vision.models import initial_model
from spartan_ray.vision.training import Trainer

ESGD: dict[str, Any] = {"strategy": "esgd", "every": 3, "population": 10, "parents": 4, "recombine": 2, "elite": 2}
ESGD |= {"optimizers": "sgd:0.003..0.1,adam:1e-4..1e-2", "sigma": 0.02, "fitness_images": 100}


def config(**evolution: Any) -> Config:
    return Config(run=Run(seed=7), parent=PARENT, evolution=Evolution(**ESGD | evolution))


def breeders(**evolution: Any) -> tuple[EvolutionarySGD, LocalBreeders]:
    strategy, spec = make_breeder(config(**evolution), SPLITS)
    return strategy, LocalBreeders(spec, CPU, print)


def individual(model: FlatModel, **known: Any) -> Individual:
    return Individual(packed(model.theta_D.clone()), [packed(buffer.clone()) for buffer in model.buffers], **known)


def network_of(theta_D: Any, buffers: list[Any]) -> FlatModel:
    model = FlatModel(initial_model(PARENT, 10, 5)[0], CPU)
    model.theta_D.copy_(torch.tensor(np.array(theta_D)))
    model.load_buffers([torch.tensor(np.array(buffer)) for buffer in buffers])
    return model


def loss_of(theta_D: Any, buffers: list[Any], case_N: Any) -> float:
    """Return the loss of a network on evolution images, computed without evaluator, noise or folding."""
    images = SPLITS.evolution[torch.from_numpy(case_N)]
    return score(network_of(theta_D, buffers).module, images, NORMALISE).loss


def test_settings_are_drawn_from_their_ranges_for_each_parent_and_generation() -> None:
    strategy = EvolutionarySGD(parents=400, optimizers=[("sgd", 0.01, 1.0), ("adam", 1e-4, 1e-4)])
    drawn = strategy.settings(3, 10)
    assert drawn == strategy.settings(3, 10)
    assert drawn != strategy.settings(3, 15)
    assert drawn != strategy.settings(4, 10)
    assert {round(one.lr, 9) for one in drawn if one.optimizer == "adam"} == {1e-4}
    rates = np.array([one.lr for one in drawn if one.optimizer == "sgd"])
    assert 150 < len(rates) < 250
    assert 0.01 <= rates.min() < 0.013
    assert 0.8 < rates.max() < 1.0
    assert 0.4 < (rates < 0.1).mean() < 0.6  # log-uniform


def test_an_offspring_has_different_parents_and_all_pairs_are_equally_likely() -> None:
    strategy = EvolutionarySGD(4000, parents=4, recombine=2, sigma=0.1, sigma_decay=0.5, every=5)
    offspring = strategy.offspring(1, 15)
    pairs, count = np.unique(offspring.parent_KR, axis=0, return_counts=True)
    assert pairs.tolist() == [[0, 1], [0, 2], [0, 3], [1, 2], [1, 3], [2, 3]]
    assert abs(count - 4000 / 6).max() < 4 * math.sqrt(4000 / 6)
    assert len(set(offspring.seed_K.tolist())) == 4000
    assert set(offspring.gain_K.tolist()) == {np.float32(0.1 * 0.5**2)}
    assert not np.array_equal(offspring.parent_KR, strategy.offspring(1, 20).parent_KR)


@pytest.mark.parametrize("seed", range(5))
def test_the_elite_is_the_best_of_parents_and_offspring_and_the_others_are_drawn_from_what_is_left(seed: int) -> None:
    strategy = EvolutionarySGD(6, parents=4, elite=2)
    fitness_C = np.array([3.0, -1.0, math.nan, 5.0, 5.0, math.inf, 0.0, 4.0, -math.inf, 2.0])
    order_P = strategy.select(fitness_C, seed, 5).tolist()
    assert order_P[:2] == [3, 4]  # the best first; of equals, the earlier first
    assert set(order_P[2:]) <= {7, 0, 9, 6, 1}  # the other finite candidates
    assert len(set(order_P)) == 4
    assert fitness_C[order_P[2]] > fitness_C[order_P[3]]
    drawn = {tuple(strategy.select(fitness_C, seed, generation)[2:].tolist()) for generation in range(5, 500, 5)}
    assert len(drawn) == 10  # all pairs of the five are drawn


def test_all_that_is_not_finite_comes_last() -> None:
    strategy = EvolutionarySGD(2, parents=2, elite=1)
    for generation in range(5, 100, 5):
        assert strategy.select(np.array([math.nan, 1.0, math.nan, math.nan]), 0, generation)[0] == 1


def test_an_offspring_is_the_mean_of_its_parents_and_its_noise() -> None:
    strategy, here = breeders()
    parents = [individual(trained()) for _ in range(4)]
    for place, parent in enumerate(parents):
        parent.theta_D[...] += np.float32(0.01) * noise("uniform", place, 0, len(parent.theta_D))
        for buffer in parent.buffers:
            buffer[...] += place
    offspring = strategy.offspring(7, 3)
    rows = [offspring[k : k + 1] for k in range(len(offspring))]
    fitness_K = [one.fitness for one in here.each("score", rows, parents)]
    made = here.each("make", rows, parents)
    for k, one in enumerate(made):
        mothers = [parents[place] for place in offspring.parent_KR[k]]
        theta_D = np.mean([mother.theta_D.astype(np.float64) for mother in mothers], axis=0)
        theta_D += float(offspring.gain_K[k]) * noise("uniform", int(offspring.seed_K[k]), 0, len(theta_D))
        np.testing.assert_allclose(one.theta_D, theta_D, rtol=1e-6, atol=1e-7)
        for number, buffer in enumerate(one.buffers):
            both = [mother.buffers[number] for mother in mothers]
            wanted = np.mean(both, axis=0) if buffer.dtype == np.float32 else np.max(both, axis=0)
            np.testing.assert_allclose(buffer, wanted, rtol=1e-6)
        assert one.fitness is one.optimizer is None
        assert fitness_K[k] == pytest.approx(-loss_of(one.theta_D, one.buffers, here.breeder.case_N), rel=1e-4)
    # The fitness does not depend on what a breeder has scored before.
    _, other = breeders()
    again = other.each("score", rows[7:], parents) + other.each("score", rows[:7], parents)
    assert [one.fitness for one in again] == fitness_K[7:] + fitness_K[:7]


def test_an_offspring_that_is_scored_by_statistics_of_its_own_keeps_them() -> None:
    _, here = breeders(batchnorm="recalibrate")
    parents = [individual(trained()) for _ in range(4)]
    strategy, _ = breeders()
    row = strategy.offspring(7, 3).rows([0])
    (made,), (scored,) = here.each("make", row, parents), here.each("score", row, parents)
    alike = network_of(made.theta_D, parents[0].buffers)
    recalibrate(alike.module, NORMALISE(SPLITS.sgd[slice(0, REFERENCE_IMAGES)].pixels_NHWC))
    for buffer, wanted in zip(made.buffers, alike.buffers, strict=True):
        np.testing.assert_allclose(buffer, wanted.numpy(), rtol=1e-5, atol=1e-6)
    assert not np.allclose(made.buffers[0], parents[0].buffers[0])
    assert scored.fitness == pytest.approx(-loss_of(made.theta_D, made.buffers, here.breeder.case_N), rel=1e-4)
    # A trained parent also keeps the statistics that it was scored with.
    (answer,) = here.each("train", [(replace(parents[0], fitness=-math.inf), Settings("sgd", 0.01), 0, 1)])
    one = answer.individual
    assert one.fitness == pytest.approx(-loss_of(one.theta_D, one.buffers, here.breeder.case_N), rel=1e-4)


def test_what_scoring_leaves_in_a_network_or_does_not_need_is_not_in_an_offspring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    strategy, here = breeders()
    breeder, parents = here.breeder, [individual(trained()) for _ in range(4)]
    row = strategy.offspring(7, 3)[:1]
    (right,) = here.each("make", [row], parents)
    ready = breeder.fitness.ready

    @contextlib.contextmanager
    def spoiling(network: torch.nn.Module) -> Iterator[None]:
        with ready(network):
            yield
        for buffer in network.buffers():
            buffer.fill_(9)

    monkeypatch.setattr(breeder.fitness, "ready", spoiling)
    monkeypatch.setattr(breeder, "needed_R2", np.array([[0, 100]]))
    (made,) = here.each("make", [row], parents)
    assert made.theta_D.tobytes() == right.theta_D.tobytes()
    for buffer, wanted in zip(made.buffers, right.buffers, strict=True):
        assert np.array_equal(buffer, wanted)


def test_each_parent_sees_the_images_in_an_order_of_its_own() -> None:
    strategy, here = breeders(optimizers="sgd:0.01..0.01")
    breeding = Breeding(strategy, here, 7, trained(), 100)
    breeding.individuals = [replace(one, fitness=-math.inf) for one in breeding.individuals]
    assert breeding.train(1, 3, 600) == 0
    assert len({one.theta_D.tobytes() for one in breeding.individuals}) == 4
    model = trained()
    key = int(np.random.Philox(key=np.array([7, (1 << 41) + 2], np.uint64)).random_raw()) >> 1
    course = PARENT.model_copy(update={"lr": breeding.strategy.settings(7, 3)[2].lr})
    Trainer(course, model, SPLITS.sgd, NORMALISE, key, augment=False).train_epoch(1, lambda count: None)
    assert breeding.individuals[2].theta_D.tobytes() == model.theta_D.numpy().tobytes()


def test_an_epoch_is_that_of_the_trainer_with_the_settings_that_were_drawn() -> None:
    _, here = breeders()
    model = trained()
    start = individual(model)
    settings, seed = Settings("adam", 0.003), 11
    course = PARENT.model_copy(update={"optimizer": "adam", "lr": 0.003})
    trainer = Trainer(course, model, SPLITS.sgd, NORMALISE, seed, augment=False)
    one = start
    for epoch in (1, 2):  # the second epoch continues with the moments of the first
        trainer.train_epoch(epoch, lambda count: None)
        (answer,) = here.each("train", [(replace(one, fitness=-math.inf), settings, seed, epoch)])
        after = answer.individual
        assert after.theta_D.tobytes() == model.theta_D.numpy().tobytes()
        for buffer, wanted in zip(after.buffers, model.buffers, strict=True):
            assert np.array_equal(buffer, wanted.numpy())
        assert after.fitness == answer.fitness == answer.found
        one = after


class Worse:
    """A course that damages the network in every second epoch and fills it with NaN in epoch 4."""

    def to(self, device: torch.device) -> None:
        pass

    def __call__(
        self, model: FlatModel, settings: Settings, state: OptimizerState | None, seed: int, epoch: int
    ) -> OptimizerState:
        trainer = Trainer(PARENT, model, SPLITS.sgd, NORMALISE, seed, augment=False)
        trainer.train_epoch(epoch, lambda count: None)
        if (epoch + seed) % 2:
            model.theta_D.add_(1.0)
        if epoch == 4:
            model.theta_D.fill_(math.nan)
        return {}, {"epoch": epoch}


def test_an_individual_whose_fitness_falls_backs_off_with_its_optimizer() -> None:
    _, here = breeders()
    here.breeder.course = Worse()
    start = replace(individual(trained()), optimizer=({}, {"epoch": 0}))
    bytes_before = start.theta_D.tobytes()
    for epoch in (1, 4):
        (answer,) = here.each("train", [(start, Settings("sgd", 0.1), 0, epoch)])
        assert answer.individual is None
        assert not answer.found >= answer.fitness
        assert answer.fitness == pytest.approx(-loss_of(start.theta_D, start.buffers, here.breeder.case_N), rel=1e-5)
    assert start.theta_D.tobytes() == bytes_before
    breeding = Breeding(EvolutionarySGD(parents=1, recombine=1), here, 0, trained(), 100)
    breeding.individuals = [start]
    assert breeding.train(4, 5, 600) == 1
    assert breeding.individuals[0].theta_D is start.theta_D
    assert breeding.individuals[0].optimizer == ({}, {"epoch": 0})
    assert breeding.individuals[0].fitness == answer.fitness


def test_neither_the_best_nor_the_mean_of_the_elite_ever_degrades() -> None:
    """Check the paper's guarantee. The course harms every second epoch, and the noise harms most offspring."""
    strategy, here = breeders(sigma=0.1, elite=3)
    here.breeder.course = Worse()
    breeding = Breeding(strategy, here, 7, trained(), 100)
    best, elite, backed_off, taken = [-math.inf], [-math.inf], 0, 0
    for epoch in range(1, 10):
        if epoch % 3:
            backed_off += breeding.train(epoch, -(-epoch // 3) * 3, 600)
        else:
            taken += breeding.evolve(epoch)[0].accepted
            assert all(one.optimizer is None for one in breeding.individuals)
        fitness_P = np.sort(breeding.fitness_P)
        best.append(float(fitness_P[-1]))
        elite.append(float(fitness_P[-3:].mean()))
    assert best == sorted(best)
    assert elite == sorted(elite)
    assert backed_off
    assert taken
    assert best[-1] > best[1]


def test_an_offspring_for_which_the_fitness_raises_is_the_worst(monkeypatch: pytest.MonkeyPatch) -> None:
    strategy, here = breeders()
    said: list[str] = []
    here.note = said.append
    breeding = Breeding(strategy, here, 7, trained(), 100)
    breeding.train(1, 3, 600)
    plain, count = type(here.breeder.fitness).__call__, 0

    def raising(fitness: Any, network: torch.nn.Module, batch: Any) -> torch.Tensor:
        nonlocal count
        count += 1
        if count == 4:
            raise ValueError("the fourth")
        return plain(fitness, network, batch)

    monkeypatch.setattr(type(here.breeder.fitness), "__call__", raising)
    outcome, more = breeding.evolve(3)
    assert np.flatnonzero(np.isnan(outcome.fitness_K)).tolist() == [3]
    assert 3 + 4 not in more["order"]
    assert len(said) == 1
    assert said[0].startswith(f"the member of seed {outcome.members.seed_K[3]} failed and is scored worst: ValueError:")


def test_adam_s_step_count_is_each_individual_s_own() -> None:
    """An optimizer's state is never changed in place, because an individual that backs off still needs it."""
    _, here = breeders()
    settings = Settings("adam", 0.003)
    (answer,) = here.each("train", [(individual(trained(), fitness=-math.inf), settings, 0, 1)])
    one = answer.individual
    before = {name: np.array(value) for name, value in one.optimizer[0].items()}
    here.each("train", [(one, settings, 0, 2)])
    for name, value in one.optimizer[0].items():
        assert np.array_equal(before[name], value)


@pytest.mark.parametrize(("changes", "message"), [
    ({"recombine": 5}, "evolution.recombine (5) is larger than evolution.parents (4)"),
    ({"elite": 5}, "evolution.elite (5) is larger than evolution.parents (4)"),
    ({"every": 1}, "evolution.strategy (esgd) needs epochs between the phases: evolution.every above 1"),
    ({"mirrored": True}, "evolution.mirrored (True) has no effect with evolution.strategy esgd"),
    ({"mutate": "batchnorm"}, "evolution.mutate (batchnorm) has no effect with evolution.strategy esgd"),
    ({"step_ratio": 0.3}, "evolution.step_ratio (0.3) has no effect with evolution.strategy esgd"),
    ({"confirm": True}, "evolution.confirm (True) has no effect with evolution.strategy esgd"),
    ({"lr": 0.1}, "evolution.lr (0.1) has no effect with evolution.strategy esgd"),
    ({"optimizers": "sgd"}, "evolution.optimizers ('sgd'): expected sgd or adam or adamw, each with a range"),
    ({"optimizers": "sgd:0.1..0.01"}, "evolution.optimizers ('sgd:0.1..0.01'): expected"),
    ({"optimizers": "lion:0.1..1"}, "evolution.optimizers ('lion:0.1..1'): expected"),
    ({"strategy": "es", "elite": None}, "evolution.optimizers (sgd:0.003..0.1,adam:1e-4..1e-2) has no effect with "),
    ({"strategy": "none", "sigma": 0.01}, None),
])  # fmt: skip
def test_settings_that_do_not_go_together_are_refused(changes: dict[str, Any], message: str | None) -> None:
    if message is None:
        config(**changes)
        return
    with pytest.raises(InputError) as error:
        config(**changes)
    assert str(error.value).startswith(message)


@pytest.mark.parametrize("field", ["lr", "optimizer", "average", "gradient_noise", "moments_after_evolution"])
def test_what_of_the_parent_is_drawn_or_unused_is_refused(field: str) -> None:
    value = {"lr": 0.5, "optimizer": "adam", "average": "ema:0.9", "gradient_noise": 0.1}.get(field, "reset")
    with pytest.raises(InputError, match=rf"parent\.{field} \({value}\) has no effect with evolution.strategy esgd"):
        change(config(), parent={field: value})


def test_images_that_are_not_there_are_refused() -> None:
    with pytest.raises(InputError, match=r"evolution.fitness_images \(601\)"):
        make_breeder(config(fitness_images=601), SPLITS)


@pytest.fixture(scope="module")
def esgd_run(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run with one worker. Tests examine it and compare other runs with it."""
    from conftest import small

    folder, notes = run_here(of_small(small(tmp_path_factory.mktemp("esgd")), workers=1))
    assert not any("lost" in note for note in notes)
    return folder


def of_small(small: Config, **cluster: Any) -> Config:
    return change(small, run={"epochs": 8, "keep": 9}, evolution=ESGD | {"fitness_images": None}, cluster=cluster)


def test_the_same_bits_with_two_workers_and_going_on_from_any_epoch(
    esgd_run: Path, small_config: Config, tmp_path: Path
) -> None:
    two, _ = run_here(of_small(small_config, workers=2))
    assert same_result(two, esgd_run)
    for epoch in (1, 3, 5):  # 1 and 5: within a generation, with optimizer states to restore; 3: after a selection
        lost = Path(shutil.copytree(esgd_run, tmp_path / f"lost-{epoch}"))
        (lost / "final.safetensors").unlink()
        for path in (lost / "checkpoints").glob("*.sha256"):
            if int(path.stem.removeprefix("epoch-")) > epoch:
                path.unlink()
        run_here(change(load_config(str(lost)), cluster={"workers": 2}), folder=lost)
        assert same_result(lost, esgd_run)


def test_the_record_and_the_report_of_a_run(esgd_run: Path) -> None:
    rows = metrics(esgd_run)
    assert [row["kind"] for row in rows] == ["sgd", "sgd", "evolve"] * 2 + ["sgd", "sgd"]
    best = [row["parents_fitness_max"] for row in rows]
    assert best == sorted(best)
    assert best[-1] > best[0]
    phases = [row for row in rows if row["kind"] == "evolve"]
    assert [row["parent_fitness_after"] for row in phases] == [best[2], best[5]]
    for row in rows[0:2] + rows[3:5]:
        assert row["lr"] > 0
        assert 0 <= row["backed_off"] <= 4
    assert rows[0]["evolution_loss"] == pytest.approx(-best[0], rel=1e-6)  # the fitness is on all evolution images
    cases = phases[0]["fitness_images"]
    assert [row["images_scored"] for row in rows[:3]] == [8 * cases, 4 * cases, phases[0]["population"] * cases]
    page = next(path for path in write_report([read_run(esgd_run)], esgd_run / "report") if path.suffix == ".html")
    assert "<dt>evolution.elite</dt><dd>2</dd>" in page.read_text()
    assert (esgd_run / "report" / "parents.png").stat().st_size > 10_000
    assert "Fitness of the parents" in page.read_text()
    assert load_file(esgd_run / "final.safetensors").keys() == initial_model(PARENT, 10, 0)[0].state_dict().keys()


def test_offspring_and_parents_are_made_again_from_the_journal(esgd_run: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(esgd_run, tmp_path / "run"))
    said: list[str] = []
    replay = EsgdReplay(folder, said.append)
    assert replay.generations == [3, 6]
    assert all(replay.verify(generation) for generation in replay.generations)
    assert all("agrees" in line for line in said)
    for generation, member in ((3, 0), (6, 9)):
        recorded, scored = replay.descendant(generation, member, tmp_path / "one.safetensors")
        assert recorded == scored
    with pytest.raises(InputError, match="--member 10: generation 6 has the members 0 to 9"):
        replay.descendant(6, 10, tmp_path / "one.safetensors")
    path = folder / "journal" / "000003.npz"
    journal = read_journal(path)
    assert sorted(journal["order"]) == sorted(set(journal["order"]))
    for name, wrong in (("order", journal["order"] + 11), ("parents", journal["parents"] - 3), ("parents", None)):
        changed = {**journal, name: wrong}
        np.savez(path, allow_pickle=False, **{key: value for key, value in changed.items() if value is not None})
        with pytest.raises(InputError, match=f"not a journal: {name}"):
            replay.verify(3)
    np.savez(path, allow_pickle=False, **journal | {"order": journal["order"][::-1].copy()})
    assert not replay.verify(3)


def test_a_run_is_what_breeding_in_this_process_makes(esgd_run: Path) -> None:
    """The reference is a plain loop in this process that starts from the network before the first epoch."""
    run_config = load_config(str(esgd_run))
    replay = EsgdReplay(esgd_run, lambda note: None)
    replay.parents.model.module.load_state_dict(load_file(esgd_run / "checkpoints" / "epoch-000000.safetensors"))
    strategy, spec = make_breeder(run_config, replay.splits)
    breeding = Breeding(
        strategy, LocalBreeders(spec, CPU, print), run_config.run.seed, replay.parents.model, len(spec.case_N)
    )
    for epoch in range(1, 9):
        if epoch % 3:
            breeding.train(epoch, -(-epoch // 3) * 3, len(replay.splits.sgd))
        else:
            breeding.evolve(epoch)
        replay.parents.load(*kept(esgd_run, epoch))
        assert breeding.digest() == replay.parents.breeding.digest()


def kept(run: Path, epoch: int) -> tuple[Any, Any, Any]:
    checkpoint = load_checkpoint(run / "checkpoints", epoch)
    tensors = checkpoint.tensors
    return tensors["evolution"], tensors["optimizer"], checkpoint.loop.optimizers["evolution"]


def test_a_checkpoint_of_other_parents_is_refused(esgd_run: Path) -> None:
    networks, moments, rest = kept(esgd_run, 4)
    parents: Parents = EsgdReplay(esgd_run, lambda note: None).parents
    fewer = {name: value for name, value in networks.items() if name != "2.theta"}
    infinite = [one | {"fitness": "inf"} for one in rest["parents"]]
    wrong: list[tuple[Any, Any]] = [
        (networks, rest | {"kind": "adam"}),
        (networks, rest | {"parents": rest["parents"][:3]}),
        (networks, rest | {"parents": infinite}),
        (fewer, rest),
        (fewer | {"2.theta": torch.zeros(3)}, rest),
        (networks, {}),
    ]
    for state, others in wrong:
        with pytest.raises(InputError, match="the checkpoint is of other parents"):
            parents.load(state, moments, others)
    parents.load(networks, moments, rest)
    state, again, others = parents.state()
    assert others == rest
    assert all(torch.equal(state[name], networks[name]) for name in networks)
    assert moments
    assert all(torch.equal(again[name], moments[name]) for name in moments)
    assert not {name for name in networks if "optimizer" in name}
    parents.load(networks, None, rest)
    assert all(one.optimizer is None for one in parents.breeding.individuals)


def test_that_nothing_was_learned_is_said(local_ray: None, small_config: Config) -> None:
    config = change(small_config, run={"epochs": 2}, evolution=ESGD | {"optimizers": "sgd:1e5..1e6"})
    _, notes = run_here(config)
    said = "all parents backed off: try smaller learning rates (evolution.optimizers sgd:1e5..1e6)"
    assert [note for note in notes if "backed off" in note] == [f"epoch {epoch}: {said}" for epoch in (1, 2)]


def frozen(num_classes: int) -> torch.nn.Module:
    """Return a network whose first convolution is not trained."""
    network = initial_model(PARENT, num_classes, 0)[0]
    next(network.children()).requires_grad_(False)
    return network


def test_what_is_not_trained_is_the_same_in_all_and_kept(local_ray: None, small_config: Config) -> None:
    config = change(
        small_config,
        run={"epochs": 4},
        data={"augment": True},
        parent={"model": "test_esgd:frozen", "schedule": "cosine", "precision": "bf16", "weight_decay": 0.01},
        evolution=ESGD | {"recombine": 3, "batchnorm": "recalibrate", "fitness_images": None},
    )
    folder, _ = run_here(config)
    networks, _, _ = kept(folder, 4)
    fixed = [value for name, value in networks.items() if name.endswith(".buffer.9")]
    assert all(torch.equal(one, next(frozen(10).parameters())) for one in fixed)
    assert len(fixed) == 4
    rows = metrics(folder)
    assert rows[2]["lr"] is None
    for row in rows:  # the network is saved with the statistics that it was scored with
        assert -row["evolution_loss"] == pytest.approx(row["parents_fitness_max"], rel=1e-4)
