"""The tables under results/ agree with their rows."""

from __future__ import annotations

import re
from pathlib import Path

import pandas as pd
import pytest
from PIL import Image
from whole_runs import ROOT

from spartan_ray.report.plots import digest
from spartan_ray.study import scale_tables, tables
from spartan_ray.study.plan import load_study, planned_runs
from spartan_ray.study.rows import Rows
from spartan_ray.study.scale import ScaleRows

RESULTS = ROOT / "results"


def digest_in(picture: Path) -> str:
    """Return the digest of the rows that a picture was made from."""
    with Image.open(picture) as image:
        return str(image.info["Rows"])


@pytest.mark.parametrize("file", sorted(RESULTS.glob("article*.yaml")), ids=lambda path: path.stem)
def test_the_tables_of_a_study_are_those_of_its_rows(file: Path) -> None:
    study, folder = load_study(file), file.with_suffix("")
    runs = planned_runs(study, {})
    rows = Rows(folder / "rows.csv")
    if folder.exists():
        assert (folder / "README.md").read_text() == tables.write_up(study, runs, rows.of(runs), folder.name)
        for picture in study.pictures:
            assert digest_in(folder / f"{picture.name}.png") == digest(rows.of(runs))


def test_the_tables_of_scaling_are_those_of_its_rows() -> None:
    folder = RESULTS / "scale"
    scale = ScaleRows(folder / "rows.jsonl")
    scale.read()
    rows, text = pd.DataFrame(scale.rows), (folder / "README.md").read_text()
    assert text == scale_tables.write_up(rows, "scale")
    pictures = re.findall(r"\]\((\w+\.png)\)", text)
    assert [digest_in(folder / name) for name in pictures] == [digest(rows)] * 2
