"""A sweep's trials: what each trains, where it begins, and how it fared."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from typing import Any

from ray import tune

from pipelines import bundles, checkpoints, config, finetune, report, tracking
from pipelines.finetune import FinetuneConfig
from pipelines.storage import Store
from pipelines.tracking import RunHandle

ORIGIN = "origin"
"""Key beside a trial's values if it continues from another: `{"run", "step", "by"}`, the run that
gives the checkpoint, the step at which it was chosen, and the trial that chose."""


HEARD = "heard"
"""Key beside a trial's values while it runs: the step of its last evaluation that Tune has. A
killed sweep may have lost some."""


def run_name(sweep: str, chosen: Mapping[str, Any]) -> str:
    """A trial's name, such as `sweep/1f2e3d4c`.

    It follows from the values, so that a restarted trial finds its checkpoints.
    """
    decisive = {name: value for name, value in chosen.items() if name != HEARD}
    text = json.dumps(decisive, sort_keys=True)
    return f"{sweep}/{hashlib.sha256(text.encode()).hexdigest()[:8]}"


def values(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """The drawn values alone: field of FinetuneConfig -> value."""
    return {name: value for name, value in chosen.items() if name not in (ORIGIN, HEARD)}


def among_equals(chosen: Mapping[str, Any]) -> str:
    """Sort key for trials of equal scores: their values, since a killed sweep may not have them in
    the order of drawing."""
    return json.dumps(values(chosen), sort_keys=True)


def configured(sweep: str, common: FinetuneConfig, chosen: Mapping[str, Any]) -> FinetuneConfig:
    """A trial's configuration: the common one with the drawn values laid over it."""
    nested = config.unflatten(values(chosen)) | {"name": run_name(sweep, chosen)}
    return config.from_dict(FinetuneConfig, config.merge(config.to_dict(common), nested))


def train(
    chosen: dict[str, Any],
    *,
    sweep: str,
    common: FinetuneConfig,
    metric: str,
    parent: RunHandle,
) -> None:
    """Train a trial, in one of Tune's processes, and report its evaluations to Tune."""
    # Tune changes to its own folder, where a local tracking file would be another one.
    os.environ["MLFLOW_TRACKING_URI"] = parent.uri
    # The process can take the next trial only if this one has left it by then.
    os.environ.setdefault("TUNE_FUNCTION_THREAD_TIMEOUT_S", "120")
    trial = configured(sweep, common, chosen)
    store, run = Store(trial.store), f"runs/{trial.name}"
    origin = chosen.get(ORIGIN)
    if origin:
        step = checkpoints.inherit(store, run, f"runs/{origin['run']}")
        origin = {**origin, "step": step}
    if not store.exists(f"{run}/trial.json"):
        store.write_json(f"{run}/trial.json", {"values": values(chosen), ORIGIN: origin})
    _say_again(store, trial, chosen.get(HEARD, 0), metric)
    finetune.run(trial, parent=parent.run_id, tuned=True)


def _say_again(store: Store, trial: FinetuneConfig, heard: int, metric: str) -> None:
    """Report the evaluations that Tune has lost and that this trial won't repeat."""
    done = checkpoints.newest(store, f"runs/{trial.name}")
    if bundles.exists(store, trial.output):
        done = trial.train.steps - 1  # the last one is reported with the model
    for step, score in scores(store, trial.name, metric) if done > heard else ():
        if heard < step <= done:
            tune.report({metric: score, "step": step})


def scores(store: Store, name: str, metric: str) -> list[tuple[int, float]]:
    """A trial's evaluations by step, from MLflow; none if it never began."""
    handle = tracking.handle_of(store, f"runs/{name}")
    if handle is None:
        return []
    curves = report.gather_curves(handle, handle.run_id, [f"eval/{metric}"])
    return [(int(step), score) for curve in curves for step, score in curve.points]


def lineage(store: Store, name: str) -> list[dict[str, Any]]:
    """The runs that trained a trial's weights, the first one first.

    Each has its `run`, the `step` it began after, and its `values`.
    """
    found: list[dict[str, Any]] = []
    run: str | None = name
    while run is not None and store.exists(f"runs/{run}/trial.json"):
        note = store.read_json(f"runs/{run}/trial.json")
        origin = note[ORIGIN] or {"run": None, "step": 0}
        found.insert(0, {"run": run, "step": origin["step"], "values": note["values"]})
        run = origin["run"]
    return found


def learning_curve(store: Store, runs: list[dict[str, Any]], metric: str) -> list[list[float]]:
    """`[step, score]` of all evaluations on the way to a trial's weights.

    Args:
        runs: Its lineage.
    """
    ends = [*(run["step"] for run in runs[1:]), math.inf]
    return [
        [step, score]
        for run, end in zip(runs, ends, strict=False)  # a trial that never began has no run
        for step, score in scores(store, run["run"], metric)
        if run["step"] < step <= end
    ]


def close(store: Store, sweep: str, failed: set[str]) -> None:
    """End the MLflow runs of trials that Tune ended, which could not do so.

    Args:
        failed: Names of the trials that failed.
    """
    for name in (f"{sweep}/{mark}" for mark in store.list(f"runs/{sweep}")):
        handle = tracking.handle_of(store, f"runs/{name}")
        if handle is None:
            continue
        if tracking.client(handle.uri).get_run(handle.run_id).info.status == "RUNNING":
            left = "FINISHED" if bundles.exists(store, f"models/{name}") else "KILLED"
            tracking.finish_run(handle, "FAILED" if name in failed else left)
