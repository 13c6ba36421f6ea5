"""Pretrain BEiT-3: masked data modelling on images, texts and pairs in every step.

    python pipelines/pretrain.py --preset base --store s3://bucket/beit3 \
        --images imagenet21k --texts wiki --pairs cc3m cc12m sbu coco vg
    ray job submit --working-dir . -- python pipelines/pretrain.py --preset base ...

Reads what `pipelines/tokenize_corpus.py` wrote, and leaves the bundle `models/<name>`. Killed
anywhere and run again, it goes on from the newest checkpoint.
"""

from __future__ import annotations

import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from beit3 import weights
from beit3.config import PRESETS as MODELS
from beit3.config import ModelConfig
from beit3.device import to_device
from beit3.masking import Masking, token_mask
from beit3.objectives import MaskedBatch, MaskedDataModelling, ObjectiveWeights
from beit3.text import TextTokenizer
from beit3.transforms import View, apply_view
from pipelines import (
    bundles,
    cluster,
    config,
    models,
    pictures,
    train_image_tokenizer,
    train_text_tokenizer,
)
from pipelines.loader import ParquetRows
from pipelines.recipe import TrainConfig
from pipelines.samples import Pictures, Sample, Samples
from pipelines.storage import ROW_GROUP_ROWS, Dataset, Store, StoreError, fingerprint
from pipelines.tracking import Logger
from pipelines.trainer import fit


@dataclass(frozen=True)
class PretrainConfig:
    """Pretrain a BEiT-3."""

    store: str = "store"
    """Where datasets and models live: a folder or an s3:// URI."""
    name: str = "pretrained"
    """The model becomes `models/<name>`, the run `runs/<name>`."""
    images: tuple[str, ...] = ("imagenet21k",)
    """Tokenized image datasets to use without captions (`tokens/<name>`)."""
    texts: tuple[str, ...] = ("wiki",)
    """Tokenized text datasets."""
    pairs: tuple[str, ...] = ("cc3m", "cc12m", "sbu", "coco", "vg")
    """Tokenized image datasets to use with their captions."""
    image_batch: int = 2048
    """Images alone of a step, over all workers."""
    text_batch: int = 2048
    """Texts alone of a step."""
    pair_batch: int = 2048
    """Pairs of a step."""
    held_out: str = ""
    """Tokenized pairs, such as captioning/val, whose masked accuracies are measured at the end;
    empty: nothing is measured."""
    held_out_batches: int = 4
    model: ModelConfig = field(default_factory=ModelConfig)
    masking: Masking = field(default_factory=Masking)
    objectives: ObjectiveWeights = field(default_factory=ObjectiveWeights)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        for kind, batch in (
            ("images", self.image_batch),
            ("texts", self.text_batch),
            ("pairs", self.pair_batch),
        ):
            named = getattr(self, kind)
            if bool(named) != (batch > 0):
                raise ValueError(
                    f"{kind} names {len(named)} datasets, but {kind[:-1]}_batch is {batch}: "
                    "set both or neither"
                )
            if self.train.workers and batch % self.train.workers:
                raise ValueError(
                    f"{kind[:-1]}_batch {batch} is not divisible by train.workers "
                    f"{self.train.workers}"
                )
        if self.image_batch + self.text_batch + self.pair_batch == 0:
            raise ValueError("image_batch, text_batch, pair_batch: all are 0, nothing to train on")


def _paper(name: str, **train: Any) -> PretrainConfig:
    """Table 11 of the paper: 1M steps of 2048 images, texts and pairs; AdamW; DropPath 0.1."""
    shape = {f: getattr(MODELS[name], f) for f in MODELS[name].__dataclass_fields__}
    shape |= {"drop_path": 0.1, "checkpoint_activations": "blocks"}
    defaults: dict[str, Any] = {
        "steps": 1_000_000,
        "warmup": 10_000,
        "learning_rate": 1e-3,
        "precision": "bf16",
        "workers": 64,
        "gpus_per_worker": 1,
        "checkpoint_every": 1000,
    }
    return PretrainConfig(model=ModelConfig(**shape), train=TrainConfig(**(defaults | train)))


PRESETS = {
    "tiny": PretrainConfig(
        image_batch=8,
        text_batch=16,
        pair_batch=64,
        model=MODELS["tiny"],
        masking=Masking(min_block=4, pair_text_share=0.75),
        train=TrainConfig(
            steps=500, warmup=30, learning_rate=2e-3, workers=2, checkpoint_every=100
        ),
    ),
    "base": _paper("base", workers=16),
    "large": _paper("large", workers=32),
    "giant": _paper("giant"),
}


