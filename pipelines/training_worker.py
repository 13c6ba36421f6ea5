"""A training worker: takes steps with DeepSpeed, logs, evaluates, saves and publishes.

All workers of a run do the same at the same time: whatever one finds or is told, all agree on
before they act on it.
"""

from __future__ import annotations

import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3.device import to_device
from pipelines import (
    budget,
    bundles,
    checkpoints,
    cluster,
    placement,
    progress,
    run_logger,
    stops,
    zero,
)
from pipelines import engine as engines
from pipelines.guards import Guard, Verdict
from pipelines.lineage import code_version
from pipelines.loader import Prefetcher
from pipelines.loader_workers import prefetch
from pipelines.progress import Clock
from pipelines.recipe import Run, TrainConfig
from pipelines.stops import Ended, Watch
from pipelines.storage import Store, StoreError


def work(run: Run) -> None:
    """Train, as one of the workers of a run, to its end or until it is stopped."""
    try:
        _train(run)
    finally:
        if not run.config.workers and dist.is_initialized():
            # This process may train again, even after an error: leave no group behind.
            import deepspeed.comm

            deepspeed.comm.destroy_process_group()


def _train(run: Run) -> None:
    store = Store(run.store_uri)
    rank, world, device = _join(run.config)
    if bundles.exists(store, run.output):  # a worker was lost after everything was done
        if run.tuned:
            _report(run, bundles.info(store, run.output)["metrics"], run.config.steps)
        return
    said: list[str] = []  # shown by the job's process: a worker's own console is not visible
    if rank == 0:
        progress.begin(store, run, said)
        if run.tuned and run.config.workers:
            placement.note(store, run.name)
    try:
        engine, start, due = _begin(run, store, world, device, said.append)
    except Ended as end:
        if rank == 0:
            progress.begin(store, run, said)
            stops.tell(store, run, end)
        return
    metrics: dict[str, float] = {}
    ended: Ended | None = None
    handle = run.tracking if rank == 0 else None
    with run_logger.Logger(handle, store, run.name, said.append) as logger:
        try:
            with _worker(run, store, engine, logger, said, start, rank, world, device) as worker:
                if due:
                    worker.evaluate(start)
                metrics = worker.steps()
        except Ended as end:  # on all workers alike
            ended = end
        except torch.OutOfMemoryError as error:
            ways = [way for way, _ in budget.lighter(run.config)]
            ways.append("smaller batches, with as much larger train.accumulate")
            error.add_note(f"A step takes more than this GPU has. Try {', or '.join(ways)}.")
            raise
        if rank == 0 and ended:
            stops.tell(store, run, ended)
        elif not ended:
            with zero.whole(engine) as module:
                if rank == 0:
                    _publish(run, store, module, metrics)
                    final = {f"final/{k}": v for k, v in metrics.items()}
                    logger.metrics(run.config.steps, final)
    if world > 1:
        dist.barrier()
    if run.tuned and not ended:  # only now, after the model is published
        _report(run, metrics, run.config.steps)
    engines.close(engine)


