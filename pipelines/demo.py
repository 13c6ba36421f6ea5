"""The whole road on a small drawn world: from URL lists to a finetuned, evaluated BEiT-3.

    make demo                    # or: python pipelines/demo.py --root demo

Runs every job of the project, on the engines they always run on, and ends with `report.html`. Run
again, it skips what is finished and goes on with what was interrupted.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import time
import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from beit3.config import PRESETS as MODELS
from beit3.masking import Masking
from beit3.vqkd import PRESETS as TOKENIZERS
from pipelines import (
    cluster,
    config,
    console,
    contrast,
    evaluate,
    finetune,
    ingest,
    prepare_task,
    pretrain,
    tokenize_corpus,
    train_image_tokenizer,
    train_text_tokenizer,
)
from pipelines.sample_world import World, WorldSize, generate, load, serve
from pipelines.samples import ViewConfig
from pipelines.storage import Store

PAIRS = ("cc3m", "cc12m", "sbu", "coco", "vg")
IMAGES = ("imagenet21k",)
TEXTS = ("wiki",)
TASKS = ("vqa", "retrieval", "captioning")
STARTS = {"pretrained": "models/pretrained", "scratch": finetune.RANDOM}
VIEW = ViewConfig(scale=(0.8, 1.0), flip=0.0)  # captions of this world speak of left and right
VOCABULARY = 400


@dataclass(frozen=True)
class DemoConfig:
    """Run the demo."""

    root: Path = Path("demo")
    """Folder for the sample world, the store, MLflow's file and the report."""
    store: str = ""
    """Another store, such as s3://bucket/prefix; by default a folder below root."""
    port: int = 8765
    """Port of the sample world's web server on 127.0.0.1; it stands in every URL of the lists."""
    small: bool = False
    """A few steps on a tiny world: shows that everything runs, learns nothing."""

    @property
    def store_uri(self) -> str:
        return self.store or str((self.root / "store").absolute())


PRESETS = {"demo": DemoConfig()}


def run(cfg: DemoConfig) -> Path:
    """Run every stage; returns the path of the report."""
    from pipelines import demo_report  # here, because it imports every section of the page

    os.environ.setdefault("TQDM_MININTERVAL", "1")
    warnings.filterwarnings("ignore")
    clock = Clock(cfg.root / "stages.json")
    with _quiet(), clock.whole():
        store = Store(cfg.store_uri)
        store.check_writable()
        with clock.stage("1/10 sample world"):
            world = make_world(cfg)
        with clock.stage("2/10 Ray and the tasks' data"):
            cluster.start(cpus=2)
            prepare(cfg, world)
        with clock.stage("3/10 ingestion"), serve(world.root, port=world.port):
            ingest_all(cfg, world)
        with clock.stage("4/10 text tokenizer"):
            train_text_tokenizer.run(text_tokenizer(cfg))
        with clock.stage("5/10 teacher (contrastive)"):
            contrast.run(teacher(cfg))
        with clock.stage("6/10 image tokenizer (VQ-KD)"):
            train_image_tokenizer.run(image_tokenizer(cfg))
        with clock.stage("7/10 tokens"):
            tokenize_corpus.run(tokens(cfg))
        with clock.stage("8/10 pretraining"):
            pretrain.run(pretraining(cfg))
        with clock.stage("9/10 finetuning, evaluation and sweep"):
            for task in TASKS:
                for start in STARTS:
                    finetune.run(finetuning(cfg, task, start))
                    evaluate.run(evaluation(cfg, task, start))
            from tuning import sweep

            sweep.run(sweeping(cfg))
        with clock.stage("10/10 report"):
            path = demo_report.write(cfg, store, world, clock.seconds)
    demo_report.show(cfg, store, path, clock.seconds)
    return path


