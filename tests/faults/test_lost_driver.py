"""A driver is killed, stopped, out of disk space or started twice. The run continues to the same bits."""

from __future__ import annotations

import os
import random
import resource
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
from ray.exceptions import RayActorError, RayTaskError
from whole_runs import attend, change, command, run, run_here, same_result

from spartan_ray.distributed.config import Cluster
from spartan_ray.errors import InputError, RunError
from spartan_ray.run.checkpoint import epochs_kept, latest_checkpoint, load_checkpoint
from spartan_ray.run.config import Config, Evolution, Run
from spartan_ray.run.loading import load_config
from spartan_ray.run.progress import Progress
from spartan_ray.run.supervisor import Supervisor
from spartan_ray.vision.config import Data, Parent

pytestmark = [pytest.mark.faults, pytest.mark.ray]
EPOCHS = 20


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Config:
    """Return the configuration of a run with every kind of state: moments of both optimizers and gradient noise."""
    return Config(
        run=Run(name="x", out=str(tmp_path_factory.mktemp("runs")), epochs=EPOCHS),
        data=Data(name="digits"),
        parent=Parent(model="convnet", optimizer="adam", gradient_noise=0.01, threads=1),
        evolution=Evolution(every=2, population=60, fitness_images=64, optimizer="momentum"),
        cluster=Cluster(workers=1, driver_restarts=10),
    )


@pytest.fixture(scope="module")
def undisturbed(local_ray: None, config: Config) -> Path:
    return run_here(config)[0]


def test_the_driver_killed_again_and_again_at_random_points(undisturbed: Path, config: Config, long: bool) -> None:
    kills = 10 if long else 3
    chance = random.Random()
    began: dict[int, float] = {}  # by process id of the driver
    delays: dict[int, float] = {}
    killed: set[int] = set()

    def kill(progress: Progress) -> None:
        pid, now = progress.driver_pid, time.monotonic()
        if not progress.epoch or pid in killed or len(killed) == kills:
            return
        if now - began.setdefault(pid, now) >= delays.setdefault(pid, chance.uniform(0, 0.3)):
            killed.add(pid)
            os.kill(pid, signal.SIGKILL)

    folder = run(config, kill)
    assert len(killed) == kills
    assert same_result(folder, undisturbed)


def test_a_driver_lost_too_often_ends_the_run_which_nobody_else_may_write_and_which_can_be_resumed(
    undisturbed: Path, config: Config
) -> None:
    supervisor = Supervisor(change(config, cluster={"driver_restarts": 0}))
    killed: list[int] = []

    def disturb(progress: Progress) -> None:
        if progress.epoch < 3 or killed:
            return
        second = Supervisor(config, progress.folder)
        with pytest.raises(RayTaskError) as caught:
            second.result()
        second.close()
        assert isinstance(caught.value.cause, InputError)
        assert f"another process writes this run: process {progress.driver_pid} on" in str(caught.value.cause)
        killed.append(progress.driver_pid)
        os.kill(progress.driver_pid, signal.SIGKILL)

    with pytest.raises(RayActorError):
        attend(supervisor, disturb)
    assert supervisor.folder
    folder = Path(supervisor.folder)
    assert run_here(load_config(str(folder)), folder=folder)[0] == folder
    assert same_result(folder, undisturbed)


def test_a_full_disk_stops_the_run_with_the_last_checkpoint_intact(undisturbed: Path, config: Config) -> None:
    """The driver cannot write files above a size limit, which the weights of the network exceed."""
    starved: list[int] = []
    supervisor = Supervisor(config)

    def starve(progress: Progress) -> None:
        if progress.epoch == 3 and not starved:
            starved.append(progress.driver_pid)
            resource.prlimit(progress.driver_pid, resource.RLIMIT_FSIZE, (50_000, 50_000))

    with pytest.raises(RayTaskError) as caught:
        attend(supervisor, starve)
    assert isinstance(caught.value.cause, RunError)
    assert "cannot be written: File too large" in str(caught.value.cause)
    folder = Path(str(supervisor.folder))
    assert not list(folder.rglob("*.tmp"))
    notes: list[str] = []
    assert latest_checkpoint(folder, notes.append)[0].epoch >= 2
    assert not notes
    assert run_here(load_config(str(folder)), folder=folder)[0] == folder
    assert same_result(folder, undisturbed)


def spartan(*arguments: str, cwd: Path) -> subprocess.Popen[str]:
    """Start the program as a user does, in a new session. Its standard error goes to the standard output."""
    keep = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
    return subprocess.Popen(
        [sys.executable, "-m", "spartan_ray", *arguments], cwd=cwd, text=True, start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, env=keep | {"PYTHONPATH": str(Path(__file__).parents[2])},
    )  # fmt: skip


def test_sigterm_and_then_sigkill_leave_nothing_half_written(undisturbed: Path, tmp_path: Path) -> None:
    """`ray job stop` sends these signals. The checkpoints that remain are intact.

    `spartan resume` ends the run with the bits of a run that was never stopped."""
    flags = ["--config", str(undisturbed), "--run.out", str(tmp_path), "--run.name", "stopped"]
    with spartan("train", *flags, cwd=tmp_path) as process:
        watchdog = threading.Timer(600, process.kill)
        watchdog.start()
        assert process.stdout
        for line in process.stdout:
            if line.startswith("epoch 4/"):
                break
        process.send_signal(signal.SIGTERM)
        try:
            process.wait(timeout=3)
        except subprocess.TimeoutExpired:
            process.kill()
        said = process.stdout.read()
        watchdog.cancel()
    assert "stopping" in said
    folder = tmp_path / "stopped"
    for epoch in epochs_kept(folder / "checkpoints")[-3:]:
        load_checkpoint(folder / "checkpoints", epoch)
    notes: list[str] = []
    checkpoint, metrics = latest_checkpoint(folder, notes.append)
    assert not notes
    assert 4 <= checkpoint.epoch == metrics.count(b"\n") < EPOCHS
    with spartan("resume", str(folder), cwd=tmp_path) as process:
        said, _ = process.communicate(timeout=900)
    assert process.returncode == 0
    going_on = f"going on after epoch {checkpoint.epoch}\n"
    assert said.index(going_on) < said.index(f"epoch {EPOCHS}/{EPOCHS} evolve")
    assert same_result(folder, undisturbed)


def test_resume_refuses_another_configuration_and_knows_a_finished_run(undisturbed: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(undisturbed, tmp_path / "run"))

    def resume(*flags: str) -> tuple[int, str, str]:
        return command("resume", str(folder), *flags, cwd=tmp_path)

    finished = (0, f"{folder}: finished, all {EPOCHS} epochs are done\n", "")
    assert resume("--cluster.workers", "2", "--run.keep", "1") == finished
    code, _, said = resume("--evolution.sigma", "0.5", "--run.seed", "3")
    assert code == 2
    assert "loggers, epochs and patience may change on resume: " in said
    assert "run.seed was 0 and is 3; evolution.sigma was 0.01 and is 0.5" in said
    shutil.rmtree(folder / "checkpoints")
    assert resume() == (2, "", f"spartan: {folder}: no intact checkpoint to go on from\n")
