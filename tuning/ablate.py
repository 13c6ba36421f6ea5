"""Runs the paper's ablations: pretrains, finetunes and scores each row, and tabulates them.

    python tuning/ablate.py --store demo/store --world demo/world --dry-run
    python tuning/ablate.py --store demo/store --world demo/world --seeds 3
    python tuning/ablate.py --preset gpu --store s3://bucket/beit3 --pretrain.train.steps 50000

Rows that share a configuration, the paper's default, are trained once. All rows have the same data,
steps and seeds. Every job skips finished work, so a killed run continues where it stopped, and more
`--seeds`, rows or tasks are added to earlier results; the tables are updated after each row. On
CPUs, rows run side by side as far as the CPUs allow. The tables are `ablations/<name>.md` and
`.json` in the store.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch

from beit3 import tasks
from beit3.config import PRESETS as MODELS
from beit3.device import to_device
from beit3.masking import Masking
from beit3.vqkd import PRESETS as TOKENIZERS
from pipelines import bundles, config, console, finetune, job, pretrain, token_checks
from pipelines.finetune import FinetuneConfig, FinetuneRecipe
from pipelines.pretrain_config import PRESETS as PRETRAINING
from pipelines.pretrain_config import PretrainConfig
from pipelines.recipe import Recipe, TrainConfig
from pipelines.side_by_side import side_by_side, steps_of
from pipelines.storage import Store
from pipelines.task_data import labels
from tuning.ablations import ABLATIONS, DEFAULT, PAPER_TASKS, VARIANTS, check_default, variant
from tuning.downstream import (
    TasksConfig,
    check_names,
    finetuning,
    log_spread,
    markdown,
    prepare_sample,
    publish,
    score,
    shown,
    tracked,
)

MEASURED = 4  # steps that a dry run times


@dataclass(frozen=True)
class Speeds:
    """Optimizer steps per second; 0: if training is on CPUs, a few are measured here."""

    pretrain: float = 0.0
    finetune: float = 0.0

    def __post_init__(self) -> None:
        for name in ("pretrain", "finetune"):
            if getattr(self, name) < 0:
                raise ValueError(f"speeds.{name}: expected 0 or more, got {getattr(self, name)}")


@dataclass(frozen=True)
class AblateConfig:
    """Train the rows of the paper's ablations."""

    store: str = "store"
    """Where tokens, tasks and models live: a folder or an s3:// URI."""
    name: str = "ablation"
    """The tables become `ablations/<name>.md` and `.json`, models `models/<name>/<variant>/...`."""
    seeds: int = 3
    """Runs of each row."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to train; rows of the others stay empty."""
    world: str = ""
    """Folder of the sample world that the data come from; it gives NLVR2's and ImageNet's data if
    they are missing. Empty: they are there."""
    dry_run: bool = False
    """Train nothing; print the steps and hours that it would take, one row after another."""
    speeds: Speeds = field(default_factory=Speeds)
    """Speeds that a dry run assumes."""
    pretrain: PretrainConfig = field(default_factory=PretrainConfig)
    """Pretraining options that all rows share, except `store` and `name`."""
    tasks: TasksConfig = field(default_factory=TasksConfig)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds: expected at least 1, got {self.seeds}")
        unknown = sorted(set(self.variants) - set(VARIANTS))
        if unknown or not self.variants:
            raise ValueError(
                f"variants: {', '.join(unknown) or 'none'}; expected some of {', '.join(VARIANTS)}"
            )
        check_default(self.pretrain)

    @property
    def cpus(self) -> int:
        """CPUs of a row that trains in its own process, on CPUs; 0 for others."""
        train = self.pretrain.train
        if train.workers or train.gpus_per_worker or not self.tasks.cpus:
            return 0
        return train.threads and max(train.threads, self.tasks.cpus)


