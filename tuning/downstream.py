"""Finetunes starts and scores them, task by task; used by ablations and comparisons."""

from __future__ import annotations

import contextlib
import dataclasses
import statistics
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3 import tasks
from pipelines import bundles, config, evaluate, finetune, prepare_task, run_logger, tracking
from pipelines.evaluate import EvaluateConfig
from pipelines.finetune import FinetuneConfig
from pipelines.sample_world import World, WorldSize, generate, load
from pipelines.storage import Store, StoreError

# The sample world has too little of these for scores to tell much; more is drawn beside it.
_MORE = {"nlvr2": 8000, "imagenet1k": 1750, "synsets": 35}
_FOLDERS = {"nlvr2": "nlvr2", "imagenet": "imagenet1k"}


@dataclass(frozen=True)
class TasksConfig:
    """Which tasks a start is finetuned for and scored on, and how."""

    names: tuple[str, ...] = ("vqa", "nlvr2", "retrieval")
    """Modules of beit3/tasks."""
    recipe: str = "tiny"
    """Each task is finetuned as by `finetune.py --preset <recipe>-<task>`: tiny, base or large; if
    there is a preset `<recipe>-<data>-<task>` for its data, as by that."""
    data: tuple[str, ...] = ()
    """The data of each task, `tasks/<data>/<split>`, such as flickr30k for retrieval; empty: the
    tasks' names."""
    steps: tuple[int, ...] = ()
    """Steps of each task; empty: the recipe's. The warm-up keeps its share."""
    learning_rates: tuple[float, ...] = ()
    """Peak learning rate of each task; empty: the recipe's."""
    workers: int = 0
    """Ray Train workers of a run. 0: it trains in its own process, and runs go side by side as far
    as the cluster's CPUs allow."""
    gpus_per_worker: float = 0.0
    threads: int = 1
    """Torch threads of a run on CPU; 0: all of the machine's, one run after another."""

    def __post_init__(self) -> None:
        unknown = sorted(set(self.names) - set(tasks.names()))
        if unknown or not self.names:
            raise ValueError(
                f"tasks.names: {', '.join(unknown) or 'none'}; expected some of "
                f"{', '.join(tasks.names())}"
            )
        for name in ("data", "steps", "learning_rates"):
            self.check_one_for_each(f"tasks.{name}", getattr(self, name))
        for task in self.names:
            finetune.preset(self.recipe, task)

    def check_one_for_each(self, name: str, given: Sequence[Any]) -> None:
        """Raises: ValueError: there are values, but not one for each task."""
        if given and len(given) != len(self.names):
            raise ValueError(
                f"{name}: {len(given)} for the {len(self.names)} of tasks.names: give one for "
                "each, or none"
            )

    @property
    def cpus(self) -> int:
        """CPUs of a run that trains in its own process, on CPUs; 0 for others."""
        return 0 if self.workers or self.gpus_per_worker else self.threads

    def of(self, values: Sequence[Any], task: str, default: Any) -> Any:
        """A task's value of a field that has one per task."""
        return values[self.names.index(task)] if values else default

    def dataset(self, task: str) -> str:
        return self.of(self.data, task, task)

    def preset(self, task: str) -> FinetuneConfig:
        """The preset by which a task is finetuned."""
        own = f"{self.recipe}-{self.dataset(task)}"
        there = own in tasks.load(task).recipes()
        return finetune.preset(own if there else self.recipe, task)


def finetuning(
    cfg: TasksConfig, store: str, task: str, *, init: str, like: str = "", name: str, seed: int
) -> FinetuneConfig:
    """The configuration that finetunes for a task from a start; `like`: see `FinetuneConfig`."""
    base = cfg.preset(task)
    steps = cfg.of(cfg.steps, task, base.train.steps)
    return dataclasses.replace(
        base,
        store=store,
        data=cfg.dataset(task),
        init=init,
        like=like,
        name=name,
        eval_split="",
        train=dataclasses.replace(
            base.train,
            steps=steps,
            warmup=base.train.warmup * steps // base.train.steps,
            learning_rate=cfg.of(cfg.learning_rates, task, base.train.learning_rate),
            seed=seed,
            workers=cfg.workers,
            gpus_per_worker=cfg.gpus_per_worker,
            threads=cfg.threads,
        ),
    )


