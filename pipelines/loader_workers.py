"""Batches made beside the training workers, by processes that decode and augment.

A batch is a function of its number, so it does not matter who makes it. With `loader_workers` each
training worker has so many Ray actors; they make whole batches in turn, and the training process
takes finished ones out of the object store, in order. Actors and not local processes, so that the
same option serves a laptop and a cluster: they want a CPU each and no GPU, and are spread over the
nodes, those without a GPU included. Actors and not tasks or Ray Data, so that row groups and
decoded pictures stay with a process that will want them again, and a run resumes at any batch
without going through those before it. The price: each actor reads the row groups of all its
worker's batches.

An actor that dies, with its node or out of memory, is replaced and its batches are made again.
"""

from __future__ import annotations

import os
import threading
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from beit3.device import pinned
from pipelines import cluster, console
from pipelines.loader import CACHES, Prefetcher
from pipelines.recipe import Recipe, TrainConfig

AHEAD = 2  # batches that each process has been asked for and that nobody has taken
ATTEMPTS = 3  # to make a batch, if the process that makes it dies
PATIENCE = 600.0  # seconds that a batch may take, the start of the process and of its node included


def prefetch(
    recipe: Recipe,
    rank: int,
    world: int,
    steps: range,
    workers: int,
    device: torch.device | str = "cpu",
) -> Prefetcher[Any]:
    """A worker's batches of some steps, in order and made ahead.

    By `workers` processes, or for 0 by a thread of this one; they are the same to the bit. They are
    in the CPU's memory, page-locked if the `device` that they go to is a GPU.
    """
    if not workers:
        CACHES.share(_beside())
    makers = LoaderWorkers(recipe, rank, world, steps, workers) if workers else None
    make, place = makers or recipe.batches(rank, world), torch.device(device)

    def batch(step: int) -> Any:
        return pinned(make(step), place) if place.type == "cuda" else make(step)

    return Prefetcher(batch, steps, close=makers and makers.close)


def check_room(config: TrainConfig) -> None:
    """See to it that the workers and their loader workers have where to run: Ray lets them wait.

    Any other cluster than this machine's own may grow; what it lacks as yet is said.

    Raises:
        ValueError: this machine's own Ray cluster lacks CPUs or GPUs.
    """
    if not config.workers and not config.loader_workers:
        return
    import ray

    cluster.start()
    there, loading = ray.cluster_resources(), max(1, config.workers) * config.loader_workers
    training = config.workers * config.cpus_per_worker
    gpus = config.workers * config.gpus_per_worker
    lacking = []
    if gpus > there.get("GPU", 0):
        lacking.append(
            f"train.workers {config.workers}: they want {gpus:g} GPUs, and there are "
            f"{there.get('GPU', 0):g}: set fewer workers"
            + ("" if there.get("GPU") else ", or train.gpus_per_worker 0 to train on CPUs")
        )
    if training + loading > there.get("CPU", 0):
        fewer = "fewer of either; no loader workers make batches in the training workers themselves"
        lacking.append(
            f"train.loader_workers {config.loader_workers}: they want {loading} CPUs in all, the "
            f"training workers {training:g}, and there are {there.get('CPU', 0):g}: set "
            f"{fewer if loading else 'fewer train.workers or train.cpus_per_worker'}"
        )
    if lacking and not os.environ.get("RAY_ADDRESS"):
        raise ValueError("; ".join(lacking))
    for lack in lacking:
        console.say(f"waiting until the cluster has grown ({lack})")


class LoaderWorkers:
    """Makes batches in Ray actors. To be called with the numbers of `steps`, one after the other.

    Raises, when called:
        RuntimeError: no batch came in time, or the actor that makes it died again and again.
        Exception: what making the batch raised.
    """

    def __init__(self, recipe: Recipe, rank: int, world: int, steps: range, workers: int) -> None:
        import ray

        # Of pixels, see `_tensor`.
        warnings.filterwarnings("ignore", "The given NumPy array is not writable", UserWarning)
        if not ray.is_initialized():
            cluster.start()
        self._actor: Any = ray.remote(num_cpus=1, scheduling_strategy="SPREAD")(_Maker)
        self._job = ray.put((recipe, rank, world))
        self._processes = workers * _beside()
        self._unasked = iter(steps)
        self._pending: dict[int, Any] = {}
        self._lock = threading.Lock()
        self._closed = False
        self.actors: list[Any] = [self._start() for _ in range(workers)]

    def __call__(self, step: int) -> Any:
        import ray
        from ray import exceptions

        lost = (exceptions.RayActorError, exceptions.ObjectLostError, exceptions.OutOfMemoryError)
        for attempt in range(1, ATTEMPTS + 1):
            self._ask()
            try:
                batch = ray.get(self._pending[step], timeout=PATIENCE)
                del self._pending[step]
                return batch
            except exceptions.GetTimeoutError as error:
                raise RuntimeError(self._stalled(step)) from error
            except lost as error:
                if self._closed or attempt == ATTEMPTS:
                    raise RuntimeError(
                        f"batch {step}: the process that makes it died {attempt} times "
                        f"({str(error).splitlines()[0]}). If memory ran out, set "
                        "train.loader_workers lower or give the nodes more"
                    ) from error
                self._replace(step % len(self.actors))
        raise AssertionError

    def close(self) -> None:
        """End the actors; a call that waits for one ends with an error."""
        import ray

        with self._lock:
            self._closed = True
            for actor in self.actors:
                ray.kill(actor)

    def _start(self) -> Any:
        return self._actor.remote(self._job, self._processes)

    def _ask(self) -> None:
        """See that each actor has work ahead, and no more than that."""
        while len(self._pending) < AHEAD * len(self.actors):
            step = next(self._unasked, None)
            if step is None:
                return
            self._pending[step] = self._actor_of(step).batch.remote(step)

    def _replace(self, number: int) -> None:
        import ray

        with self._lock:
            if self._closed:
                return
            ray.kill(self.actors[number])
            self.actors[number] = self._start()
        for step in self._pending:
            if step % len(self.actors) == number:
                self._pending[step] = self._actor_of(step).batch.remote(step)

    def _actor_of(self, step: int) -> Any:
        return self.actors[step % len(self.actors)]

    def _stalled(self, step: int) -> str:
        import ray

        there, free = ray.cluster_resources(), ray.available_resources()
        return (
            f"batch {step} was not made within {PATIENCE:g} s. Each of train.loader_workers "
            f"{len(self.actors)} wants a CPU; the Ray cluster has {there.get('CPU', 0):g}, "
            f"{free.get('CPU', 0):g} of them free: set fewer, or add nodes"
        )


class _Maker:
    """The actor."""

    def __init__(self, job: tuple[Recipe, int, int], processes: int) -> None:
        """`processes`: how many such a machine may have, which share its memory."""
        import ray.util

        torch.set_num_threads(1)
        # As arrays, tensors travel through shared memory without being copied into a pickle.
        ray.util.register_serializer(
            torch.Tensor, serializer=torch.Tensor.numpy, deserializer=_tensor
        )
        CACHES.share(processes)
        self._job = job
        self._make: Callable[[int], Any] | None = None

    def batch(self, step: int) -> Any:
        if self._make is None:
            recipe, rank, world = self._job
            self._make = recipe.batches(rank, world)
        return self._make(step)


def _beside() -> int:
    """Training workers on this machine, as Ray Train counts them."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _tensor(array: np.ndarray) -> torch.Tensor:
    """Pixels stay in the object store's memory, which is read-only, as models only make floats of
    them. All else is small and copied."""
    return torch.from_numpy(array if array.dtype == np.uint8 else array.copy())
