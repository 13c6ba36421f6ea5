"""Finetuning: a pretrained model and a prepared task -> `models/<name>`.

    python pipelines/finetune.py --preset base-vqa --init models/pretrained --name vqa-base

Each time an image is drawn, one of its examples is picked; views, masks and picks are a function of
the seed and the sample's number, so a resumed run, on any number of workers, repeats them. `--init
random --like models/pretrained` trains the same architecture from scratch: the baseline.

Not reproduced from the published recipes: RandAugment for VQA, captioning and retrieval, and VQA's
extra training images from val2014 (prepare them as a separate split to use them).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from torch import nn

from beit3 import tasks, weights
from beit3.config import Checkpointing, ModelConfig
from beit3.model import interpolate_positions
from beit3.tasks import Sample, Task
from beit3.text import TextTokenizer
from pipelines import cluster, config, job, models
from pipelines.config import indifferent
from pipelines.finetuned import TASK_FILE, predict, row_sample
from pipelines.lineage import fingerprint
from pipelines.recipe import Recipe, TrainConfig
from pipelines.run_logger import Logger
from pipelines.samples import Pictures, Samples, ViewConfig
from pipelines.samples import Sample as Drawn
from pipelines.storage import Store, StoreError
from pipelines.task_data import labels, read_examples
from pipelines.trainer import fit

RANDOM = "random"
_POSITIONS = "backbone.vision_embedding.positions"


@dataclass(frozen=True)
class FinetuneConfig:
    """Finetune a model on a task."""

    store: str = indifferent("store", noted="")
    """Where models and data live: a folder or an s3:// URI."""
    task: str = "vqa"
    """A module of beit3/tasks, such as vqa."""
    data: str = ""
    """The task's data are tasks/<data>/<split>; by default the task's name."""
    train_split: str = "train"
    init: str = "models/pretrained"
    """Model bundle to start from, or "random" for random weights."""
    like: str = ""
    """With `init random`: the bundle whose architecture and text tokenizer to use."""
    name: str = ""
    """The model becomes models/<name>; by default the task's name."""
    image_size: int = 0
    """Side of the pictures in pixels; 0: as in pretraining. Position embeddings are resampled."""
    drop_path: float = 0.0
    """Stochastic depth of the last layer."""
    checkpoint_activations: Checkpointing = "none"
    """Activations that the backward pass recomputes instead of storing: `blocks`, all inside each
    block; `selective`, all but the results of matrix products and attention."""
    batch_size: int = 32
    """Examples per batch, over all workers."""
    view: ViewConfig = field(default_factory=lambda: ViewConfig(scale=(0.5, 1.0)))
    """Crops and flips of training; evaluation sees the whole picture."""
    options: dict[str, float] = field(default_factory=dict)
    """The task's own options, e.g. `--options mask_ratio 0.6`; see the task's file."""
    eval_split: str = "val"
    """Split on which the metric is computed during training; empty: none."""
    eval_records: int = 1000
    """How many of that split's records to use."""
    eval_batch_size: int = 32
    track: bool = True
    """Log to MLflow."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        tasks.create(self.task, options=self.options)  # raises for unknown options
        if self.init == RANDOM and not self.like:
            raise ValueError("like: init is 'random', so name the bundle whose shape to take")
        for name in ("batch_size", "eval_batch_size", "eval_records"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: must be at least 1, not {getattr(self, name)}")
        self.train.check_shared("batch_size", self.batch_size)

    @property
    def output(self) -> str:
        return f"models/{self.name or self.task}"

    def dataset(self, split: str) -> str:
        return f"tasks/{self.data or self.task}/{split}"


def preset(size: str, task: str) -> FinetuneConfig:
    """The configuration of a model size (`tiny`, `base`, `large`) for a task.

    Raises:
        ValueError: there is no such task or size.
    """
    kind = tasks.load(task)
    if size == "tiny":
        # For a CPU, in seconds. No mirroring: captions and questions mention left and right.
        return FinetuneConfig(
            task=task,
            batch_size=64,
            view=ViewConfig(scale=(0.7, 1.0), flip=0.0),
            eval_split=kind.about.validation_split,
            options=dict(kind.about.small_options),
            eval_records=64,
            eval_batch_size=64,
            train=TrainConfig(
                steps=200,
                warmup=20,
                learning_rate=1e-3,
                betas=(0.9, 0.98),
                eps=1e-8,
                weight_decay=0.05,
                head_scale=1.0,
                zero_stage=0,
                workers=0,
                checkpoint_every=0,
            ),
        )
    recipes = kind.recipes()
    if size not in recipes:
        raise ValueError(f"size: {size!r} is none of tiny, {', '.join(recipes)}")
    recipe = recipes[size]
    return FinetuneConfig(
        task=task,
        name=f"{task}-{size}",
        image_size=recipe.image_size,
        drop_path=recipe.drop_path,
        checkpoint_activations="blocks" if recipe.checkpoint_activations else "none",
        batch_size=recipe.batch_size,
        view=ViewConfig(scale=recipe.scale, flip=recipe.flip),
        eval_split=kind.about.validation_split,
        train=TrainConfig(
            steps=recipe.steps,
            warmup=recipe.warmup,
            learning_rate=recipe.learning_rate,
            min_learning_rate=1e-6,
            betas=recipe.betas,
            eps=1e-8,
            weight_decay=recipe.weight_decay,
            clip=0.0,
            layer_decay=recipe.layer_decay,
            head_scale=recipe.head_scale,
            precision="bf16",
            workers=math.gcd(8, recipe.batch_size),
            gpus_per_worker=1.0,
            # Decode 1.5 times the pictures that an L40S takes, at 384 pixels and more, or at 224.
            loader_workers=2 if size.startswith("large") or recipe.image_size >= 384 else 6,
        ),
    )


# The published recipes, by size and task; each task's file names the source.
PRESETS: dict[str, FinetuneConfig] = {
    "tiny": preset("tiny", "vqa"),
    **{
        f"{size}-{task}": preset(size, task)
        for task in tasks.names()
        for size in ("tiny", *tasks.load(task).recipes())
    },
}


@dataclass(frozen=True)
class FinetuneRecipe(Recipe):
    """A finetuning run, as the training loop needs it."""

    cfg: FinetuneConfig
    model: ModelConfig
    tokenizer: TextTokenizer
    labels: tuple[str, ...]

    @property
    def task(self) -> Task:
        return tasks.create(self.cfg.task, labels=self.labels, options=self.cfg.options)

    def build(self) -> nn.Module:
        module = self.task.build(self.model)
        if self.cfg.init != RANDOM:
            with models.opened(Store(self.cfg.store), self.cfg.init) as folder:
                load_start(module, folder, self.model)
        return module

    def layers(self) -> int:
        return self.model.layers

    def samples_per_batch(self) -> int:
        return self.cfg.batch_size

    def batches(self, rank: int, world: int) -> Callable[[int], Any]:
        cfg, task = self.cfg, self.task
        drawn = Samples(
            [Store(cfg.store).dataset(cfg.dataset(cfg.train_split))],
            columns=None,
            seed=cfg.train.seed,
            batch=cfg.batch_size,
            rank=rank,
            world=world,
        )
        pictures = Pictures()

        def batch(step: int) -> Any:
            found = drawn(step)
            samples = [self._sample(one, task, pictures) for one in found]
            rngs = [one.rng for one in found]
            return task.collate(samples, self.tokenizer, rngs, training=True)

        return batch

    def _sample(self, drawn: Drawn, task: Task, pictures: Pictures) -> Sample:
        """One of a row's examples, and a random view of its images."""
        row, place = drawn.row, f"{drawn.group.path}/{drawn.group.index}/{drawn.index}"
        examples = read_examples(row)
        wanted = [e for e in examples if task.trainable(e)] or list(examples)
        example = wanted[int(drawn.rng.integers(len(wanted)))]
        images = tuple(
            self.cfg.view.pixels(
                pictures(f"{place}/{i}", image["bytes"]), drawn.rng, self.model.image_size
            )
            for i, image in enumerate(row["images"])
        )
        return Sample(images, (example,))

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        """The task's metric on the first records of the validation split."""
        if not self.cfg.eval_split:
            return {}
        task = self.task
        split = Store(self.cfg.store).dataset(self.cfg.dataset(self.cfg.eval_split))
        rows = list(split.first_rows(self.cfg.eval_records))
        predictions: list[Any] = []
        examples: list[Any] = []
        for start in range(0, len(rows), self.cfg.eval_batch_size):
            chunk = rows[start : start + self.cfg.eval_batch_size]
            samples = [row_sample(task, row, self.model.image_size) for row in chunk]
            predictions += predict(task, module, self.tokenizer, samples)
            examples += [example for sample in samples for example in sample.examples]
        scores = task.score(predictions, examples)
        shown = [
            {"id": e.id, "text": e.text, "target": e.target, "prediction": p}
            for e, p in list(zip(examples, predictions, strict=True))[:20]
        ]
        if not task.about.similarity:  # vectors mean nothing to a reader
            logger.json(f"predictions/step-{step:06d}.json", shown)
        return scores

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        cfg = self.cfg
        built = cast(ModelConfig, cast(Any, module).backbone.config)  # a task may change it
        model = dataclasses.replace(built, drop_path=0.0, checkpoint_activations="none")
        weights.save(folder, module, model, kind=cfg.task)
        models.add_tokenizer(folder, self.tokenizer)
        notes = {
            "task": cfg.task,
            "labels": list(self.labels),
            "image_size": self.model.image_size,
            "options": tasks.options_of(self.task),
        }
        (folder / TASK_FILE).write_text(json.dumps(notes, indent=1) + "\n")
        return {
            "kind": "finetuned",
            "task": cfg.task,
            "init": cfg.init,
            "text_tokenizer": self.tokenizer.identity,
            **models.provenance(Store(cfg.store), cfg, [cfg.dataset(cfg.train_split)]),
        }