@dataclass(frozen=True)
class Worker:
    """One of a run's workers, with everything it works with."""

    run: Run
    engine: Any
    start: int
    """Number of steps done before this start."""
    rank: int
    world: int
    device: torch.device
    guard: Guard
    writer: checkpoints.Writer
    logger: run_logger.Logger
    clock: Clock | None
    """Rank 0's."""

    def steps(self) -> dict[str, float]:
        """Take the remaining steps; returns the scores after the last.

        Raises:
            Ended: the run was stopped, or a step was bad.
        """
        config = self.run.config
        numbers = range(self.start * config.accumulate, config.steps * config.accumulate)
        batches = prefetch(
            self.run.recipe, self.rank, self.world, numbers, config.loader_workers, self.device,
            ahead=config.accumulate,
        )  # fmt: skip
        metrics: dict[str, float] = {}
        try:
            for step in range(self.start, config.steps):
                metrics = self._step(step, batches)
        finally:
            batches.close()
        return metrics

    def _step(self, step: int, batches: Prefetcher[Any]) -> dict[str, float]:
        """Take a step and do what is due after it; returns scores if it evaluates."""
        config, metrics = self.run.config, dict[str, float]()
        passed = self._passes(step, batches)
        done = step + 1
        agreed = self.guard.step(done)
        if config.ema and not agreed.skipped:
            zero.update_average(self.engine, config.ema, done)
        last = done == config.steps
        due = _every(config.checkpoint_every, done) and self.guard.stepped
        haste = agreed.stop or agreed.save  # this machine, or another, may be gone in a minute
        save = (due or haste) and not last
        evaluated = last or _every(config.evaluate_every, done)
        self._log(done, passed, agreed, due=_every(config.log_every, done) or save or last)
        if evaluated and not haste:
            metrics = self.evaluate(done)
        if save:
            self._save(done, agreed, due=evaluated and haste)
        if evaluated and haste:
            metrics = self.evaluate(done)
        if evaluated and self.run.tuned and not last:
            self.writer.wait()  # another trial may continue from this one's checkpoint
            if not self.logger.failing:
                self.logger.flush()
            _report(self.run, metrics, done)  # Tune may end this process in here
        return metrics

    def _passes(self, step: int, batches: Prefetcher[Any]) -> list[dict[str, Tensor]]:
        """Forward and backward through a step's batches; returns each forward pass's scalars."""
        config, passed = self.run.config, []
        # Dropout and the like are a function of the step, so that a resumed run repeats them.
        torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + self.rank)
        engines.set_learning_rate(self.engine, config, step)
        self.engine.module.train()
        self.guard.begin()
        before = time.monotonic()
        own = self.run.recipe.of_one_step([next(batches) for _ in range(config.accumulate)])
        if self.clock:
            self.clock.took(own, time.monotonic() - before)
        for number, on_cpu in enumerate(own, 1):
            batch = to_device(on_cpu, self.device)
            results = self.engine(batch)
            self.engine.backward(results["loss"])
            self.guard.add(batch, results["loss"])
            passed.append({k: v.detach() for k, v in results.items() if v.numel() == 1})
            if number < config.accumulate:
                self.engine.step()
        return passed

    def _log(
        self, done: int, passed: Sequence[Mapping[str, Tensor]], agreed: Verdict, *, due: bool
    ) -> None:
        if agreed.skipped and self.clock:
            self.logger.metrics(done, {"train/skipped_steps": self.guard.skipped})
        elif due and not agreed.skipped:
            values = _mean_over_workers(passed, self.world)
            if self.clock:
                self.clock.log(done, values, self.engine, agreed.gradient_norm)
        if self.clock:
            self.clock.show(done)

    def _save(self, done: int, agreed: Verdict, *, due: bool) -> None:
        """Save a checkpoint; with `due`, the step's evaluation is still to come.

        Raises:
            Ended: the run was asked to stop.
        """
        if not self.logger.failing:  # a run resumed from here doesn't log these steps again
            self.logger.flush(10.0)
        self.logger.keep()
        self.writer.save(done, self.engine, due=due)
        self.guard.remember(done)
        if agreed.stop:
            self.writer.wait()
            raise self.guard.watch.ended(done)

    def evaluate(self, done: int) -> dict[str, float]:
        """Scores of the weights after step `done`; rank 0 computes and logs them, others wait."""
        metrics: dict[str, float] = {}
        with zero.whole(self.engine) as module:
            if self.rank == 0:
                module.eval()
                with torch.no_grad():
                    metrics = self.run.recipe.evaluate(module, done, self.logger)
                self.logger.metrics(done, {f"eval/{k}": v for k, v in metrics.items()})
        if self.world > 1:
            dist.barrier()
        return metrics


def _every(steps: int, done: int) -> bool:
    """Whether something is due that happens every `steps` steps; 0: never."""
    return bool(steps) and done % steps == 0


@contextmanager
def _worker(
    run: Run,
    store: Store,
    engine: Any,
    logger: run_logger.Logger,
    said: list[str],
    start: int,
    rank: int,
    world: int,
    device: torch.device,
) -> Iterator[Worker]:
    """A worker for an engine that is ready; the context's end waits for the last checkpoint."""
    notes = {
        "fingerprint": run.fingerprint,
        "parameters": dict(run.parameters),
        "code": code_version(),
    }
    with (
        Watch(run, store, rank, said.append) as watch,
        checkpoints.Writer(store, run.name, run.config, said.append, notes) as writer,
    ):
        guard = Guard(run, store, engine, watch, start=start, rank=rank, say=said.append)
        clock = Clock(run, store, logger, start, said, device) if rank == 0 else None
        yield Worker(run, engine, start, rank, world, device, guard, writer, logger, clock)


