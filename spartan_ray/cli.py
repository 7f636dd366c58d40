"""The command line, `spartan`. Exit codes: 0 done, 2 bad configuration or input, 130 stopped by the
user, 141 nobody reads the output, 1 anything else."""

from __future__ import annotations

import argparse
import contextlib
import io
import logging
import math
import os
import secrets
import select
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from spartan_ray import __version__
from spartan_ray.address import check_address, check_token, ray_address
from spartan_ray.config import (
    Config,
    Diverged,
    InputError,
    RunError,
    differences,
    load_config,
    load_run_config,
    no_url,
    preset_names,
)

DESCRIPTION = """Spartan training: SGD alternated with evolution, the population scored on Ray."""
REFRESH_SECONDS = 0.5
# Seconds between plain lines within a phase, and seconds that a stopping run may take.
LINE_SECONDS = 15.0
STOP_SECONDS = 30.0
# Seconds that a run which was just killed may take to let go of its folder.
LOCK_PATIENCE = 3.0
# The file descriptor of standard output.
STDOUT = 1
# What the path of a Ray job's working directory has in it.
JOB_FOLDER = "/runtime_resources/working_dir_files/"


def main() -> None:
    """Run the command line and exit with its code."""
    code: int | str | None
    try:
        try:
            code = _command()
        except SystemExit as end:  # of --help, and what argparse refuses
            code = end.code
        except InputError as error:
            print(f"spartan: {error}", file=sys.stderr)
            code = 2
        except RunError as error:
            print(f"spartan: {error}", file=sys.stderr)
            code = 1
        except KeyboardInterrupt:  # before there was a run to stop, or after its end
            print("stopped")
            code = 130
        print(end="", flush=True)
    except BrokenPipeError:
        if not _is_unread():
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), STDOUT)  # for what Python still writes when it ends
        code = 128 + signal.SIGPIPE
    sys.exit(code)


def _command() -> int:
    """Parse the command line and run its command; the exit code."""
    parser = argparse.ArgumentParser(prog="spartan", description=DESCRIPTION)
    parser.add_argument("--version", action="version", version=f"spartan {__version__}")
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("train", add_help=False, help="train a network; its flags: spartan train --help")
    resume = commands.add_parser(
        "resume",
        help="go on with a run that was stopped or lost, to the same result",
        epilog="--cluster.* and --run.keep may follow, as in `spartan train`; nothing else of a run can change.",
    )
    resume.add_argument("run", type=_path("RUN"), metavar="RUN", help="a run folder")
    report = commands.add_parser("report", help="tables and pictures of one run, or of several compared")
    report.add_argument("runs", nargs="+", type=_path("RUN"), metavar="RUN", help="a run folder")
    report.add_argument(
        "-o",
        dest="folder",
        type=_path("-o"),
        metavar="DIR",
        help="where to write (default: RUN/report; for several runs, ./report)",
    )
    replay = commands.add_parser(
        "replay", help="rebuild any descendant that a run scored, or verify the run's updates from its journal"
    )
    replay.add_argument("run", type=_path("RUN"), metavar="RUN", help="a run folder")
    replay.add_argument(
        "--verify", action="store_true", help="make every next parent again and compare it with its digest on record"
    )
    replay.add_argument("--generation", type=int, metavar="G", help="the epoch of the evolve phase")
    replay.add_argument("--member", type=int, metavar="K", help="the member, counted from 0")
    replay.add_argument(
        "-o",
        dest="file",
        type=_path("-o"),
        metavar="FILE",
        help="the descendant's weights (default: descendant-G-K.safetensors)",
    )
    bench = commands.add_parser(
        "bench", help="measure this machine: scoring, update, dispatch, memory, beside its limit: ten minutes"
    )
    bench.add_argument("--full", action="store_true", help="every population, and a simulated cluster: half an hour")
    bench.add_argument("--json", action="store_true", help="print the results as JSON instead of the table")
    bench.add_argument(
        "--peers", type=_path("--peers"), metavar="DIR", help="compare with the programs of benchmarks/peers"
    )
    bench.add_argument(
        "--write-docs", action="store_true", help="put the tables into ./README.md and ./docs/scaling.md"
    )
    bench.add_argument(
        "-o",
        dest="folder",
        type=_path("-o"),
        metavar="DIR",
        default=Path("bench"),
        help="where to write (default: bench)",
    )
    arguments, rest = parser.parse_known_args()
    if rest and arguments.command not in ("train", "resume"):
        parser.error(f"unknown arguments: {' '.join(rest)}")
    if arguments.command == "replay" and arguments.verify == (arguments.generation is not None):
        replay.error("either --verify, or --generation G and --member K")
    if arguments.command == "replay" and (arguments.generation is None) != (arguments.member is None):
        replay.error("--generation and --member go together")
    match arguments.command:
        case "train":
            return run(with_absolute_paths(parse_config(rest)))
        case "resume":
            return resume_run(arguments.run, rest)
        case "report":
            return write_report(arguments.runs, arguments.folder)
        case "bench":
            return run_bench(arguments)
        case _:
            return replay_run(arguments)