PRESETS = {
    # A row on one CPU core, with the data and tokenizers of `make demo`.
    "tiny": AblateConfig(
        world="demo/world",
        pretrain=dataclasses.replace(
            PRETRAINING["tiny"],
            held_out="captioning/val",
            model=dataclasses.replace(  # of the demo's tokenizers
                MODELS["tiny"], vocab_size=320, codebook_size=TOKENIZERS["tiny"].codebook_size
            ),
            # Equally many of each kind, as in the paper.
            image_batch=24,
            text_batch=24,
            pair_batch=24,
            masking=Masking(min_block=4),
            train=dataclasses.replace(
                PRETRAINING["tiny"].train,
                steps=1000,
                warmup=50,
                learning_rate=3e-3,
                workers=0,
                threads=1,
                zero_stage=0,
                checkpoint_every=250,
            ),
        ),
        tasks=TasksConfig(steps=(250, 250, 250), learning_rates=(2e-3, 1e-3, 2e-3)),
    ),
    # The paper does not state its ablations' budget; this one has not been run.
    "gpu": AblateConfig(
        pretrain=dataclasses.replace(
            PRETRAINING["base"],
            held_out="captioning/val",
            image_batch=512,
            text_batch=512,
            pair_batch=512,
            train=dataclasses.replace(
                PRETRAINING["base"].train, steps=100_000, warmup=5_000, workers=8
            ),
        ),
        tasks=TasksConfig(
            data=("vqa", "nlvr2", "flickr30k"), recipe="base", workers=8, gpus_per_worker=1.0
        ),
    ),
}


def run(cfg: AblateConfig) -> dict[str, Any]:
    """Train every row, or continue; returns the contents of `ablations/<name>.json`.

    `scores` has, by variant and task, a list of metrics, by seed.

    Raises:
        FileNotFoundError: there is no sample world in `world`.
        StoreError: data are missing, or a name is taken by another ablation.
        ValueError: data and model don't fit; or `dry_run` is set.
    """
    if cfg.dry_run:
        raise ValueError("dry_run is set: call plan() instead")
    store = Store(cfg.store)
    store.check_writable()
    _check_names(cfg, store)
    if cfg.world:
        prepare_sample(cfg.tasks, cfg.store, Path(cfg.world))
    place = f"ablations/{cfg.name}"
    scores: dict[str, dict[str, list[dict[str, float]]]] = {
        name: {task: [] for task in cfg.tasks.names} for name in cfg.variants
    }
    with tracked(store, place, cfg) as handle:
        outcome = {"config": config.to_dict(cfg), "scores": scores, "mlflow_run": handle.run_id}
        runs = _runs(cfg)
        work = partial(_row, cfg, handle.run_id)
        trainings = {run: _trainings(cfg, run) for run in runs}
        with side_by_side(work, trainings, cpus=cfg.cpus, store=store) as results:
            for (seed, name), row in zip(runs, results, strict=True):
                for task, metrics in row.items():
                    scores[name][task].append(metrics)
                said = (f"{_title(task)} {_score(task, m):.1f}" for task, m in row.items())
                console.say(f"seed {seed}, {name}: {', '.join(said)}")
                publish(store, place, handle, outcome, tables(scores, cfg.tasks.names))
        log_spread(
            handle,
            {
                f"{name}/{task}": [_score(task, metrics) for metrics in of_task]
                for name, by_task in scores.items()
                for task, of_task in by_task.items()
            },
        )
    console.say(tables(scores, cfg.tasks.names))
    return outcome


def pretraining(cfg: AblateConfig, name: str, seed: int) -> PretrainConfig:
    """The configuration that pretrains a variant."""
    found = variant(cfg.pretrain, name)
    return dataclasses.replace(
        found,
        store=cfg.store,
        name=f"{cfg.name}/{name}/{seed}",
        train=dataclasses.replace(found.train, seed=cfg.pretrain.train.seed + seed),
    )


def _finetunings(cfg: AblateConfig, pretrained: str, seed: int) -> dict[str, FinetuneConfig]:
    """The configurations that finetune a pretrained variant, by task."""
    return {
        task: finetuning(
            cfg.tasks,
            cfg.store,
            task,
            init=f"models/{pretrained}",
            name=f"{pretrained}-{task}",
            seed=seed,
        )
        for task in cfg.tasks.names
    }


def _runs(cfg: AblateConfig) -> list[tuple[int, str]]:
    return list(itertools.product(range(cfg.seeds), cfg.variants))


def _check_names(cfg: AblateConfig, store: Store) -> None:
    rows = ((seed, pretraining(cfg, name, seed).name) for seed, name in _runs(cfg))
    check_names(store, (t for seed, row in rows for t in _finetunings(cfg, row, seed).values()))


def _row(cfg: AblateConfig, parent: str, run: tuple[int, str]) -> dict[str, dict[str, float]]:
    """A variant's metrics, by task."""
    seed, name = run
    chosen = pretraining(cfg, name, seed)
    pretrain.run(chosen, parent=parent)
    return {
        task: score(cfg.tasks, task, tuned, parent=parent)
        for task, tuned in _finetunings(cfg, chosen.name, seed).items()
    }


