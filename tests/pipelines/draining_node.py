"""A Ray cluster of two local nodes, of which one is told to end: a program, since Ray is one to a
process.

    python draining_node.py

Prints what a worker there finds before and after, as JSON.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path


def looked() -> list[bool]:
    """Whether the node drains: at first, and within the next half minute."""
    from pipelines.stops import drained

    found = [drained()]
    for _ in range(120):
        if drained():
            return [*found, True]
        time.sleep(0.25)
    return [*found, False]


def main() -> None:
    import ray
    from ray.cluster_utils import Cluster

    cluster = Cluster()
    cluster.add_node(num_cpus=0, include_dashboard=False)
    assert cluster.address
    ray.init(address=cluster.address, log_to_driver=False)
    address = cluster.address.split(":")[0]
    second = subprocess.Popen(
        [
            Path(sys.executable).with_name("ray"), "start", f"--address={cluster.address}",
            "--num-cpus=1", "--block", f"--node-ip-address={address}",
        ],
        env=os.environ | {"RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S": "30"},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        here = Path(__file__).parents[2]
        remote = ray.remote(num_cpus=1, runtime_env={"env_vars": {"PYTHONPATH": str(here)}})
        begun = remote(lambda: None)
        ray.get(begun.remote())  # the node is there
        found = remote(looked).remote()
        time.sleep(5)
        second.terminate()
        print(json.dumps(ray.get(found)))
    finally:
        second.kill()
        ray.shutdown()
        cluster.shutdown()


if __name__ == "__main__":
    main()