def evaluation(cfg: TasksConfig, store: str, task: str, name: str) -> EvaluateConfig:
    """The configuration that scores `models/<name>` on data it was not finetuned on."""
    base = evaluate.PRESETS["gpu" if cfg.gpus_per_worker else "tiny"]
    return dataclasses.replace(
        base,
        store=store,
        model=f"models/{name}",
        data=f"tasks/{cfg.dataset(task)}/{tasks.load(task).about.test_split}",
        name=name,
        track=False,  # the scores go to the parent run
    )


def score(
    cfg: TasksConfig, task: str, chosen: FinetuneConfig, *, parent: str | None = None
) -> dict[str, float]:
    """Finetune as `chosen`, unless done; returns the task's metrics on held-out data.

    Raises:
        StoreError: data or start are missing, or the name is taken by another run.
    """
    finetune.run(chosen, parent=parent)
    return evaluate.run(evaluation(cfg, chosen.store, task, chosen.name))["metrics"]


def check_names(store: Store, trainings: Iterable[FinetuneConfig]) -> None:
    """Raises: StoreError: a model still to be trained has the name of another's predictions, which
    would stop the job at scoring."""
    for chosen in trainings:
        name = chosen.name
        made = store.dataset(f"predictions/{name}").find_commit()
        if made and not bundles.exists(store, f"models/{name}"):
            raise StoreError(
                f"{store.uri}/predictions/{name} is of a model that is gone, and models/{name} is "
                "to be another one: choose another name, or delete predictions and scores too"
            )


def prepare_sample(cfg: TasksConfig, store: str, folder: Path) -> World:
    """Make the sample world's NLVR2 and ImageNet datasets if they are wanted and missing.

    They come from a world of the same seed with more of both, drawn beside the one in `folder`.
    Returns the one in `folder`.

    Raises:
        FileNotFoundError: there is no sample world in the folder.
    """
    try:
        world = load(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(
            f"{folder} holds no sample world: `make demo` draws one in demo/world"
        ) from error
    for task in cfg.names:
        if task not in _FOLDERS or Store(store).dataset(f"tasks/{task}/train").find_commit():
            continue
        least = {f.name: 1 for f in dataclasses.fields(WorldSize) if f.name != "bad_share"}
        more = generate(
            folder.with_name(f"{folder.name}-tasks"),
            seed=world.seed,
            size=WorldSize(**(least | _MORE)),
            base_url=world.base_url,
        )
        annotations = more.annotations(_FOLDERS[task])
        prepare_task.run(
            dataclasses.replace(
                prepare_task.PRESETS[task],
                annotations=str(annotations),
                images=str(annotations if task == "imagenet" else more.images("nlvr2")),
                store=store,
                short_side=160,
                in_process=True,
            )
        )
    return world


# -- tables ---------------------------------------------------------------------------------------


def spread(values: Sequence[float]) -> float | None:
    """Standard deviation of a sample (n - 1); None for fewer than two."""
    return statistics.stdev(values) if len(values) > 1 else None


def shown(values: Sequence[float]) -> str:
    """Mean ± standard deviation, one decimal."""
    if not values:
        return "–"
    deviation = spread(values)
    mean = f"{statistics.fmean(values):.1f}"
    return mean if deviation is None else f"{mean} ± {deviation:.1f}"


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table, its first column of words and the others of numbers."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


@contextlib.contextmanager
def tracked(store: Store, key: str, cfg: Any) -> Iterator[tracking.RunHandle]:
    """The MLflow run of a comparison or ablation, named by its place `key`, open in the context."""
    handle = tracking.start_run(store, key, config.flatten(cfg), key=key)
    try:
        yield handle
    except BaseException as error:
        tracking.finish_run(handle, "FAILED" if isinstance(error, Exception) else "KILLED")
        raise
    tracking.finish_run(handle)


def log_spread(handle: tracking.RunHandle, values: Mapping[str, Sequence[float]]) -> None:
    """Log means and standard deviations by name; the step is the number of values."""
    with run_logger.Logger(handle) as logger:
        for name, found in values.items():
            logger.metrics(len(found), {name: statistics.fmean(found)})
            deviation = spread(found)
            if deviation is not None:
                logger.metrics(len(found), {f"{name}_deviation": deviation})


def publish(
    store: Store, name: str, handle: tracking.RunHandle, outcome: Mapping[str, Any], text: str
) -> None:
    """Write an outcome as `<name>.json` and `<name>.md` to the store, and to its MLflow run."""
    store.write_json(f"{name}.json", outcome)
    store.write(f"{name}.md", text.encode())
    tracker = tracking.client(handle.uri)
    tracker.log_dict(handle.run_id, dict(outcome), "outcome.json")
    tracker.log_text(handle.run_id, text, "tables.md")