@dataclass(frozen=True)
class PretrainRecipe:
    cfg: PretrainConfig
    tokenizer: TextTokenizer

    def build(self) -> nn.Module:
        return MaskedDataModelling(self.cfg.model, self.cfg.objectives)

    def layers(self) -> int:
        return self.cfg.model.layers

    def samples_per_batch(self) -> int:
        return self.cfg.image_batch + self.cfg.text_batch + self.cfg.pair_batch

    def batches(self, rank: int, world: int) -> Callable[[int], MaskedBatch]:
        return MaskedBatches(self.cfg, self.tokenizer, rank, world)

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        """Masked accuracies on held-out pairs; a picture of masked inputs and predictions."""
        assert isinstance(module, MaskedDataModelling)
        cfg = self.cfg
        if not cfg.held_out:
            return {}
        batches = held_out_batches(cfg, self.tokenizer)
        device = module.text_head.weight.device
        totals: dict[str, list[float]] = {}
        for number in range(cfg.held_out_batches):
            batch = to_device(batches(number), device)
            for key, value in module(batch).items():
                totals.setdefault(key, []).append(float(value))
            if number == 0 and len(batch.images):
                sheet = masked_sheet(module, batch, cfg.model.patch_size)
                logger.picture(f"masked/step-{step:07d}.png", sheet)
        return {key: sum(values) / len(values) for key, values in totals.items()}

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        weights.save(folder, module, self.cfg.model, kind="pretrained")
        models.add_tokenizer(folder, self.tokenizer)
        return {"kind": "pretrained", "text_tokenizer": self.tokenizer.identity}


def masked_sheet(module: MaskedDataModelling, batch: MaskedBatch, patch: int) -> Any:
    """Pictures, what the model saw, the true visual words, and those it predicted."""
    predicted, _ = module.restore(batch)
    shown = batch.hidden_patches.any(1).nonzero().flatten()[:10].cpu()
    return pictures.masked_predictions(
        batch.images.cpu()[shown],
        batch.hidden_patches.cpu()[shown],
        batch.visual_words.cpu()[shown],
        predicted.cpu()[shown],
        patch,
    )


class MaskedBatches:
    """Corrupted batches of a worker, as a function of the step."""

    def __init__(
        self, cfg: PretrainConfig, tokenizer: TextTokenizer, rank: int, world: int
    ) -> None:
        self.cfg, self.tokenizer = cfg, tokenizer
        store = Store(cfg.store)

        def samples(names: Sequence[str], batch: int, kind: int) -> Samples | None:
            if not batch:
                return None
            return Samples(
                [store.dataset(f"tokens/{name}") for name in names],
                columns=None,
                seed=cfg.train.seed * 3 + kind,
                batch=batch,
                rank=rank,
                world=world,
            )

        self.images = samples(cfg.images, cfg.image_batch, 0)
        self.texts = samples(cfg.texts, cfg.text_batch, 1)
        self.pairs = samples(cfg.pairs, cfg.pair_batch, 2)
        self.image_source = PictureSource(store, cfg.images)
        self.pair_source = PictureSource(store, cfg.pairs)

    def __call__(self, step: int) -> MaskedBatch:
        cfg, grid = self.cfg, self.cfg.model.grid
        pixels, words, patch_masks, texts, token_masks, ids = [], [], [], [], [], []

        def add_picture(source: PictureSource, sample: Sample, mask: np.ndarray) -> None:
            view = sample.row["views"][sample.epoch % len(sample.row["views"])]
            pixels.append(source.pixels(sample, view, cfg.model.image_size))
            words.append(np.asarray(view["words"], dtype=np.int64))
            patch_masks.append(mask)

        for sample in self.images(step) if self.images else []:
            add_picture(self.image_source, sample, cfg.masking.of_image(grid, sample.rng))
            ids.append(sample.row["id"])
        for sample in self.pairs(step) if self.pairs else []:
            captions = sample.row["captions"]
            caption = captions[int(sample.rng.integers(len(captions)))]
            of_image, of_text = cfg.masking.of_pair(grid, len(caption), sample.rng)
            add_picture(self.pair_source, sample, of_image)
            texts.append(caption)
            token_masks.append(of_text)
            ids.append(sample.row["id"])
        pairs = len(texts)
        for sample in self.texts(step) if self.texts else []:
            text = sample.row["ids"]
            texts.append(text)
            token_masks.append(token_mask(len(text), cfg.masking.text, sample.rng))
            ids.append(sample.row["id"])
        side, patches = cfg.model.image_size, cfg.model.patches
        return MaskedBatch.collate(
            torch.from_numpy(np.array(pixels, np.uint8).reshape(-1, 3, side, side)),
            torch.from_numpy(np.array(patch_masks, bool).reshape(-1, patches)),
            torch.from_numpy(np.array(words, np.int64).reshape(-1, patches)),
            texts,
            token_masks,
            self.tokenizer.mask_id,
            pairs=pairs,
            ids=ids,
        )


