"""Tests of the program as a user runs it: exit codes and output. Where it starts Ray, it runs in a real process."""

from __future__ import annotations

import json
import os
import re
import signal
import stat
import subprocess
import sys
import threading
from pathlib import Path
from typing import ClassVar

import psutil
import pytest
import ray
from conftest import Head
from ray.exceptions import RayActorError
from whole_runs import ROOT, SMALL, change, command, environment, run_here, same_result, spartan

import spartan_ray
from spartan_ray import origin
from spartan_ray.cli import main as cli
from spartan_ray.cli import train
from spartan_ray.cli.flags import take_config
from spartan_ray.run import supervisor
from spartan_ray.run.checkpoint import latest_checkpoint
from spartan_ray.run.config import Config
from spartan_ray.run.loading import load_config


@pytest.mark.ray
def test_train_and_report(tmp_path: Path) -> None:
    home = tmp_path / "home"
    home.mkdir()
    trained = spartan("train", *SMALL, "--run.epochs", "2", "--run.name", "tiny", cwd=tmp_path, HOME=str(home))
    assert trained.returncode == 0, trained.stderr
    # Only the owner can read Ray's token, and no file of the run contains it.
    token = home / ".ray" / "auth_token"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    secret = token.read_bytes()
    assert len(secret) == 64
    files = [path for path in (tmp_path / "runs").rglob("*") if path.is_file()]
    assert len(files) > 5
    assert not any(secret in path.read_bytes() for path in files)
    assert "epoch 2/2 evolve" in trained.stdout
    (effect,) = set(re.findall(r"better|worse", trained.stdout))  # the epoch's line and the table agree
    assert f"| tiny | 2 | 1 moved: 1 {effect} |" in trained.stdout
    assert (tmp_path / "runs" / "tiny" / "final.safetensors").exists()
    code, said, _ = command("report", "runs/tiny", cwd=tmp_path)
    assert code == 0
    assert (tmp_path / "runs" / "tiny" / "report" / "report.html").exists()
    assert "runs/tiny/report/test_accuracy.png" in said
    (tmp_path / "file").write_text("")
    refused = command("report", "runs/tiny", "-o", "file", cwd=tmp_path)
    assert refused == (2, "", "spartan: -o file: not a folder to write to: File exists\n")


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["train", "--evolution.nonsense", "3"], "unknown option --evolution.nonsense"),
        (["trian"], "unknown command trian (perhaps train?)"),
        (
            ["train", "--config", "quickstrat"],
            "--config quickstrat: no such preset (perhaps quickstart?) or readable file\n",
        ),
        (
            ["train", "--evolution.population", "1"],
            "evolution.population: should be greater than or equal to 2 (got '1')",
        ),
        (["train", "--data.name", "folder", "--data.root", "nowhere"], "/nowhere: no such folder"),
        (["train", *SMALL, "--parent.weights", "absent.pt"], "/absent.pt: cannot be read as weights: [Errno 2]"),
        (["train", *SMALL, "--parent.weights", __file__], "test_cli.py: cannot be read as weights: not a state dict"),
        (["train", "--data.name", "folder", "--data.root", "."], "/train: no such folder (expected train/<class>"),
        (["train", *SMALL, "--run.out", f"{__file__}/runs"], f"cannot make a run folder: {__file__}: Not a directory"),
        (["train", *SMALL, "--run.out", "/proc/runs"], "run.out /proc/runs: cannot make a run folder: /proc: "),
        (["train", *SMALL, "--run.out", "nosuch://bucket/x"], "nosuch://bucket/x: expected a path, s3:// or gs://"),
        (["report", "nosuch://bucket/x"], "nosuch://bucket/x: expected a path, s3:// or gs://"),
        (["report", "memory://bucket/x"], "memory://bucket/x: there is no run"),
        (["report", "runs/x", "-o", "s3://bucket/x"], "-o (s3://bucket/x) is a URL"),
        (["submit", *SMALL], "run.out (runs): a job has a working directory of its own: give an absolute path"),
        (["submit", "--run.out", "/x"], "data.root (not given): a job has a working directory of its own"),
        (["submit", *SMALL, "--run.out", "/x", "--parent.model", "mine:Small"], "mine:Small is code of your own: give"),
        (["submit", *SMALL, "--run.out", "/x", "--address", "http://127.0.0.1:1"], "--address http://127.0.0.1:1: "),
        (["resume", "nosuch://bucket/x"], "nosuch://bucket/x: expected a path, s3:// or gs://"),
        (["replay", "memory://bucket/x", "--verify"], "memory://bucket/x: there is no run"),
        (
            ["replay", "runs/x", "--generation", "1", "--member", "1", "-o", "file:///x"],
            "-o (file:///x) is a URL: give the path where it is mounted",
        ),
        (["report", "nowhere"], "nowhere: not a run folder: metrics.jsonl: "),
    ],
)
def test_bad_input_is_one_line_and_exit_2(arguments: list[str], said: str, tmp_path: Path) -> None:
    code, out, err = command(*arguments, cwd=tmp_path)
    assert (code, out) == (2, "")
    assert err.startswith("spartan: ")
    assert said in err
    assert err.count("\n") == 1
    assert not list(tmp_path.iterdir())  # neither a run nor a token was made