def _trainings(cfg: AblateConfig, run: tuple[int, str]) -> dict[str, int]:
    """The trainings of a row, and how many steps each has."""
    seed, name = run
    chosen = pretraining(cfg, name, seed)
    return steps_of([chosen, *_finetunings(cfg, chosen.name, seed).values()])


# -- tables ---------------------------------------------------------------------------------------


def _title(task: str) -> str:
    return tasks.load(task).about.title


def _score(task: str, metrics: Mapping[str, float]) -> float:
    return tasks.load(task).about.score_of(metrics)


def tables(scores: Mapping[str, Any], names: Sequence[str]) -> str:
    """The paper's tables with this run's numbers, mean ± standard deviation over the seeds, and how
    the differences compare with the paper's."""
    values = {
        name: {task: [_score(task, m) for m in found[task]] for task in names}
        for name, found in scores.items()
    }
    papers = [task for task in PAPER_TASKS if task in names]
    head = ["", *map(_title, names), *(f"paper: {PAPER_TASKS[task]}" for task in papers)]
    parts = []
    for ablation in ABLATIONS:
        rows = [
            [
                row.label,
                *(shown(values.get(row.variant, {}).get(task, [])) for task in names),
                *(f"{row.published(task):.1f}" for task in papers),
            ]
            for row in ablation.rows
        ]
        parts.append(f"**{ablation.title}**\n\n{markdown(head, rows)}")
    if papers:
        parts.append(_agreement(values, papers))
    return "\n".join(parts)


def _agreement(values: Mapping[str, Mapping[str, list[float]]], papers: Sequence[str]) -> str:
    """Each row's distance from the default, here and in the paper."""
    default = values.get(DEFAULT, {})
    here = {
        (name, task): [a - b for a, b in zip(default.get(task, []), found[task], strict=False)]
        for name, found in values.items()
        for task in papers
        if name != DEFAULT
    }
    limits = {task: limit([found[task] for found in values.values()]) for task in papers}
    columns = (f"{PAPER_TASKS[t]}: {w}" for t in papers for w in ("here", "paper", ""))
    head = ["default minus", *columns]
    rows = []
    for ablation in ABLATIONS:
        for row in ablation.rows:
            if row.variant in values and row.variant != DEFAULT:
                line = [f"{ablation.title.lower()}: {row.label}"]
                for task in papers:
                    paper = ablation.rows[-1].published(task) - row.published(task)
                    found = here[row.variant, task]
                    said = verdict(found, paper, limits[task])
                    line += [shown(found), f"{paper:.1f}", said]
                rows.append(line)
    bounds = ", ".join(
        f"{PAPER_TASKS[task]} {bound:.1f}" for task, bound in limits.items() if bound is not None
    )
    return (
        "**Differences** of runs with the same seed. One agrees with the paper if it has the "
        "paper's sign, contradicts it if not, and is open where it could be chance: where its mean "
        "is within the 95 % limits of Student's t with the deviation pooled over all rows"
        f"{f' ({bounds})' if bounds else ''}.\n\n{markdown(head, rows)}"
    )


def limit(rows: Sequence[Sequence[float]]) -> float | None:
    """Smallest difference between two rows' means that is not put down to chance (two-sided 5 %):
    Student's t with the deviation pooled over all rows. None if no row has two."""
    from scipy.stats import t

    rows = [row for row in rows if len(row) > 1]
    if not rows:
        return None
    freedom = sum(len(row) - 1 for row in rows)
    pooled = sum(statistics.variance(row) * (len(row) - 1) for row in rows) / freedom
    fewest = min(len(row) for row in rows)
    return float(t.ppf(0.975, freedom)) * (2 * pooled / fewest) ** 0.5


def verdict(here: Sequence[float], paper: float, limit: float | None) -> str:
    """Whether differences confirm the paper's: agrees, contradicts, or open."""
    if limit is None or len(here) < 2 or abs(statistics.fmean(here)) <= limit:
        return "open"
    return "agrees" if statistics.fmean(here) * paper > 0 else "contradicts"


# -- what it would take ---------------------------------------------------------------------------


