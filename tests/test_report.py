"""Tables, pictures and the page of a report, from records that the tests write."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from matplotlib.text import Annotation
from PIL import Image

from spartan_ray.engine.strategies.requests import Outcome, noisy
from spartan_ray.errors import InputError
from spartan_ray.report.page import write_report
from spartan_ray.report.plots import COLOURS, INK, NARROW, PAGE, bins, label_lines, other_images
from spartan_ray.report.reading import images_forwarded, read_run, unique_frames
from spartan_ray.report.settings import changed, differing
from spartan_ray.report.tables import evolve_table, final_table, markdown
from spartan_ray.run.config import Config, Evolution, Run
from spartan_ray.run.journal import write_journal
from spartan_ray.run.loading import dump_config
from spartan_ray.run.record import phase_row


def write_run(folder: Path, accuracies: list[float], evolve: dict[int, bool]) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(dump_config(Config()))
    (folder / "environment.json").write_text(json.dumps({"versions": {"torch": "1"}, "processor": "<b>chip</b>"}))
    rows = []
    for epoch, accuracy in enumerate(accuracies, 1):
        row: dict[str, Any] = {"epoch": epoch, "kind": "sgd", "train_loss": 1 / epoch, "seconds": 1.0}
        row |= {"validation_accuracy": accuracy, "test_accuracy": accuracy - 0.1, "test_loss": 0.5}
        row |= {"evaluation_seconds": 0.5, "images_per_second": 10.0}
        if epoch in evolve:
            row |= {"kind": "evolve", "accepted": evolve[epoch], "note": None if evolve[epoch] else "all equal"}
            row |= {"population": 50, "fitness_images": 9, "fitness_mean": -1.0, "fitness_max": -0.9}
            row |= {"parent_fitness_before": -1.0, "parent_fitness_after": -0.8, "step_ratio": 0.7}
            row |= {"scoring_seconds": 2.0, "update_seconds": 0.1, "retries": 0}
        rows.append(row)
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.mark.parametrize(
    ("phases", "said"),
    [
        ([(-1.0, -0.5, True)] * 7 + [(-1.0, -1.5, True)] * 8, "15 moved: 7 better, 8 worse"),
        ([(-1.0, -0.5, True)] * 3 + [(-1.0, -1.0, False)] * 12, "3 of 15 moved: 3 better"),
        ([(-1.0, -1.5, False)], "0 of 1 moved"),
        (
            [(0.5, 0.5, True), (0.5, None, True), (None, 0.5, True), (None, None, True)],
            "4 moved: 1 better, 1 worse, 2 equal",
        ),
    ],
)
def test_a_table_says_what_the_phases_made_of_the_parent(
    tmp_path: Path, phases: list[tuple[float | None, float | None, bool]], said: str
) -> None:
    """The fitness is that on the images that scored the members. A fitness that is not finite is the lowest."""
    folder = write_run(tmp_path / "x", [0.5] * len(phases), {n: moved for n, (_, _, moved) in enumerate(phases, 1)})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row, (before, after, _) in zip(rows, phases, strict=True):
        row |= {"parent_fitness_before": before, "parent_fitness_after": after}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (row,) = final_table({"x": read_run(folder).metrics}).to_dict("records")
    assert row["evolve phases"] == said


def test_final_table_takes_the_test_accuracy_where_validation_is_best(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "x", [0.5, 0.9, 0.7], {2: True, 3: False}))
    (row,) = final_table({"x": run.metrics}).to_dict("records")
    assert row["test accuracy"] == "0.6000"
    assert row["best validation"] == "0.9000 (epoch 2)"
    assert row["test accuracy there"] == "0.8000"
    assert row["evolve phases"] == "1 of 2 moved: 1 better"
    assert row["seconds"] == "4"
    phases = evolve_table({"x": run.metrics}).to_dict("records")
    assert [phase["moved"] for phase in phases] == ["better", "no: all equal"]
    assert not {"confirm before", "images saved", "images discarded", "gradient, s"} & phases[0].keys()


def test_the_report_tells_who_replaced_the_parent_and_what_confirmed_it(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [0.5, 0.9, 0.7], {1: True, 2: True, 3: False})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row, member, count, confirm in zip(
        rows, (7, 9, None), (1, 3, 0), ((-1.5, -1.25), (None, None), (-2.0, -2.5)), strict=True
    ):
        row |= {"chosen_member": member, "accepted_members": count, "images_scored": 300, "images_saved": 100}
        row |= {"confirm_fitness_before": confirm[0], "confirm_fitness_after": confirm[1], "images_discarded": 0}
    rows[0] |= {"search_ratios": [0.0, 0.5, 2.0], "search_fitness": [-1.0, -0.5, None]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    run = read_run(folder)
    phases = evolve_table({"x": run.metrics}).to_dict("records")
    moved = ["better: member 7", "better: 3 members, last: member 9", "no: all equal"]
    assert [phase["moved"] for phase in phases] == moved
    assert [(phase["confirm before"], phase["confirm after"]) for phase in phases] == [
        ("-1.5000", "-1.2500"), ("", ""), ("-2.0000", "-2.5000"),
    ]  # fmt: skip
    assert [phase["images saved"] for phase in phases] == ["25%"] * 3
    assert "images discarded" not in phases[0]
    assert other_images(run.metrics).round(6).values.tolist() == [[1, 0.2, 0.25], [3, 0.2, -0.5]]
    paths = write_report([run], tmp_path / "report")
    assert {"step_search.png", "confirmed.png"} <= {path.name for path in paths}
    page = (tmp_path / "report" / "report.html").read_text()
    assert "Search along the update" in page
    assert "Scored and confirmed" in page


def test_a_search_tells_the_gain_on_images_that_did_not_choose_the_direction(tmp_path: Path) -> None:
    """The gain is measured at the length that was taken. A phase that does not move the parent has no gain."""
    folder = write_run(tmp_path / "x", [0.5, 0.9], {1: True, 2: False})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    for row in rows:
        row |= {"search_ratios": [0.0, 0.5, 0.7], "search_fitness": [-1.0, -0.25, -0.5]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = other_images(read_run(folder).metrics)
    assert found.round(6).values.tolist() == [[1, 0.2, 0.5]]


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"search_ratios": [0.0], "search_fitness": []}, "must have the same length"),
        ({"search_ratios": [], "search_fitness": []}, "must have the same length"),
        ({"search_ratios": [0.0]}, "must have the same length"),
        ({"average_test_accuracy": 0.5}, "average_test_accuracy without average_validation_accuracy"),
        (
            {"parents": 4, "parents_fitness_min": 0.1, "parents_fitness_max": 0.2},
            "parents without parents_fitness_mean",
        ),
    ],
)
def test_a_record_with_half_of_what_belongs_together_is_refused(
    tmp_path: Path, fields: dict[str, Any], said: str
) -> None:
    folder = write_run(tmp_path / "x", [0.5], {1: True})
    row = json.loads((folder / "metrics.jsonl").read_text()) | fields
    (folder / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(InputError, match=rf"metrics\.jsonl: line 1: .*{said}"):
        read_run(folder)


def test_names_and_notes_are_text_in_the_report_and_its_charts(tmp_path: Path) -> None:
    name, note = r"x$\bad$ <b>|", "a | b\n<img src=x onerror=alert(1)>"
    folder = write_run(tmp_path / name, [0.5, 0.6], {2: False})
    rows = (folder / "metrics.jsonl").read_text().replace('"all equal"', json.dumps(note))
    (folder / "metrics.jsonl").write_text(rows)
    runs = [read_run(folder), read_run(write_run(tmp_path / "y", [0.5], {}))]
    paths = write_report(runs, tmp_path / "report")
    texts = [path.read_text() for path in paths if path.suffix in (".md", ".html")]
    assert len(texts) == 2
    for text in texts:
        assert "<img src=x" not in text
        assert "<b>|" not in text
    assert "| no: a \\| b &lt;img src=x onerror=alert(1)> |" in (tmp_path / "report" / "report.md").read_text()


def test_images_forwarded_are_those_of_gradients_and_of_scores(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [0.5, 0.9], {2: True})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    rows[1] |= {"images_scored": 300, "images_saved": 100, "images_discarded": 50}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    trained, scored = images_forwarded(read_run(folder).metrics)
    assert (trained.tolist(), scored.tolist()) == ([10, 0], [0, 350])


def test_the_page_shows_how_the_members_of_each_phase_scored(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [0.5, 0.9, 0.6], {1: True, 3: True})
    assert read_run(folder, journals=True).members == {}
    members = noisy(np.arange(4, dtype=np.uint64), 0.0, 1.0)
    fitness_K = np.array([-1.0, -0.5, math.nan, -0.25])
    (folder / "journal").mkdir()
    write_journal(folder / "journal", 3, Outcome(members, fitness_K, np.full(4, 9), np.zeros(4), -1.0, -0.5), "a", "b")
    run = read_run(folder, journals=True)
    assert list(run.members) == [3]
    np.testing.assert_array_equal(run.members[3], fitness_K)
    paths = write_report([run], tmp_path / "report")
    assert "members-1-x.png" in [path.name for path in paths]
    assert "Fitness of the members" in paths[-1].read_text()
    (folder / "journal" / "000003.npz").write_bytes(b"torn")
    with pytest.raises(InputError, match=r"000003\.npz: not a journal"):
        read_run(folder, journals=True)


def test_settings_that_differ_stand_out(tmp_path: Path) -> None:
    runs = []
    for name, config in (
        ("a", Config()),
        ("b", Config(run=Run(name="b", seed=3), evolution=Evolution(population=200, step="search"))),
    ):
        folder = write_run(tmp_path / name, [0.5], {})
        (folder / "config.yaml").write_text(dump_config(config))
        runs.append(read_run(folder))
    found = differing({"a": runs[0], "b": runs[1]})
    assert found == {"run.seed": ["0", "3"], "evolution.population": ["50", "200"], "evolution.step": ["lr", "search"]}
    assert changed(runs[0]) == {}
    assert changed(runs[1]) == {"run.seed": "3", "evolution.population": "200", "evolution.step": "search"}
    gradients = write_run(tmp_path / "c", [0.5], {})
    (gradients / "config.yaml").write_text(dump_config(Config(evolution=Evolution(strategy="random-gradients"))))
    assert differing({"a": runs[0], "c": read_run(gradients)})["evolution.accept"] == ["always", "best"]
    page = write_report(runs, tmp_path / "report")[-1].read_text()
    assert "<mark>search</mark>" in page
    assert "<mark>lr</mark>" not in page
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| run | run.seed | evolution.population | evolution.step |\n" in text
    assert "| b | 3 | 200 | search |\n" in text


def test_charts_on_the_page_take_its_colours_and_fit_both_widths(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "x", [0.1, 0.2], {2: False}))
    page = write_report([run], tmp_path / "report")[-1].read_text()
    charts = re.findall(r"<svg.*?</svg>", page, re.DOTALL)
    assert len(charts) == 2 * 5
    for chart in charts:
        opening = chart[: chart.index(">")]
        assert "viewBox" in opening
        assert " width=" not in opening
        assert "currentColor" in chart
        assert INK not in chart
        assert PAGE not in chart
        assert "var(--blue)" in chart
        assert COLOURS[0].lower() not in chart.lower()
    assert "var(--page)" in charts[0]  # the hollow dot of a phase that did not move the parent
    assert "prefers" not in page
    assert "light-dark(" in page


def test_report_is_pictures_a_text_and_a_page_that_needs_nothing(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "a" / "same", [0.1, 0.2], {2: True})),
        read_run(write_run(tmp_path / "b" / "same", [0.3, 0.2], {})),
    ]
    assert list(unique_frames(runs)) == ["same", "same (2)"]
    paths = write_report(runs, tmp_path / "report")
    assert [path.name for path in paths] == [
        "validation_accuracy.png", "test_accuracy.png", "train_loss.png", "overfitting.png", "budget.png", "report.md",
        "report.html",
    ]  # fmt: skip
    for path in paths[:5]:
        with Image.open(path) as picture:
            assert picture.size[0] > 800
    page = paths[6].read_text()
    assert not re.search(r'(src|href)="(?!#)', page)
    assert "@import" not in page
    assert "<b>chip</b>" not in page
    text = paths[5].read_text()
    assert "| same (2) |" in text
    assert "## Evolve phases" in text


def test_the_best_member_of_a_race_is_of_those_that_were_scored_on_all() -> None:
    members = noisy(np.arange(3, dtype=np.uint64), 0.0, 1.0)
    fitness_K, cases_K = np.array([0.9, 0.5, 0.6]), np.array([25, 100, 100])
    outcome = Outcome(members, fitness_K, cases_K, np.zeros(3), 0.0, 0.0, cases=100, seconds={"scoring": 1.0})
    assert phase_row(outcome)["fitness_max"] == 0.6
    assert repr(outcome) == "Outcome(members=3, before=0, after=0, note=None)"


def test_a_report_of_sgd_alone_has_no_evolve_phases(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "sgd", [0.1], {}))
    paths = write_report([run], tmp_path / "report")
    assert "Evolve phases" not in paths[5].read_text()
    assert "Evolve phases" not in paths[6].read_text()
    assert markdown(final_table({"sgd": run.metrics})).splitlines()[2].startswith("| sgd | 1 of 50 | - |")


def test_what_is_no_run_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}: not a run folder: metrics.jsonl: No such file")):
        read_run(tmp_path)
    folder = write_run(tmp_path / "x", [0.5], {})
    with pytest.raises(InputError, match=r"No such file or directory; it holds runs: x$"):
        read_run(tmp_path)
    (folder / "metrics.jsonl").write_text('{"epoch": 1\n')
    with pytest.raises(InputError, match=r"x/metrics.jsonl: line 1 is not JSON"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no epoch has ended"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match="line 1 is no record of an epoch"):
        read_run(folder)


def test_a_run_whose_numbers_are_not_finite_has_a_report(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [0.5, 0.9], {2: True})
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    nothing = ("train_loss", "test_loss", "parent_fitness_before", "parent_fitness_after", "fitness_mean", "step_ratio")
    rows[1] |= dict.fromkeys(nothing) | {"search_ratios": [0.0, None], "search_fitness": [None, None]}
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "journal").mkdir()
    members = noisy(np.arange(2, dtype=np.uint64), 0.0, 1.0)
    outcome = Outcome(members, np.full(2, math.nan), np.full(2, 9), np.zeros(2), math.nan, math.nan)
    write_journal(folder / "journal", 2, outcome, "a", "b")
    runs = [read_run(folder, journals=True), read_run(write_run(tmp_path / "y", [0.5], {}))]
    assert "not finite" in write_report(runs, tmp_path / "report")[-1].read_text()


@pytest.mark.parametrize(
    "values", [[0.5], [0.5, 0.5], list(np.arange(40) / 128), [0.1, 0.25, 7.0], [-1.0, -1.0 + 1e-12, 5.0]]
)
def test_bins_hold_every_value(values: list[float]) -> None:
    edges = bins(np.array(values))
    assert np.histogram(values, bins=edges)[0].sum() == len(values)
    assert len(edges) <= 23


def test_bins_of_multiples_of_a_step_are_equally_many_of_them() -> None:
    value_N = np.arange(50) / 128
    edges = bins(np.tile(value_N, 4))
    count_B = np.histogram(value_N, bins=edges)[0]
    assert set(count_B[:-1]) == {count_B[0]}
    assert count_B[0] >= 2


def test_labels_stand_apart_at_the_ends_of_the_lines() -> None:
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=NARROW[0])
    axes.set_ylim(0, 1)
    ends = {"grid.a": 0.5, "grid.b": 0.51, "grid.with-a-long-name": 0.99, "grid.d": 5.0, "grid.e": math.nan}
    label_lines(axes, {name: (1.0, y, "red") for name, y in ends.items()})
    plt.close(figure)
    places = {text.get_text(): text.xy[1] for text in axes.texts if isinstance(text, Annotation)}
    assert list(places) == ["e", "a", "b", "with-a-long-…", "d"]
    heights = list(places.values())
    assert min(np.diff(heights)) > 0.05
    assert heights[0] >= 0
    assert heights[-1] <= 1
    assert abs(places["a"] - 0.5) < 0.01