def make_world(cfg: DemoConfig) -> World:
    """Draw the sample world, or find it drawn."""
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
    """Five pair sources over HTTP, labelled tars, texts; nothing that is tested on gets in."""
    held_out = tuple(
        f"tasks/{task}/{split}"
        for task, splits in {"vqa": ("val",), "captioning": ("val", "test")}.items()
        for split in splits
    )
    common = ingest.IngestConfig(
        store=cfg.store_uri,
        threads=16,
        timeout=2.0,
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


def model(cfg: DemoConfig):
    tiny = MODELS["tiny"]
    vocabulary = 200 if cfg.small else VOCABULARY
    return dataclasses.replace(
        tiny, vocab_size=vocabulary, codebook_size=TOKENIZERS["tiny"].codebook_size
    )


def teacher(cfg: DemoConfig) -> contrast.ContrastConfig:
    base = contrast.PRESETS["tiny"]
    steps = 5 if cfg.small else 250
    return dataclasses.replace(
        base,
        store=cfg.store_uri,
        images=PAIRS,
        model=model(cfg),
        view=VIEW,
        train=dataclasses.replace(
            base.train, steps=steps, warmup=steps // 10, checkpoint_every=100
        ),
    )


def image_tokenizer(cfg: DemoConfig) -> train_image_tokenizer.ImageTokenizerConfig:
    base = train_image_tokenizer.PRESETS["tiny"]
    steps = 5 if cfg.small else 200
    return dataclasses.replace(
        base,
        store=cfg.store_uri,
        images=(*PAIRS, *IMAGES),
        held_out="tasks/captioning/val",
        view=VIEW,
        train=dataclasses.replace(
            base.train, steps=steps, warmup=steps // 10, checkpoint_every=100
        ),
    )


def tokens(cfg: DemoConfig) -> tokenize_corpus.TokenizeConfig:
    return tokenize_corpus.TokenizeConfig(
        store=cfg.store_uri,
        images=(*PAIRS, *IMAGES),
        texts=TEXTS,
        views=2,
        view=VIEW,
        max_text_length=64,
        max_caption_length=48,
    )


def pretraining(cfg: DemoConfig) -> pretrain.PretrainConfig:
    base = pretrain.PRESETS["tiny"]
    steps = 6 if cfg.small else 1200
    return dataclasses.replace(
        base,
        store=cfg.store_uri,
        images=IMAGES,
        texts=TEXTS,
        pairs=PAIRS,
        model=model(cfg),
        image_batch=8,
        text_batch=8,
        pair_batch=48,
        masking=Masking(min_block=4, pair_text_share=0.75),
        train=dataclasses.replace(
            base.train,
            steps=steps,
            warmup=steps // 20,
            learning_rate=3e-3,
            workers=2,
            checkpoint_every=3 if cfg.small else 200,
        ),
    )


def finetuning(cfg: DemoConfig, task: str, start: str) -> finetune.FinetuneConfig:
    base = finetune.preset("tiny", task)
    steps = {"vqa": 200, "retrieval": 150, "captioning": 200}[task]
    steps = 4 if cfg.small else steps
    return dataclasses.replace(
        base,
        store=cfg.store_uri,
        init=STARTS[start],
        like="models/pretrained" if start == "scratch" else "",
        name=f"{task}-{start}",
        view=VIEW,
        eval_split="",
        train=dataclasses.replace(base.train, steps=steps, warmup=steps // 10, learning_rate=2e-3),
    )


def evaluation(cfg: DemoConfig, task: str, start: str) -> evaluate.EvaluateConfig:
    split = "val" if task == "vqa" else "test"
    return evaluate.EvaluateConfig(
        store=cfg.store_uri,
        model=f"models/{task}-{start}",
        data=f"tasks/{task}/{split}",
        name=f"{task}-{start}",
        batch_size=64,
        in_process=True,
    )


def sweeping(cfg: DemoConfig):
    from tuning import sweep

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


class Clock:
    """Times the stages, over interrupted runs too: a stage's seconds add up."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.seconds: dict[str, float] = {}
        with contextlib.suppress(OSError, ValueError):
            self.seconds = json.loads(file.read_text())

    @contextlib.contextmanager
    def stage(self, title: str) -> Iterator[None]:
        start = time.monotonic()
        with console.stage(title):
            yield
        self._add(title, time.monotonic() - start)

    @contextlib.contextmanager
    def whole(self) -> Iterator[None]:
        start = time.monotonic()
        yield
        self._add("total", time.monotonic() - start)

    def _add(self, title: str, seconds: float) -> None:
        self.seconds[title] = self.seconds.get(title, 0.0) + seconds
        self.file.parent.mkdir(parents=True, exist_ok=True)
        self.file.write_text(json.dumps(self.seconds, indent=1))


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Keep the engines' chatter off the console; BEIT3_RAY_LOGS=1 lets it through."""
    import logging

    if not os.environ.get("BEIT3_RAY_LOGS"):
        logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(logging.NOTSET)


def main() -> None:
    run(config.cli(PRESETS, description=__doc__ or ""))


if __name__ == "__main__":
    main()
