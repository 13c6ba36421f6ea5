"""Tokenizes a corpus: images to visual words, captions and texts to ids, in Parquet.

    python pipelines/tokenize_corpus.py --store store --images cc3m cc12m --texts wiki --views 4

For each image, `views` views (crop, flip, colours) are drawn and stored with their visual words, so
that pretraining replays exactly what was tokenized. A part of `tokens/<name>` belongs to the part
of the same number in its source, which holds the pictures; `image_row` says which row.
The same commit, tokenizers and seed give the same bytes, whatever the number of workers. (Another
batch size or device rounds differently and may choose the other of two equally near codes.)

With `--in-step` the words are left to pretraining, which computes the same ones
(`pipelines/words_in_step.py`).

A worker's threads decode pictures while it encodes earlier ones, and it holds the pixels of a few
batches at most, however large the part is.
"""

from __future__ import annotations

import ctypes
import functools
import zlib
from collections import deque
from collections.abc import Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from beit3.config import Precision
from beit3.text import TextTokenizer
from beit3.transforms import View, apply_view, decode
from beit3.vqkd import VQKD, batch_that_fits
from pipelines import (
    bundles,
    cluster,
    config,
    job,
)
from pipelines.config import indifferent, later
from pipelines.dataset import Commit
from pipelines.lineage import fingerprint
from pipelines.parts import PartOutput, Resources, make_dataset
from pipelines.samples import ViewConfig, picture_of
from pipelines.storage import Store
from pipelines.task_data import captions_of, check_captions
from pipelines.tokenizers import image_tokenizer_shape, load_image_tokenizer, load_text_tokenizer

AHEAD = 2  # batches that are decoded while one is encoded
PICTURES, DOCUMENTS = 32, 256  # rows read at once
GATHERED = 1024  # rows whose tokens are held as Python objects


def image_tokens(patches: int, *, jitter: bool = False) -> pa.Schema:
    """Columns of a tokenized image dataset; a view's words are a list of fixed size. With 0 patches
    there are no words: the training step computes them. Without `jitter`, colours don't vary."""
    colours = [("jitter", pa.list_(pa.float32(), 3))] if jitter else []
    words = [("words", pa.list_(pa.uint16(), patches))] if patches else []
    view = pa.struct([("box", pa.list_(pa.float64(), 4)), ("flip", pa.bool_()), *colours, *words])
    return pa.schema(
        [
            ("id", pa.string()),
            ("image_row", pa.int32()),
            ("views", pa.list_(view)),
            ("captions", pa.list_(pa.list_(pa.int32()))),
        ]
    )


def stored_view(row: Mapping[str, Any]) -> View:
    """The view in an element of the column `views`."""
    jitter = row.get("jitter")
    return View(tuple(row["box"]), row["flip"], None if jitter is None else tuple(jitter))