def _path(name: str) -> Callable[[str], Path]:
    """What makes a path of an argument."""
    return lambda text: Path(no_url(name, text))


def _is_unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    output = select.poll()
    output.register(STDOUT, 0)  # an error is told unasked
    return any(event & select.POLLERR for _, event in output.poll(0))


def parse_config(arguments: list[str]) -> Config:
    """The configuration of `spartan train`'s arguments: --config NAME|FILE, and flags that override it."""
    base = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    base.add_argument("--config")
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            chosen, flags = base.parse_known_args(arguments)
    except SystemExit:
        raise InputError("--config: expected the name of a preset or a file") from None
    default = load_config(chosen.config) if chosen.config else Config()
    description = (
        f"Train a network. --config NAME|FILE is the base, flags override it. Presets: {', '.join(preset_names())}."
    )
    try:
        return _with_flags(default, flags, "spartan train", description)
    except InputError as error:
        stray = next((flag for flag in flags if str(error) == f"Unrecognized options: {flag}"), "")
        if stray in preset_names() or Path(stray).is_file():
            raise InputError(f"{error} (perhaps --config {stray}?)") from None
        raise


def _with_flags(default: Config, flags: list[str], prog: str, description: str) -> Config:
    """A configuration with the fields that flags name replaced."""
    errors = io.StringIO()
    try:
        with contextlib.redirect_stderr(errors):
            return tyro.cli(Config, default=default, args=flags, prog=prog, description=description)
    except SystemExit as end:
        if end.code == 0:
            raise
        raise InputError(_first_sentence(errors.getvalue())) from None


def with_absolute_paths(config: Config) -> Config:
    """The paths of a configuration as they are here: the driver may run in another directory."""
    run, data, parent = config.run, config.data, config.parent
    run = run.model_copy(update={"out": str(Path(run.out).absolute())})
    if data.name != "digits":
        data = data.model_copy(update={"root": str(Path(data.root or f"data/{data.name}").absolute())})
    if parent.weights not in ("none", "imagenet"):
        parent = parent.model_copy(update={"weights": str(Path(parent.weights).absolute())})
    return config.model_copy(update={"run": run, "data": data, "parent": parent})


def _first_sentence(box: str) -> str:
    """The message of tyro's error box without the box, and the flag that it proposes."""
    lines = [line.strip("│ ").strip() for line in box.splitlines() if line.startswith("│")]
    rule = next((number for number, line in enumerate(lines) if line.startswith("───")), len(lines))
    message = " ".join(lines[:rule]).split(" Got errors", 1)[0]
    proposed = [line.split()[0].rstrip(",") for line in lines[rule:] if line.startswith("--")]
    if message.startswith("Unrecognized") and proposed:
        message += f" (perhaps {proposed[0]}?)"
    return message or " ".join(box.split())


