"""`spartan train` and `spartan resume`: run training to its end, from the start or from the last checkpoint."""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from rich.console import Console

from spartan_ray.cli.flags import take_fields
from spartan_ray.cli.follow import follow, say, summarise
from spartan_ray.cli.watchdog import watchdog
from spartan_ray.distributed.address import ray_address
from spartan_ray.distributed.start import reach_ray, start_ray
from spartan_ray.errors import Diverged, InputError, RunError
from spartan_ray.naming import imported, is_named, logger_names
from spartan_ray.run.config import Config
from spartan_ray.run.loading import load_run_config, named_code, refuse_changes, refuse_code
from spartan_ray.section import is_url

# Seconds to wait for Ray to start, and for a run to stop.
START_SECONDS = 300.0
STOP_SECONDS = 30.0
# Seconds to wait for a run that was just killed to release its folder's lock.
LOCK_PATIENCE = 3.0
# Environment variable that Ray sets in a job.
JOB_CONFIG = "RAY_JOB_CONFIG_JSON_ENV_VAR"
# Part of the path of a Ray job's working directory.
JOB_FOLDER = "/runtime_resources/working_dir_files/"


def resume_run(arguments: argparse.Namespace) -> int:
    """`spartan resume`: continue a run from its last checkpoint, and return the exit code."""
    from spartan_ray.run.place import reading

    with reading(arguments.run, lambda name: name == "config.yaml") as folder:
        before = load_run_config(folder)
        if not arguments.code:
            refuse_code(folder, before, "add --code if you trust it")
        where = arguments.run if is_url(arguments.run) else str(folder.absolute())
    config = take_fields(before, arguments)
    return 0 if is_finished(arguments.run, config) else run(config, where)


def begun(config: Config) -> tuple[str | None, bool]:
    """Return the folder or URL of the existing run that `run.resume` continues, or None, and whether that run is
    finished. Raises InputError if it cannot continue with this configuration."""
    from spartan_ray.run.place import exists

    place = f"{config.run.out}/{config.run.name}"
    if config.run.resume == "never" or not exists(place):
        return None, False
    return place, is_finished(place, config)


def is_finished(place: str, config: Config) -> bool:
    """Return whether a run is finished under this configuration, and print so if it is. Raises InputError if it cannot
    continue with this configuration."""
    from spartan_ray.run.checkpoint import is_empty, latest_checkpoint
    from spartan_ray.run.place import last_epoch, lock_folder, reading
    from spartan_ray.run.record import is_over

    with reading(place, last_epoch(place)) as folder:
        if config.run.resume == "auto" and is_empty(folder):
            return False
        with lock_folder(folder, LOCK_PATIENCE):  # reports a run in progress before Ray starts
            warnings: list[str] = []
            try:
                checkpoint, metrics = latest_checkpoint(folder, warnings.append)
            except InputError:
                if is_url(place):  # the driver will try earlier checkpoints
                    return False
                for warning in warnings:
                    print(warning)
                raise
        has_ended = (folder / "final.safetensors").exists()
    before = checkpoint.loop.config
    refuse_changes(place, before, config)
    if config.cluster.cpus_per_worker != before.cluster.cpus_per_worker:
        print("cluster.cpus_per_worker has changed: the bits of the scores depend on it")
    rows = [json.loads(line) for line in metrics.splitlines()]
    if not is_over(rows, config.run) or not has_ended:
        return False
    done = f"all {checkpoint.epoch} epochs are done"
    print(f"{place}: finished, {done if checkpoint.epoch == config.run.epochs else f'after epoch {checkpoint.epoch}'}")
    return True