class PictureSource:
    """The pictures that belong to tokenized datasets, found by part and row."""

    def __init__(self, store: Store, names: Sequence[str]) -> None:
        commits = [store.dataset(f"tokens/{name}").commit() for name in names]
        self.datasets = [store.dataset(c.lineage["inputs"][0]["dataset"]) for c in commits]
        self.rows = ParquetRows(self.datasets, ["image", "images"]) if names else None
        # A part of tokens/x holds the tokens of the part of the same number of its source.
        self.paths = [
            {posixpath.basename(f.path): f.path for f in dataset.commit().files}
            for dataset in self.datasets
        ]
        self.decoded = Pictures()

    def pixels(self, sample: Sample, view: dict[str, Any], size: int) -> np.ndarray:
        """The view that was tokenized, uint8 `[3, size, size]`."""
        assert self.rows is not None
        number = sample.group.dataset
        path = self.paths[number][posixpath.basename(sample.group.path)]
        group, index = divmod(sample.row["image_row"], ROW_GROUP_ROWS)
        table = self.rows.table(number, path, group)
        cell = table.column(0)[index].as_py()  # `image`, or of a task's row the first of `images`
        data = (cell[0] if isinstance(cell, list) else cell)["bytes"]
        picture = self.decoded(f"{number}/{sample.row['id']}", data)
        return apply_view(picture, View(tuple(view["box"]), view["flip"]), size)


def held_out_batches(cfg: PretrainConfig, tokenizer: TextTokenizer) -> MaskedBatches:
    """Batches of held-out pairs, on one worker."""
    alone = replace(
        cfg,
        images=(),
        texts=(),
        pairs=(cfg.held_out,),
        image_batch=0,
        text_batch=0,
        pair_batch=64,
        held_out="",
        train=replace(cfg.train, workers=0, gpus_per_worker=0.0),
    )
    return MaskedBatches(alone, tokenizer, 0, 1)


def run(cfg: PretrainConfig) -> dict[str, Any]:
    """Pretrain, or skip what is trained; returns the bundle's info.

    Raises:
        StoreError: a dataset is missing or empty, was made with another tokenizer, or its views
            don't match the model's patches.
        ValueError: the tokenizers don't fit the model.
    """
    store = Store(cfg.store)
    names = [*cfg.images, *cfg.texts, *cfg.pairs, *([cfg.held_out] if cfg.held_out else [])]
    datasets = {name: store.dataset(f"tokens/{name}") for name in names}
    tokenizer = check_tokens(store, cfg, datasets)
    models.check_vocabulary(tokenizer, cfg.model)
    if cfg.train.workers:
        cluster.start()
    return fit(
        store,
        name=cfg.name,
        output=f"models/{cfg.name}",
        fingerprint=fingerprint(
            "pretrain", models.decisive(cfg), [d.commit().identity for d in datasets.values()]
        ),
        recipe=PretrainRecipe(cfg, tokenizer),
        config=cfg.train,
        parameters=config.flatten(cfg),
    )


def check_tokens(store: Store, cfg: PretrainConfig, datasets: dict[str, Dataset]) -> TextTokenizer:
    """Every dataset is there, with rows, from one pair of tokenizers that fits the model."""
    used: dict[str, dict[str, str]] = {"text": {}, "image": {}}
    for name, dataset in datasets.items():
        commit = dataset.commit()
        if not commit.rows:
            raise StoreError(f"{dataset.uri} has no rows: leave {name!r} out, or ingest it again")
        for key in ("max_text_length", "max_caption_length"):
            longest = commit.lineage["config"][key]
            if longest > cfg.model.max_text_length:
                raise StoreError(
                    f"{dataset.uri} was tokenized with {key} {longest}, above the model's "
                    f"model.max_text_length {cfg.model.max_text_length}: raise that, or tokenize "
                    "again into shorter pieces"
                )
        for kind, made_with in commit.lineage["inputs"][0]["tokenizers"].items():
            used[kind][made_with["identity"]] = made_with["name"]
    for kind, found in used.items():
        if len(found) > 1:
            raise StoreError(
                f"the datasets were tokenized with different {kind} tokenizers "
                f"({', '.join(sorted(found.values()))}): tokenize them all with one"
            )
    if used["image"]:
        (identity, name) = next(iter(used["image"].items()))
        shape = train_image_tokenizer.shape(store, name)
        if bundles.identity(store, f"tokenizers/image/{name}") != identity:
            raise StoreError(
                f"tokenizers/image/{name} is not the one that made these tokens: tokenize again"
            )
        grid = shape.image_size // shape.patch_size
        if grid != cfg.model.grid or shape.image_size != cfg.model.image_size:
            raise StoreError(
                f"visual words are {grid}x{grid} at {shape.image_size} pixels, the model's "
                f"patches {cfg.model.grid}x{cfg.model.grid} at {cfg.model.image_size}: tokenize "
                "with another tokenizer, or set model.image_size and model.patch_size"
            )
        if shape.codebook_size != cfg.model.codebook_size:
            raise StoreError(
                f"model.codebook_size {cfg.model.codebook_size} is not the tokenizer's "
                f"{shape.codebook_size}: set it to that"
            )
    (identity, name) = next(iter(used["text"].items()))
    tokenizer = train_text_tokenizer.load(store, name)
    if tokenizer.identity != identity:
        raise StoreError(
            f"tokenizers/text/{name} is not the one that made these tokens: tokenize again"
        )
    return tokenizer


def main() -> None:
    run(config.cli(PRESETS, description=__doc__ or ""))


if __name__ == "__main__":
    main()
