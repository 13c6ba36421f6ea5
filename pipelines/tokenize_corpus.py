"""Tokenize a corpus: images to visual words, captions and texts to ids, in Parquet.

    python pipelines/tokenize_corpus.py --store store --images cc3m cc12m --texts wiki --views 4

Of each image, `views` crops are drawn and their boxes stored beside their visual words, so that
pretraining replays exactly what was tokenized. A part of `tokens/<name>` belongs to the part of the
same number in its source, which holds the pictures; `image_row` says which row.
The same commit, tokenizers and seed give the same bytes, however many workers there are.
"""

from __future__ import annotations

import functools
import json
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from beit3.text import TextTokenizer
from beit3.transforms import View, apply_view, decode
from beit3.vqkd import VQKD
from pipelines import bundles, cluster, config, train_image_tokenizer, train_text_tokenizer
from pipelines.parts import PartOutput, Resources, make_dataset
from pipelines.samples import ViewConfig
from pipelines.storage import Commit, Store, fingerprint

VIEW = pa.struct(
    [
        ("box", pa.list_(pa.float64(), 4)),
        ("flip", pa.bool_()),
        ("words", pa.list_(pa.uint16())),
    ]
)
IMAGE_TOKENS = pa.schema(
    [
        ("id", pa.string()),
        ("image_row", pa.int32()),
        ("views", pa.list_(VIEW)),
        ("captions", pa.list_(pa.list_(pa.int32()))),
    ]
)
TEXT_TOKENS = pa.schema([("id", pa.string()), ("ids", pa.list_(pa.int32()))])


@dataclass(frozen=True)
class TokenizeConfig:
    """Turn committed images and texts into tokens."""

    store: str = "store"
    """Where datasets and tokenizers live: a folder or an s3:// URI."""
    images: tuple[str, ...] = ()
    """Image datasets (`images/<name>`), each becoming `tokens/<name>`."""
    texts: tuple[str, ...] = ()
    """Text datasets (`text/<name>`), each becoming `tokens/<name>`."""
    held_out: tuple[str, ...] = ()
    """Prepared captioning splits (`tasks/<name>`, such as captioning/val), each becoming
    `tokens/<name>`: pairs that pretraining is measured on, never trained on."""
    image_tokenizer: str = "vqkd"
    """`tokenizers/image/<name>`."""
    text_tokenizer: str = "sentencepiece"
    """`tokenizers/text/<name>`."""
    views: int = 4
    """Views drawn of each image; epochs cycle through them."""
    view: ViewConfig = field(default_factory=ViewConfig)
    max_text_length: int = 512
    """Longest piece of a text in tokens, `<s>` and `</s>` included; longer texts become several."""
    max_caption_length: int = 64
    batch_size: int = 64
    """Views encoded at once."""
    seed: int = 0
    actors: int = 0
    """Size of the actor pool that encodes images; 0: plain tasks on CPUs."""
    gpus_per_actor: float = 0.0

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
        if self.gpus_per_actor and not self.actors:
            raise ValueError("gpus_per_actor needs actors of at least 1")


PRESETS = {
    "default": TokenizeConfig(images=("cc3m",)),
    "gpu": TokenizeConfig(images=("cc3m",), actors=4, gpus_per_actor=1, batch_size=256),
}


def run(cfg: TokenizeConfig) -> list[Commit]:
    """Tokenize every dataset that is not tokenized yet.

    Raises:
        StoreError: a dataset or tokenizer is missing or half written.
    """
    store = Store(cfg.store)
    text_tokenizer = train_text_tokenizer.load(store, cfg.text_tokenizer)
    image_tokenizer = bundles.identity(store, f"tokenizers/image/{cfg.image_tokenizer}")
    cluster.start()
    tokenizers = {
        "image": {"name": cfg.image_tokenizer, "identity": image_tokenizer},
        "text": {"name": cfg.text_tokenizer, "identity": text_tokenizer.identity},
    }
    kinds = {"images": cfg.images, "tasks": cfg.held_out, "text": cfg.texts}
    return [
        _tokenize(cfg, store, f"{kind}/{name}", name, tokenizers)
        for kind, names in kinds.items()
        for name in names
    ]


def _tokenize(
    cfg: TokenizeConfig, store: Store, source: str, name: str, tokenizers: dict[str, Any]
) -> Commit:
    is_text = source.startswith("text/")
    commit = store.dataset(source).commit()
    options = config.to_dict(cfg)
    where = ("store", "images", "texts", "held_out", "batch_size", "actors", "gpus_per_actor")
    options = {k: v for k, v in options.items() if k not in where}
    used = {"text": tokenizers["text"]} if is_text else tokenizers

    def units() -> list[dict[str, Any]]:
        return [
            {"name": file.path.split("/")[-1].removeprefix("part-").removesuffix(".parquet")}
            | {"path": file.path}
            for file in commit.files
        ]

    worker = functools.partial(TextPart if is_text else ImagePart, cfg, source)
    gpu = not is_text and cfg.actors > 0
    return make_dataset(
        store.dataset(f"tokens/{name}"),
        job="tokenize_corpus",
        fingerprint=fingerprint("tokenize_corpus", options, [commit.identity, str(used)]),
        config=config.to_dict(cfg),
        inputs=[{"dataset": source, "identity": commit.identity, "tokenizers": used}],
        units=units,
        make_worker=worker,
        schema=TEXT_TOKENS if is_text else IMAGE_TOKENS,
        resources=Resources(actors=cfg.actors, gpus=cfg.gpus_per_actor) if gpu else Resources(),
    )


