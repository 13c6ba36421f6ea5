"""Runs trainings that start no workers of their own, as many at once as a cluster's CPUs allow."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Generic, Protocol, TypeVar

from pipelines import cluster, console
from pipelines.progress import progress
from pipelines.recipe import TrainConfig
from pipelines.storage import Store

_Run = TypeVar("_Run")
_Result = TypeVar("_Result")


class _Training(Protocol):
    """A training job's configuration, which names the run and gives its number of steps."""

    @property
    def name(self) -> str: ...
    @property
    def train(self) -> TrainConfig: ...


def steps_of(trainings: Iterable[_Training]) -> dict[str, int]:
    """The number of steps of each training, by its run."""
    return {f"runs/{training.name}": training.train.steps for training in trainings}


@contextmanager
def side_by_side(
    work: Callable[[_Run], _Result],
    runs: Mapping[_Run, Mapping[str, int]],
    *,
    cpus: int,
    store: Store,
) -> Iterator[Iterator[_Result]]:
    """Results of `work`, in the order of the runs, with one progress bar for all their steps.

    Args:
        work: What one run does, in its own process.
        runs: The trainings in each run, as returned by `steps_of`.
        cpus: CPUs per run (or all that a machine has). 0: the runs go one after another in this
            process, since runs that start Ray workers take the cluster's resources themselves.
        store: Where trainings report their progress.

    Raises:
        Exception: that of the first run, in their order, that failed. Runs that are not done when
            the context is left are ended.
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


class _Rota(Generic[_Run]):
    """Assigns runs to workers: the next run goes to the first idle worker that has started.

    There is a worker for each run; workers without room yet wait, which makes an autoscaler add
    nodes.
    """

    def __init__(self, work: Callable[[_Run], Any], runs: Iterable[_Run], cpus: int) -> None:
        self.waiting = list(runs)
        workers = _workers(work, cpus, len(self.waiting))
        self.starting: dict[Any, Any] = {worker.begin.remote(): worker for worker in workers}
        self.going: dict[Any, tuple[Any, _Run]] = {}
        self.done: dict[_Run, Any] = {}
        """Runs that have ended, and references to their results."""

    def wait(self, seconds: float) -> None:
        """Wait up to `seconds` for a worker to finish its run or start; it begins the next run."""
        import ray

        for answer in ray.wait([*self.going, *self.starting], timeout=seconds)[0]:
            worker = self._freed(answer)
            if self.waiting:
                run = self.waiting.pop(0)
                self.going[worker.do.remote(run)] = worker, run
            else:
                ray.kill(worker)
        if not self.waiting:
            self._dismiss()

    def _freed(self, answer: Any) -> Any:
        if answer in self.starting:
            return self.starting.pop(answer)
        worker, run = self.going.pop(answer)
        self.done[run] = answer
        return worker

    def _dismiss(self) -> None:
        """End the workers still waiting for room, so that no node is added for them."""
        import ray

        while self.starting:
            ray.kill(self.starting.popitem()[1])

    def end(self) -> None:
        """End all runs that are not done."""
        import ray

        for answer, (worker, _) in self.going.items():
            ray.cancel(answer)  # so that Ray doesn't report a restart
            ray.kill(worker)
        self._dismiss()


def _workers(work: Callable[[Any], Any], cpus: int, count: int) -> list[Any]:
    """Processes of `cpus` CPUs each that do `work`.

    They are actors, which Ray reliably ends: cancelling a task by force may abort the calling
    process, and a task asked to end may not notice (Ray 2.60).
    """
    import ray

    cluster.start()
    sizes = [node["Resources"].get("CPU", 0) for node in ray.nodes() if node["Alive"]]
    # A head without CPUs may be the only node until something waits for more.
    cpus = min(cpus, int(max(sizes))) or cpus

    # A worker lost with its node restarts its run, which resumes from its last checkpoint.
    @ray.remote(num_cpus=cpus, max_restarts=3, max_task_retries=3)
    class Worker:
        def begin(self) -> None:
            """Answered as soon as there is room."""

        def do(self, run: Any) -> Any:
            return work(run)

    return [Worker.remote() for _ in range(count)]


def _in_order(
    work: Callable[[Any], Any], runs: Mapping[_Run, Mapping[str, int]], cpus: int, store: Store
) -> Generator[Any, None, None]:
    """Results of runs, in their order, with a progress bar."""
    import ray

    total = sum(sum(trainings.values()) for trainings in runs.values())
    rota = _Rota(work, runs, cpus)
    try:
        with console.bar(f"{len(runs)} runs", total=total, unit="step") as bar:
            for run in runs:
                while run not in rota.done:
                    rota.wait(2.0)
                    steps = sum(sum(runs[ended].values()) for ended in rota.done)
                    steps += sum(_steps_done(runs[now], store) for _, now in rota.going.values())
                    bar.update(steps - bar.n)
                yield ray.get(rota.done[run])
    finally:
        rota.end()


def _steps_done(trainings: Mapping[str, int], store: Store) -> int:
    return sum(min(steps, progress(store, run)) for run, steps in trainings.items())