def test_a_run_in_the_working_directory_of_a_job_is_warned_of_first(tmp_path: Path) -> None:
    job = tmp_path / "session_1" / "runtime_resources" / "working_dir_files" / "_ray_pkg_0123456789abcdef"
    job.mkdir(parents=True)
    wrong = ["train", *SMALL, "--parent.weights", "absent.pt"]
    code, said, _ = command(*wrong, cwd=job)
    assert code == 2
    assert said.startswith(f"run.out {job}/runs: this is the working directory of a Ray job, which Ray may delete")
    assert "give --run.out an absolute path elsewhere" in said
    assert command(*wrong, "--run.out", str(tmp_path / "runs"), cwd=job)[1] == ""
    assert command(*wrong, cwd=tmp_path)[1] == ""


@pytest.mark.ray
def test_what_the_cluster_cannot_do_is_one_line_and_exit_2(ray_head: Head, tmp_path: Path) -> None:
    flags = ["--cluster.address", ray_head.gcs, "--cluster.gpus-per-worker", "1"]
    ended = spartan("train", *SMALL, *flags, cwd=tmp_path, **ray_head.environment)
    assert ended.returncode == 2
    errors = [line for line in ended.stderr.splitlines() if line.startswith("spartan: ")]
    assert len(errors) == 1
    assert "do not fit the" in errors[0]
    assert "waiting for nodes: cluster.workers (auto) with 1 CPUs" in ended.stdout
    assert "Traceback" not in ended.stderr + ended.stdout
    assert not (tmp_path / "runs").exists()


def test_help_names_the_presets_and_every_section(tmp_path: Path) -> None:
    code, said, _ = command("train", "--help", cwd=tmp_path)
    assert code == 0
    for word in ("article-es", "--config NAME|FILE", "--evolution.sigma", "--cluster.workers", "--data.root"):
        assert word in said
    assert command("--help", cwd=tmp_path)[0] == 0


def test_the_version_is_the_package_s(tmp_path: Path) -> None:
    assert command("--version", cwd=tmp_path) == (0, f"spartan {spartan_ray.__version__}\n", "")


@pytest.mark.parametrize(("arguments", "unbuffered"), [(["train", "--help"], "1"), (["--version"], "")])
def test_output_that_nobody_reads_ends_quietly(arguments: list[str], unbuffered: str) -> None:
    """The reader has ended, as `| head` does once it has its lines. The error occurs during a write or at the end."""
    unread, output = os.pipe()
    os.close(unread)
    program = [sys.executable, "-m", "spartan_ray", *arguments]
    given = environment() | {"PYTHONUNBUFFERED": unbuffered}
    ended = subprocess.run(
        program, stdout=output, stderr=subprocess.PIPE, text=True, env=given, timeout=60, check=False
    )
    os.close(output)
    assert (ended.returncode, ended.stderr) == (128 + signal.SIGPIPE, "")