def run(config: Config, folder: str | None = None) -> int:
    """Run the driver on Ray and show its progress. Continue from the checkpoint in `folder` if it is given. Return the
    exit code."""
    if folder is None and JOB_FOLDER in config.run.out:
        print(
            f"run.out {config.run.out}: this is the working directory of a Ray job, which Ray may delete once the job "
            "has ended: give --run.out an absolute path elsewhere",
            flush=True,
        )
    if ray_address(config.cluster.address)[0] == "local":
        check_paths(config, new=folder is None)
    address, named_by = reach_ray(config.cluster.address)
    import ray
    from ray.exceptions import RayError, RayTaskError

    from spartan_ray.run.supervisor import ROOM_SECONDS, Supervisor

    print("starting Ray" if address == "local" else f"joining the Ray at {address}", flush=True)
    with watchdog("the start of Ray", START_SECONDS, "its logs are in /tmp/ray/session_latest/logs"):
        start_ray(address, named_by)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # replaces Ray's handler
    supervisor = None
    try:
        supervisor = Supervisor(config, folder, ROOM_SECONDS if address != "local" else 0.0)
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
    except RunError as error:  # raised by the supervisor
        known = supervisor.folder if supervisor else None
        raise RunError(f"{error}; {_how_to_go_on(known)}") from None
    except RayError as error:
        known, lost = (supervisor.folder, supervisor.restarts) if supervisor else (None, 1)
        reason = _first_line(error).rstrip(".")
        allowed = f"cluster.driver_restarts {config.cluster.driver_restarts}"
        print(f"spartan: the driver was lost {lost} x ({allowed}): {reason}; {_how_to_go_on(known)}", file=sys.stderr)
        return 1
    except BrokenPipeError as error:  # nobody reads the output
        known = supervisor.folder if supervisor else None
        print(f"spartan: {error.strerror}; {_how_to_go_on(known)}", file=sys.stderr)
        raise
    finally:
        if supervisor:
            supervisor.close()
        ray.shutdown()


def _stop(supervisor: Any, console: Console) -> None:
    """Stop a run and print how to continue it. A second interrupt leaves it at its last checkpoint."""
    from ray.exceptions import RayError, RayTaskError

    try:
        print("stopping", flush=True)
        supervisor.stop()
        _, progress = supervisor.watch(STOP_SECONDS, 0)
        say(console, supervisor)
        if not progress.folder:
            print("stopped before the run began", flush=True)
        else:
            print(f"stopped after epoch {len(progress.rows)}; {_how_to_go_on(progress.folder)}", flush=True)
    except RayTaskError:
        raise
    except (RayError, RunError):  # a signal to the whole process group ended the driver too
        print(f"stopped; {_how_to_go_on(supervisor.folder)}", flush=True)
    except KeyboardInterrupt:
        print(f"stopped at once; {_how_to_go_on(supervisor.folder)}", flush=True)


def _how_to_go_on(folder: str | None) -> str:
    if not folder:
        return "there is no run folder yet"
    # Inside a Ray job, the way to continue is another job, not a local command.
    command = "a job of: python -m spartan_ray" if JOB_CONFIG in os.environ else "spartan"
    return f"go on with{':' * (command == 'spartan')} {command} resume {folder}"


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def check_paths(config: Config, new: bool) -> None:
    """Raises InputError for a wrong path or name, before Ray starts. Call it on the machine that will run the driver.
    Give `new` as False for a run that continues: it has its folder, and its weights are in its checkpoint."""
    if new and is_url(config.run.out):
        from spartan_ray.run.storage import Store

        try:
            Store(config.run.out).check()
        except RunError as error:
            raise InputError(f"run.out {error}") from None
    elif new:
        out = Path(config.run.out)
        place = next(folder for folder in (out, *out.parents) if os.path.exists(folder))
        try:
            tempfile.TemporaryDirectory(dir=place).cleanup()
        except OSError as error:
            raise InputError(f"run.out {out}: cannot make a run folder: {place}: {error.strerror}") from None
    if config.data.name == "folder":
        from spartan_ray.vision.images import list_folder

        list_folder(Path(str(config.data.root)))
    if new and config.parent.weights not in ("none", "imagenet"):
        from spartan_ray.vision.weights import read_weights

        read_weights(Path(config.parent.weights))
    for name in logger_names(config.run.loggers):
        if not is_named(name) and importlib.util.find_spec(name) is None:
            raise InputError(f"run.loggers {name}: not installed: pip install 'spartan-ray[{name}]'")
    for field, name in named_code(config):
        imported(field, name)
    if is_named(config.evolution.strategy):
        from spartan_ray.run.setup import make_strategy

        make_strategy(config.evolution, classes=2)
