"""Compares starts: finetunes each task from pretrained and from random weights, several times.

    python tuning/compare.py --store demo/store --world demo/world
    python tuning/compare.py --preset gpu --store s3://bucket/beit3 --seeds 5

Both starts get the same data, steps and seeds, and are scored on held-out data. Two scores stand
beside them: "blind", without a look at the picture, and, on the sample world, the ceiling: what a
perfect reader would score, worked out from the known scenes. On CPUs, runs go side by side. A rerun
continues where the last one stopped; more `--seeds` add runs. The table is `comparisons/<name>.md`
and `.json` in the store.
"""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from beit3 import tasks
from pipelines import config, console, finetune, job
from pipelines.baselines import blind
from pipelines.finetune import FinetuneConfig
from pipelines.sample_world import ceiling as ceilings
from pipelines.side_by_side import side_by_side, steps_of
from pipelines.storage import Store
from pipelines.task_data import labels
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

STARTS = ("scratch", "pretrained")


@dataclass(frozen=True)
class CompareConfig:
    """Compare pretrained weights with random ones."""

    store: str = "store"
    """Where models and data live: a folder or an s3:// URI."""
    name: str = "comparison"
    """The table becomes `comparisons/<name>.md` and `.json`, models `models/<name>/...`."""
    init: str = "models/pretrained"
    """The pretrained start; the random one has its architecture."""
    inits: tuple[str, ...] = ()
    """Pretrained start of each task, such as models/aligned for retrieval, made by the contrastive
    stage (`contrast.py --init`). "" for a task, or none at all: `init`."""
    seeds: int = 3
    """Runs of each task from each start."""
    world: str = ""
    """Folder of the sample world that the data come from: gives the ceiling, and NLVR2's and
    ImageNet's data if they are missing. Empty: no ceiling."""
    tasks: TasksConfig = field(default_factory=TasksConfig)

    def __post_init__(self) -> None:
        if self.seeds < 1:
            raise ValueError(f"seeds: expected at least 1, got {self.seeds}")
        self.tasks.check_one_for_each("inits", self.inits)


PRESETS = {
    "tiny": CompareConfig(
        world="demo/world",
        inits=("", "models/aligned", "models/aligned", "", ""),
        tasks=TasksConfig(
            names=("vqa", "nlvr2", "retrieval", "captioning", "imagenet"),
            steps=(400, 400, 400, 400, 200),
            learning_rates=(2e-3, 1e-3, 2e-3, 2e-3, 2e-3),
        ),
    ),
    "gpu": CompareConfig(
        tasks=TasksConfig(
            names=("vqa", "nlvr2", "retrieval", "captioning", "imagenet"),
            recipe="base",
            workers=8,
            gpus_per_worker=1.0,
        )
    ),
}


def run(cfg: CompareConfig) -> dict[str, Any]:
    """Compare, or continue; returns the contents of `comparisons/<name>.json`.

    `tasks` has, by task, the metrics of `blind` and `ceiling` (None if unknown), and for each start
    a list of metrics, by seed.

    Raises:
        FileNotFoundError: there is no sample world in `world`.
        StoreError: models or data are missing, or a name is taken by another comparison.
    """
    store = Store(cfg.store)
    store.check_writable()
    runs = list(itertools.product(range(cfg.seeds), cfg.tasks.names, STARTS))
    check_names(store, [_finetuning(cfg, run) for run in runs])
    world = prepare_sample(cfg.tasks, cfg.store, Path(cfg.world)) if cfg.world else None
    place = f"comparisons/{cfg.name}"
    known = _ceilings(store, place)
    found: dict[str, Any] = {}
    for task in cfg.tasks.names:
        data = cfg.tasks.dataset(task)
        top = known.get(task)
        if world is not None and task in ceilings.TASKS:
            top = _ceiling(store, task, data, world.seed, top)
        found[task] = {
            "blind": blind(store, task, data),
            "ceiling": top,
            **{start: [] for start in STARTS},
        }
    with tracked(store, place, cfg) as handle:
        outcome = {"config": config.to_dict(cfg), "tasks": found, "mlflow_run": handle.run_id}
        work = partial(_score, cfg, handle.run_id)
        trainings = {run: steps_of([_finetuning(cfg, run)]) for run in runs}
        with side_by_side(work, trainings, cpus=cfg.tasks.cpus, store=store) as results:
            for (seed, task, start), metrics in zip(runs, results, strict=True):
                found[task][start].append(metrics)
                about = tasks.load(task).about
                console.say(f"seed {seed}, {start}: {about.title} {about.score_of(metrics):.1f}")
                publish(store, place, handle, outcome, table(found))
        log_spread(
            handle,
            {
                f"{task}/{start}": list(map(tasks.load(task).about.score_of, scores[start]))
                for task, scores in found.items()
                for start in STARTS
            },
        )
    console.say(table(found))
    return outcome


