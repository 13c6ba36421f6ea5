"""The demo's configuration of each job: small enough for two CPU cores, otherwise ordinary."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from functools import partial
from typing import TYPE_CHECKING, Any

from beit3 import tasks
from beit3.config import PRESETS as MODELS
from beit3.config import ModelConfig
from beit3.vqkd import PRESETS as TOKENIZERS
from pipelines import (
    console,
    contrast,
    evaluate,
    finetune,
    ingest,
    prepare_task,
    pretrain_config,
    tokenize_corpus,
    train_image_tokenizer,
    train_text_tokenizer,
)
from pipelines.sample_world import World, WorldSize, generate, load
from pipelines.samples import ViewConfig
from pipelines.side_by_side import side_by_side, steps_of
from pipelines.storage import Store
from tuning import sweep

if TYPE_CHECKING:
    from pipelines.demo import DemoConfig

PAIRS = ("cc3m", "cc12m", "sbu", "coco", "vg")
IMAGES = ("imagenet21k",)
TEXTS = ("wiki",)
TASKS = ("vqa", "retrieval", "captioning")
ALIGNED = "models/aligned"
STARTS = {"pretrained": "models/pretrained", "scratch": finetune.RANDOM}
HELD_OUT = "captioning/val"  # what pretraining is measured on
VIEW = ViewConfig(scale=(0.8, 1.0), flip=0.0)  # no flips: captions here mention left and right
VOCABULARY = 320


def make_world(cfg: DemoConfig) -> World:
    """Draw the sample world, or load it if it is there already."""
    root = cfg.root / "world"
    url = f"http://127.0.0.1:{cfg.port}"
    with contextlib.suppress(FileNotFoundError):
        world = load(root)
        console.say("sample world: already there, skipped")
        return world
    size = WorldSize.tiny() if cfg.small else WorldSize()
    with console.bar("sample world", total=1, unit="picture") as bar:

        def progress(done: int, total: int) -> None:
            bar.total = total
            bar.update(done - bar.n)

        return generate(root, size=size, base_url=url, progress=progress)


def prepare(cfg: DemoConfig, world: World) -> None:
    """The tasks' published files and images, as committed datasets."""
    folders = {"vqa": "vqa", "retrieval": "coco", "captioning": "coco"}
    splits = {"vqa": ("train", "val")}
    for task, folder in folders.items():
        prepare_task.run(
            prepare_task.PrepareConfig(
                task=task,
                annotations=str(world.annotations(folder)),
                images=str(world.images("coco")),
                store=cfg.store_uri,
                splits=splits.get(task, ("train", "val", "test")),
                min_answer_count=1 if cfg.small else 9,
                short_side=160,
                in_process=True,
            )
        )


def ingest_all(cfg: DemoConfig, world: World) -> None:
    """Ingest five pair sources over HTTP, labelled tars, and texts, without any test pictures."""
    held_out = tuple(
        f"tasks/{task}/{split}"
        for task, splits in {"vqa": ("val",), "captioning": ("val", "test")}.items()
        for split in splits
    )
    common = ingest.IngestConfig(
        store=cfg.store_uri,
        threads=16,
        timeout=5.0,
        retries=0,
        shard_size=250,
        short_side=128,
        allow_loopback=True,
        held_out=held_out,
    )
    folders = {name: name for name in PAIRS} | {"imagenet21k": "imagenet"}
    for source, folder in folders.items():
        where = str(world.annotations(folder))
        ingest.run(dataclasses.replace(common, source=source, annotations=where))
    texts = dataclasses.replace(
        common,
        source="text_files",
        name=TEXTS[0],
        annotations=str(world.annotations("text")),
        held_out=(),
    )
    ingest.run(texts)


def text_tokenizer(cfg: DemoConfig) -> train_text_tokenizer.TextTokenizerConfig:
    return train_text_tokenizer.TextTokenizerConfig(
        store=cfg.store_uri,
        texts=TEXTS,
        images=PAIRS,
        vocab_size=200 if cfg.small else VOCABULARY,
        character_coverage=1.0,
    )


def model(cfg: DemoConfig) -> ModelConfig:
    tiny = MODELS["tiny"]
    vocabulary = 200 if cfg.small else VOCABULARY
    return dataclasses.replace(
        tiny, vocab_size=vocabulary, codebook_size=TOKENIZERS["tiny"].codebook_size
    )


def teacher(cfg: DemoConfig) -> contrast.ContrastConfig:
    base = contrast.PRESETS["tiny"]
    steps = 5 if cfg.small else base.train.steps
    return dataclasses.replace(
        base,
        store=cfg.store_uri,
        images=PAIRS,
        held_out=f"tasks/{HELD_OUT}",
        model=model(cfg),
        view=VIEW,
        train=dataclasses.replace(
            base.train, steps=steps, warmup=steps // 10, checkpoint_every=100
        ),
    )


