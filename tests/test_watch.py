"""`spartan watch` shows the epochs in a run folder while the run writes them, and ends with the run."""

from __future__ import annotations

import errno
import fcntl
import io
import re
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console
from test_report import write_run

from spartan_ray.cli import main as cli
from spartan_ray.cli import watch
from spartan_ray.errors import InputError
from spartan_ray.report.reading import read_run
from spartan_ray.run.place import lock_folder


def grow(folder: Path, monkeypatch: pytest.MonkeyPatch, *steps: Callable[[], object]) -> list[float]:
    """Take the next step whenever the watcher sleeps. Return the list of its sleep times in seconds."""
    slept: list[float] = []
    left = iter(steps)

    def sleep(seconds: float) -> None:
        slept.append(seconds)
        next(left)()

    monkeypatch.setattr("time.sleep", sleep)
    return slept


def append(path: Path, line: str) -> None:
    with open(path, "a") as lines:
        lines.write(f"{line}\n")


def test_it_prints_each_epoch_as_it_ends_and_stops_with_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "x", [0.5, 0.6], {2: True})
    (folder / "log.txt").write_text("2026-01-01T00:00:00+00:00 100 sgd images\n")
    rows = (folder / "metrics.jsonl").read_text().splitlines()
    (folder / "metrics.jsonl").unlink()
    slept = grow(
        folder,
        monkeypatch,
        lambda: append(folder / "metrics.jsonl", rows[0]),
        lambda: append(folder / "metrics.jsonl", rows[1]),
        lambda: append(folder / "log.txt", "2026-01-01T00:01:00+00:00 finished"),
    )
    output = io.StringIO()
    assert watch.watch(str(folder), Console(file=output, width=40)) == 0
    lines = output.getvalue().splitlines()
    assert [line.split(" train")[0].strip() for line in lines] == ["epoch 1/50 sgd", "epoch 2/50 evolve", "finished"]
    assert "parent -1.0000 -> -0.8000 better" in lines[1]
    assert len(slept) == 3


def test_a_terminal_shows_progress_and_the_last_epochs(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [0.5] * 14 + [0.75], {5: True, 15: False})
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(watch.view("runs/x", read_run(folder), ["t one", "t two"]))
    text = console.export_text()
    assert "epoch 15/50" in text
    assert "about 52 s left" in text  # 35 epochs of 1.5 s
    assert "best 0.7500" in text
    assert re.search(r"15 +evolve +0\.0667 +0\.7500 +0\.6500 +1\.0 +-1\.0000 -> -0\.8000 unmoved", text)
    assert not re.search(r"^ *3 +sgd", text, re.MULTILINE)
    assert text.rstrip().endswith("t two")


@pytest.mark.parametrize(
    ("said", "ended"),
    [
        ("finished", True),
        ("stopped by the user", True),
        ("ended by RunError: no worker is left", True),
        ("ended by Broken: a strategy's own error", True),
        ("finished\n2026-01-01T00:00:02+00:00 mlflow gets no more rows: OSError", True),
        ("stopped by the user\n2026-01-01T00:00:02+00:00 going on after epoch 3", False),
        ("a worker was lost: RayActorError: it died", False),
        ("going on after epoch 3", False),
    ],
)
def test_the_log_says_whether_a_run_has_ended(said: str, ended: bool) -> None:
    lines = f"2026-01-01T00:00:00+00:00 begins\n2026-01-01T00:00:01+00:00 {said}"
    assert (watch.end_of(lines.splitlines()) is not None) is ended


def test_a_sparkline_spans_the_values_that_it_shows() -> None:
    assert watch.sparkline([0.0, 0.5, 1.0]) == "▁▅█"
    assert watch.sparkline([2.0, 2.0]) == "▁▁"
    assert watch.sparkline([9.0, 0.0, 1.0], width=2) == "▁█"


def test_a_run_that_no_process_writes_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "x", [0.5], {})
    (folder / "log.txt").write_text("2026-01-01T00:00:00+00:00 100 sgd images\n")
    lock = lock_folder(folder)
    slept = grow(folder, monkeypatch, *[lambda: None] * 99, lock.close, *[lambda: None] * 60)
    output = io.StringIO()
    assert watch.watch(str(folder), Console(file=output, width=200)) == 1
    assert output.getvalue().splitlines()[-1] == f"no process writes this run; to continue it: spartan resume {folder}"
    assert len(slept) == 160


def test_a_run_that_goes_on_has_not_ended_though_its_log_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = write_run(tmp_path / "x", [0.5], {})
    (folder / "log.txt").write_text("2026-01-01T00:00:00+00:00 ended by RunError: no worker is left\n")
    lock = lock_folder(folder)  # a driver that still sets itself up

    def goes_on() -> None:
        append(folder / "log.txt", "2026-01-01T00:00:02+00:00 going on after epoch 1")
        append(folder / "log.txt", "2026-01-01T00:00:03+00:00 finished")
        lock.close()

    grow(folder, monkeypatch, lambda: None, goes_on)
    output = io.StringIO()
    assert watch.watch(str(folder), Console(file=output, width=200)) == 0
    assert output.getvalue().splitlines()[-1] == "finished"


def test_without_locks_a_run_ends_with_its_log(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "x", [0.5], {})
    (folder / "log.txt").write_text("2026-01-01T00:00:00+00:00 going on\n")
    lock_folder(folder).close()

    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr("fcntl.flock", refuse)
    looks = [lambda: None] * 99
    grow(folder, monkeypatch, *looks, lambda: append(folder / "log.txt", "2026-01-01T00:00:03+00:00 finished"))
    assert watch.watch(str(folder), Console(file=io.StringIO())) == 0


def test_a_terminal_says_why_a_run_without_an_epoch_has_ended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "x", [0.5], {})
    (folder / "metrics.jsonl").unlink()
    grow(folder, monkeypatch, *[lambda: None] * 60)
    output = io.StringIO()
    assert watch.watch(str(folder), Console(file=output, width=200, force_terminal=True)) == 1
    assert "no process writes this run; to continue it: spartan resume" in output.getvalue()


def test_a_look_at_a_lock_refuses_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    lock_folder(tmp_path).close()
    with open(tmp_path / "lock") as look:
        fcntl.flock(look, fcntl.LOCK_SH)
        monkeypatch.setattr("time.sleep", lambda seconds: look.close())
        lock_folder(tmp_path).close()


def test_what_a_log_says_is_shown_as_it_is(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "x", [0.5], {})
    rows = (folder / "metrics.jsonl").read_text()
    (folder / "metrics.jsonl").write_text(rows.replace('"kind"', '"time": "2026-01-01T00:00:00", "kind"'))
    console = Console(file=io.StringIO(), width=120, record=True)
    console.print(watch.view("runs/x", read_run(folder), [], "ended by RunError: cannot read [/work/x]: [red] gone"))
    assert "ended by RunError: cannot read [/work/x]: [red] gone" in console.export_text()


def test_ctrl_c_leaves_the_run_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_run(tmp_path / "x", [0.5], {})

    def interrupt() -> None:
        raise KeyboardInterrupt

    grow(folder, monkeypatch, interrupt)
    assert watch.watch(str(folder), Console(file=io.StringIO())) == 0


def test_what_is_no_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="there is no run"):
        watch.watch(str(tmp_path))
    write_run(tmp_path / "x", [0.5], {})
    with pytest.raises(InputError, match="there is no run; it holds runs: x"):
        watch.watch(str(tmp_path))
    assert cli.parse(["watch", "runs/x"]).run == "runs/x"
