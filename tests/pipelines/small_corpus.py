"""A corpus of a few pictures and texts, and the smallest configuration of each job for it."""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, ImageDraw

from beit3.config import PRESETS as MODELS
from beit3.masking import Masking
from beit3.vqkd import PRESETS as TOKENIZERS
from pipelines.contrast import ContrastConfig
from pipelines.dataset import Commit, Dataset
from pipelines.ingest import IMAGE_SCHEMA, TEXT_SCHEMA
from pipelines.lineage import fingerprint
from pipelines.pretrain_config import PretrainConfig
from pipelines.recipe import TrainConfig
from pipelines.samples import ViewConfig
from pipelines.storage import Store
from pipelines.task_data import SCHEMA as TASK_SCHEMA
from pipelines.tokenize_corpus import TokenizeConfig
from pipelines.train_image_tokenizer import ImageTokenizerConfig
from pipelines.train_text_tokenizer import TextTokenizerConfig

SIZE, PATCH, VOCABULARY, CODES = 24, 8, 38, 24
BROKEN = "alone/000005"
SHAPE = replace(
    MODELS["tiny"], layers=2, hidden=32, mlp=64, heads=2, image_size=SIZE, patch_size=PATCH,
    vocab_size=VOCABULARY, max_text_length=32, codebook_size=CODES,
)  # fmt: skip
WORDS = replace(
    TOKENIZERS["tiny"], image_size=SIZE, patch_size=PATCH, hidden=32, mlp=64, heads=2,
    encoder_layers=1, codebook_size=CODES, code_dim=8, teacher_dim=32,
)  # fmt: skip
VIEW = ViewConfig(scale=(0.4, 1.0), flip=0.5)
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
FORMS = ("circle", "square", "bar")
CAPTIONS = [
    f"a {size} {one} {form} {where} the {other} {second}"
    for size, one, form, where, other, second in itertools.product(
        ("small", "large"), COLOURS, FORMS, ("above", "beside", "below"), COLOURS, FORMS
    )
]


def picture(number: int) -> bytes:
    """A drawn JPEG; another one for every number."""
    rng = np.random.default_rng(number)
    colours = [COLOURS[int(i)] for i in rng.integers(len(COLOURS), size=2)]
    image = Image.new("RGB", (int(rng.integers(30, 50)), int(rng.integers(30, 50))), colours[0])
    left, top = (int(v) for v in rng.integers(2, 14, size=2))
    ImageDraw.Draw(image).ellipse((left, top, left + 12, top + 14), colours[1])
    noisy = np.asarray(image).astype(int) + rng.integers(-20, 20, (*image.size[::-1], 3))
    out = io.BytesIO()
    Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=90)
    return out.getvalue()


def image_rows(name: str, start: int, count: int, *, captions: int) -> list[dict[str, Any]]:
    rows = []
    for number in range(start, start + count):
        key = f"{name}/{number:06d}"
        data = b"\xff\xd8 no picture" if key == BROKEN else picture(len(name) * 1000 + number)
        said = [CAPTIONS[(number * 37 + i * 11) % len(CAPTIONS)] for i in range(captions)]
        rows.append(
            {"id": key, "image": {"bytes": data, "path": None}, "captions": said, "source": name}
        )
    return rows


def text_rows(count: int) -> list[dict[str, Any]]:
    """Documents of one to five sentences: some are longer than a model's text."""
    return [
        {
            "id": f"words/{number:06d}",
            "text": ". ".join(CAPTIONS[(number * 53 + i) % len(CAPTIONS)] for i in range(n)),
            "source": "words",
        }
        for number, n in ((number, 1 + number % 5) for number in range(count))
    ]


def task_rows(count: int) -> list[dict[str, Any]]:
    """A prepared captioning split."""
    rows = []
    for number in range(count):
        said = [CAPTIONS[(number * 71 + i * 5) % len(CAPTIONS)] for i in range(2)]
        example = {"id": str(number), "text": None, "target": json.dumps(said)}
        image = {"bytes": picture(90_000 + number), "path": f"{number}.jpg"}
        rows.append({"id": str(number), "images": [image], "examples": [example]})
    return rows