def plan(cfg: AblateConfig) -> list[dict[str, Any]]:
    """Work left for each variant: `name`, the `pretrain_steps` and `finetune_steps` still to be
    done over all seeds, and `hours`, None if no speed is known.

    Raises:
        StoreError, ValueError: data to measure speeds on are missing, or a name is taken.
    """
    store = Store(cfg.store)
    _check_names(cfg, store)
    rows = []
    for name in cfg.variants:
        chosen = [pretraining(cfg, name, seed) for seed in range(cfg.seeds)]
        missing = [one for one in chosen if not bundles.exists(store, f"models/{one.name}")]
        steps = len(missing) * cfg.pretrain.train.steps
        seconds = steps * _pretrain_seconds(cfg, chosen[0]) if steps else 0.0
        tuned = 0
        for task in cfg.tasks.names:
            left = [one for one in chosen if not store.exists(f"scores/{one.name}-{task}.json")]
            own = finetuning(cfg.tasks, cfg.store, task, init="", name="", seed=0).train.steps
            tuned += len(left) * own
            if left:
                seconds += len(left) * own * _finetune_seconds(cfg, chosen[0], task)
        hours = None if seconds != seconds else seconds / 3600
        rows.append(
            {"name": name, "pretrain_steps": steps, "finetune_steps": tuned, "hours": hours}
        )
    return rows


def _pretrain_seconds(cfg: AblateConfig, chosen: PretrainConfig) -> float:
    """Seconds of a step; on GPUs as estimated by `pretrain.py --dry-run`."""
    if cfg.speeds.pretrain:
        return 1 / cfg.speeds.pretrain
    if chosen.train.gpus_per_worker:
        return pretrain.plan(chosen)["hours"] * 3600 / chosen.train.steps
    recipe, _ = pretrain.prepare(chosen)
    return measured(recipe, chosen.train)


def _finetune_seconds(cfg: AblateConfig, chosen: PretrainConfig, task: str) -> float:
    """Seconds of a step; NaN on GPUs if no speed is given."""
    if cfg.speeds.finetune:
        return 1 / cfg.speeds.finetune
    if cfg.tasks.gpus_per_worker:
        return float("nan")
    store = Store(cfg.store)
    if cfg.world:
        prepare_sample(cfg.tasks, cfg.store, Path(cfg.world))
    _, tokenizer = token_checks.check_data(store, chosen)
    tuned = finetuning(
        cfg.tasks, cfg.store, task, init=finetune.RANDOM, like="models/any", name="", seed=0
    )
    model = dataclasses.replace(
        chosen.model, image_size=tuned.image_size or chosen.model.image_size
    )
    names = labels(store, cfg.tasks.dataset(task))
    return measured(FinetuneRecipe(tuned, model, tokenizer, names), tuned.train)


def measured(recipe: Recipe, train: TrainConfig) -> float:
    """Seconds of an optimizer step of a recipe's first worker, on this machine's CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(train.threads or before)
    try:
        module = recipe.build()
        batches = recipe.batches(0, max(1, train.workers))
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        begun = 0.0
        for number in range(1 + MEASURED):  # the first one reads and warms up
            if number == 1:
                begun = time.monotonic()
            for passes in range(train.accumulate):
                batch = to_device(batches(number * train.accumulate + passes), torch.device("cpu"))
                module(batch)["loss"].backward()
            optimizer.step()
            optimizer.zero_grad()
        return (time.monotonic() - begun) / MEASURED
    finally:
        torch.set_num_threads(before)


def show_plan(rows: Sequence[Mapping[str, Any]], cpus: int = 0) -> None:
    """Print a plan, its sum, and its hours if rows of `cpus` CPUs each run side by side."""
    known = all(row["hours"] is not None for row in rows)
    total = {key: sum(row[key] for row in rows) for key in ("pretrain_steps", "finetune_steps")}
    hours = sum(row["hours"] for row in rows) if known else None
    lines = [*rows, {"name": "in all", **total, "hours": hours}]
    console.say(f"{'':12} {'pretraining':>12} {'finetuning':>12} {'hours':>8}")
    for row in lines:
        said = "unknown" if row["hours"] is None else f"{row['hours']:.2f}"
        console.say(
            f"{row['name']:12} {row['pretrain_steps']:>12,} {row['finetune_steps']:>12,} {said:>8}"
        )
    at_once = (os.cpu_count() or 1) // cpus if cpus else 1
    if hours is not None and at_once > 1:
        console.say(
            f"with this machine's CPUs, {at_once} rows side by side: {hours / at_once:.2f} hours"
        )
    if not known:
        console.say("steps per second of finetuning on GPUs are unknown: give --speeds.finetune")


def main() -> None:
    def run_or_plan(chosen: AblateConfig) -> None:
        if chosen.dry_run:
            show_plan(plan(chosen), chosen.cpus)
        else:
            run(chosen)

    job.main(PRESETS, __doc__, run_or_plan)


if __name__ == "__main__":
    main()
