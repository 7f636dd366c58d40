"""`spartan submit`: submit a run as a job to a running Ray cluster, where this package need not be installed."""

from __future__ import annotations

import asyncio
import os
import shlex
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import spartan_ray
from spartan_ray.errors import InputError, one_line
from spartan_ray.run.config import Config
from spartan_ray.run.loading import dump_config, named_code
from spartan_ray.section import is_url

ADDRESS = "http://127.0.0.1:8265"
# Patterns of files that are not sent with the job.
EXCLUDED = ["__pycache__", "*.pyc", ".git", ".venv"]
CONFIG = "spartan-submitted.yaml"


def submit(config: Config, address: str | None, code: Path | None, follow: bool) -> int:
    """Submit a run as a job, and print its id and how to follow, stop and continue it. With `follow`, show its output
    and return its exit code. Raises InputError if the job cannot be submitted."""
    _refuse_paths(config)
    if named_code(config) and code is None:
        raise InputError(f"{named_code(config)[0][1]} is code of your own: give its folder with --code")
    address = address or os.environ.get("RAY_API_SERVER_ADDRESS") or ADDRESS
    from ray.job_submission import JobStatus, JobSubmissionClient

    os.environ.setdefault("RAY_AUTH_MODE", "token")
    with tempfile.TemporaryDirectory() as folder:
        # Send the resolved configuration: later changes to the file that it came from have no effect.
        if code:
            shutil.copytree(code, folder, ignore=shutil.ignore_patterns(*EXCLUDED), dirs_exist_ok=True)
        (Path(folder) / CONFIG).write_text(dump_config(config))
        package = str(Path(spartan_ray.__file__).parent)
        environment: dict[str, Any] = {"working_dir": folder, "py_modules": [package], "excludes": EXCLUDED}
        command = ["python", "-m", "spartan_ray", "train", "--config", CONFIG]
        try:
            client = JobSubmissionClient(address)
            job = client.submit_job(
                entrypoint=shlex.join(command), runtime_env=environment, metadata={"spartan_run": config.run.name}
            )
        except (ConnectionError, RuntimeError, ValueError) as error:
            raise InputError(f"--address {address}: {one_line(str(error))}") from None
    print(f"{job}: submitted")
    print(f"follow:  ray job logs --address {address} --follow {job}\nstop:    ray job stop --address {address} {job}")
    print("resume:  submit it again if it has --run.resume auto, else resume the run folder that it prints")
    if not follow:
        return 0

    async def show() -> None:
        async for text in client.tail_job_logs(job):
            print(text, end="", flush=True)

    asyncio.run(show())
    while not (info := client.get_job_info(job)).status.is_terminal():  # the log ends before the job does
        time.sleep(0.5)
    if info.status == JobStatus.SUCCEEDED:
        return 0
    return info.driver_exit_code if info.driver_exit_code and info.driver_exit_code > 0 else 1


def _refuse_paths(config: Config) -> None:
    """Raises InputError for a relative path, which would mean another place on the cluster."""
    paths = {"run.out": config.run.out}
    if config.data.name != "digits":
        paths["data.root"] = config.data.root or ""
    if config.parent.weights not in ("none", "imagenet"):
        paths["parent.weights"] = config.parent.weights
    for field, path in paths.items():
        if not is_url(path) and not Path(path).is_absolute():
            raise InputError(
                f"{field} ({path or 'not given'}): a job has a working directory of its own: give an absolute path"
            )
