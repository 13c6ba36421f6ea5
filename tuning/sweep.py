"""Sweep finetuning: Ray Tune over learning rate, layer decay, drop path; poor trials stop early.

    python tuning/sweep.py --preset tiny --samples 8 --finetune.task vqa
    ray job submit --working-dir . -- python tuning/sweep.py --preset gpu --samples 32 ...

Each trial is a Ray Train run of `pipelines/finetune.py`, logged as an MLflow run nested under the
sweep's. A sweep that was killed goes on when run again. The table of trials is
`sweeps/<name>.json` in the store.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
from dataclasses import dataclass, field
from typing import Any

from pipelines import bundles, cluster, config, console, finetune, tracking
from pipelines.finetune import FinetuneConfig
from pipelines.storage import Store, StoreError, fingerprint
from tuning import spaces


@dataclass(frozen=True)
class SweepConfig:
    """Search the finetuning options of a task."""

    name: str = "sweep"
    """The table becomes `sweeps/<name>.json`, trials `models/<name>/<trial>`."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """What every trial has in common; the search space lies over it."""
    samples: int = 16
    """Trials to draw."""
    grace_evaluations: int = 1
    """Evaluations before a poor trial may be stopped."""
    reduction: int = 2
    """At each rung of ASHA, one in so many trials goes on."""
    concurrent: int = 0
    """Trials at once; 0: as many as the cluster has room for."""
    cpus_per_trial: float = 1.0
    """CPUs of a trial's own process; its Ray Train workers come on top."""
    seed: int = 0

    def __post_init__(self) -> None:
        spaces.load(self.finetune.task)
        if self.samples < 1:
            raise ValueError(f"samples: expected at least 1, got {self.samples}")
        if self.reduction < 2:
            raise ValueError(f"reduction: expected at least 2, got {self.reduction}")
        if not self.finetune.train.evaluate_every:
            raise ValueError(
                "finetune.train.evaluate_every is 0: set it, trials are judged by evaluations"
            )


def _preset(size: str, **train: Any) -> SweepConfig:
    base = finetune.preset(size, "vqa")
    return SweepConfig(
        finetune=dataclasses.replace(base, train=dataclasses.replace(base.train, **train))
    )


PRESETS = {
    "tiny": _preset("tiny", steps=80, warmup=8, evaluate_every=20),
    "gpu": _preset("base", evaluate_every=1000, workers=1),
}


def run(cfg: SweepConfig) -> dict[str, Any]:
    """Sweep, or go on, or read the finished table: `{"metric", "best", "trials": [...]}`.

    Raises:
        StoreError: the name is taken by another sweep.
    """
    store = Store(cfg.finetune.store)
    table = f"sweeps/{cfg.name}.json"
    print_of = fingerprint("sweep", config.to_dict(cfg) | {"concurrent": 0})
    if store.exists(table):
        found = store.read_json(table)
        if found["fingerprint"] != print_of:
            raise StoreError(
                f"{store.uri}/{table} is another sweep's: choose another --name, or delete it"
            )
        console.say(f"{table}: already there ({len(found['trials'])} trials), skipped")
        return found
    cluster.start()
    handle = tracking.start_run(
        store, f"sweep/{cfg.name}", config.flatten(cfg), key=f"sweeps/{cfg.name}"
    )
    _, metric = spaces.load(cfg.finetune.task)
    results = _tuner(cfg, store, print_of, handle.run_id).fit()
    for result in results:
        _close(cfg, store, result)
    rows = [_row(result, metric) for result in results]
    rows.sort(key=lambda row: (row["score"] is None, -(row["score"] or 0.0)))
    if not rows or rows[0]["score"] is None:
        raise RuntimeError(f"no trial of sweep {cfg.name} gave a score: {rows}")
    outcome = {"fingerprint": print_of, "metric": metric, "best": rows[0], "trials": rows}
    outcome["mlflow_run"] = handle.run_id
    with tracking.Logger(handle) as logger:
        logger.metrics(0, {f"best/{metric}": rows[0]["score"]})
        logger.json("trials.json", rows)
    tracking.finish_run(handle)
    store.write_json(table, outcome)
    show(outcome)
    return outcome


