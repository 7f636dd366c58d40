"""Tests that run the examples as a user does and check the results that they print."""

from __future__ import annotations

import re
import subprocess
import sys
from collections.abc import Callable

import pytest
from whole_runs import ROOT, environment

EXAMPLES = ROOT / "examples"
# A check of the numbers in the last output line of each example.
SHOWS: dict[str, Callable[..., bool]] = {
    "plain_loop": lambda loss, accuracy: loss < 0.6 and accuracy > 0.88,
    "f1": lambda before, after: after > before - 0.02 and after > 0.75,
    "transformer": lambda before, after: after > before - 0.03,  # 6 of 200 test cases; the fitness is checked below
    "lightning_digits": lambda accuracy, steps, phases: accuracy > 0.88 and (steps, phases) == (500, 5),
    "tune": lambda sigma, accuracy, epochs: sigma in (0.001, 0.02) and accuracy > 0.5 and epochs == 8,
    "cartpole": lambda mean, episodes, seconds: mean >= 475 and episodes == 100,
}
ON_RAY = ("transformer", "cartpole", "tune")


def test_every_example_is_short_and_tried() -> None:
    paths = sorted(EXAMPLES.glob("*.py"))
    assert {path.stem for path in paths} == SHOWS.keys()
    assert all(len(path.read_text().splitlines()) < 60 for path in paths)


@pytest.mark.parametrize("name", [pytest.param(n, marks=pytest.mark.ray if n in ON_RAY else ()) for n in SHOWS])
def test_an_example_shows_what_it_is_for(name: str) -> None:
    ended = subprocess.run(
        [sys.executable, str(EXAMPLES / f"{name}.py")], capture_output=True, text=True, env=environment(), check=False
    )
    assert ended.returncode == 0, ended.stderr
    numbers = [float(number) for number in re.findall(r"\b\d+(?:\.\d+)?", ended.stdout.splitlines()[-1])]
    assert SHOWS[name](*numbers), ended.stdout
    if name == "transformer":
        phases = re.findall(r"generation \d+: (\S+) -> (\S+)", ended.stdout)
        assert float(phases[-1][1]) > float(phases[0][0]) + 0.02
