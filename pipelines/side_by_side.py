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
        Exception: of the first run, in their order, that failed. What is not done when the context
            is left is ended.
    """
    if not cpus or not runs:
        yield map(work, runs)
        return
    from ray.exceptions import RayTaskError

    try:
        with contextlib.closing(_in_order(work, runs, cpus, store)) as results:
            yield results
    except RayTaskError as error:
        raise error.cause from None


def _start(work: Callable[[Any], Any], cpus: int, most: int) -> list[Any]:
    """Processes of `cpus` CPUs each that do `work`: as many as there is room for, or `most`.

    Actors, which Ray ends surely: cancelling a task by force may abort the process that asks it,
    and a task that is asked to end may not hear it (Ray 2.60).
    """
    import ray

    cluster.start()
    sizes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    # A head without CPUs of its own may be all that there is until something waits for more.
    cpus = min(cpus, int(max(sizes))) or cpus

    # A worker lost with its node begins its run again, which goes on from its last checkpoint.
    @ray.remote(num_cpus=cpus, max_restarts=3, max_task_retries=3)
    class Worker:
        def do(self, run: Any) -> Any:
            return work(run)

    room = max(1, sum(int(size // cpus) for size in sizes))
    return [Worker.remote() for _ in range(min(room, most))]


def _in_order(
    work: Callable[[Any], Any], runs: Mapping[_Run, Mapping[str, int]], cpus: int, store: Store
) -> Generator[Any, None, None]:
    """Results of runs, each given to the first worker that has nothing to do."""
    import ray

    workers = _start(work, cpus, len(runs))
    idle, waiting = list(workers), list(runs)
    going: dict[Any, tuple[Any, _Run]] = {}
    done: dict[_Run, Any] = {}
    total = sum(sum(trainings.values()) for trainings in runs.values())
    try:
        with console.bar(f"{len(runs)} runs", total=total, unit="step") as bar:
            for run in runs:
                while run not in done:
                    while idle and waiting:
                        worker, begun = idle.pop(), waiting.pop(0)
                        going[worker.do.remote(begun)] = worker, begun
                    for result in ray.wait(list(going), timeout=2.0)[0]:
                        worker, ended = going.pop(result)
                        idle.append(worker)
                        done[ended] = result
                    steps = sum(sum(runs[ended].values()) for ended in done)
                    steps += sum(_steps_done(runs[begun], store) for _, begun in going.values())
                    bar.update(steps - bar.n)
                yield ray.get(done[run])
    finally:
        for result in going:
            ray.cancel(result)  # so that Ray doesn't speak of beginning it again
        for worker in workers:
            ray.kill(worker)


def _steps_done(trainings: Mapping[str, int], store: Store) -> int:
    return sum(min(steps, progress(store, run)) for run, steps in trainings.items())
