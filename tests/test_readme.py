"""What the README shows runs."""

from __future__ import annotations

import re
import subprocess
import sys
import textwrap

import methods_table
import pandas as pd
import yaml
from whole_runs import ROOT, environment

from spartan_ray.study.plan import Study, planned_runs


def test_the_readme_s_python_runs_as_it_stands() -> None:
    text = (ROOT / "README.md").read_text()
    blocks = [textwrap.dedent(block) for block in re.findall(r"(?:^    .*\n|^\n)+", text, re.M)]
    (program,) = [block for block in blocks if "import torch, spartan_ray as sr" in block]
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=True
    )
    pairs = [tuple(map(float, line.split())) for line in ended.stdout.splitlines()]
    assert len(pairs) == 5
    assert all(len(pair) == 2 for pair in pairs)
    assert pairs[4][1] > pairs[0][0]
    assert not ended.stderr


def test_the_tables_of_methods_are_those_of_the_rows() -> None:
    rows = pd.read_json(ROOT / "benchmarks" / "methods.jsonl", lines=True)
    assert (ROOT / "docs" / "methods.md").read_text() == methods_table.text(rows)


def test_a_parent_that_was_not_finished_and_rows_that_were_written_again_change_no_table() -> None:
    rows = pd.read_json(ROOT / "benchmarks" / "methods.jsonl", lines=True)
    unfinished = rows[rows["weights"] == rows["weights"][0]].iloc[:40].assign(weights="another", test_loss=9.0)
    assert methods_table.text(pd.concat([rows[:30], rows, unfinished])) == methods_table.text(rows)


def test_the_study_in_readme_is_one() -> None:
    (text,) = re.findall(r"```yaml\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
    runs = planned_runs(Study(**yaml.safe_load(text)), {})
    assert len(runs) == 20
    assert {run.config.evolution.strategy for run in runs} == {"none", "es"}
