"""The one training loop: Ray Train starts the workers, DeepSpeed runs the steps.

Pretraining, VQ-KD, the contrastive stage and finetuning differ in their `Recipe`; the loop, the
schedule, checkpoints, resume and tracking are shared. A run that was killed anywhere, or a worker
that Ray restarts, goes on from the newest sound checkpoint, on any number of workers.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from beit3.device import to_device
from pipelines import (
    bill,
    budget,
    bundles,
    checkpoints,
    cluster,
    console,
    placement,
    progress,
    stops,
    tracking,
    zero,
)
from pipelines import engine as engines
from pipelines.guards import Guard
from pipelines.loader_workers import check_room, prefetch
from pipelines.progress import Clock
from pipelines.recipe import Recipe, Run, TrainConfig
from pipelines.stops import Ended, Watch
from pipelines.storage import Store, StoreError, code_version


def fit(
    store: Store,
    *,
    name: str,
    output: str,
    fingerprint: str,
    recipe: Recipe,
    config: TrainConfig,
    parameters: Mapping[str, Any],
    step_memory: budget.StepMemory | None = None,
    parent: str | None = None,
    track: bool = True,
    tuned: bool = False,
) -> dict[str, Any]:
    """Train, or skip what is trained, or go on with what was interrupted.

    Args:
        fingerprint: Hash of configuration and inputs; a finished run with another is an error.
        parameters: Flat values for the tracker.
        step_memory: What a step takes of a GPU beside the state, where somebody reckons it.
        parent: MLflow run under which this one is nested.
        tuned: Report evaluations to the Ray Tune trial that this is called in.

    Returns:
        The result: `metrics` of the last evaluation, `steps`, `mlflow_run`.

    Raises:
        StoreError: the store or the tracker can't be used, or the output's name is taken.
        ValueError: the options fit neither each other nor the machines.
        FloatingPointError: a loss or a gradient went wrong; see `pipelines/guards.py`.
        Stopped: the run was stopped and left a checkpoint; see `pipelines/stops.py`.
    """
    begun = time.monotonic()
    run_folder = f"runs/{name}"
    taken = (
        "exists and was trained from other inputs or options: choose another name, or delete that "
        "folder and its run first"
    )
    found = bundles.finished(store, output, fingerprint, taken)
    if found is not None:
        console.say(f"{output}: already trained ({found['steps']} steps), skipped")
        if tuned:  # the sweep was killed between the model and its score
            import ray.tune

            ray.tune.report({**found["metrics"], "step": found["steps"]})
        if track and store.exists(f"{run_folder}/{tracking.UNDELIVERED}"):
            tracking.settle(store, run_folder)
        return found
    store.check_writable()
    _claim(store, run_folder, fingerprint, parameters)
    handle = None
    if track:
        handle = tracking.start_run(store, name, parameters, key=run_folder, parent=parent)
    run = Run(
        *(store.uri, run_folder, output, fingerprint, recipe, config, handle),
        parameters=dict(parameters),
        step_memory=step_memory,
        tuned=tuned,
    )
    store.delete(f"{run_folder}/{stops.BEGUN}")  # what an interrupted run said last
    try:
        with (
            bill.of_training(None if tuned else handle, config),  # trials share their nodes
            stops.stoppable(store, run, begun),
            progress.shown(store, run),
        ):
            _launch(run, store)
    except BaseException as error:
        stopped = tuned and isinstance(error, SystemExit)  # by Tune: the sweep says how it ended
        if handle is not None and not stopped:
            with contextlib.suppress(Exception):
                kind = "KILLED" if isinstance(error, stops.Stopped) else "FAILED"
                tracking.finish_run(handle, kind)
        raise
    if handle is not None:
        tracking.settle(store, run_folder)
    result = bundles.info(store, output)
    shown = ", ".join(f"{k} {v:.4f}" for k, v in result["metrics"].items())
    console.say(f"{output}: trained ({config.steps:,} steps){'; ' if shown else ''}{shown}")
    return result


def _claim(store: Store, folder: str, fingerprint: str, parameters: Mapping[str, Any]) -> None:
    """Note what the run comes from; an interrupted run of other options is an error."""
    note = f"{folder}/run.json"
    if store.exists(note) and store.read_json(note)["fingerprint"] != fingerprint:
        raise StoreError(
            f"{store.uri}/{folder} was begun with other inputs or options, or by a version that "
            "drew other samples: choose another name, or delete that folder first"
        )
    store.write_json(note, {"fingerprint": fingerprint, "parameters": dict(parameters)})


def _launch(run: Run, store: Store) -> None:
    """Train on Ray's workers, and start them again as long as there is progress between failures.

    Ray counts the failures of a run of weeks all together.
    """
    from ray.train import TrainingFailedError

    check_room(run.config)
    while True:
        before = checkpoints.newest(store, run.name)
        try:
            _trainer(run).fit()
            return
        except TrainingFailedError:
            if checkpoints.newest(store, run.name) <= before:
                raise
            console.say(f"{run.name}: failed after new checkpoints; the workers are started again")


def _trainer(run: Run) -> Any:
    from ray.train import FailureConfig, RunConfig, ScalingConfig
    from ray.train.torch import TorchTrainer

    from pipelines.process_group import GroupConfig

    config = run.config
    address, *query = run.store_uri.split("?", 1)
    return TorchTrainer(
        _worker,
        train_loop_config={"run": run},
        torch_config=GroupConfig(
            "nccl" if cluster.device(config.gpus_per_worker) == "cuda" else "gloo"
        ),
        scaling_config=ScalingConfig(
            num_workers=config.workers,
            use_gpu=config.gpus_per_worker > 0,
            resources_per_worker={"CPU": config.cpus_per_worker}
            | ({"GPU": config.gpus_per_worker} if config.gpus_per_worker else {}),
        ),
        run_config=RunConfig(
            name=f"{run.name.replace('/', '-')}-{uuid.uuid4().hex[:6]}",
            storage_path="?".join([f"{address}/{run.name}/ray", *query]),
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=_tune_callbacks(run),
            worker_runtime_env={"env_vars": _environment(config)},
        ),
    )


def _environment(config: TrainConfig) -> dict[str, str]:
    """Variables of the workers' processes, but where the job's own has others.

    On a CPU, tensors are in the C library's memory. Left alone, glibc gives it back to the system
    at every step, and gets it again page by page, each cleared anew: more so in a thread that is
    not the main one, as a worker's of Ray Train.
    """
    if cluster.device(config.gpus_per_worker) == "cuda":
        return {}
    kept = {
        "MALLOC_ARENA_MAX": "1",
        "MALLOC_MMAP_MAX_": "0",
        "MALLOC_TRIM_THRESHOLD_": str(1 << 40),
    }
    return {name: os.environ.get(name, value) for name, value in kept.items()}


def _tune_callbacks(run: Run) -> list[Any]:
    if not (run.tuned and run.config.workers):
        return []
    from ray.tune.integration.ray_train import TuneReportCallback

    return [TuneReportCallback()]


# -- the worker ----------------------------------------------------------------------------------


def _worker(arguments: dict[str, Any]) -> None:
    run: Run = arguments["run"]
    try:
        _train(run)
    finally:
        if not run.config.workers and dist.is_initialized():
            # This process may train again, also after an error: leave no group behind.
            import deepspeed.comm

            deepspeed.comm.destroy_process_group()


def _train(run: Run) -> None:
    store = Store(run.store_uri)
    rank, world, device = _join(run.config)
    if bundles.exists(store, run.output):  # a worker was lost after all was done
        if run.tuned:
            metrics = bundles.info(store, run.output)["metrics"]
            _report(run.config, {**metrics, "step": run.config.steps})
        return
    said: list[str] = []  # the job's process shows it: a worker's own console is out of sight
    if rank == 0:
        progress.begin(store, run.name, said)
        if run.tuned and run.config.workers:
            placement.note(store, run.name)
    try:
        engine, start, due = _begin(run, store, world, device, said.append)
    except Ended as end:
        if rank == 0:
            progress.begin(store, run.name, said)
            stops.tell(store, run.name, end)
        return
    handle = run.tracking if rank == 0 else None
    metrics, ended = {}, None
    with (
        tracking.Logger(handle, store, run.name, said.append) as logger,
        Watch(run, store, rank, said.append) as watch,
    ):
        clock = Clock(run, store, logger, start, said, device) if rank == 0 else None
        guard = Guard(run, store, engine, watch, start=start, rank=rank, say=said.append)
        notes = {
            "fingerprint": run.fingerprint,
            "parameters": dict(run.parameters),
            "code": code_version(),
        }
        try:
            with checkpoints.Writer(store, run.name, run.config, said.append, notes) as writer:
                if due:
                    _evaluate(run, engine, logger, start, rank)
                metrics = _steps(
                    run, engine, writer, guard, logger, clock, start, rank, world, device
                )
        except Ended as end:  # on all workers alike
            ended = end
        if rank == 0 and ended:
            stops.tell(store, run.name, ended)
        elif not ended:
            with zero.whole(engine) as module:
                if rank == 0:
                    _publish(run, store, module, metrics)
                    final = {f"final/{k}": v for k, v in metrics.items()}
                    logger.metrics(run.config.steps, final)
    if world > 1:
        dist.barrier()
    if run.tuned and not ended:  # now that the model is there
        _report(run.config, {**metrics, "step": run.config.steps})
    engines.close(engine)


def _begin(
    run: Run, store: Store, world: int, device: torch.device, say: Callable[[str], None]
) -> tuple[Any, int, bool]:
    """The engine with the newest checkpoint's state, its step, and whether to evaluate that.

    Raises:
        Ended: a worker can't begin, for a reason that a second start would not change.
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
        if isinstance(error.__cause__, OSError):  # rank 0's alone
            raise
        raise Ended(str(error), error=StoreError) from error
    if start:
        say(f"{run.name}: resumed from step {start}")
    return engine, start, due