def resume_run(folder: Path, flags: list[str]) -> int:
    """`spartan resume`: go on from the last checkpoint."""
    from spartan_ray.checkpoint import latest_checkpoint
    from spartan_ray.record import lock_folder

    before = load_run_config(folder)
    try:
        config = _with_flags(before, flags, "spartan resume RUN", "Only --cluster.* and --run.keep may be given.")
    except InputError as error:
        raise InputError(f"{error} (resume takes one RUN, --cluster.* and --run.keep)") from None
    with lock_folder(folder, LOCK_PATIENCE):  # a run in progress is said before Ray starts
        warnings: list[str] = []
        try:
            checkpoint, _ = latest_checkpoint(folder, warnings.append)
        except InputError:
            for warning in warnings:
                print(warning)
            raise
    changed = differences(checkpoint.loop.config, config)
    if changed:
        raise InputError(f"{folder}: only cluster and run.keep may change on resume: {'; '.join(changed)}")
    if config.cluster.cpus_per_worker != before.cluster.cpus_per_worker:
        print("cluster.cpus_per_worker is another one now: the bits of the scores depend on it")
    if checkpoint.epoch == config.run.epochs and (folder / "final.safetensors").exists():
        print(f"{folder}: finished, all {config.run.epochs} epochs are done")
        return 0
    return run(config, folder.absolute())


def run(config: Config, folder: Path | None = None) -> int:
    """Run the driver on Ray, from the checkpoint in a folder if there is one, and show its progress."""
    if folder is None and JOB_FOLDER in config.run.out:
        print(
            f"run.out {config.run.out}: this is the working directory of a Ray job, which Ray may delete once the job "
            "has ended: give --run.out an absolute path elsewhere",
            flush=True,
        )
    address, named_by = ray_address(config.cluster.address)
    if address == "local":
        _check_paths(config, new=folder is None)
        _make_token()  # Ray reads the mode when it is imported
    # It warns of what protects the user: the token.
    logging.getLogger("ray._private.authentication.authentication_token_setup").setLevel(logging.ERROR)
    if address != "local":
        address = check_address(address, named_by)
    # Ray and torch take seconds to import; a bad flag is answered before.
    import ray
    from ray.exceptions import RayError, RayTaskError

    from spartan_ray.supervisor import Supervisor

    _start_ray(address, named_by)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # over Ray's own
    supervisor = None
    try:
        supervisor = Supervisor(config, folder)
        console = Console()
        try:
            follow(supervisor, console)
        except KeyboardInterrupt:
            _stop(supervisor, console)
            return 130
        supervisor.result()
        _, progress = supervisor.watch(0, 0)
        summarise(progress)
        return 0
    except RayTaskError as error:
        if isinstance(error.cause, InputError):
            raise error.cause from None
        if not isinstance(error.cause, RunError):
            print(error, file=sys.stderr)
            return 1
        assert supervisor
        hint = "" if isinstance(error.cause, Diverged) else f"; {_how_to_go_on(supervisor.folder)}"
        print(f"spartan: {error.cause}{hint}", file=sys.stderr)
        return 1
    except RunError as error:  # of the supervisor
        known = supervisor.folder if supervisor else None
        raise RunError(f"{error}; {_how_to_go_on(known)}") from None
    except RayError as error:
        known, lost = (supervisor.folder, supervisor.restarts) if supervisor else (None, 1)
        reason = _first_line(error).rstrip(".")
        allowed = f"cluster.driver_restarts {config.cluster.driver_restarts}"
        print(f"spartan: the driver was lost {lost} x ({allowed}): {reason}; {_how_to_go_on(known)}", file=sys.stderr)
        return 1
    except BrokenPipeError as error:  # nobody reads what is printed
        known = supervisor.folder if supervisor else None
        print(f"spartan: {error.strerror}; {_how_to_go_on(known)}", file=sys.stderr)
        raise
    finally:
        if supervisor:
            supervisor.close()
        ray.shutdown()


def _stop(supervisor: Any, console: Console) -> None:
    """End a run, or leave it at its last checkpoint when the user does not wait, and say how to go on."""
    try:
        print("stopping", flush=True)
        supervisor.stop()
        _, progress = supervisor.watch(STOP_SECONDS, 0)
        _say(console, supervisor)
        if not progress.folder:
            print("stopped before the run began", flush=True)
        else:
            print(f"stopped after epoch {len(progress.rows)}; {_how_to_go_on(progress.folder)}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped at once; {_how_to_go_on(supervisor.folder)}", flush=True)


