"""A run on a cluster that gains and loses nodes. Takes the configuration as JSON and prints observations as JSON.

The cluster begins with a head without cores and gets two nodes, one after the other. It loses the second one during a
generation.
"""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parent.parent))
from whole_runs import attend

from spartan_ray.run.config import Config
from spartan_ray.run.progress import Progress
from spartan_ray.run.supervisor import Supervisor


def main() -> None:
    config = Config(**json.loads(sys.argv[1]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    ray.init(address=cluster.address, log_to_driver=False)
    seen: dict[str, Any] = {"workers": []}
    second: list[Any] = []
    first: list[int] = []

    def watch(progress: Progress) -> None:
        if supervisor.unsaid and "waited" not in seen:
            seen["waited"] = supervisor.unsaid[0]
            cluster.add_node(num_cpus=1)
        workers = progress.worker_pids
        if workers and seen["workers"][-1:] != [len(workers)]:
            seen["workers"].append(len(workers))
        evolving = progress.phase == "evolve" and 0 < progress.done < progress.total
        if evolving and progress.epoch == 2 and not second:
            # The run waits until the second node has a worker, which takes the tasks of the stopped first worker.
            first.extend(workers)
            os.kill(first[0], signal.SIGSTOP)
            second.append(cluster.add_node(num_cpus=1))
        elif evolving and len(workers) == 2 and "removed" not in seen:
            seen["removed"] = progress.phase
            cluster.remove_node(second[0], allow_graceful=False)
            os.kill(first[0], signal.SIGCONT)

    supervisor = Supervisor(config, room_seconds=600.0)
    seen["folder"] = str(attend(supervisor, watch))
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