def load_start(module: nn.Module, folder: Path, model: ModelConfig) -> None:
    """Load a bundle's backbone, and by name those of its heads that the module also has.

    Raises:
        ValueError: shapes differ, or part of the backbone is missing.
    """
    tensors = weights.load_tensors(folder)
    own = module.state_dict()
    missing = [k for k in own if k.startswith("backbone.") and k not in tensors]
    if missing:
        names = ", ".join(missing[:5])
        raise ValueError(f"init: the bundle lacks {len(missing)} backbone tensors ({names}, ...)")
    if tensors[_POSITIONS].shape != own[_POSITIONS].shape:
        tensors[_POSITIONS] = interpolate_positions(tensors[_POSITIONS], model.grid, model.grid)
    tensors.pop("passes", None)  # a captioning model's own count of steps
    weights.load_into(module, tensors, partial=True)


def run(cfg: FinetuneConfig, *, parent: str | None = None, tuned: bool = False) -> dict[str, Any]:
    """Finetune; a finished model is skipped, an interrupted run resumed.

    `parent` is the MLflow run to nest under; with `tuned`, evaluations are reported to the Ray Tune
    trial that this is called in.

    Returns the bundle's info: `metrics` of the last evaluation, `steps`, `task`, `mlflow_run`.

    Raises:
        StoreError: the data or the initial model are missing, or the output's name is taken.
        ValueError: the initial model does not fit.
    """
    store = Store(cfg.store)
    source = cfg.like if cfg.init == RANDOM else cfg.init
    with models.opened(store, source) as folder:
        model, _ = weights.load_config(folder)
        tokenizer = models.tokenizer_of(folder)
        start = "" if cfg.init == RANDOM else _digest(store, source)
    models.check_vocabulary(tokenizer, model)
    model = dataclasses.replace(
        model,
        image_size=cfg.image_size or model.image_size,
        drop_path=cfg.drop_path,
        checkpoint_activations=cfg.checkpoint_activations,
    )
    inputs = _commits(store, cfg)
    names = labels(store, cfg.data or cfg.task)
    if cfg.train.workers:
        cluster.start()
    mark = fingerprint(
        "finetune",
        [models.decisive(cfg), dataclasses.asdict(model)],
        [*inputs, start, tokenizer.identity, *names],
    )
    return fit(
        store,
        name=cfg.name or cfg.task,
        output=cfg.output,
        fingerprint=mark,
        recipe=FinetuneRecipe(cfg, model, tokenizer, names),
        config=cfg.train,
        parameters=config.flatten(cfg),
        track=cfg.track,
        parent=parent,
        tuned=tuned,
    )


def _digest(store: Store, name: str) -> str:
    files = store.read_json(f"{name}/_bundle.json")["files"]
    return files[weights.WEIGHTS]["sha256"]


def _commits(store: Store, cfg: FinetuneConfig) -> Sequence[str]:
    """The commits that decide the result; raises what would go wrong later, in training."""
    commit = store.dataset(cfg.dataset(cfg.train_split)).commit()
    if not commit.rows:
        raise StoreError(f"{commit.dataset}: has no records to train on")
    if cfg.eval_split:
        measured = store.dataset(cfg.dataset(cfg.eval_split)).commit()
        if not measured.rows:
            raise StoreError(
                f"eval_split: {measured.dataset} has no records: name another, or none"
            )
    return [commit.identity]


def main() -> None:
    job.main(PRESETS, __doc__, run)


if __name__ == "__main__":
    main()