def _end_if_any(failed: Exception | None, world: int) -> None:
    """Every worker must call this, with what went wrong on it.

    Raises:
        Ended: something did on some worker.
    """
    said = (isinstance(failed, StoreError), str(failed)) if failed else None
    everyone: list[tuple[bool, str] | None] = [None] * world
    dist.all_gather_object(everyone, said)
    for of_store, message in filter(None, everyone):
        raise Ended(message, error=StoreError if of_store else ValueError) from failed


def _steps(
    run: Run,
    engine: Any,
    writer: checkpoints.Writer,
    guard: Guard,
    logger: tracking.Logger,
    clock: Clock | None,
    start: int,
    rank: int,
    world: int,
    device: torch.device,
) -> dict[str, float]:
    config = run.config
    numbers = range(start * config.accumulate, config.steps * config.accumulate)
    batches = prefetch(run.recipe, rank, world, numbers, config.loader_workers, device)
    metrics: dict[str, float] = {}
    try:
        for step in range(start, config.steps):
            # Dropout and the like are a function of the step, so that a resumed run repeats them.
            torch.manual_seed((config.seed * 1_000_003 + step) * 1_009 + rank)
            engines.set_learning_rate(engine, config, step)
            engine.module.train()
            passed: list[Mapping[str, Tensor]] = []
            guard.begin()
            for passes in range(1, config.accumulate + 1):
                before = time.monotonic()
                batch = to_device(next(batches), device)
                if clock:
                    clock.passes(batch, time.monotonic() - before)
                results = engine(batch)
                engine.backward(results["loss"])
                guard.add(batch, results["loss"])
                passed.append({k: v.detach() for k, v in results.items() if v.numel() == 1})
                if passes < config.accumulate:
                    engine.step()
            done = step + 1
            agreed = guard.step(done)
            if config.ema and not agreed.skipped:
                zero.update_average(engine, config.ema, done)
            last = done == config.steps
            every = config.checkpoint_every
            due = bool(every) and done % every == 0 and guard.stepped
            asked = agreed.stop or agreed.save
            save = (due or asked) and not last
            evaluated = last or (bool(config.evaluate_every) and done % config.evaluate_every == 0)
            if agreed.skipped and clock:
                logger.metrics(done, {"train/skipped_steps": guard.skipped})
            elif not agreed.skipped and (done % config.log_every == 0 or save or last):
                values = _mean_over_workers(passed, world)
                if clock:
                    clock.log(done, values, engine, agreed.gradient_norm)
            if clock:
                clock.show(done)
            if evaluated and not asked:
                metrics = _evaluate(run, engine, logger, done, rank)
            if save:
                if not logger.failing:  # a run that goes on from here doesn't log these steps again
                    logger.flush(10.0)
                logger.keep()
                writer.save(done, engine, due=evaluated and asked)
                guard.remember(done)
                if agreed.stop:
                    writer.wait()
                    raise guard.watch.ended(done)
            if evaluated and asked:  # by a machine that may be gone in a minute
                metrics = _evaluate(run, engine, logger, done, rank)
            if evaluated and run.tuned and not last:  # Tune may end this process in here
                writer.wait()  # another trial may go on from this one's checkpoint
                if not logger.failing:
                    logger.flush()
                _report(config, {**metrics, "step": done})
    finally:
        batches.close()
    return metrics


