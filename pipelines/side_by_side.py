"""Trainings that start no workers of their own, as many at once as a cluster has CPUs for."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol, TypeVar

from pipelines import cluster, console
from pipelines.progress import progress
from pipelines.recipe import TrainConfig
from pipelines.storage import Store

_Run = TypeVar("_Run")
_Result = TypeVar("_Result")


class _Training(Protocol):
    """What names a run and says how long it is: each training job's configuration."""

    @property
    def name(self) -> str: ...
    @property
    def train(self) -> TrainConfig: ...


def steps_of(trainings: Iterable[_Training]) -> dict[str, int]:
    """The runs of trainings, and how many steps each has."""
    return {f"runs/{training.name}": training.train.steps for training in trainings}


@contextmanager
def side_by_side(
    work: Callable[[_Run], _Result],
    runs: Mapping[_Run, Mapping[str, int]],
    *,
    cpus: int,
    store: Store,
) -> Iterator[Iterator[_Result]]:
    """Results of `work`, in the order of the runs, under one bar of all their steps.

    Args:
        work: What one run does, in a process of its own.
        runs: Of each run the trainings in it, as by `steps_of`.
        cpus: CPUs of a run (or all that a machine has). 0: they go one after another in this
            process, for what starts Ray workers takes the cluster's resources by itself.
        store: Where trainings say how far they are.

    Raises:
        Exception: of the first run, in their order, that failed. Those that are not done when the
            context is left are cancelled.
    """
    if not cpus or not runs:
        yield map(work, runs)
        return
    import ray
    from ray.exceptions import RayTaskError

    cluster.start()
    most = max(node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"])

    @ray.remote(num_cpus=min(cpus, most))
    def task(run: _Run) -> _Result:
        return work(run)

    waiting = {task.remote(run): trainings for run, trainings in runs.items()}
    try:
        with contextlib.closing(_in_order(waiting, store)) as results:
            yield results
    except RayTaskError as error:
        raise error.cause from None
    finally:
        for left in waiting:
            ray.cancel(left, force=True)


def _in_order(waiting: dict[Any, Mapping[str, int]], store: Store) -> Generator[Any, None, None]:
    """Results of Ray tasks; what is left in `waiting` has not been taken."""
    import ray

    total = sum(sum(trainings.values()) for trainings in waiting.values())
    with console.bar(f"{len(waiting)} runs", total=total, unit="step") as bar:
        while waiting:
            first = next(iter(waiting))
            while not ray.wait([first], timeout=2.0)[0]:
                bar.update(total - _left(waiting, store) - bar.n)
            result = ray.get(first)
            del waiting[first]
            bar.update(total - _left(waiting, store) - bar.n)
            yield result


def _left(waiting: Mapping[Any, Mapping[str, int]], store: Store) -> int:
    """Steps that tasks still have to do."""
    import ray

    _, going = ray.wait(list(waiting), num_returns=len(waiting), timeout=0) if waiting else ([], [])
    trainings = [item for task in going for item in waiting[task].items()]
    return sum(max(0, steps - progress(store, run)) for run, steps in trainings)
