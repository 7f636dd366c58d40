"""`spartan scale`: nested populations of one parent, whose members are scored once."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from local import scored
from test_results import digest_in
from whole_runs import command, run_here

from spartan_ray.engine.strategies.shaping import zscore
from spartan_ray.errors import InputError
from spartan_ray.noise.contract import member_seeds, noise
from spartan_ray.report.plots import digest
from spartan_ray.run.config import Config, Evolution, Run
from spartan_ray.study import scale_tables
from spartan_ray.study.scale import ScaleRows, Scaling, Way
from spartan_ray.vision.config import Data, Parent

WAYS = {
    "common": Way(64, sigma=0.02),
    "own": Way(32, own=True, sigma=0.02),
    "BatchNorm": Way(64, mutate="batchnorm", sigma=0.1),
    "trajectory": Way(64, subspace="trajectory:2", sigma=0.5),
    "of the average": Way(32, own=True, of_average=True, sigma=0.02),
}


def trained(out: Path, name: str = "run", seed: int = 0, sgd_on_evolution: bool = False) -> Path:
    """Return the folder of an SGD run that has kept three epochs."""
    config = Config(
        run=Run(out=str(out), name=name, seed=seed, epochs=3),
        data=Data(name="digits", sgd_images=400, evolution_images=300, sgd_on_evolution=sgd_on_evolution),
        parent=Parent(model="convnet", threads=1, lr=0.05, batch_size=32),
        evolution=Evolution(strategy="none"),
    )
    return run_here(config)[0]


@pytest.fixture(scope="module")
def parent(local_ray: None, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(tmp_path_factory.mktemp("scale"))


def test_parents_share_a_file_and_levels_are_those_of_their_seed(local_ray: None, parent: Path, tmp_path: Path) -> None:
    runs = parent, trained(tmp_path, seed=1), trained(tmp_path, "both-1", seed=1, sgd_on_evolution=True)
    rows = ScaleRows(tmp_path / "rows.jsonl")
    first, second, level = (Scaling(run, rows, [4], 1, print) for run in runs)
    rows.refuse_others([first, second])
    first.baselines()
    second.baselines([level])
    again = ScaleRows(tmp_path / "rows.jsonl")
    again.read()
    own = ["parent", "average of 2 epochs", "average of 3 epochs", "greedy soup of 3 epochs"]
    ways = [(row["seed"], row["way"]) for row in again.rows]
    both = [(1, "both"), (1, "both, average of 3 epochs")]
    assert ways == [(0, way) for way in own] + [(1, way) for way in own] + both
    assert again.rows[-1]["weights"] == second.about["weights"]
    result = scored(level.network, second.splits.test, level.normalise)
    assert again.rows[-2]["test_loss"] == pytest.approx(result.loss, rel=1e-5)
    second.baselines([level])
    assert len(rows.rows) == len(again.rows)
    known = level.about["weights"]
    level.about["weights"] = "trained again"
    second.baselines([level])
    assert [row["made"] for row in rows.rows[len(again.rows) :]] == ["trained again"] * 2
    # What is asked for again is what tables show, though no row is missing.
    level.about["weights"] = known
    second.baselines([level])
    assert [row["made"] for row in rows.rows[-4:]] == ["trained again"] * 2 + [known] * 2
    other = rows.rows[0] | {"weights": "other", "made": "other"}
    rows.add(other)
    first.baselines()
    assert rows.rows[-1]["weights"] == first.about["weights"]
    assert rows.rows.index(other) < len(rows.rows) - 4
    assert len(rows.rows) == len(again.rows) + 3
    again.read()
    assert again.rows == rows.rows
    level.name = "parent-1"
    with pytest.raises(InputError, match="--levels parent-1: the name 'parent' is taken"):
        second.baselines([level])
    refused = command("scale", str(runs[0]), "--levels", str(runs[2]), cwd=tmp_path)
    assert refused == (2, "", "spartan: --levels both-1: no parent has its run.seed (1)\n")


def test_parents_of_another_configuration_are_not_mixed(parent: Path, tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROWS[0]) + "\n")
    rows = ScaleRows(tmp_path / "rows.jsonl")
    one = Scaling(parent, rows, [4], 1, print)
    rows.refuse_others([one])  # nothing is read yet
    rows.read()
    with pytest.raises(InputError, match=rf"{parent.name} differs in configuration .* not k\)"):
        rows.refuse_others([one])
    pruned = shutil.copytree(parent, tmp_path / "pruned")
    for path in (pruned / "checkpoints").glob("epoch-000001.*"):
        path.unlink()
    with pytest.raises(InputError, match=r"pruned differs in configuration or run\.keep"):
        ScaleRows(tmp_path / "other.jsonl").refuse_others([one, Scaling(pruned, rows, [4], 1, print)])


def scaled(parent: Path, folder: Path, ways: dict[str, Way] = WAYS, populations: tuple[int, ...] = (4, 8)) -> Scaling:
    folder.mkdir(exist_ok=True)
    rows = ScaleRows(folder / "rows.jsonl")
    rows.read()
    scaling = Scaling(parent, rows, list(populations), draws=2, say=lambda text: None)
    scaling.baselines()
    for name, way in ways.items():
        scaling.way(name, way, "local")
    return scaling


def test_a_smaller_population_is_a_part_of_the_larger_one_and_its_update_the_formula_s(
    local_ray: None, parent: Path, tmp_path: Path
) -> None:
    scaling = scaled(parent, tmp_path, {"common": WAYS["common"]})
    rows = pd.DataFrame(scaling.rows.rows)
    found = rows[rows["fitness"].notna()]
    assert [tuple(row) for row in found[["population", "draw", "fitness"]].values] == [
        (count, draw, fitness)
        for count, draws in ((4, 2), (8, 1))
        for draw in range(draws)
        for fitness in ("loss", "accuracy")
    ]
    (path,) = tmp_path.glob("scores/*.npy")
    mean_KM, size = np.load(path), int(found["parameters"].iloc[0])
    seed_K = np.repeat(member_seeds(0, 1, 4), 2)
    noise_KD = np.stack([noise("uniform", int(seed), 0, size) for seed in seed_K]) * np.array([1, -1] * 4)[:, None]
    theta_D = scaling.thetas[-1].numpy()
    for row in found[found["length"] > 0].to_dict("records"):
        count, draw = int(row["population"]), int(row["draw"])
        part = slice(draw * count, (draw + 1) * count)
        weight_K = zscore(mean_KM[part, ["loss", "accuracy"].index(row["fitness"])])
        update_D = (weight_K[:, None] * noise_KD[part]).sum(0)
        update_D *= 0.02 * np.sqrt(size / 3) / np.linalg.norm(update_D)
        scaling.model.theta_D.copy_(torch.from_numpy((theta_D + row["length"] * update_D).astype(np.float32)))
        result = scored(scaling.network, scaling.splits.test, scaling.normalise)
        assert result.loss == pytest.approx(row["test_loss"], abs=2e-3)
        lengths, rest = divmod(row["images"] - count * 64, 150)
        assert rest == 0
        assert 9 <= lengths <= 17
        assert row["cosine_expected"] == pytest.approx(np.sqrt(row["population"] / 2 / size))
    assert (found["length"] > 0).any()


def test_what_is_there_is_not_done_again_and_what_was_interrupted_goes_on(
    local_ray: None, parent: Path, tmp_path: Path
) -> None:
    whole = scaled(parent, tmp_path / "whole").rows.rows
    assert {row["way"] for row in whole if "fitness" in row} == WAYS.keys()
    scaled(parent, tmp_path / "broken", {"own": WAYS["own"]}, populations=(4,))
    lines = (tmp_path / "broken" / "rows.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "broken" / "rows.jsonl").write_text("".join(lines[:-1]))
    key = ["way", "population", "draw", "fitness"]
    broken = pd.DataFrame(scaled(parent, tmp_path / "broken").rows.rows).sort_values(key)
    expected = pd.DataFrame(whole).sort_values(key)
    pd.testing.assert_frame_equal(broken.reset_index(drop=True), expected.reset_index(drop=True), check_like=True)
    assert scaled(parent, tmp_path / "whole").rows.rows == whole


def test_the_command_says_what_it_cannot_use_and_writes_tables_of_rows(parent: Path, tmp_path: Path) -> None:
    for arguments, wrong in (
        (("--populations", "5"), "--populations 5: must be even, for mirrored pairs, and at least 2"),
        (("--draws", "0"), "--draws 0: must be at least 1"),
        (("--tables",), "-o scale: has no rows.jsonl yet"),
        (("--ways", "none"), "--ways 'none': one of all-common-512, "),
        (("--draws", "1"), "nowhere: not a run folder"),
    ):
        code, _, err = command("scale", "nowhere", *arguments, cwd=tmp_path)
        assert (code, err[: len(wrong) + 9]) == (2, f"spartan: {wrong}")
    wanted = "all-common-512: 512 common images and 150 to search a length do not fit data.evolution_images (300)"
    code, _, err = command("scale", str(parent), cwd=tmp_path)
    assert (code, err) == (2, f"spartan: {parent.name}: {wanted}: choose other --ways\n")
    assert command("scale", cwd=tmp_path)[2] == "spartan: scale: name a run, or give --tables\n"
    assert not (tmp_path / "scale").exists()
    (tmp_path / "scale").mkdir()
    (tmp_path / "scale" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS[:4]))
    assert command("scale", "--tables", cwd=tmp_path)[0] == 0  # an interrupted study without an update
    (tmp_path / "scale" / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert command("scale", "--tables", cwd=tmp_path)[0] == 0
    text = (tmp_path / "scale" / "README.md").read_text()
    assert text == scale_tables.write_up(pd.DataFrame(ROWS), "scale")
    assert (tmp_path / "scale" / "accuracy.png").stat().st_size > 10_000


def row(weights: str, draw: int, gain: float, population: int = 50) -> dict[str, Any]:
    measures = {f"{on}_{what}_before": 0.5 for on in ("scored", "unscored", "test") for what in ("loss", "accuracy")}
    measures |= {f"{on}_{what}": 0.5 + gain for on in ("scored", "unscored", "test") for what in ("loss", "accuracy")}
    about = {
        "weights": weights,
        "seed": "ab".index(weights),
        "epoch": 3,
        "key": "k",
        "way": "all",
        "made": "w",
        "population": population,
        "draw": draw,
        "fitness": "accuracy",
        "images": 100_000,
    }
    return about | measures | {"cosine": 0.02, "cosine_expected": 0.04, "length": 1.0}


ROWS = [
    *({"weights": name, "seed": "ab".index(name), "epoch": 3, "key": "k", "way": way,
       "made": name, "test_loss": loss, "test_accuracy": accuracy}
      for way, loss, accuracy in (("parent", 2.0, 0.5), ("average of 2 epochs", 1.5, 0.6)) for name in "ab"),
    row("a", 0, 0.01), row("a", 1, 0.03), row("b", 0, 0.02), row("b", 1, 0.06),
]  # fmt: skip


def test_tables_are_of_the_means_of_draws() -> None:
    rows = pd.DataFrame([*ROWS, row("a", 0, 0.05, 100), row("b", 0, 0.05, 100)])
    text = scale_tables.write_up(rows, "x")
    # The gains of the parents are 2 and 4 points. Their mean is 3, with a half width of 12.706 * sqrt(2) / sqrt(2). The
    # standard deviations of the draws are 1.41 and 2.83 points.
    line = "| all | 50 | 2 | 0.10 | +3.00 ± 12.71 | +3.00 ± 12.71 | +3.00 ± 12.71 |  | +0.030 ± 0.127 | 2.24 |"
    assert f"{line} +0.0200 | +0.50 | +30.00 |" in text
    # With 100 members both gain 5 points, 3 and 1 more.
    more = "**+5.00 ± 0.00** | **+5.00 ± 0.00** | **+5.00 ± 0.00** | +2.00 ± 12.71 |"
    assert f"| all | 100 | 2 | 0.10 | {more}" in text
    assert "| average of 2 epochs | 60.00 ± 0.00 | **+10.00 ± 0.00** | 1.500 ± 0.000 | **-0.500 ± 0.000** |" in text
    assert "over 2 parents" in text
    # A parent that was trained further replaces the earlier parent of its seed.
    older = [entry | {"weights": "older", "epoch": 2} for entry in ROWS if entry["weights"] == "a"]
    assert scale_tables.write_up(pd.concat([pd.DataFrame(older), rows, pd.DataFrame(older)]), "x") == text
    # So does one that was trained again, and a way that is made otherwise now.
    other = [entry | {"weights": "other"} for entry in ROWS if entry["weights"] == "a"]
    former = [entry | {"made": "former", "test_accuracy": 0.9} for entry in ROWS]
    assert scale_tables.write_up(pd.concat([pd.DataFrame(former), pd.DataFrame(other), rows]), "x") == text


def test_populations_that_were_scored_later_stand_with_those_of_their_way() -> None:
    rows = pd.DataFrame([*ROWS, row("a", 0, 0.02) | {"way": "other"}, row("a", 0, 0.05, 100)])
    lines = scale_tables.table(scale_tables.changes(rows), "accuracy")
    assert list(zip(lines["way"], lines["K"], strict=True)) == [("all", "50"), ("all", "100"), ("other", "50")]


def test_the_picture_shows_gains_over_the_parent_with_its_average_as_a_level(tmp_path: Path) -> None:
    rows = [*ROWS, row("a", 0, 0.04, 100), row("b", 0, 0.06, 100), row("a", 0, 0.9, 200)]  # 200 of one parent only
    rows += [row("a", 0, 0.05, 100) | {"way": "average-all"}]
    rows += [
        entry | {"way": "average-sgd", "made": "c", "test_accuracy": 0.9} for entry in ROWS if entry["way"] == "parent"
    ]
    rows += [entry | {"fitness": "loss"} for entry in rows if "fitness" in entry]
    accuracy, loss = (
        scale_tables.draw(pd.DataFrame(rows), fitness, tmp_path / "x.png") for fitness in ("accuracy", "loss")
    )
    (all_common, of_average, _, level), (less, *_) = accuracy.lines, loss.lines
    labels = ["all", "average of 2 epochs", "average-all", "↑ average-sgd: 40.0"]  # from below
    assert [text.get_text() for text in accuracy.texts] == labels
    colours = [all_common.get_color(), "dimgrey", of_average.get_color(), "dimgrey"]
    assert [text.get_color() for text in accuracy.texts] == colours
    np.testing.assert_allclose(np.array(all_common.get_xydata()), [[50, 3], [100, 5]])
    np.testing.assert_allclose(np.array(of_average.get_xydata()), [[100, 15]])  # the average's own 10 points too
    np.testing.assert_allclose(np.array(level.get_ydata()), [10, 10])
    np.testing.assert_allclose(np.array(less.get_xydata()), [[50, -0.03], [100, -0.05]])  # a rise is no reduction
    assert digest_in(tmp_path / "x.png") == digest(pd.DataFrame(rows))
    (band, *_) = accuracy.collections
    assert sorted(set(np.asarray(band.get_paths()[0].vertices)[:, 1].round(9))) == [2, 4, 6]


def test_a_parent_without_averages_has_tables_too() -> None:
    rows = pd.DataFrame([ROWS[0], row("a", 0, 0.01)])
    text = scale_tables.write_up(rows, "x")
    assert "| parent | 50.00 |  | 2.000 |  |" in text
    assert "| all | 50 | 1 | 0.10 | +1.00 |" in text
