"""Tests that the examples in the README and the documentation work. Each block is run, or its commands are parsed."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import generate
import methods_table
import pandas as pd
import pytest
import yaml
from run_page import blocks
from whole_runs import ROOT, environment

from spartan_ray.cli import main as cli
from spartan_ray.cli.flags import take_config
from spartan_ray.study.plan import Study, planned_runs

PAGES = [
    ROOT / "README.md",
    ROOT / "CONTRIBUTING.md",
    ROOT / "cluster" / "README.md",
    *sorted((ROOT / "docs").rglob("*.md")),
]
PAGES = [page for page in PAGES if "_build" not in page.parts]
# Languages of the blocks that a test runs, and of those that it only reads: they may need a cluster, a GPU or hours.
RUN, READ = {"python", "bash"}, {"console", "yaml", "text"}


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT))


def runs_blocks(page: Path) -> bool:
    return page.name != "README.md" and any(language in RUN for language, _ in blocks(page))


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.ray, id=name_of(page)) for page in PAGES if runs_blocks(page)],
)
def test_the_blocks_of_a_page_run_one_after_another(page: Path, tmp_path: Path) -> None:
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    ended = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "run_page.py"), str(page)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment() | {"PATH": path},
        check=False,
    )
    assert ended.returncode == 0, ended.stdout + ended.stderr


def test_there_are_pages_whose_blocks_run() -> None:
    assert {page.name for page in PAGES if runs_blocks(page)} >= {"tutorial.md", "own-network.md", "own-strategy.md"}


def test_the_readme_s_python_learns() -> None:
    (program,) = [text for language, text in blocks(ROOT / "README.md") if language == "python"]
    assert len(program.splitlines()) <= 18
    ended = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, env=environment(), check=True
    )
    pairs = [tuple(map(float, line.split())) for line in ended.stdout.splitlines()]
    assert [len(pair) for pair in pairs] == [2] * 5
    assert pairs[4][1] > pairs[0][0]
    assert not ended.stderr


def test_the_readme_is_one_screen() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 120


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_every_command_that_is_shown_is_one(page: Path) -> None:
    """Each block has a language, which decides how it is tested. `spartan` commands parse with their flags and presets,
    and scripts exist."""
    assert {language for language, _ in blocks(page)} <= RUN | READ
    assert page.read_text().count("\n```") == 2 * len(blocks(page)) + 2 * len(
        re.findall(r"^```\{", page.read_text(), re.M)
    ) - (page.read_text().startswith("```"))
    for command in commands(page):
        words = shlex.split(command, comments=True)
        program = Path(words[0]).name
        if words[0].startswith("scripts/"):
            assert (ROOT / words[0]).exists(), command
        elif program == "spartan" and words[1] != "--help" and "--help" not in words:
            arguments = cli.parse([word for word in words[1:] if word != "..."])
            if arguments.command in ("train", "submit", "doctor") and not str(arguments.config).startswith(
                ("runs/", "my.")
            ):
                take_config(arguments)


def commands(page: Path) -> list[str]:
    """Return the `spartan` and `scripts/` commands in the shell blocks of a page. In `cluster`, add indented blocks."""
    texts = [text for language, text in blocks(page) if language in ("bash", "console")]
    texts += (
        re.findall(r"(?:^    [a-z.].*\n(?:^    .*\n)*)", page.read_text(), re.M)
        if page.parent.name == "cluster"
        else []
    )
    lines = "\n".join(texts).replace("\\\n", " ").splitlines()
    return [
        line.strip().removeprefix("$ ")
        for line in lines
        if re.match(r"\s*(\$ )?(\S*/)?(spartan|scripts/\w+) ", line + " ")
    ]


def test_the_study_that_is_shown_is_one() -> None:
    (text,) = [text for language, text in blocks(ROOT / "docs" / "howto" / "studies.md") if language == "yaml"]
    runs = planned_runs(Study(**yaml.safe_load(text)), {})
    assert len(runs) == 20
    assert {run.config.evolution.strategy for run in runs} == {"none", "es"}


@pytest.mark.parametrize("name", generate.PAGES)
def test_generated_pages_are_those_of_the_code(name: str) -> None:
    assert (ROOT / "docs" / name).read_text() == generate.PAGES[name](), "run: python docs/generate.py"


def test_the_answer_takes_its_figures_from_the_ways_that_it_names_and_claims_what_they_show() -> None:
    values = {"a": (0.5, 0.1), "a, average": (0.9, 0.1), "b": (0.4, 0.3)}
    ended = pd.DataFrame(
        [{"group": group, "seed": seed, "way": way, "test_accuracy": end + seed / 100, "late_test_accuracy": late}
         for way, (end, late) in values.items() for seed in (0, 1) for group in ("scratch", "other")]
    )  # fmt: skip
    gains = [
        ("accuracy", "x", 50, "v", 0.02), ("accuracy", "x", 50, "w", 0.08), ("accuracy", "x", 200, "w", 0.11),
        ("accuracy", "x", 200, "v", 0.05), ("accuracy", "x", 200, "more", 0.5), ("loss", "x", 50, "w", 0.9),
        ("accuracy", "y", 50, "w", 0.9), ("accuracy", "x", 900, "v", 0.01), ("accuracy", "x", 900, "w", 0.2),
    ]  # fmt: skip
    scaled = pd.DataFrame(gains, columns=["fitness", "way", "population", "weights", "test accuracy"])
    text = "{a > b}, {late a < b}; {a, average > b}; {scale x 200 > 50}, {scale x 900 ~ 50}"
    found = generate.answer(ended, scaled, text)
    assert found == "+10.00 ± 0.00, -20.00 ± 0.00; +50.00 ± 0.00; +3.00 ± 0.00, +5.50 ± 82.59"
    for wrong in ("{a ~ b}", "{late a > b}", "{scale x 200 < 50}", "{scale x 900 > 50}"):
        with pytest.raises(ValueError, match=f"README claims {wrong}, but the rows say "):
            generate.answer(ended, scaled, wrong)


def test_the_script_that_repeats_the_experiment_passes_its_flags_on(tmp_path: Path) -> None:
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    (tmp_path / "scripts").mkdir()
    shutil.copy(ROOT / "scripts" / "reproduce", tmp_path / "scripts")
    spartan = tmp_path / ".venv" / "bin" / "spartan"
    spartan.write_text('#!/bin/sh\necho "$@"\n')
    spartan.chmod(0o755)

    def asked(*flags: str) -> list[str]:
        done = subprocess.run(
            [tmp_path / "scripts" / "reproduce", *flags], capture_output=True, text=True, check=True, timeout=60
        )
        return done.stdout.splitlines()

    own = "--data.name folder --data.root data/cifar10-jpeg"
    train = f"train --config results/vehicles.yaml --run.out results/article-small/runs --run.resume auto {own}"
    study = "study results/article-small.yaml --data.root data/cifar10-jpeg"
    assert asked() == [train, study]
    assert asked("--scale", "small", "--data.root", "x", "--run.epochs", "3", "--cluster.address", "auto") == [
        f"{train} --data.root x --cluster.address auto",
        f"{study} --data.root x --run.epochs 3 --cluster.address auto",
    ]
    assert asked("--tables") == [f"{study} --tables"]
    assert asked("--scale", "article", "--run.epochs", "3") == ["study results/article.yaml --run.epochs 3"]
    refused = subprocess.run(
        [tmp_path / "scripts" / "reproduce", "--scale", "big"], capture_output=True, text=True, check=False, timeout=60
    )
    assert (refused.returncode, refused.stderr) == (2, "scripts/reproduce: --scale big: must be small or article\n")


def test_the_tables_of_methods_are_those_of_the_rows() -> None:
    rows = pd.read_json(ROOT / "benchmarks" / "methods.jsonl", lines=True)
    assert (ROOT / "docs" / "methods.md").read_text() == methods_table.text(rows)


def test_a_parent_that_was_not_finished_and_rows_that_were_written_again_change_no_table() -> None:
    rows = pd.read_json(ROOT / "benchmarks" / "methods.jsonl", lines=True)
    unfinished = rows[rows["weights"] == rows["weights"][0]].iloc[:40].assign(weights="another", test_loss=9.0)
    assert methods_table.text(pd.concat([rows[:30], rows, unfinished])) == methods_table.text(rows)


def test_links_between_files_lead_somewhere() -> None:
    for page in [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]:
        for target in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text()):
            if "://" not in target:
                assert (page.parent / target).exists(), f"{page}: {target}"


def test_the_documentation_builds_without_a_warning(tmp_path: Path) -> None:
    command = [
        sys.executable,
        "-m",
        "sphinx",
        "--fail-on-warning",
        "--quiet",
        "-b",
        "html",
        str(ROOT / "docs"),
        str(tmp_path / "html"),
    ]
    ended = subprocess.run(
        [*command, "-d", str(tmp_path / "trees")], capture_output=True, text=True, env=environment(), check=False
    )
    assert ended.returncode == 0, ended.stderr
    assert "search" in (tmp_path / "html" / "index.html").read_text()
    shutil.rmtree(tmp_path / "html")
