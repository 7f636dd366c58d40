"""Tables, pictures and the page, from records that the test writes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from spartan_ray.engine.strategies.requests import Outcome, noisy
from spartan_ray.errors import InputError
from spartan_ray.report.page import write_report
from spartan_ray.report.reading import read_run, unique_frames
from spartan_ray.report.tables import evolve_table, final_table, markdown
from spartan_ray.run.config import Config
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
    """On the images that scored them; a fitness that was not finite is below all others."""
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
    assert not {"confirm before", "images saved", "images discarded", "gradient s"} & phases[0].keys()


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
    paths = write_report([run], tmp_path / "report")
    assert "step_search.png" in [path.name for path in paths]
    assert "gain in fitness along the update" in (tmp_path / "report" / "report.html").read_text()


def test_report_is_three_pictures_a_text_and_a_page_that_needs_nothing(tmp_path: Path) -> None:
    runs = [
        read_run(write_run(tmp_path / "a" / "same", [0.1, 0.2], {2: True})),
        read_run(write_run(tmp_path / "b" / "same", [0.3, 0.2], {})),
    ]
    assert list(unique_frames(runs)) == ["same", "same (2)"]
    paths = write_report(runs, tmp_path / "report")
    assert [path.name for path in paths] == [
        "train_loss.png", "validation_accuracy.png", "test_accuracy.png", "report.md", "report.html",
    ]  # fmt: skip
    for path in paths[:3]:
        with Image.open(path) as picture:
            assert picture.size[0] > 800
    page = paths[4].read_text()
    assert page.count("data:image/png;base64,") == 3
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "<b>chip</b>" not in page
    text = paths[3].read_text()
    assert "| same (2) |" in text
    assert "## Evolve phases" in text


def test_the_best_member_of_a_race_is_of_those_that_were_scored_on_all() -> None:
    members = noisy(np.arange(3, dtype=np.uint64), 0.0, 1.0)
    fitness_K, cases_K = np.array([0.9, 0.5, 0.6]), np.array([25, 100, 100])
    outcome = Outcome(members, fitness_K, cases_K, np.zeros(3), 0.0, 0.0, cases=100, seconds={"scoring": 1.0})
    assert phase_row(outcome)["fitness_max"] == 0.6


def test_a_report_of_sgd_alone_has_no_evolve_phases(tmp_path: Path) -> None:
    run = read_run(write_run(tmp_path / "sgd", [0.1], {}))
    paths = write_report([run], tmp_path / "report")
    assert "Evolve phases" not in paths[3].read_text()
    assert markdown(final_table({"sgd": run.metrics})).splitlines()[2].startswith("| sgd | 1 of 50 | - |")


def test_what_is_no_run_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=re.escape(f"{tmp_path}/metrics.jsonl: not readable")):
        read_run(tmp_path)
    folder = write_run(tmp_path / "x", [0.5], {})
    (folder / "metrics.jsonl").write_text('{"epoch": 1\n')
    with pytest.raises(InputError, match=r"x/metrics.jsonl: line 1 is not JSON"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text("")
    with pytest.raises(InputError, match="no epoch has ended"):
        read_run(folder)
    (folder / "metrics.jsonl").write_text("[1]\n")
    with pytest.raises(InputError, match="line 1 is no record of an epoch"):
        read_run(folder)