def publish(
    store: Store, name: str, schema: pa.Schema, *parts: list[dict[str, Any]], **config: Any
) -> Commit:
    """Commit a dataset of these rows, a file for each list, as if a job so configured made it."""
    dataset, mark = store.dataset(name), fingerprint("made by hand", name)
    records = [
        dataset.write_part(mark, f"{i:05d}", pa.Table.from_pylist(rows, schema))
        for i, rows in enumerate(parts)
    ]
    return dataset.publish(mark, records, job="by hand", schema=schema, stats={}, config=config)


def publish_sources(store: Store) -> None:
    """Pairs in two files, pictures alone with a broken one among them, texts, a held-out split."""
    pairs = [image_rows("pairs", start, n, captions=2) for start, n in ((0, 20), (20, 14))]
    publish(store, "images/pairs", IMAGE_SCHEMA, *pairs)
    publish(store, "images/alone", IMAGE_SCHEMA, image_rows("alone", 0, 15, captions=0))
    publish(store, "text/words", TEXT_SCHEMA, text_rows(25))
    publish(store, "tasks/captioning/val", TASK_SCHEMA, task_rows(9), task="captioning")


def republished(
    store: Store,
    name: str,
    change: Callable[[dict[str, Any]], None],
    *,
    rows: Callable[[pa.Table], pa.Table] = lambda table: table,
) -> Dataset:
    """The first file of `tokens/pairs` as another dataset, whose lineage and rows are changed."""
    made = store.dataset("tokens/pairs")
    commit, dataset = made.commit(), store.dataset(f"tokens/{name}")
    table = rows(pq.read_table(made.paths()[0], filesystem=store.fs))
    origin = dict(commit.lineage["inputs"][0])
    origin["tokenizers"] = {kind: dict(v) for kind, v in origin["tokenizers"].items()}
    change(origin["tokenizers"])
    mark = fingerprint("republished", name)
    dataset.publish(
        mark, [dataset.write_part(mark, "00000", table)], job="by hand", schema=table.schema,
        stats={}, config=commit.lineage["config"], inputs=[origin],
    )  # fmt: skip
    return dataset


# -- the jobs --------------------------------------------------------------------------------------


def train_config(**changes: Any) -> TrainConfig:
    start = TrainConfig(
        steps=4, warmup=1, learning_rate=1e-3, workers=0, log_every=1, checkpoint_every=0,
        max_failures=0,
    )  # fmt: skip
    return replace(start, **changes)


def text_tokenizer(store: Store, **changes: Any) -> TextTokenizerConfig:
    start = TextTokenizerConfig(
        store=store.uri, texts=("words",), images=("pairs",), vocab_size=VOCABULARY,
        character_coverage=1.0, threads=1,
    )  # fmt: skip
    return replace(start, **changes)


def teacher(store: Store, **changes: Any) -> ContrastConfig:
    start = ContrastConfig(
        store=store.uri, name="teacher", images=("pairs",), model=SHAPE, batch_size=8,
        max_text_length=24, view=VIEW, train=train_config(),
    )  # fmt: skip
    return replace(start, **changes)


def image_tokenizer(store: Store, **changes: Any) -> ImageTokenizerConfig:
    start = ImageTokenizerConfig(
        store=store.uri, images=("pairs",), held_out="tasks/captioning/val", tokenizer=WORDS,
        batch_size=8, view=VIEW, evaluate_images=9, train=train_config(),
    )  # fmt: skip
    return replace(start, **changes)


def tokens(store: Store, **changes: Any) -> TokenizeConfig:
    start = TokenizeConfig(
        store=store.uri, images=("pairs", "alone"), texts=("words",), held_out=("captioning/val",),
        views=2, view=VIEW, max_text_length=24, max_caption_length=16, batch_size=12,
    )  # fmt: skip
    return replace(start, **changes)


def pretraining(store: Store, **changes: Any) -> PretrainConfig:
    """Six steps; `train` holds changes of its TrainConfig."""
    train = {"steps": 6, "checkpoint_every": 2, **changes.pop("train", {})}
    start = PretrainConfig(
        store=store.uri, images=("alone",), texts=("words",), pairs=("pairs",), image_batch=4,
        text_batch=4, pair_batch=8, held_out="captioning/val", held_out_batches=1, model=SHAPE,
        held_out_ranked=4, masking=Masking(min_block=1),
    )  # fmt: skip
    if not changes.get("held_out", start.held_out):
        changes["held_out_ranked"] = 0
    return replace(start, train=train_config(**train), **changes)