def _tuner(cfg: SweepConfig, store: Store, print_of: str, parent: str) -> Any:
    from ray import tune
    from ray.tune.schedulers import ASHAScheduler
    from ray.tune.search.basic_variant import BasicVariantGenerator

    space, metric = spaces.load(cfg.finetune.task)
    trainable = tune.with_resources(
        functools.partial(_trial, cfg=cfg, parent=parent), {"CPU": cfg.cpus_per_trial}
    )
    where = f"{store.uri}/sweeps/ray"
    experiment = f"{cfg.name.replace('/', '-')}-{print_of[:8]}"
    if tune.Tuner.can_restore(f"{where}/{experiment}"):
        console.say(f"sweep {cfg.name}: goes on where it was")
        return tune.Tuner.restore(
            f"{where}/{experiment}", trainable, resume_errored=True, param_space=space
        )
    every = cfg.finetune.train.evaluate_every
    scheduler = ASHAScheduler(
        time_attr="step",
        metric=metric,
        mode="max",
        max_t=cfg.finetune.train.steps,
        grace_period=min(cfg.grace_evaluations * every, cfg.finetune.train.steps),
        reduction_factor=cfg.reduction,
    )
    return tune.Tuner(
        trainable,
        param_space=space,
        tune_config=tune.TuneConfig(
            num_samples=cfg.samples,
            scheduler=scheduler,
            max_concurrent_trials=cfg.concurrent or None,
            search_alg=BasicVariantGenerator(random_state=cfg.seed),
        ),
        run_config=tune.RunConfig(
            name=experiment, storage_path=where, verbose=0, callbacks=[_Progress(cfg.samples)]
        ),
    )


def _Progress(total: int) -> Any:
    """A Tune callback that counts finished trials on the console."""
    from ray import tune

    class Progress(tune.Callback):
        def __init__(self) -> None:
            self.ended = 0

        def on_trial_complete(
            self, iteration: int, trials: list[Any], trial: Any, **_: Any
        ) -> None:
            self.ended += 1
            console.say(f"   trial {self.ended}/{total}: {_plain(trial.last_result)}")

    return Progress()


def _plain(result: dict[str, Any]) -> str:
    chosen = ", ".join(f"{k}={v:.4g}" for k, v in sorted(result.get("config", {}).items()))
    return f"step {result.get('step', 0)}, {chosen}"


def trial_config(cfg: SweepConfig, chosen: dict[str, Any]) -> FinetuneConfig:
    """The finetuning configuration of a trial: the common one with the drawn values laid on."""
    nested = config.unflatten(chosen)
    # The name follows from the values, so that a trial that starts again finds its checkpoints.
    mark = hashlib.sha256(json.dumps(chosen, sort_keys=True).encode()).hexdigest()[:8]
    nested["name"] = f"{cfg.name}/{mark}"
    return config.from_dict(FinetuneConfig, config.merge(config.to_dict(cfg.finetune), nested))


def _trial(chosen: dict[str, Any], *, cfg: SweepConfig, parent: str) -> None:
    finetune.run(trial_config(cfg, chosen), parent=parent, tuned=True)


def _close(cfg: SweepConfig, store: Store, result: Any) -> None:
    """End the MLflow run of a trial that Tune stopped: the trial itself could not."""
    trial = trial_config(cfg, result.config)
    note = f"runs/{trial.name}/mlflow.json"
    if store.exists(note) and not result.error:
        status = "FINISHED" if bundles.exists(store, trial.output) else "KILLED"
        tracking.finish_run(tracking.RunHandle(**store.read_json(note)), status)


def _row(result: Any, metric: str) -> dict[str, Any]:
    metrics = result.metrics or {}
    return {
        "parameters": result.config,
        "score": metrics.get(metric),
        "steps": metrics.get("step", 0),
        "status": "failed" if result.error else "finished",
        "error": str(result.error)[:500] if result.error else None,
    }


def show(outcome: dict[str, Any]) -> None:
    """Print the trials, best first."""
    for row in outcome["trials"]:
        chosen = "  ".join(f"{k} {v:.4g}" for k, v in row["parameters"].items())
        score = "failed" if row["score"] is None else f"{row['score']:.4f}"
        console.say(f"  {outcome['metric']} {score}  after {row['steps']:>4} steps  {chosen}")


def main() -> None:
    run(config.cli(PRESETS, description=__doc__ or ""))


if __name__ == "__main__":
    main()