@functools.cache
def _image_tokenizer(uri: str, name: str, device: str) -> VQKD:
    """Loaded once per process: tasks come and go, their process stays."""
    if device == "cpu":
        torch.set_num_threads(1)  # there is a task per CPU
    return train_image_tokenizer.load(Store(uri), name)[0].to(device)


@functools.cache
def _text_tokenizer(uri: str, name: str) -> TextTokenizer:
    return train_text_tokenizer.load(Store(uri), name)


class ImagePart:
    """Tokenizes one file of an image dataset."""

    def __init__(self, cfg: TokenizeConfig, source: str) -> None:
        self.cfg, self.store = cfg, Store(cfg.store)
        self.dataset = self.store.dataset(source)
        self.device = "cuda" if cfg.gpus_per_actor else "cpu"
        self.images = _image_tokenizer(cfg.store, cfg.image_tokenizer, self.device)
        self.texts = _text_tokenizer(cfg.store, cfg.text_tokenizer)

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        path = self.store.path(self.dataset.name, unit["path"])
        table = pq.read_table(path, filesystem=self.store.fs)
        rows, pixels, aside = [], [], []
        words: list[np.ndarray] = []
        for number, row in enumerate(map(_as_pair, table.to_pylist())):
            try:
                picture = decode(row["data"])
            except OSError as error:
                aside.append({"id": row["id"], "reason": "does not decode", "detail": str(error)})
                continue
            rng = np.random.default_rng((self.cfg.seed, int(unit["name"]), number))
            views = [self.cfg.view.draw(picture, rng) for _ in range(self.cfg.views)]
            pixels += [apply_view(picture, v, self.images.config.image_size) for v in views]
            rows.append((number, row, views))
            if len(pixels) >= self.cfg.batch_size:
                words += self._encode(pixels)
                pixels = []
        words += self._encode(pixels)
        records = [
            self._record(number, row, views, words[i * self.cfg.views :])
            for i, (number, row, views) in enumerate(rows)
        ]
        counts = torch.bincount(
            torch.from_numpy(np.concatenate(words).astype(np.int64))
            if words
            else torch.zeros(0).long(),
            minlength=self.images.config.codebook_size,
        )
        return PartOutput(
            pa.Table.from_pylist(records, IMAGE_TOKENS),
            aside,
            {
                "rows": len(records),
                "set_aside": {"does not decode": len(aside)} if aside else {},
                "words": {str(i): n for i, n in enumerate(counts.tolist()) if n},
            },
        )

    def _encode(self, pixels: list[np.ndarray]) -> list[np.ndarray]:
        """Visual words of each view, `[patches]`."""
        if not pixels:
            return []
        images = torch.from_numpy(np.stack(pixels)).to(self.device)
        return list(self.images.encode(images).cpu().numpy().astype(np.uint16))

    def _record(
        self, number: int, row: dict[str, Any], views: list[View], words: list[np.ndarray]
    ) -> dict[str, Any]:
        ids = self.texts.encode_batch(row["captions"]) if row["captions"] else []
        return {
            "id": row["id"],
            "image_row": number,
            "views": [
                {"box": list(view.box), "flip": view.flip, "words": codes}
                for view, codes in zip(views, words, strict=False)
            ],
            "captions": [self.texts.wrap(caption, self.cfg.max_caption_length) for caption in ids],
        }


def _as_pair(row: dict[str, Any]) -> dict[str, Any]:
    """Identity, picture and captions of a row of `images/*`, or of a prepared captioning split."""
    if "image" in row:
        return {"id": row["id"], "data": row["image"]["bytes"], "captions": row["captions"]}
    captions = [caption for e in row["examples"] for caption in json.loads(e["target"])]
    return {"id": row["id"], "data": row["images"][0]["bytes"], "captions": captions}


class TextPart:
    """Tokenizes one file of a text dataset; long texts are cut into pieces."""

    def __init__(self, cfg: TokenizeConfig, source: str) -> None:
        self.cfg, self.store = cfg, Store(cfg.store)
        self.dataset = self.store.dataset(source)
        self.texts = _text_tokenizer(cfg.store, cfg.text_tokenizer)

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        path = self.store.path(self.dataset.name, unit["path"])
        table = pq.read_table(path, columns=["id", "text"], filesystem=self.store.fs)
        documents = self.texts.encode_batch(table["text"].to_pylist())
        inner = self.cfg.max_text_length - 2
        records = [
            {"id": f"{name}#{start // inner}", "ids": self.texts.wrap(ids[start:], inner + 2)}
            for name, ids in zip(table["id"].to_pylist(), documents, strict=True)
            for start in range(0, len(ids), inner)
        ]
        tokens = sum(len(r["ids"]) for r in records)
        return PartOutput(
            pa.Table.from_pylist(records, TEXT_TOKENS),
            stats={"rows": len(records), "documents": len(documents), "tokens": tokens},
        )


def main() -> None:
    run(config.cli(PRESETS, description=__doc__ or ""))


if __name__ == "__main__":
    from pipelines.tokenize_corpus import main  # Ray's workers know the file by this name only

    main()
