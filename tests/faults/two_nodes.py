"""A run on a cluster that begins with one node, gets a second one, and loses it in mid-generation. Takes the
configuration as JSON; prints what it saw as JSON."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import ray
from ray.cluster_utils import Cluster

sys.path.insert(0, str(Path(__file__).parent.parent))
from runs import attend

from spartan_ray.config import Config
from spartan_ray.driver import Progress, Supervisor


def main() -> None:
    config = Config(**json.loads(sys.argv[1]))
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1})
    ray.init(address=cluster.address, log_to_driver=False)
    seen: dict[str, Any] = {"workers": []}
    second: list[Any] = []

    def watch(progress: Progress) -> None:
        workers = len(progress.worker_pids)
        if workers and seen["workers"][-1:] != [workers]:
            seen["workers"].append(workers)
        if progress.epoch >= 1 and not second:
            second.append(cluster.add_node(num_cpus=1))
        if workers == 2 and progress.phase == "evolve" and 20 < progress.done < 150 and "removed" not in seen:
            seen["removed"] = progress.phase
            cluster.remove_node(second[0], allow_graceful=False)

    seen["folder"] = str(attend(Supervisor(config), watch))
    ray.shutdown()
    cluster.shutdown()
    print(json.dumps(seen))


if __name__ == "__main__":
    main()
