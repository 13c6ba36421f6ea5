"""Runs every training: Ray Train starts the workers (`pipelines/training_worker.py`), which train.

Pretraining, VQ-KD, the contrastive stage and finetuning differ in their `Recipe`; the loop, the
schedule, checkpoints, resume and tracking are shared. A killed run, or a worker that Ray restarts,
resumes from the newest sound checkpoint, on any number of workers.
"""

from __future__ import annotations

import contextlib
import os
import time
import uuid
from collections.abc import Mapping
from typing import Any

from pipelines import (
    bill,
    budget,
    bundles,
    checkpoints,
    cluster,
    console,
    progress,
    run_logger,
    stops,
    tracking,
    training_worker,
)
from pipelines.loader_workers import check_room
from pipelines.recipe import Recipe, Run, TrainConfig
from pipelines.storage import Store, StoreError


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
    """Train; a finished training is skipped, an interrupted one resumed.

    Args:
        fingerprint: Hash of configuration and inputs; a finished run with another is an error.
        parameters: Flat values for the tracker.
        step_memory: Memory that a step takes on a GPU on top of the state, if it was estimated.
        parent: MLflow run under which this one is nested.
        tuned: Report evaluations to the Ray Tune trial that this is called in.

    Returns:
        The result: `metrics` of the last evaluation, `steps`, `mlflow_run`.

    Raises:
        StoreError: the store or the tracker can't be used, or the output's name is taken.
        TakenOver: the same training was started again meanwhile, and goes on there.
        ValueError: the options don't fit each other or the machines.
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
        if track and store.exists(f"{run_folder}/{run_logger.UNDELIVERED}"):
            run_logger.settle(store, run_folder)
        return found
    store.check_writable()
    _check_unclaimed(store, run_folder, fingerprint)
    check_room(config)
    handle = None
    if track:
        handle = tracking.start_run(store, name, parameters, key=run_folder, parent=parent)
    run = Run(
        *(store.uri, run_folder, output, fingerprint, recipe, config, handle),
        parameters=dict(parameters),
        step_memory=step_memory,
        start=uuid.uuid4().hex[:12],
        tuned=tuned,
    )
    _claim(store, run)  # only now: from here on an earlier start gives way to this one
    store.delete(f"{run_folder}/{stops.BEGUN}")  # an interrupted run's last report
    try:
        with (
            bill.of_training(None if tuned else handle, config),  # trials share their nodes
            stops.stoppable(store, run, begun),
            progress.shown(store, run),
        ):
            _launch(run, store)
    except BaseException as error:
        stopped = tuned and isinstance(error, SystemExit)  # by Tune: the sweep records how it ended
        if handle is not None and not stopped and not isinstance(error, stops.TakenOver):
            with contextlib.suppress(Exception):
                kind = "KILLED" if isinstance(error, stops.Stopped) else "FAILED"
                tracking.finish_run(handle, kind)
        raise
    if handle is not None:
        run_logger.settle(store, run_folder)
    result = bundles.info(store, output)
    shown = ", ".join(f"{k} {v:.4f}" for k, v in result["metrics"].items())
    console.say(f"{output}: trained ({config.steps:,} steps){'; ' if shown else ''}{shown}")
    return result


def _check_unclaimed(store: Store, folder: str, fingerprint: str) -> None:
    """Raises: StoreError: there is an interrupted run with other options."""
    note = f"{folder}/{stops.NOTE}"
    if store.exists(note) and store.read_json(note)["fingerprint"] != fingerprint:
        raise StoreError(
            f"{store.uri}/{folder} was begun with other inputs or options, or by a version that "
            "drew other samples: choose another name, or delete that folder first"
        )


def _claim(store: Store, run: Run) -> None:
    """Record the run's provenance, and that this is its latest start."""
    parameters = dict(run.parameters)
    noted = {"fingerprint": run.fingerprint, "parameters": parameters, "start": run.start}
    store.write_json(f"{run.name}/{stops.NOTE}", noted)


def _launch(run: Run, store: Store) -> None:
    """Train on Ray's workers, and restart them as long as there is progress between failures.

    Ray itself never resets its count of failures, even in a run of weeks.
    """
    from ray.train import TrainingFailedError

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
    return TorchTrainer(
        _work,
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
            storage_path=Store(run.store_uri).uri_of(f"{run.name}/ray"),
            failure_config=FailureConfig(max_failures=config.max_failures),
            callbacks=_tune_callbacks(run),
            worker_runtime_env={"env_vars": _environment(config)},
        ),
    )


def _environment(config: TrainConfig) -> dict[str, str]:
    """Environment variables for the workers' processes; the job's own values take precedence.

    On a CPU, tensors are in the C library's memory. By default glibc returns it to the system at
    every step, and gets it back page by page, each zeroed again; even more so in a thread other
    than the main one, such as that of a Ray Train worker.
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


def _work(arguments: dict[str, Any]) -> None:
    training_worker.work(arguments["run"])