def _finetuning(cfg: CompareConfig, run: tuple[int, str, str]) -> FinetuneConfig:
    seed, task, start = run
    random = start == "scratch"
    return finetuning(
        cfg.tasks,
        cfg.store,
        task,
        init=finetune.RANDOM if random else cfg.tasks.of(cfg.inits, task, "") or cfg.init,
        like=cfg.init if random else "",
        name=f"{cfg.name}/{task}-{start}/{seed}",
        seed=seed,
    )


def _score(cfg: CompareConfig, parent: str, run: tuple[int, str, str]) -> dict[str, float]:
    return score(cfg.tasks, run[1], _finetuning(cfg, run), parent=parent)


def _ceilings(store: Store, place: str) -> dict[str, Any]:
    """Ceilings that an earlier run worked out: retrieval's takes minutes."""
    if not store.exists(f"{place}.json"):
        return {}
    known = store.read_json(f"{place}.json")["tasks"]
    return {task: found["ceiling"] for task, found in known.items()}


def _ceiling(
    store: Store, task: str, data: str, seed: int, known: dict[str, Any] | None
) -> dict[str, Any]:
    dataset = store.dataset(f"tasks/{data}/{tasks.load(task).about.test_split}")
    commit = dataset.commit().identity
    if known and known["data"] == commit:
        return known
    console.say(f"{task}: working out the ceiling")
    metrics = ceilings.ceiling(
        task, dataset.read_table().to_pylist(), seed=seed, labels=labels(store, data)
    )
    return {"data": commit, "metrics": metrics}


def table(found: Mapping[str, Any]) -> str:
    """The comparison as a table, in hundredths: means and standard deviations over the seeds.

    "learnt" is how far the pretrained start got from blind to the ceiling, as a share.
    """
    head = ("", "blind", "from scratch", "pretrained", "ceiling", "better in", "learnt")
    return markdown(head, [_line(task, scores) for task, scores in found.items()])


def _line(task: str, scores: Mapping[str, Any]) -> Sequence[str]:
    about = tasks.load(task).about
    low = about.score_of(scores["blind"])
    top = about.score_of(scores["ceiling"]["metrics"]) if scores["ceiling"] else None
    scratch, pretrained = ([about.score_of(m) for m in scores[start]] for start in STARTS)
    better = sum(a < b for a, b in zip(scratch, pretrained, strict=False))
    learnt = "–"
    if top is not None and pretrained:
        learnt = f"{100 * (statistics.fmean(pretrained) - low) / (top - low):.0f} %"
    return (
        about.title,
        f"{low:.1f}",
        shown(scratch),
        shown(pretrained),
        "–" if top is None else f"{top:.1f}",
        f"{better} of {len(pretrained)} seeds",
        learnt,
    )


def main() -> None:
    job.main(PRESETS, __doc__, run)


if __name__ == "__main__":
    main()