def _how_to_go_on(folder: Path | str | None) -> str:
    return f"go on with: spartan resume {folder}" if folder else "there is no run folder yet"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _check_paths(config: Config, new: bool) -> None:
    """Answer a wrong path before Ray starts, where the driver will run on this machine. A run that goes on
    has its folder, and its weights in its checkpoint."""
    if new:
        out = Path(config.run.out)
        place = next(folder for folder in (out, *out.parents) if os.path.exists(folder))
        try:
            tempfile.TemporaryDirectory(dir=place).cleanup()
        except OSError as error:
            raise InputError(f"run.out {out}: cannot make a run folder: {place}: {error.strerror}") from None
    if config.data.name == "folder":
        from spartan_ray.images import list_folder

        list_folder(Path(str(config.data.root)))
    if new and config.parent.weights not in ("none", "imagenet"):
        from spartan_ray.model import read_weights

        read_weights(Path(config.parent.weights))


def _start_ray(address: str, named_by: str) -> None:
    """Join the Ray at an address, or start one of this machine that takes nobody in without its token."""
    import ray
    from ray.exceptions import RayError

    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    print("starting Ray", flush=True)
    quiet: dict[str, Any] = {"logging_level": logging.WARNING, "log_to_driver": False}
    try:
        if address == "local":
            ray.init(address="local", include_dashboard=False, dashboard_host="127.0.0.1", **quiet)
        else:
            ray.init(address=address, **quiet)
    except (OSError, ValueError, RuntimeError, RayError) as error:
        raise InputError(f"{named_by} {address}: {error.__cause__ or error}") from None


def _make_token() -> None:
    """Turn Ray's token authentication on for a local Ray, unless the user chose, and let nobody else read the
    token: Ray itself leaves that to the umask."""
    if os.environ.setdefault("RAY_AUTH_MODE", "token") != "token":
        return
    if not os.environ.get("RAY_AUTH_TOKEN") and not os.environ.get("RAY_AUTH_TOKEN_PATH"):
        path = Path.home() / ".ray" / "auth_token"
        try:
            path.parent.mkdir(mode=0o700, exist_ok=True)
            with contextlib.suppress(FileExistsError):
                file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
                os.write(file, secrets.token_hex(32).encode())
                os.close(file)
            path.chmod(0o600)
        except OSError as error:
            raise InputError(f"{path}: Ray's token cannot be kept there: {error.strerror}") from None
    check_token()


def follow(supervisor: Any, console: Console) -> None:
    """Show the run's progress until it ends: a live bar in a terminal, plain lines elsewhere."""
    show = _live_bar(console) if console.is_terminal else _plain_lines()
    with show as update:
        ended = False
        while not ended:
            ended, state = supervisor.watch(REFRESH_SECONDS)
            _say(console, supervisor)
            update(state)


def _say(console: Console, supervisor: Any) -> None:
    """Print what the run has said, each line taken away when it is out: an interrupt loses none."""
    while supervisor.unsaid:
        said = supervisor.unsaid[0]
        line = said if isinstance(said, str) else _row_line(said, supervisor.config.run.epochs)
        console.print(line, highlight=False, markup=False, soft_wrap=True)
        supervisor.unsaid.popleft()


def _row_line(row: dict[str, Any], epochs: int) -> str:
    from spartan_ray.report import effect, number

    line = (
        f"epoch {row['epoch']}/{epochs} {row['kind']:6} train loss {number(row['train_loss'])}  "
        f"validation {number(row['validation_accuracy'])}  test {number(row['test_accuracy'])}  "
        f"{row['seconds']:.1f} s  {row['images_per_second']:.0f} images/s"
    )
    if row["kind"] == "evolve":
        before, after = number(row["parent_fitness_before"]), number(row["parent_fitness_after"])
        line += f"  parent {before} -> {after} {effect(row)}"
        line += f"  step ratio {number(row['step_ratio'], 2)}" if row["accepted"] else ""
    return line


