"""Sweeps finetuning: Ray Tune over learning rate, layer decay, drop path.

    python tuning/sweep.py --preset tiny-retrieval --samples 8
    python tuning/sweep.py --preset tiny --scheduler pbt --samples 6
    ray job submit --working-dir . -- python tuning/sweep.py --preset gpu --search optuna ...

Each trial is a run of `pipelines/finetune.py`, logged as an MLflow run nested under the sweep's. A
killed sweep continues when run again. It writes `sweeps/<name>.json`, the table of trials;
`sweeps/<name>.html`, the same as a page; and `models/<name>/best`.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from beit3 import tasks
from pipelines import (
    bundles,
    cluster,
    config,
    console,
    finetune,
    job,
    models,
    run_logger,
    tracking,
)
from pipelines.config import indifferent
from pipelines.finetune import FinetuneConfig
from pipelines.lineage import fingerprint
from pipelines.storage import Store, StoreError
from pipelines.task_data import labels
from tuning import outcome, room, schedulers, spaces, sweep_page, trials, watch


@dataclass(frozen=True)
class SweepConfig:
    """Search the finetuning options of a task."""

    name: str = "sweep"
    """The table becomes `sweeps/<name>.json`, trials `models/<name>/<trial>`."""
    finetune: FinetuneConfig = field(default_factory=FinetuneConfig)
    """Options that all trials share; the search space overrides them."""
    samples: int = 16
    """Trials to draw."""
    search: Literal["random", "optuna"] = "random"
    """Where values come from: random draws, or Optuna's TPE, which learns from earlier trials."""
    scheduler: Literal["asha", "pbt", "none"] = "asha"
    """ASHA stops poor trials early. Population based training lets poor trials continue from good
    ones' checkpoints with new values. `none` trains all to the end."""
    grace_evaluations: int = 1
    """ASHA: evaluations before a poor trial may be stopped."""
    reduction: int = 2
    """ASHA: at each rung, one in this many trials goes on."""
    exploit_evaluations: int = 1
    """Population based training: evaluations between chances to take another trial's weights."""
    exploit_share: float = 0.25
    """Population based training: the share of trials that count as poor, and as good."""
    concurrent: int = indifferent(0)
    """Trials at once; 0: as many as the cluster has room for now."""
    cpus_per_trial: float = indifferent(1.0)
    """CPUs of a trial's own process; its Ray Train workers come on top."""
    autoscaling: bool = indifferent(False)
    """The cluster adds machines by itself, so trials wait for room that it doesn't have yet. Needs
    `concurrent`."""
    seed: int = 0

    def __post_init__(self) -> None:
        spaces.load(self.finetune)
        if self.samples < 1:
            raise ValueError(f"samples: expected at least 1, got {self.samples}")
        if self.reduction < 2:
            raise ValueError(f"reduction: expected at least 2, got {self.reduction}")
        for name in ("grace_evaluations", "exploit_evaluations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        if not 0 < self.exploit_share <= 0.5:
            raise ValueError(
                f"exploit_share: expected more than 0 and at most 0.5, got {self.exploit_share}"
            )
        if self.concurrent < 0 or self.cpus_per_trial < 0:
            raise ValueError("concurrent and cpus_per_trial can't be negative")
        if self.autoscaling and not self.concurrent:
            raise ValueError("autoscaling needs concurrent: how many trials to bring machines for")
        if not self.finetune.train.evaluate_every:
            raise ValueError(
                "finetune.train.evaluate_every is 0: set it, trials are judged by evaluations"
            )
        if not self.finetune.eval_split:
            raise ValueError("finetune.eval_split is empty: trials are judged on it")
        if not self.finetune.track:
            raise ValueError("finetune.track is off: a sweep's curves are read from MLflow")
        if self.scheduler == "pbt" and self.search != "random":
            raise ValueError(
                f"search {self.search} with scheduler pbt: there values change while training, and "
                "a search that learns from the first ones learns nothing: take search random"
            )
        if self.scheduler == "pbt" and self.samples < 2:
            raise ValueError("samples: population based training needs at least 2")

    @property
    def metric(self) -> str:
        """What trials are compared by: the higher the better."""
        return tasks.load(self.finetune.task).about.selected_by


def _tiny(task: str) -> SweepConfig:
    base = finetune.preset("tiny", task)
    return _around(base, steps=80, warmup=8, evaluate_every=20)


def _gpu(task: str) -> SweepConfig:
    """Around the published recipe of base. A trial has one GPU for every 128 examples of a batch,
    all of VQA's, and at most the recipe's number of GPUs."""
    base = finetune.preset("base", task)
    gpus = math.gcd(base.train.workers, max(1, base.batch_size // 128))
    return _around(base, evaluate_every=1000, workers=gpus)


def _around(base: FinetuneConfig, **train: Any) -> SweepConfig:
    return SweepConfig(
        finetune=dataclasses.replace(base, train=dataclasses.replace(base.train, **train))
    )


PRESETS: dict[str, SweepConfig] = {
    "tiny": _tiny("vqa"),
    "gpu": _gpu("vqa"),
    **{f"tiny-{task}": _tiny(task) for task in tasks.names()},
    **{f"gpu-{task}": _gpu(task) for task in tasks.names() if "base" in tasks.load(task).recipes()},
}


def run(cfg: SweepConfig) -> dict[str, Any]:
    """Sweep, or continue, or read the finished table.

    Returns:
        The contents of `sweeps/<name>.json`: `metric`, `best`, `trials` (the best first, each with
        `parameters`, `score`, `status`, `curve`), `importance`, `model`, and how busy the
        `workers` were: `seconds` by what they did, `busy`.

    Raises:
        StoreError: the data or the start are missing, or the name is taken by another sweep.
        ValueError: the cluster has no room for a trial, and never will.
        RuntimeError: no trial was trained to its end.
    """
    store = Store(cfg.finetune.store)
    table, mark = f"sweeps/{cfg.name}.json", _fingerprint(cfg, store)
    if store.exists(table):
        found = store.read_json(table)
        if found["fingerprint"] != mark:
            raise StoreError(
                f"{store.uri}/{table} is another sweep's, or of other data or another start: "
                "choose another --name, or delete it"
            )
        console.say(f"{table}: already there ({len(found['trials'])} trials), skipped")
        return found
    cluster.start()
    workers = room.at_once(
        cfg.finetune.train,
        cfg.cpus_per_trial,
        wanted=cfg.concurrent,
        samples=cfg.samples,
        autoscaling=cfg.autoscaling,
    )
    handle = tracking.start_run(
        store, f"sweep/{cfg.name}", config.flatten(cfg), key=f"sweeps/{cfg.name}"
    )
    folder = f"sweeps/ray/{cfg.name.replace('/', '-')}-{mark[:8]}"
    _tune(cfg, store, folder, workers, handle)
    result = {"fingerprint": mark, **outcome.gather(cfg, store, folder)}
    result["mlflow_run"] = handle.run_id
    result["model"] = outcome.export(store, result)
    page = sweep_page.render(result, spaces.read(spaces.load(cfg.finetune)))
    store.write(f"sweeps/{cfg.name}.html", page.encode())
    with tempfile.TemporaryDirectory() as local, run_logger.Logger(handle) as logger:
        score = result["best"]["score"]
        logger.metrics(0, {f"best/{result['metric']}": score, "busy": result["busy"]})
        logger.json("trials.json", result["trials"])
        (Path(local) / "sweep.html").write_text(page)
        logger.file(Path(local) / "sweep.html")
        logger.flush()  # while the file is there
    tracking.finish_run(handle)
    store.write_json(table, result)
    outcome.show(result)
    return result


def _fingerprint(cfg: SweepConfig, store: Store) -> str:
    """Fingerprint of what decides the outcome: not where or how fast it runs."""
    tuned = cfg.finetune
    start = bundles.identity(store, tuned.like if tuned.init == finetune.RANDOM else tuned.init)
    splits = (tuned.train_split, tuned.eval_split)
    commits = [store.dataset(tuned.dataset(split)).commit().identity for split in splits]
    names = labels(store, tuned.data or tuned.task)
    plain = config.decisive(cfg)
    plain["finetune"] = models.decisive(cfg.finetune)
    plain["evaluate_every"] = cfg.finetune.train.evaluate_every
    space = spaces.load(cfg.finetune)
    fields = {name: dataclasses.asdict(field) for name, field in spaces.read(space).items()}
    return fingerprint("sweep", [plain, fields, cfg.metric], [*commits, start, *names])


def _tune(
    cfg: SweepConfig, store: Store, folder: str, workers: int, parent: tracking.RunHandle
) -> None:
    """Run the trials, or those that an earlier start has left."""
    from ray import tune

    space = spaces.load(cfg.finetune)
    trainable = tune.with_resources(
        functools.partial(
            trials.train, sweep=cfg.name, common=common(cfg), metric=cfg.metric, parent=parent
        ),
        {"CPU": cfg.cpus_per_trial},
    )
    where, note = f"{store.uri}/{folder}", f"{folder}/begun.json"
    if tune.Tuner.can_restore(where):
        begun = store.read_json(note)["workers"]
        if workers < begun and len(room.demand(cfg.finetune.train, 0)) > 1:
            # More trials would start than have room for their workers, and wait for each other.
            raise ValueError(
                f"sweep {cfg.name} was begun with {begun} trials at once, and there is room for "
                f"{workers}: start a cluster as large as then"
            )
        console.say(f"sweep {cfg.name}: goes on where it was, {begun} trials at once")
        tuner = tune.Tuner.restore(where, trainable, resume_errored=True, param_space=space)
    else:
        store.write_json(note, {"workers": workers})
        in_process = not cfg.finetune.train.workers
        tuner = tune.Tuner(
            trainable,
            param_space=space,
            tune_config=tune.TuneConfig(
                num_samples=cfg.samples,
                scheduler=_scheduler(cfg, store, workers),
                search_alg=_search(cfg),
                # Optuna should learn from a trial before it proposes the next.
                max_concurrent_trials=workers if cfg.search == "optuna" else None,
                # A process that has imported everything takes the next trial. One that waits for
                # Ray Train workers can't leave them: it ends with them.
                reuse_actors=in_process,
            ),
            run_config=tune.RunConfig(
                name=folder.rpartition("/")[2],
                storage_path=where.rpartition("/")[0],
                verbose=0,
                callbacks=[
                    watch.Watch(
                        store,
                        folder,
                        cfg.name,
                        workers=workers,
                        total=cfg.samples,
                        metric=cfg.metric,
                    )
                ],
            ),
        )
    tuner.fit()


def _search(cfg: SweepConfig) -> Any:
    from ray.tune.search.optuna import OptunaSearch

    if cfg.search == "optuna":
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        return OptunaSearch(metric=cfg.metric, mode="max", seed=cfg.seed)
    return schedulers.Drawn(random_state=cfg.seed)


def _scheduler(cfg: SweepConfig, store: Store, workers: int) -> Any:
    steps, every = cfg.finetune.train.steps, cfg.finetune.train.evaluate_every
    if cfg.scheduler == "asha":
        return schedulers.Halving(
            functools.partial(_known, store=store, sweep=cfg.name, metric=cfg.metric),
            workers=workers,
            metric=cfg.metric,
            max_t=steps,
            grace_period=min(cfg.grace_evaluations * every, steps),
            reduction_factor=cfg.reduction,
        )
    if cfg.scheduler == "pbt":
        return schedulers.Population(
            workers=workers,
            sweep=cfg.name,
            space=spaces.load(cfg.finetune),
            metric=cfg.metric,
            every=cfg.exploit_evaluations * every,
            steps=steps,
            share=cfg.exploit_share,
            seed=cfg.seed,
        )
    return schedulers.Limited(workers=workers)


def _known(
    chosen: Mapping[str, Any], *, store: Store, sweep: str, metric: str
) -> list[tuple[int, float]]:
    return trials.scores(store, trials.run_name(sweep, chosen), metric)


def common(cfg: SweepConfig) -> FinetuneConfig:
    """The configuration that all trials share when they run."""
    train = cfg.finetune.train
    if not train.workers and not train.threads:  # they share the machine
        train = dataclasses.replace(train, threads=max(1, int(cfg.cpus_per_trial)))
    if cfg.scheduler == "pbt" and (
        not train.checkpoint_every or train.evaluate_every % train.checkpoint_every
    ):
        train = dataclasses.replace(train, checkpoint_every=train.evaluate_every)
    return dataclasses.replace(cfg.finetune, store=Store(cfg.finetune.store).uri, train=train)


def trial_config(cfg: SweepConfig, chosen: dict[str, Any]) -> FinetuneConfig:
    """The finetuning configuration of a trial: the common one with the drawn values laid on."""
    return trials.configured(cfg.name, common(cfg), chosen)


def main() -> None:
    job.main(PRESETS, __doc__, run)


if __name__ == "__main__":
    main()
