"""Makes batches beside the training workers, in processes that decode and augment.

A batch is a function of its number, so it does not matter which process makes it. Each training
worker has `loader_workers` Ray actors; they make whole batches in turn, and the training process
takes finished ones out of the object store, in order. Actors rather than local processes let the
same option serve a laptop and a cluster: each needs a CPU and no GPU, and they are spread over the
nodes, including those without a GPU. Actors rather than tasks or Ray Data keep row groups and
decoded pictures in a process that will need them again, and let a run resume at any batch without
going through those before it. The price: each actor reads the row groups of all its worker's
batches.

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

AHEAD = 2  # batches requested from each process and not yet taken
ATTEMPTS = 3  # to make a batch, if the process that makes it dies
PATIENCE = 600.0  # seconds that a batch may take, including the start of its process and node


def prefetch(
    recipe: Recipe,
    rank: int,
    world: int,
    steps: range,
    workers: int,
    device: torch.device | str = "cpu",
    ahead: int = 1,
) -> Prefetcher[Any]:
    """A worker's batches for `steps`, in order; `ahead` and one more are made ahead.

    They are made by `workers` processes, or, for 0, by a thread of this process; the batches are
    bit-identical either way. They are in CPU memory, page-locked if their `device` is a GPU.
    """
    if not workers:
        CACHES.share(_beside())
    makers = LoaderWorkers(recipe, rank, world, steps, workers) if workers else None
    make, place = makers or recipe.batches(rank, world), torch.device(device)

    def batch(step: int) -> Any:
        return pinned(make(step), place) if place.type == "cuda" else make(step)

    return Prefetcher(batch, steps, ahead + 1, close=makers and makers.close)


def check_room(config: TrainConfig) -> None:
    """Check that there is room for the workers and their loader workers: Ray would let them wait.

    A cluster other than this machine's own may grow; what it still lacks is printed.

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
        want = f"train.workers {config.workers}: they want {training:g} CPUs"
        fewer = "fewer, or a smaller train.cpus_per_worker"
        if loading:
            want += f", and train.loader_workers {config.loader_workers} in all {loading} more"
            fewer = "fewer of either; with no loader workers, the workers make batches themselves"
        lacking.append(f"{want}; there are {there.get('CPU', 0):g}: set {fewer}")
    if lacking and not os.environ.get("RAY_ADDRESS"):
        raise ValueError("; ".join(lacking))
    for lack in lacking:
        console.say(f"waiting until the cluster has grown ({lack})")


class LoaderWorkers:
    """Makes batches in Ray actors. Call it with the numbers of `steps`, in order.

    Raises, when called:
        RuntimeError: the batch was not made in time, or the actor making it died repeatedly.
        Exception: what making the batch raised.
    """

    def __init__(self, recipe: Recipe, rank: int, world: int, steps: range, workers: int) -> None:
        import ray

        # About pixels, see `_tensor`.
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
        """Request batches so that each actor has `AHEAD` pending, and no more."""
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
        """`processes`: how many of these actors one machine may have; they share its memory."""
        import ray.util

        torch.set_num_threads(1)
        # As arrays, tensors pass through shared memory without being copied into a pickle.
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
    """An array as a tensor. Pixels stay in the object store's memory, which is read-only, as models
    only convert them to floats. Everything else is small and copied."""
    return torch.from_numpy(array if array.dtype == np.uint8 else array.copy())