def _begin(
    run: Run, store: Store, world: int, device: torch.device, say: Callable[[str], None]
) -> tuple[Any, int, bool]:
    """The engine with the newest checkpoint's state, its step, and whether to evaluate that step.

    Raises:
        Ended: a worker can't begin, for a reason that a restart would not change.
    """
    torch.manual_seed(run.config.seed)
    module, failed = nn.Module(), None
    try:
        module = run.recipe.build()
        budget.check_device(module, run.config, device, run.step_memory)
    except (StoreError, ValueError) as error:
        if isinstance(error.__cause__, OSError):  # the store doesn't answer this worker
            raise
        failed = error
    _end_if_any(failed, world)
    engine = engines.build(run, module.to(device))
    try:
        start, due = checkpoints.restore(store, run.name, engine, say, run.fingerprint)
    except StoreError as error:
        if isinstance(error.__cause__, OSError):  # on rank 0 only
            raise
        raise Ended(str(error), error=StoreError) from error
    if start:
        say(f"{run.name}: resumed from step {start}")
    return engine, start, due


def _end_if_any(failed: Exception | None, world: int) -> None:
    """End all workers if any failed; each must call this, with its own error or None.

    Raises:
        Ended: some worker failed.
    """
    said = (isinstance(failed, StoreError), str(failed)) if failed else None
    everyone: list[tuple[bool, str] | None] = [None] * world
    dist.all_gather_object(everyone, said)
    for of_store, message in filter(None, everyone):
        raise Ended(message, error=StoreError if of_store else ValueError) from failed


def _report(run: Run, metrics: Mapping[str, float], step: int) -> None:
    """Report the trial's metrics after a step to Ray Tune; every worker must call this."""
    told = {**metrics, "step": step}
    if run.config.workers:
        import ray.train

        ray.train.report(told)
    else:
        import ray.tune

        ray.tune.report(told)


def _publish(run: Run, store: Store, module: nn.Module, metrics: dict[str, float]) -> None:
    module.eval()
    with tempfile.TemporaryDirectory() as temporary:
        notes = run.recipe.export(module, Path(temporary))
        result = {
            "fingerprint": run.fingerprint,
            "steps": run.config.steps,
            "metrics": metrics,
            "run": run.name,
            "mlflow_run": run.tracking.run_id if run.tracking else None,
            **notes,
        }
        bundles.save(store, run.output, Path(temporary), result)


def _join(config: TrainConfig) -> tuple[int, int, torch.device]:
    """Join the workers' process group; returns rank, number of workers and device."""
    import ray.train
    import ray.train.torch

    rank, world = 0, 1
    if config.workers:
        context = ray.train.get_context()
        rank, world = context.get_world_rank(), context.get_world_size()
    if cluster.device(config.gpus_per_worker) == "cuda":
        device = ray.train.torch.get_device()
        assert isinstance(device, torch.device)
        torch.cuda.set_device(device)
        # DeepSpeed uses the GPU of this number, which need not be the worker's local rank in Ray.
        os.environ["LOCAL_RANK"] = str(device.index)
    else:
        device = torch.device("cpu")
        os.environ["DS_ACCELERATOR"] = "cpu"
        threads = config.threads or max(1, (os.cpu_count() or 1) // max(1, config.workers))
        torch.set_num_threads(threads)
        os.environ.setdefault("LOCAL_RANK", "0")  # for the job's own process; Ray sets workers'
    if not dist.is_initialized():  # in the job's own process there is no group yet
        meeting = Path(tempfile.mkdtemp()) / "group"
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    return rank, world, device


def _mean_over_workers(passed: Sequence[Mapping[str, Tensor]], world: int) -> dict[str, float]:
    """Scalars of a step's passes, averaged over the passes and the workers that have them.

    Every worker must call this.
    """
    names = {name: None for one in passed for name in one}
    own = {
        name: float(torch.stack([one[name] for one in passed if name in one]).double().mean())
        for name in names
    }
    if world == 1:
        return own
    everyone: list[dict[str, float] | None] = [None] * world
    dist.all_gather_object(everyone, own)
    names = sorted({name for one in everyone if one for name in one})
    values = {name: [one[name] for one in everyone if one and name in one] for name in names}
    return {name: sum(found) / len(found) for name, found in values.items()}