def test_a_broken_pipe_to_another_process_is_not_hidden(monkeypatch: pytest.MonkeyPatch) -> None:
    unread, pipe = os.pipe()
    os.close(unread)
    monkeypatch.setattr(cli, "_command", lambda: os.write(pipe, b"work"))
    with pytest.raises(BrokenPipeError):
        cli.main()
    os.close(pipe)


class EndedFromOutside:
    """A supervisor whose `watch` always raises. With RayActorError, the first call raises KeyboardInterrupt."""

    folder = Path("/runs/x")
    unsaid: ClassVar[list[str]] = []

    def __init__(self, error: type[BaseException], watches: list[float]) -> None:
        self.error = error
        self.watches = watches

    def watch(self, seconds: float, rows: int | None = None) -> None:
        self.watches.append(seconds)
        if self.error is RayActorError and len(self.watches) == 1:  # SIGTERM to the whole process group
            raise KeyboardInterrupt
        raise self.error() if self.error is RayActorError else self.error(32, "Broken pipe")

    def stop(self) -> None: ...

    def close(self) -> None: ...


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (KeyboardInterrupt, "stopping\nstopped at once; go on with: spartan resume /runs/x\n"),
        (RayActorError, "stopping\nstopped; go on with: spartan resume /runs/x\n"),
        (BrokenPipeError, "spartan: Broken pipe; go on with: spartan resume /runs/x\n"),
    ],
)
def test_a_run_that_is_ended_in_a_hurry_says_how_to_go_on(
    error: type[BaseException],
    said: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The causes are a second Ctrl-C during the stop, a signal that also ended the driver, and a closed output."""
    watches: list[float] = []
    monkeypatch.setattr(supervisor, "Supervisor", lambda *arguments: EndedFromOutside(error, watches))
    for part, name in ((train, "check_paths"), (train, "start_ray"), (ray, "shutdown")):
        monkeypatch.setattr(part, name, lambda *arguments, **named: None)
    monkeypatch.setattr(train, "reach_ray", lambda flag: ("local", "cluster.address"))
    monkeypatch.setattr(signal, "signal", lambda *arguments: None)
    if error is not BrokenPipeError:
        assert train.run(Config()) == 130
        assert len(watches) == 2
    else:
        with pytest.raises(BrokenPipeError):
            train.run(Config())
    assert "".join(capsys.readouterr()) == f"starting Ray\n{said}"


@pytest.mark.ray
def test_an_interrupt_stops_cleanly(tmp_path: Path) -> None:
    """The program exits with 130, keeps the finished epochs, says how to resume, and leaves no process."""
    command = [sys.executable, "-m", "spartan_ray", "train", *SMALL, "--run.epochs", "100000", "--run.name", "long"]
    # A shell starts background processes with SIGINT ignored, and this process would inherit that.
    command = ["env", "--default-signal=INT", *command]
    # An existing token is kept, but becomes readable by its owner only.
    token = tmp_path / ".ray" / "auth_token"
    token.parent.mkdir()
    token.write_text("0123456789abcdef" * 4)
    token.chmod(0o644)
    given = environment() | {"HOME": str(tmp_path)}
    with subprocess.Popen(
        command, cwd=tmp_path, env=given, stdout=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        watchdog = threading.Timer(180, process.kill)
        watchdog.start()
        assert process.stdout
        seen = ""
        while not (seen.startswith("epoch 2/") and "train loss" in seen):
            seen = process.stdout.readline()
            assert seen
        children = psutil.Process(process.pid).children(recursive=True)
        assert children
        process.send_signal(signal.SIGINT)
        rest = process.stdout.read()
        assert process.wait(timeout=600) == 130
        watchdog.cancel()
    (said,) = [line for line in rest.splitlines() if line.startswith("stopped after epoch")]
    epoch = int(said.split(";")[0].rpartition(" ")[2])
    assert said == f"stopped after epoch {epoch}; go on with: spartan resume {tmp_path}/runs/long"
    assert (tmp_path / "runs" / "long" / "metrics.jsonl").read_text().count("\n") == epoch >= 2
    assert latest_checkpoint(tmp_path / "runs" / "long", print)[0].epoch == epoch
    assert f"epoch {epoch}/" in seen + rest
    assert (token.read_text(), stat.S_IMODE(token.stat().st_mode)) == ("0123456789abcdef" * 4, 0o600)
    assert psutil.wait_procs(children, timeout=60)[1] == []


@pytest.mark.ray
def test_a_ray_job_does_the_same_as_a_local_run(local_ray: None, ray_head: Head, tmp_path: Path) -> None:
    flags = [*SMALL, "--run.epochs", "2", "--run.name", "job", "--parent.threads", "1"]
    program = str(Path(sys.executable).parent / "ray")
    # The job agent starts shortly after the head reports that it runs.
    for _ in range(30):
        ready = subprocess.run([program, "job", "submit", "--", "true"], env=ray_head.environment, capture_output=True)
        if ready.returncode == 0:
            break
    submitted = subprocess.run(
        [program, "job", "submit", "--working-dir", str(ROOT), "--", "python", "-m", "spartan_ray", "train", *flags,
         "--run.out", str(tmp_path / "cluster")],
        capture_output=True, text=True, env=ray_head.environment, timeout=900, check=False,
    )  # fmt: skip
    assert submitted.returncode == 0, submitted.stdout + submitted.stderr
    assert "succeeded" in submitted.stdout + submitted.stderr
    assert "epoch 2/2 evolve" in submitted.stdout
    job = tmp_path / "cluster" / "job"
    assert {path.name for path in job.iterdir()} == {
        "config.yaml", "environment.json", "metrics.jsonl", "journal", "tensorboard", "final.safetensors",
        "checkpoints", "lock", "log.txt",
    }  # fmt: skip
    known = json.loads((job / "environment.json").read_text())
    assert known["sources"] == origin.sources()
    assert known["versions"]["spartan-ray"] == spartan_ray.__version__
    local, _ = run_here(change(load_config(str(job)), run={"out": str(tmp_path / "local")}))
    assert same_result(local, job)

    out = ["--run.out", str(tmp_path / "sent")]
    sent = spartan("submit", "--follow", *flags, *out, cwd=tmp_path, **ray_head.environment)
    assert sent.returncode == 0, sent.stdout + sent.stderr
    assert "epoch 2/2 evolve" in sent.stdout
    assert same_result(tmp_path / "sent" / "job", job)
    failed = spartan("submit", "--follow", *flags, *out, "--cluster.workers", "9", cwd=tmp_path, **ray_head.environment)
    assert failed.returncode == 2, failed.stdout + failed.stderr


def test_a_flag_may_have_the_name_of_its_field_in_a_file() -> None:
    config = take_config(cli.parse(["train", "--cluster.gpus_per_worker", "0.5", "--run.keep_best", "--run.name=a_b"]))
    assert (config.cluster.gpus_per_worker, config.run.keep_best, config.run.name) == (0.5, True, "a_b")


def test_in_a_job_the_hint_is_another_job(monkeypatch: pytest.MonkeyPatch) -> None:
    assert train._how_to_go_on("/runs/x") == "go on with: spartan resume /runs/x"
    monkeypatch.setenv(train.JOB_CONFIG, "{}")
    assert train._how_to_go_on("/runs/x") == "go on with a job of: python -m spartan_ray resume /runs/x"
