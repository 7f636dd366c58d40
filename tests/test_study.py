"""Studies: planning, running, resuming, and the tables of their rows."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from scipy import stats
from torch import nn
from whole_runs import command, run_here

from spartan_ray.distributed.config import Cluster
from spartan_ray.engine.population import Population
from spartan_ray.errors import InputError
from spartan_ray.noise.contract import noise
from spartan_ray.report.reading import read_run
from spartan_ray.study import runner
from spartan_ray.study.pictures import draw
from spartan_ray.study.plan import Claim, Picture, Planned, Study, load_study, planned_runs
from spartan_ray.study.pure_noise import PureNoise
from spartan_ray.study.rows import Rows
from spartan_ray.study.runner import Runner
from spartan_ray.study.statistics import Interval, differences, ends, interval, verdict
from spartan_ray.study.tables import write_up

SMALL: dict[str, Any] = {
    "about": "Small.",
    "base": {
        "run": {"epochs": 4},
        "data": {"name": "digits"},
        "parent": {"model": "convnet", "threads": 1},
        "evolution": {"every": 2, "population": 4},
        "cluster": {"workers": 1},
    },
    "grid": [
        {
            "start": {"scratch": {}},
            "method": {
                "sgd": {"evolution": {"strategy": "none"}, "parent": {"average": "epochs:2"}},
                "es": {"evolution": {"lr": 0.002}},
            },
        }
    ],
    "seeds": 2,
    "at_once": 2,
    "baselines": ["sgd", "sgd, average"],
    "claims": [{"says": "It helps.", "group": "scratch", "way": "es", "over": ["sgd", "sgd, average"]}],
    "pictures": [{"name": "accuracy", "group": "scratch", "methods": ["sgd", "es"], "measure": "test_accuracy"}],
}

NO_MORE: dict[str, Any] = {"baselines": [], "claims": [], "pictures": []}


def plan(**changes: Any) -> list[Planned]:
    return planned_runs(Study(**SMALL | changes), {})


def test_every_combination_is_planned_and_all_cells_of_a_seed_come_first() -> None:
    grid = [
        {"start": {"a": {}, "b": {"parent": {"lr": 0.1}}}, "method": {"sgd": {"evolution": {"strategy": "none"}}}},
        {"start": {"a": {}}, "method": {"es": {"evolution": {"sigma": 0.5}}}},
    ]
    runs = planned_runs(Study(**SMALL | NO_MORE | {"grid": grid, "seeds": [3, 1]}), {"run": {"epochs": 7}})
    assert [(run.group, run.method, run.seed) for run in runs] == [
        (group, method, seed) for seed in (3, 1) for group, method in (("a", "sgd"), ("b", "sgd"), ("a", "es"))
    ]
    assert [run.config.parent.lr for run in runs[:3]] == [0.01, 0.1, 0.01]
    assert {run.config.run.seed for run in runs[:3]} == {3}
    assert {run.config.run.epochs for run in runs} == {7}
    assert runs[2].config.evolution.sigma == 0.5


def test_the_key_of_a_run_is_of_what_changes_its_numbers() -> None:
    key = plan()[0].key
    assert [run.key for run in plan()[::2]] == [key, key]  # the same for every seed
    assert planned_runs(Study(**SMALL), {"run": {"out": "x"}, "cluster": {"workers": 7}})[0].key == key
    assert planned_runs(Study(**SMALL), {"data": {"root": "elsewhere"}})[0].key == key
    assert planned_runs(Study(**SMALL), {"parent": {"lr": 0.02}})[0].key != key
    assert planned_runs(Study(**SMALL), {"cluster": {"cpus_per_worker": 2}})[0].key != key
    others = [planned_runs(Study(**SMALL), {"parent": {"weights": path}})[0].key for path in ("a/x", "b/x", "c/a/x")]
    assert len({key, *others}) == 3
    assert others[0] == others[2]  # the same file in another checkout


@pytest.mark.parametrize(
    ("changes", "wrong"),
    [
        ({"sedes": 3}, "study.sedes: unknown field"),
        ({"seeds": 0}, "study.seeds: "),
        ({"grid": []}, "study.grid: "),
        ({"claims": [{"says": "x"}]}, "claims.group: "),
        ({"grid": [{"method": {"es": {"evolution": {"sigma": -1}}}}]}, "es: evolution.sigma: "),
        ({"grid": [{"method": {"es": {"evolution": 3}}}]}, "es: evolution: expected fields"),
        ({"grid": [{"method": {"es": {}}}, {"method": {"es": {}}}]}, "es: appears twice"),
        ({"base": {"config": "nothing"}}, "scratch.sgd: --config nothing: no such preset"),
        ({"seeds": []}, "study.seeds: "),
        ({"seeds": [1, 1]}, r"study.seeds: \[1, 1\] has a duplicate"),
        ({"grid": [{}]}, "study.grid: an axis without settings"),
        ({"grid": [{"method": {"a.b": {}}}]}, "study.grid: 'a.b': letters"),
        ({"baselines": ["sdg"]}, r"baselines: sdg: no such way in scratch \(perhaps sgd"),
        ({"claims": [{"says": "", "group": "x", "way": "es"}]}, "claims: x: no such group"),
        ({"base": {"run": {"seed": 3}}}, "study: run.seed: a study gives each run its own"),
        ({"grid": [{"method": {"es": {"run": {"out": "x"}}}}]}, "study: run.out: a study gives each run its own"),
        (
            {"grid": [{"method": {"a": {}, "b": {"cluster": {"address": "auto"}}}}]} | NO_MORE,
            "cluster.address: differs between the cells: ",
        ),
        ({"baselines": ["es, average"]}, "baselines: es, average: no such way in scratch"),  # es has no parent.average
        ({"baselines": ["es", "sgd, stopped early"]}, "baselines: sgd, stopped early: no such way"),  # only the first
        (
            {"pictures": [SMALL["pictures"][0] | {"methods": ["sgd, average"]}]},
            "pictures: sgd, average: no such method in scratch",
        ),
    ],
)
def test_what_cannot_be_used_is_named(changes: dict[str, Any], wrong: str) -> None:
    with pytest.raises(InputError, match=f"^{wrong}"):
        plan(**changes)


def test_a_file_that_is_no_study_is_named(tmp_path: Path) -> None:
    path = tmp_path / "study.yaml"
    for text, wrong in (("- 1", "expected fields, got list"), ("a: [", "not YAML"), ("seeds: x", "study.grid: ")):
        path.write_text(text)
        with pytest.raises(InputError, match=f"^{path}: {wrong}"):
            load_study(path)


def test_intervals_are_those_of_the_t_test() -> None:
    a, b = [0.51, 0.55, 0.53, 0.56, 0.52], [0.50, 0.51, 0.53, 0.52, 0.53]
    expected: Any = stats.ttest_1samp(a, 0).confidence_interval(0.95)
    found = interval(a)
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(expected))
    frame = pd.DataFrame(
        [{"group": "g", "way": way, "seed": seed, "test_accuracy": value}
         for way, values in (("a", a), ("b", b[::-1])) for seed, value in enumerate(values)]
    )  # fmt: skip
    frame.loc[frame["way"] == "b", "seed"] = [4, 3, 2, 1, 0]  # values are paired by seed, not by position
    paired: Any = stats.ttest_rel(a, b).confidence_interval(0.95)
    by_seed = differences(frame, "g", "a", "b", "test_accuracy")
    found, wins = interval(by_seed), int((by_seed > 0).sum())
    assert (found.mean - found.half, found.mean + found.half) == pytest.approx(tuple(paired))
    assert (wins, found.count) == (3, 5)
    assert interval([1.0]).text(1) == "1.0"
    assert interval([]).text(1) == "-"
    assert Interval(0.0123, 0.004, 5).text(2, 100.0, sign=True) == "+1.23 ± 0.40"


@pytest.mark.parametrize(
    ("values", "expects", "found"),
    [([1, 1.1, 0.9], "higher", "confirmed"), ([1, 1.1, 0.9], "lower", "contradicted"),
     ([1, -1, 2], "higher", "undecided"), ([-1, -1.1, -0.9], "lower", "confirmed"), ([1], "higher", "undecided"),
     ([1, 1.1, 0.9], "not higher", "contradicted"), ([1, -1, 2], "not higher", "not contradicted")],
)  # fmt: skip
def test_a_claim_is_confirmed_where_its_interval_excludes_zero(values: list[float], expects: Any, found: str) -> None:
    frame = pd.DataFrame({"group": "g", "way": "a", "seed": range(len(values)), "phase_train_loss": values})
    claim = Claim(says="", group="g", way="a", measure="phase_train_loss", expects=expects)
    assert verdict(frame, claim)[0] == found


@pytest.mark.parametrize(
    ("b", "c", "found"),
    [([0, 0, 0.1], [0.1, 0, 0], "confirmed"), ([0, 0, 0.1], [3, 0, 0], "undecided"),
     ([0, 0, 0.1], [2, 2.1, 2.2], "contradicted")],
)  # fmt: skip
def test_the_highest_is_above_every_other(b: list[float], c: list[float], found: str) -> None:
    values = {"a": [1, 1.1, 1.2], "b": b, "c": c}
    frame = pd.DataFrame(
        [{"group": "g", "way": way, "seed": seed, "test_accuracy": value}
         for way, of_way in values.items() for seed, value in enumerate(of_way)]
    )  # fmt: skip
    assert verdict(frame, Claim(says="", group="g", way="a", over=["b", "c"]))[0] == found


def test_few_seeds_and_chance_among_many_ways_decide_nothing() -> None:
    def found(values: dict[str, list[float]], over: list[str], expects: Any = "higher") -> str:
        frame = pd.DataFrame(
            [{"group": "g", "way": way, "seed": seed, "test_accuracy": value}
             for way, of_way in values.items() for seed, value in enumerate(of_way)]
        )  # fmt: skip
        return verdict(frame, Claim(says="", group="g", way="a", over=over, expects=expects))[0]

    assert found({"a": [1], "b": [2]}, ["b"]) == "undecided"
    assert found({"b": [2, 2]}, ["b"], "not higher") == "undecided"
    worse: dict[str, list[float]] = {"a": [0, 0, 0], "b": [0.9, 1.6, 0.8]}  # p = 0.05 / 1.2
    assert interval([-0.9, -1.6, -0.8]).excludes_zero
    assert found(worse, ["b"]) == "contradicted"
    assert found(worse | {"c": [0, 1, -1]}, ["b", "c"]) == "undecided"


def of_epochs(
    method: str, validation: list[float], evolution: list[float], average: float = np.nan, every: int = 3
) -> pd.DataFrame:
    """Return the rows of a run in which one epoch of `every` is an evolve phase."""
    count = len(validation)
    frame = pd.DataFrame({"epoch": range(1, count + 1), "validation_accuracy": validation})
    frame["evolution_accuracy"] = evolution
    frame["kind"] = ["evolve" if epoch % every == 0 else "sgd" for epoch in frame["epoch"]]
    for name in ("train_loss", "test_loss", "test_accuracy", "validation_loss"):
        frame[name] = np.arange(count) / 10 + (name == "test_loss")
    frame = frame.assign(group="g", method=method, seed=0, trained=100, scored=10, seconds=1.5)
    for name in ("test_accuracy", "test_loss", "validation_accuracy", "validation_loss"):
        frame[f"average_{name}"] = average
    return frame


def test_where_a_run_ended_and_what_it_did_on_the_way() -> None:
    sgd = of_epochs("sgd", [0.1, 0.3, 0.2, 0.5, 0.6, 0.3], [0.1, 0.2, 0.5, 0.4, 0.5, 0.1], average=0.7)
    found = ends(pd.concat([sgd, of_epochs("es", [0.1] * 6, [0.1] * 6)]), "sgd").set_index("way")
    assert list(found.index) == ["sgd", "sgd, average", "sgd, stopped early", "es"]
    end = found.loc["sgd"]
    assert end["test_accuracy"] == 0.5
    assert end["overfitting"] == pytest.approx(1.0)
    assert end["phase_validation_accuracy"] == pytest.approx((-0.1 - 0.3) / 2)
    assert end["phase_train_loss"] == pytest.approx(0.1)
    assert end["turn_of_validation_accuracy"] == pytest.approx((0.6 + 0.3) / 2 - 0.5)  # epochs 5 and 6, and 4
    assert end["late_test_accuracy"] == pytest.approx(0.4)  # epoch 5; 6 is an evolve phase
    assert (end["trained"], end["scored"], end["seconds"]) == (600, 60, 9)
    early = found.loc["sgd, stopped early"]
    assert early["test_accuracy"] == pytest.approx(0.2)  # the first epoch with the highest evolution accuracy
    assert early["trained"] == 300
    assert found.loc["sgd, average", "test_accuracy"] == 0.7
    assert found["overfitting"].isna().tolist() == [False, True, False, False]
    assert found["late_test_accuracy"].isna().tolist() == [False, True, True, False]


def test_late_epochs_are_those_that_are_sgd_in_every_way_of_a_group() -> None:
    sgd, es = of_epochs("sgd", [0.1] * 8, [0.1] * 8, every=9), of_epochs("es", [0.1] * 8, [0.1] * 8, every=4)
    found = ends(pd.concat([sgd, es]), None).set_index("way")
    assert found["late_test_accuracy"].tolist() == [pytest.approx(0.6)] * 2  # epoch 7 of 7 and 8
    found = ends(pd.concat([sgd, es.assign(group="other")]), None).set_index("way")
    assert found["late_test_accuracy"].tolist() == [pytest.approx(0.65), pytest.approx(0.6)]


def test_a_picture_draws_the_means_of_the_seeds_with_their_interval(tmp_path: Path) -> None:
    runs = [
        of_epochs(method, [gain, gain + 0.1, gain + 0.4], [0.1] * 3).assign(seed=seed)
        for method, gains in (("sgd", (0.1, 0.2)), ("es", (0.4, 0.4)))
        for seed, gain in enumerate(gains)
    ]
    picture = Picture(name="x", group="g", methods=["sgd", "none", "es"], measure="validation_accuracy")
    axes = draw(pd.concat(runs), picture, tmp_path / "x.png")
    sgd, es = axes.lines
    assert [line.get_label() for line in axes.lines] == ["sgd (2 seeds)", "es (2 seeds)"]
    assert sgd.get_xdata().tolist() == [1, 2, 3]  # type: ignore[union-attr]
    np.testing.assert_allclose(np.array(sgd.get_ydata()), [0.15, 0.25, 0.55])
    np.testing.assert_allclose(np.array(es.get_ydata()), [0.4, 0.5, 0.8])
    band, dots = axes.collections[:2]
    half = interval([0.1, 0.2]).half
    heights = np.unique(np.asarray(band.get_paths()[0].vertices)[:, 1].round(9))
    assert {round(mean + sign * half, 9) for mean in (0.15, 0.25, 0.55) for sign in (-1, 1)} <= set(heights)
    np.testing.assert_allclose(np.array(dots.get_offsets()), [[3, 0.55]])
    assert (tmp_path / "x.png").stat().st_size > 10_000


def rows_of(study: Study, folder: Path, interrupt_after: int | None = None) -> Rows:
    """Do the missing runs of a study and return its rows. Raise KeyboardInterrupt after `interrupt_after` runs."""
    runs, rows = planned_runs(study, {}), Rows(folder / "rows.csv")
    missing = [run for run in runs if not rows.has(run)]
    ended: list[Planned] = []

    def add(run: Planned, place: Path) -> None:
        rows.add(run, read_run(place), place)
        ended.append(run)
        if len(ended) == interrupt_after:
            raise KeyboardInterrupt

    assert Runner(folder / "runs", study.at_once, add, print).run(missing) == []
    return rows


def test_an_interrupted_study_goes_on_to_the_same_rows(local_ray: None, tmp_path: Path) -> None:
    study = Study(**SMALL)
    with pytest.raises(KeyboardInterrupt):
        rows_of(study, tmp_path / "broken", interrupt_after=1)
    assert sum(Rows(tmp_path / "broken" / "rows.csv").has(run) for run in planned_runs(study, {})) == 1
    broken = rows_of(study, tmp_path / "broken")
    whole = rows_of(study, tmp_path / "whole")
    runs = planned_runs(study, {})
    found, expected = (frame.of(runs).drop(columns="seconds") for frame in (broken, whole))
    pd.testing.assert_frame_equal(found, expected)
    assert len(found) == 16
    assert found["weights"].nunique() == 4
    # The tables need only the file of rows.
    read = Rows(tmp_path / "whole" / "rows.csv")
    assert write_up(study, runs, read.of(runs), "x") == write_up(study, runs, whole.of(runs), "x")
    assert rows_of(study, tmp_path / "whole", interrupt_after=1).frame.equals(whole.frame)  # nothing to do


def test_a_run_that_diverges_is_told_and_the_others_go_on(local_ray: None, tmp_path: Path) -> None:
    methods = {"bad": {"parent": {"lr": 1e20}}, "sgd": {}}
    base = SMALL["base"] | {"evolution": {"strategy": "none"}, "run": {"epochs": 2}}
    study = Study(**SMALL | {"base": base, "grid": [{"method": methods}], "seeds": 1} | NO_MORE)
    ended: list[str] = []
    one = Runner(tmp_path, 2, lambda run, place: ended.append(f"{run.method} {place.name}"), print)
    (failed,) = one.run(planned_runs(study, {}))
    assert failed.startswith("all.bad-0-")
    assert "the network diverged in epoch 1" in failed
    assert [line.split("-")[0] for line in ended] == ["sgd all.sgd"]

    def unreadable(run: Planned, place: Path) -> None:
        ended.append(run.method)
        if run.seed == 0:
            raise InputError("metrics.jsonl: line 1 is not JSON")

    two = Study(**SMALL | {"base": base, "grid": [{"method": {"sgd": {}}}], "seeds": 2} | NO_MORE)
    (failed,) = Runner(tmp_path, 1, unreadable, print).run(planned_runs(two, {}))
    assert failed.endswith("metrics.jsonl: line 1 is not JSON")
    assert ended[1:] == ["sgd", "sgd"]


@pytest.mark.parametrize(
    ("nodes", "count"),
    [([{"CPU": 2}], 2), ([{"CPU": 1}], 1), ([{"CPU": 8, "GPU": 1}], 1), ([{"CPU": 8, "GPU": 2}], 1),
     ([{"CPU": 8, "GPU": 3}], 2), ([{"CPU": 8, "GPU": 1}] * 3, 2)],
)  # fmt: skip
def test_so_many_runs_go_at_a_time_as_have_room(
    nodes: list[dict[str, float]], count: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runner, "grows", lambda: False)
    monkeypatch.setattr(runner, "nodes_here_first", lambda: [{"Resources": node} for node in nodes])
    assert runner.fit_together(Cluster(workers=1), most=2) == count


def test_the_command_writes_tables_without_the_runs(local_ray: None, tmp_path: Path) -> None:
    study, folder = Study(**SMALL | {"seeds": 1}), tmp_path / "small"
    (tmp_path / "small.yaml").write_text(yaml.safe_dump(SMALL | {"seeds": 1}, sort_keys=False))
    rows = Rows(folder / "rows.csv")
    folder.mkdir()
    for run in planned_runs(study, {}):
        if run.method == "sgd":
            place, _ = run_here(run.config.model_copy(update={"run": run.config.run.model_copy(
                update={"out": str(tmp_path / "runs"), "name": "x"})}))  # fmt: skip
            rows.add(run, read_run(place), place)
    code, out, _ = command("study", "small.yaml", "--tables", cwd=tmp_path)
    assert code == 0
    assert "1 of 2 runs are done: small" in out
    text = (folder / "README.md").read_text()
    assert "1 of 2 runs: 2 cells of 1 seeds" in text
    assert "| sgd, stopped early | 1 |" in text
    assert (
        "| It helps. | scratch, es: test accuracy, %: - over sgd; - over sgd, average | 0 of 1 | so far undecided |"
        in text
    )
    assert (folder / "accuracy.png").stat().st_size > 10_000
    assert command("study", "small.yaml", "--tables", cwd=tmp_path)[0] == 0
    assert (folder / "README.md").read_text() == text
    code, out, _ = command("study", "small.yaml", "--tables", "--parent.lr", "0.5", cwd=tmp_path)
    assert "0 of 2 runs are done" in out  # rows of other settings do not count, and are kept
    assert command("study", "small.yaml", "--tables", cwd=tmp_path)[0] == 0
    assert (folder / "README.md").read_text() == text
    (tmp_path / "bad.yaml").write_text(yaml.safe_dump(SMALL | {"baselines": ["sdg"]}, sort_keys=False))
    refused = command("study", "bad.yaml", "--tables", cwd=tmp_path)
    assert refused == (2, "", "spartan: bad.yaml: baselines: sdg: no such way in scratch (perhaps sgd?)\n")
    for flags, wrong in (
        (("--run.seed", "3"), "--run.seed: a study gives each run its own"),
        (("--parent.weights", "none.pt"), "scratch.sgd: parent.weights"),
    ):
        refused = command("study", "small.yaml", *flags, cwd=tmp_path)
        assert (refused[0], refused[2][: len(wrong) + 9]) == (2, f"spartan: {wrong}")
    (folder / "rows.csv").write_text("a,b\n1,2\n")
    refused = command("study", "small.yaml", "--tables", cwd=tmp_path)
    assert refused == (2, "", "spartan: small/rows.csv: no rows of a study: column group is missing\n")


def test_pure_noise_moves_the_parent_by_so_much_of_a_mutation() -> None:
    network = nn.Linear(3, 2)
    before_D = nn.utils.parameters_to_vector(network.parameters()).detach().clone()
    with Population(network, lambda network, case_N: network(torch.ones(len(case_N), 3)).sum(1), cases=4) as population:
        outcome = population.step(PureNoise(sigma=0.2, step_ratio=0.25))
    moved_D = (nn.utils.parameters_to_vector(network.parameters()).detach() - before_D).numpy()
    seed = int(outcome.members.seed_K[0])
    np.testing.assert_allclose(moved_D, 0.05 * noise("uniform", seed, 0, 8), atol=1e-6)
    assert outcome.accepted == 1
    with pytest.raises(InputError, match="step_ratio"):
        PureNoise(step_ratio=0)
