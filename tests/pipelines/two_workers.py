"""Runs of two workers without Ray: two processes that gloo joins, started once for many runs."""

from __future__ import annotations

import gc
import os
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from pipelines import training_worker
from pipelines.recipe import Run, TrainConfig
from pipelines.storage import Store


def on_two_workers(work: Callable[[int], None], folder: Path) -> None:
    """Call `work` with the rank in each of two processes, in which `run` trains."""
    torch.multiprocessing.spawn(_worker, (work, folder), nprocs=2)


def run(store: Store, name: str, recipe: Any, config: TrainConfig) -> None:
    """What a worker of Ray Train does of `trainer.fit`."""
    training_worker.work(Run(store.uri, f"runs/{name}", f"models/{name}", "same", recipe, config))


def _worker(rank: int, work: Callable[[int], None], folder: Path) -> None:
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    gc.freeze()  # as in conftest.py
    dist.init_process_group(
        "gloo", init_method=f"file://{folder}/group", rank=rank, world_size=2,
        timeout=timedelta(minutes=1),
    )  # fmt: skip
    training_worker._join = lambda config: (rank, 2, torch.device("cpu"))
    work(rank)