@contextlib.contextmanager
def _live_bar(console: Console) -> Iterator[Any]:
    """A bar for the run and one for its phase."""
    columns = (
        TextColumn("{task.description:22}"),
        BarColumn(bar_width=None),
        MofNCompleteColumn(),
        TextColumn("{task.fields[rate]}"),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console, transient=True) as bar:
        run = bar.add_task("epochs", total=None, rate="")
        phase = bar.add_task("starting", total=None, rate="")
        shown = (0, "")

        def update(state: Any) -> None:
            nonlocal shown
            bar.update(run, completed=max(0, state.epoch - 1), total=state.epochs)
            name = f"{state.phase} ({state.unit})" if state.unit else state.phase
            if shown != (state.epoch, state.phase):
                bar.reset(phase, total=state.total or None, description=name)
                shown = (state.epoch, state.phase)
            bar.update(phase, completed=state.done, rate=f"{_rate(state):.0f} images/s" if state.images else "")

        yield update


@contextlib.contextmanager
def _plain_lines() -> Iterator[Any]:
    """A line now and then, for logs."""
    last = time.monotonic()

    def update(state: Any) -> None:
        nonlocal last
        if time.monotonic() - last < LINE_SECONDS or not state.done:
            return
        last = time.monotonic()
        left = (time.time() - state.started) / state.done * (state.total - state.done)
        rate = f", {_rate(state):.0f} images/s" if state.images else ""
        print(
            f"epoch {state.epoch}/{state.epochs} {state.phase}: {state.done}/{state.total} {state.unit}{rate}, "
            f"{left:.0f} s left",
            flush=True,
        )

    yield update


def _rate(state: Any) -> float:
    return float(state.images / max(time.time() - state.started, 1e-9))


def summarise(state: Any) -> None:
    """Print the table of a run that ended, and where it lies."""
    import pandas as pd

    from spartan_ray.report import SHORT, final_table, markdown

    print("\n" + markdown(final_table({Path(state.folder).name: pd.DataFrame(state.rows)})[SHORT]))
    print(f"run folder: {state.folder}\npictures:   spartan report {state.folder}", flush=True)


def write_report(folders: list[Path], out: Path | None) -> int:
    """`spartan report`: tables and pictures."""
    from spartan_ray import report

    runs = [report.read_run(folder) for folder in folders]
    out = out or (folders[0] / "report" if len(folders) == 1 else Path("report"))
    paths = report.write_report(runs, out)
    print(report.markdown(report.final_table(report.unique_frames(runs))[report.SHORT]))
    for path in paths:
        print(path)
    return 0


def run_bench(arguments: argparse.Namespace) -> int:
    """`spartan bench`: what this machine does."""
    import json

    _make_token()
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    from spartan_ray.bench.command import bench
    from spartan_ray.bench.figures import table

    def say(line: str) -> None:
        print(line, file=sys.stderr, flush=True)

    results = bench(arguments.folder, arguments.full, arguments.peers, arguments.write_docs, say)
    print(json.dumps(results) if arguments.json else table(results))
    say(", ".join(str(arguments.folder / name) for name in ("results.json", "throughput.png", "scaling.png")))
    return 0


def replay_run(arguments: argparse.Namespace) -> int:
    """`spartan replay`: a descendant again, or all updates."""
    import torch

    from spartan_ray.process import set_up
    from spartan_ray.replay import Replay, ran_on_gpu

    device = set_up(gpu=ran_on_gpu(arguments.run) and torch.cuda.is_available())
    replay = Replay(arguments.run, print, device)
    if arguments.verify:
        agree = []
        for generation in replay.generations:
            try:
                agree.append(replay.verify(generation))
            except InputError as error:
                print(f"generation {generation}: {error}")
                agree.append(False)
        print(f"{sum(agree)} of {len(agree)} updates agree with the recorded parents")
        return 0 if all(agree) else 1
    generation, member = arguments.generation, arguments.member
    file = arguments.file or Path(f"descendant-{generation}-{member}.safetensors")
    if file.is_dir() or not file.absolute().parent.is_dir():
        raise InputError(f"-o {file}: {'is a folder' if file.is_dir() else 'there is no such folder'}")
    recorded, scored = replay.descendant(generation, member, file)
    print(f"{file}: member {member} of generation {generation}; fitness {recorded!r} on record, {scored!r} here")
    same = recorded == scored or math.isnan(recorded)
    reason = "on record it was not finite, or no worker could score it" if math.isnan(recorded) else "equal to the bit"
    print(reason if same else "they differ: other versions or another device than the run's?")
    return 0 if same else 1