def _evaluate(
    run: Run, engine: Any, logger: tracking.Logger, step: int, rank: int
) -> dict[str, float]:
    """Scores of the weights after a step, which rank 0 finds and logs while the others wait."""
    metrics: dict[str, float] = {}
    with zero.whole(engine) as module:
        if rank == 0:
            module.eval()
            with torch.no_grad():
                metrics = run.recipe.evaluate(module, step, logger)
            logger.metrics(step, {f"eval/{k}": v for k, v in metrics.items()})
    if dist.get_world_size() > 1:
        dist.barrier()
    return metrics


def _report(config: TrainConfig, metrics: dict[str, float]) -> None:
    """Tell Ray Tune how the trial fares; every worker must call this."""
    if config.workers:
        import ray.train

        ray.train.report(metrics)
    else:
        import ray.tune

        ray.tune.report(metrics)


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
        # DeepSpeed takes the GPU of this number, which need not be Ray's number of the worker.
        os.environ["LOCAL_RANK"] = str(device.index)
    else:
        device = torch.device("cpu")
        os.environ["DS_ACCELERATOR"] = "cpu"
        threads = config.threads or max(1, (os.cpu_count() or 1) // max(1, config.workers))
        torch.set_num_threads(threads)
        os.environ.setdefault("LOCAL_RANK", "0")  # of the job's own process; Ray has set workers'
    if not dist.is_initialized():  # in the job's own process there is no group yet
        meeting = Path(tempfile.mkdtemp()) / "group"
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=0, world_size=1)
    return rank, world, device


def _mean_over_workers(passed: Sequence[Mapping[str, Tensor]], world: int) -> dict[str, float]:
    """Scalars of a step's passes, averaged over those and the workers that have them.

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