def image_tokenizer(cfg: DemoConfig) -> train_image_tokenizer.ImageTokenizerConfig:
    base = train_image_tokenizer.PRESETS["tiny"]
    steps = 5 if cfg.small else base.train.steps
    return dataclasses.replace(
        base,
        store=cfg.store_uri,
        images=(*PAIRS, *IMAGES),
        held_out="tasks/captioning/val",
        view=VIEW,
        train=dataclasses.replace(
            base.train,
            steps=steps,
            warmup=steps // 10,
            learning_rate=2e-3,
            checkpoint_every=100,
        ),
    )


def tokens(cfg: DemoConfig) -> tokenize_corpus.TokenizeConfig:
    return tokenize_corpus.TokenizeConfig(
        store=cfg.store_uri,
        images=(*PAIRS, *IMAGES),
        texts=TEXTS,
        held_out=(HELD_OUT,),
        views=2,
        view=VIEW,
        max_text_length=64,
        max_caption_length=48,
    )


def pretraining(cfg: DemoConfig) -> pretrain_config.PretrainConfig:
    base = pretrain_config.PRESETS["tiny"]
    steps = 6 if cfg.small else 2000
    return dataclasses.replace(
        base,
        store=cfg.store_uri,
        images=IMAGES,
        texts=TEXTS,
        pairs=PAIRS,
        held_out=HELD_OUT,
        model=model(cfg),
        image_batch=8,
        text_batch=8,
        pair_batch=48,
        train=dataclasses.replace(
            base.train,
            steps=steps,
            warmup=steps // 20,
            learning_rate=4e-3,
            workers=0 if cfg.small else 2,
            checkpoint_every=3 if cfg.small else 200,
        ),
    )


def aligning(cfg: DemoConfig) -> contrast.ContrastConfig:
    """The paper's stage between pretraining and retrieval (appendix A), on the same pairs."""
    base = teacher(cfg)
    steps = 5 if cfg.small else 300
    return dataclasses.replace(
        base,
        name="aligned",
        init="models/pretrained",
        train=dataclasses.replace(base.train, steps=steps, warmup=steps // 10),
    )


def finetuning(cfg: DemoConfig, task: str, start: str) -> finetune.FinetuneConfig:
    base = finetune.preset("tiny", task)
    steps = {"vqa": 250, "retrieval": 150, "captioning": 200}[task]
    steps = 4 if cfg.small else steps
    return dataclasses.replace(
        base,
        store=cfg.store_uri,
        init=ALIGNED if (task, start) == ("retrieval", "pretrained") else STARTS[start],
        like="models/pretrained" if start == "scratch" else "",
        name=f"{task}-{start}",
        view=VIEW,
        eval_split="",
        train=dataclasses.replace(base.train, steps=steps, warmup=steps // 10, learning_rate=2e-3),
    )


def evaluation(cfg: DemoConfig, task: str, start: str) -> evaluate.EvaluateConfig:
    return evaluate.EvaluateConfig(
        store=cfg.store_uri,
        model=f"models/{task}-{start}",
        data=f"tasks/{task}/{tasks.load(task).about.test_split}",
        name=f"{task}-{start}",
        batch_size=64,
        in_process=True,
    )


def finetune_all(cfg: DemoConfig) -> None:
    """Finetune and evaluate each task from each start; one at a time per CPU, in parallel."""
    store = Store(cfg.store_uri)
    trainings = {}
    for run in itertools.product(TASKS, STARTS):
        if store.exists(f"scores/{evaluation(cfg, *run).output}.json"):
            _finetune(cfg, run)  # in this process, so that it can report that it was skipped
        else:
            trainings[run] = steps_of([finetuning(cfg, *run)])
    with side_by_side(partial(_finetune, cfg), trainings, cpus=1, store=store) as results:
        for scores in results:
            shown = ", ".join(f"{k} {v:.3f}" for k, v in scores["metrics"].items())
            console.say(f"{scores['model']} on {scores['data']}: {shown}")


def _finetune(cfg: DemoConfig, run: tuple[str, str]) -> dict[str, Any]:
    finetune.run(finetuning(cfg, *run))
    return evaluate.run(evaluation(cfg, *run))


def sweeping(cfg: DemoConfig) -> sweep.SweepConfig:
    base = sweep.PRESETS["tiny"]
    steps = 4 if cfg.small else 60
    tuned = finetuning(cfg, "retrieval", "pretrained")
    return dataclasses.replace(
        base,
        name="retrieval",
        samples=2 if cfg.small else 4,
        finetune=dataclasses.replace(
            tuned,
            eval_split="val",
            eval_records=64,
            train=dataclasses.replace(
                tuned.train,
                steps=steps,
                warmup=steps // 10,
                evaluate_every=steps // 3 or 1,
                threads=1,
            ),
        ),
    )