TEXT_TOKENS = pa.schema([("id", pa.string()), ("ids", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class TokenizeConfig:
    """Turn committed images and texts into tokens."""

    store: str = indifferent("store")
    """Where datasets and tokenizers live: a folder or an s3:// URI."""
    images: tuple[str, ...] = indifferent(())
    """Image datasets (`images/<name>`), each becoming `tokens/<name>`."""
    texts: tuple[str, ...] = indifferent(())
    """Text datasets (`text/<name>`), each becoming `tokens/<name>`."""
    held_out: tuple[str, ...] = indifferent(())
    """Prepared splits of captioning or retrieval (`tasks/<name>`, such as captioning/val), each
    becoming `tokens/<name>`: pairs that pretraining is measured on, never trained on."""
    image_tokenizer: str = "vqkd"
    """`tokenizers/image/<name>`."""
    text_tokenizer: str = "sentencepiece"
    """`tokenizers/text/<name>`."""
    views: int = 4
    """Views per image; epochs cycle through them."""
    view: ViewConfig = field(default_factory=ViewConfig)
    in_step: bool = later(False)
    """Store the views without visual words: each training step computes them, with the same image
    tokenizer. Then no GPU is needed here, and views cost next to nothing, but training pays each
    time it sees one."""
    precision: Precision = later("fp32")
    """Precision of the image tokenizer, also in a training step. On GPUs, bf16 uses the tensor
    cores; some words then change, to codes that are about as near:
    `pipelines/check_tokenizer.py` says how many."""
    max_text_length: int = 512
    """Maximum tokens per piece of a text, including `<s>` and `</s>`; longer texts become several
    pieces."""
    max_caption_length: int = 64
    batch_size: int = indifferent(64)
    """Views encoded at once; 0: as many as fit into the device's memory."""
    seed: int = 0
    actors: int = indifferent(0)
    """Size of the actor pool that encodes images; 0: plain tasks on CPUs."""
    gpus_per_actor: float = indifferent(0.0)
    cpus_per_actor: float = indifferent(1.0)
    """CPUs per actor; it decodes pictures in this many threads while it encodes others."""

    def __post_init__(self) -> None:
        if not (self.images or self.texts or self.held_out):
            raise ValueError("images, texts: name at least one dataset to tokenize")
        if self.views < 1:
            raise ValueError(f"views: expected at least 1, got {self.views}")
        for name in ("max_text_length", "max_caption_length"):
            if getattr(self, name) < 3:
                raise ValueError(
                    f"{name}: expected at least 3, <s>, a token and </s>, got {getattr(self, name)}"
                )
        if self.batch_size < 0:
            raise ValueError(f"batch_size: expected 0 or more, got {self.batch_size}")
        if self.cpus_per_actor <= 0:
            raise ValueError(f"cpus_per_actor: expected more than 0, got {self.cpus_per_actor}")
        if self.in_step and self.gpus_per_actor:
            raise ValueError("gpus_per_actor: with in_step nothing is encoded here; set 0")
        if (self.gpus_per_actor or self.cpus_per_actor > 1) and not self.actors:
            raise ValueError("gpus_per_actor and cpus_per_actor need actors of at least 1")


PRESETS = {
    "default": TokenizeConfig(images=("cc3m",)),
    "gpu": TokenizeConfig(
        images=("cc3m",),
        view=ViewConfig(jitter=0.4),
        precision="bf16",
        actors=4,
        gpus_per_actor=1,
        cpus_per_actor=8,
        batch_size=0,
    ),
}


def run(cfg: TokenizeConfig) -> list[Commit]:
    """Tokenize every dataset that is not tokenized yet.

    Raises:
        StoreError: a dataset or tokenizer is missing or half written.
        ValueError: the image tokenizer has more codes than uint16 can name.
    """
    store = Store(cfg.store)
    text_tokenizer = load_text_tokenizer(store, cfg.text_tokenizer)
    tokenizers, patches = {}, 0
    if cfg.images or cfg.held_out:  # texts can be tokenized while the image tokenizer trains
        identity = bundles.identity(store, f"tokenizers/image/{cfg.image_tokenizer}")
        tokenizers["image"] = {"name": cfg.image_tokenizer, "identity": identity}
        patches = image_tokenizer_shape(store, cfg.image_tokenizer).patches
    tokenizers["text"] = {"name": cfg.text_tokenizer, "identity": text_tokenizer.identity}
    cluster.start()
    kinds = {"images": cfg.images, "tasks": cfg.held_out, "text": cfg.texts}
    return [
        _tokenize(cfg, store, f"{kind}/{name}", name, tokenizers, patches)
        for kind, names in kinds.items()
        for name in names
    ]


def _tokenize(
    cfg: TokenizeConfig,
    store: Store,
    source: str,
    name: str,
    tokenizers: dict[str, Any],
    patches: int,
) -> Commit:
    is_text, is_task = source.startswith("text/"), source.startswith("tasks/")
    dataset = store.dataset(source)
    commit = check_captions(dataset, "held_out") if is_task else dataset.commit()
    options = config.decisive(cfg)
    used = {"text": tokenizers["text"]} if is_text else tokenizers

    def units() -> list[dict[str, Any]]:
        return [
            {"name": file.path.split("/")[-1].removeprefix("part-").removesuffix(".parquet")}
            | {"path": file.path}
            for file in commit.files
        ]

    worker = functools.partial(TextPart if is_text else ImagePart, cfg, source)
    pool = Resources(cfg.actors, cfg.cpus_per_actor, cfg.gpus_per_actor)
    return make_dataset(
        store.dataset(f"tokens/{name}"),
        job="tokenize_corpus",
        fingerprint=fingerprint("tokenize_corpus", options, [commit.identity, str(used)]),
        config=config.to_dict(cfg),
        inputs=[{"dataset": source, "identity": commit.identity, "tokenizers": used}],
        units=units,
        make_worker=worker,
        schema=TEXT_TOKENS if is_text else _schema(cfg, patches),
        resources=pool if cfg.actors and not is_text else Resources(),
    )


def _schema(cfg: TokenizeConfig, patches: int) -> pa.Schema:
    return image_tokens(0 if cfg.in_step else patches, jitter=cfg.view.jitter > 0)


@functools.cache
def _image_tokenizer(uri: str, name: str, device: str) -> VQKD:
    """An image tokenizer, loaded once per process, which outlives its tasks."""
    if device == "cpu":
        torch.set_num_threads(1)  # there is a task per CPU
    return load_image_tokenizer(Store(uri), name)[0].to(device)


@functools.cache
def _text_tokenizer(uri: str, name: str) -> TextTokenizer:
    return load_text_tokenizer(Store(uri), name)


@dataclass
class _Picture:
    """A picture's row in its part, its views and their pixels; `broken` says why there are none."""

    number: int
    id: str
    captions: list[str]
    views: list[View] = field(default_factory=list)
    pixels: list[np.ndarray] = field(default_factory=list)
    broken: str = ""


@dataclass
class _Columns:
    """The tokens of a part so far, without pixels."""

    schema: pa.Schema
    ids: list[str] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    views: list[View] = field(default_factory=list)
    words: list[np.ndarray] = field(default_factory=list)
    captions: list[list[list[int]]] = field(default_factory=list)

    def clear(self) -> None:
        for rows in (self.ids, self.rows, self.views, self.words, self.captions):
            rows.clear()

    def table(self) -> pa.Table:
        views_type = self.schema.field("views").type
        view = views_type.value_type
        boxes = pa.array([list(v.box) for v in self.views], view.field("box").type)
        columns = [boxes, pa.array([v.flip for v in self.views], pa.bool_())]
        if view.get_field_index("jitter") >= 0:
            columns.append(pa.array([v.jitter for v in self.views], view.field("jitter").type))
        if view.get_field_index("words") >= 0:
            words = np.concatenate([np.zeros(0, np.uint16), *(w.ravel() for w in self.words)])
            patches = view.field("words").type.list_size
            columns.append(pa.FixedSizeListArray.from_arrays(pa.array(words), patches))
        views = pa.StructArray.from_arrays(columns, fields=list(view))
        each = len(self.views) // max(1, len(self.rows))
        starts = pa.array(np.arange(len(self.rows) + 1) * each, pa.int32())
        columns = [
            pa.array(self.ids, pa.string()),
            pa.array(self.rows, pa.int32()),
            pa.ListArray.from_arrays(starts, views).cast(views_type),
            pa.array(self.captions, self.schema.field("captions").type),
        ]
        return pa.Table.from_arrays(columns, schema=self.schema)


class ImagePart:
    """Tokenizes one file of an image dataset."""

    def __init__(self, cfg: TokenizeConfig, source: str) -> None:
        self.cfg, self.store = cfg, Store(cfg.store)
        self.dataset = self.store.dataset(source)
        self.device = cluster.device(cfg.gpus_per_actor)
        self.texts = _text_tokenizer(cfg.store, cfg.text_tokenizer)
        self.shape = image_tokenizer_shape(self.store, cfg.image_tokenizer)
        self.batch = cfg.batch_size or PICTURES
        if not cfg.in_step:
            self.images = _image_tokenizer(cfg.store, cfg.image_tokenizer, self.device)
            share = min(1.0, cfg.gpus_per_actor) if cfg.gpus_per_actor else 1.0
            self.batch = cfg.batch_size or batch_that_fits(
                self.images, share, precision=cfg.precision
            )

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        columns, aside = _Columns(_schema(self.cfg, self.shape.patches)), []
        tables = [columns.table()]  # in Arrow, tokens take a sixth of the memory
        counts = np.zeros(self.shape.codebook_size, np.int64)
        batch: list[_Picture] = []

        def encode() -> None:
            pixels = [view for picture in batch for view in picture.pixels]
            for start in range(0, len(pixels), self.batch):
                words = self._encode(pixels[start : start + self.batch])
                counts[:] += np.bincount(words.ravel(), minlength=len(counts))
                columns.words.append(words)
            batch.clear()
            if len(columns.ids) >= GATHERED:
                tables.append(columns.table())
                columns.clear()
                _give_back_memory()

        for picture in self._pictures(unit):
            if picture.broken:
                reason = {"reason": "does not decode", "detail": picture.broken}
                aside.append({"id": picture.id} | reason)
                continue
            columns.ids.append(picture.id)
            columns.rows.append(picture.number)
            columns.views += picture.views
            columns.captions.append(self._captions(picture.captions))
            batch.append(picture)
            if len(batch) * self.cfg.views >= self.batch:
                encode()
        encode()
        table = pa.concat_tables([*tables, columns.table()])
        return PartOutput(
            table,
            aside,
            {
                "rows": table.num_rows,
                "set_aside": {"does not decode": len(aside)} if aside else {},
                "words": {str(i): n for i, n in enumerate(counts.tolist()) if n},
            },
        )

    def _pictures(self, unit: dict[str, Any]) -> Iterator[_Picture]:
        """A part's pictures in order, decoded ahead."""
        ahead = AHEAD * max(1, self.batch // self.cfg.views)
        waiting: deque[Future[_Picture]] = deque()
        with ThreadPoolExecutor(max(1, round(self.cfg.cpus_per_actor))) as threads:
            for number, row in enumerate(self._rows(unit["path"])):
                waiting.append(threads.submit(self._decode, unit["name"], number, row))
                if len(waiting) > ahead:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()

    def _rows(self, path: str) -> Iterator[dict[str, Any]]:
        columns = ["id", "image", "captions", "images", "examples"]
        for batch in self.dataset.batches(path, PICTURES, columns=columns):
            yield from map(_as_pair, batch.to_pylist())

    def _decode(self, part: str, number: int, row: dict[str, Any]) -> _Picture:
        """Decode a picture and draw its views, as a function of the seed, its part and its row."""
        picture = _Picture(number, row["id"], row["captions"])
        try:
            image = decode(row["data"])
        except OSError as error:
            picture.broken = str(error)
            return picture
        rng = np.random.default_rng((self.cfg.seed, _number(part), number))
        picture.views = [self.cfg.view.draw(image, rng) for _ in range(self.cfg.views)]
        if not self.cfg.in_step:
            size = self.shape.image_size
            picture.pixels = [apply_view(image, view, size) for view in picture.views]
        return picture

    def _encode(self, pixels: list[np.ndarray]) -> np.ndarray:
        """Visual words `[views, patches]`."""
        images = torch.from_numpy(np.stack(pixels)).to(self.device)
        return self.images.encode(images, self.cfg.precision).cpu().numpy().astype(np.uint16)

    def _captions(self, captions: list[str]) -> list[list[int]]:
        ids = self.texts.encode_batch(captions) if captions else []
        return [self.texts.wrap(caption, self.cfg.max_caption_length) for caption in ids]


def _give_back_memory() -> None:
    """Free memory that the C library retains: with many pictures of different sizes, fragmentation
    would grow with the part."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc has it
    if trim is not None:
        trim(0)


def _number(part: str) -> int:
    """The number that seeds a part's random numbers."""
    return int(part) if part.isdecimal() else zlib.crc32(part.encode())


def _as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Id, picture and captions of a row of `images/*`, or of a prepared split with captions."""
    return {"id": row["id"], "data": picture_of(row), "captions": captions_of(row)}


class TextPart:
    """Tokenizes one file of a text dataset; long texts are cut into pieces."""

    def __init__(self, cfg: TokenizeConfig, source: str) -> None:
        self.cfg, self.store = cfg, Store(cfg.store)
        self.dataset = self.store.dataset(source)
        self.texts = _text_tokenizer(cfg.store, cfg.text_tokenizer)

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        pieces, documents, tokens = [TEXT_TOKENS.empty_table()], 0, 0
        columns = ["id", "text"]
        for batch in self.dataset.batches(unit["path"], DOCUMENTS, columns=columns):
            made = self._cut(batch)
            pieces.append(made)
            documents += batch.num_rows
            tokens += len(made["ids"].chunk(0).values)
        table = pa.concat_tables(pieces)
        stats = {"rows": table.num_rows, "documents": documents, "tokens": tokens}
        return PartOutput(table, stats=stats)

    def _cut(self, batch: pa.RecordBatch) -> pa.Table:
        """The pieces of some documents."""
        texts = batch["text"].to_pylist()
        ids, lengths, counts = self.texts.encode_cut(texts, self.cfg.max_text_length)
        documents = batch["id"].to_pylist()
        names = [
            f"{document}#{number}"
            for document, count in zip(documents, counts.tolist(), strict=True)
            for number in range(count)
        ]
        starts = pa.array(np.concatenate([[0], np.cumsum(lengths)]), pa.int32())
        pieces = pa.ListArray.from_arrays(starts, pa.array(ids))
        return pa.table([pa.array(names, pa.string()), pieces], TEXT_TOKENS)


def main() -> None:
    job.main(PRESETS, __doc__, run)


if __name__ == "__main__":
    from pipelines.tokenize_corpus import main  # Ray's workers know the file by this name only

    main()
