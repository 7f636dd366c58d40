"""Many generations while workers are killed. Takes the configuration as JSON and prints observations as JSON."""

from __future__ import annotations

import json
import os
import random
import signal
import sys
from pathlib import Path

import psutil
import ray

sys.path.insert(0, str(Path(__file__).parent.parent))
from whole_runs import attend

from spartan_ray.run.config import Config
from spartan_ray.run.progress import Progress
from spartan_ray.run.supervisor import Supervisor

# A number of generations, not seconds: the run must progress even if workers start slowly.
GENERATIONS_BETWEEN_KILLS = 5


def main() -> None:
    config = Config(**json.loads(sys.argv[1]))
    ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False)
    chance = random.Random(0)
    resident: dict[int, int] = {}
    killed: list[int] = []
    next_kill = GENERATIONS_BETWEEN_KILLS

    def watch(progress: Progress) -> None:
        nonlocal next_kill
        if progress.epoch not in resident:
            resident[progress.epoch] = psutil.Process(progress.driver_pid).memory_info().rss
        alive = [pid for pid in progress.worker_pids if pid not in killed]
        if alive and progress.epoch >= next_kill:
            killed.append(chance.choice(alive))
            os.kill(killed[-1], signal.SIGKILL)
            next_kill = progress.epoch + GENERATIONS_BETWEEN_KILLS

    folder = attend(Supervisor(config), watch)
    processes = [process.pid for process in psutil.Process().children(recursive=True)]
    ray.shutdown()
    print(json.dumps({"folder": str(folder), "killed": killed, "resident": resident, "processes": processes}))


if __name__ == "__main__":
    main()
