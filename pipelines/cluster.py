"""Joins a Ray cluster: the one at RAY_ADDRESS, or else a local one, which it starts."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager


def start(*, cpus: int | None = None) -> None:
    """Connect to Ray unless this process is connected already.

    `ray job submit` and a head node set RAY_ADDRESS; without it a private local cluster starts,
    with its dashboard off and every port on loopback. `cpus` is the number of logical CPUs of that
    local cluster (default: the machine's).
    """
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")  # img2dataset's resizer phones home
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")  # the jobs show their own
    os.environ.setdefault("RAY_AIR_NEW_OUTPUT", "0")  # Tune's tables
    os.environ.setdefault("RAY_CHDIR_TO_TRIAL_DIR", "0")  # keep paths relative to the job's start
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # see pipelines/demo.py; workers inherit it
    import ray
    import ray.data

    if not ray.is_initialized():
        address = os.environ.get("RAY_ADDRESS")
        if address:
            ray.init(address=address, log_to_driver=True, logging_level=logging.WARNING)
        else:
            # Ray Data would start 32 processes to read the footers of Parquet files.
            os.environ.setdefault("RAY_DATA_PARQUET_FOOTER_NUM_ACTORS", "1")
            # Ray's workers would yield to every other process, Ray's own included: with all cores
            # in use, the threads of an operator then wait for each other.
            os.environ.setdefault("RAY_worker_niceness", "0")
            # A process per training that watches whether its nodes are about to be preempted.
            os.environ.setdefault("RAY_TRAIN_ENABLE_PREEMPTION_WATCHER", "0")
            with _on_loopback():
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    include_dashboard=False,
                    log_to_driver=bool(os.environ.get("BEIT3_RAY_LOGS")),
                    logging_level=logging.ERROR,
                    object_store_memory=1 << 30,
                    _metrics_export_port=None,
                )
    context = ray.data.DataContext.get_current()
    context.enable_progress_bars = False
    context.print_on_execution_start = False
    for name in ("ray.data", "ray.train", "ray.tune"):
        logging.getLogger(name).setLevel(logging.WARNING)


def device(gpus: float) -> str:
    """The device of a worker to which Ray assigned `gpus` GPUs: `cuda` or `cpu`.

    With BEIT3_DEVICE=cpu it is always the CPU: a cluster can be rehearsed on machines whose GPUs
    are only declared (`ray start --num-gpus`).
    """
    return "cuda" if gpus and os.environ.get("BEIT3_DEVICE") != "cpu" else "cpu"


@contextmanager
def _on_loopback() -> Iterator[None]:
    """Make a Ray started in this block use 127.0.0.1 as its node's address, and listen only there.

    On Linux Ray otherwise replaces loopback by the machine's network address, and listens
    everywhere. The environment variable for it, RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER=0, is read only
    when Ray is first imported, which may have been long ago.
    """
    from ray._private import ray_constants

    before = ray_constants.ENABLE_RAY_CLUSTER
    ray_constants.ENABLE_RAY_CLUSTER = False
    try:
        yield
    finally:
        ray_constants.ENABLE_RAY_CLUSTER = before
