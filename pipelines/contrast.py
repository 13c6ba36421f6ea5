"""The contrastive stage: encodes images and captions separately, and aligns them in one space.

    python pipelines/contrast.py --store store --images cc3m cc12m --name teacher

From random weights it trains a small CLIP-like teacher for VQ-KD, for users without a CLIP;
from a pretrained model it is the paper's intermediate stage before retrieval (appendix A).
Writes the bundle `models/<name>`.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beit3 import weights
from beit3.config import PRESETS as MODELS
from beit3.config import Checkpointing, ModelConfig
from beit3.flops import contrastive_step
from beit3.objectives import DualEncoder
from beit3.tasks.retrieval import recalls
from beit3.text import TextTokenizer
from beit3.transforms import WHOLE, apply_view, decode
from pipelines import cluster, config, job, models
from pipelines.config import indifferent, later
from pipelines.lineage import fingerprint
from pipelines.recipe import Recipe, TrainConfig
from pipelines.run_logger import Logger
from pipelines.samples import Pictures, Samples, ViewConfig, picture_of
from pipelines.storage import Store, StoreError
from pipelines.task_data import captions_of, check_captions
from pipelines.tokenizers import load_text_tokenizer
from pipelines.trainer import fit

EVALUATED = 64  # pictures, or texts, encoded at once


@dataclass(frozen=True)
class ContrastConfig:
    """Train a dual encoder on image-text pairs."""

    store: str = indifferent("store", noted="")
    """Where datasets and models live: a folder or an s3:// URI."""
    name: str = "contrast"
    """The model becomes `models/<name>`."""
    images: tuple[str, ...] = ("cc3m",)
    """Image datasets with captions (`images/<name>`)."""
    init: str = ""
    """Model bundle to start from (`models/<name>`); empty: random weights of `model`."""
    text_tokenizer: str = "sentencepiece"
    """Tokenizer of a random start (`tokenizers/text/<name>`)."""
    model: ModelConfig = field(default_factory=ModelConfig)
    """Architecture of a random start."""
    drop_path: float | None = later(None)
    """Stochastic depth of the last layer; none: as the model has it."""
    checkpoint_activations: Checkpointing | None = later(None)
    """Activations that the backward pass recomputes, as in finetuning; none: as the model has."""
    batch_size: int = 256
    """Pairs per batch, over all workers."""
    max_text_length: int = 64
    held_out: str = ""
    """Captioned pictures that are not trained on (`tasks/captioning/val`, `images/<name>`), for the
    retrieval in both directions that each evaluation does; empty: no retrieval."""
    held_out_images: int = 1000
    """How many of them to use, from the start. Recall depends on it: compare like with like."""
    view: ViewConfig = field(default_factory=ViewConfig)
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("images: name at least one dataset")
        if self.held_out_images < 1:
            raise ValueError(f"held_out_images: expected at least 1, got {self.held_out_images}")
        self.train.check_shared("batch_size", self.batch_size)


PRESETS = {
    # The paper's appendix A: 5 epochs of 21M pairs at batch 16k, one epoch of warm-up.
    "base": ContrastConfig(
        init="models/pretrained",
        drop_path=0.3,
        checkpoint_activations="blocks",
        batch_size=16384,
        train=TrainConfig(
            steps=6500,
            warmup=1300,
            learning_rate=3e-5,
            layer_decay=0.95,
            betas=(0.9, 0.999),
            precision="bf16",
            workers=8,
            gpus_per_worker=1,
            loader_workers=6,  # decode 1.5 times the pictures that an L40S takes of this model
        ),
    ),
    "tiny": ContrastConfig(
        name="teacher",
        model=MODELS["tiny"],
        # With batches of 32 at twice the rate it hardly leaves its initial plateau.
        batch_size=64,
        max_text_length=48,
        view=ViewConfig(scale=(0.8, 1.0), flip=0.0),
        train=TrainConfig(steps=800, warmup=80, learning_rate=1e-3, workers=0),
    ),
}


@dataclass
class ContrastBatch:
    """uint8 `images` `[n, 3, size, size]`, and `n` packed texts."""

    images: Tensor
    text: Tensor
    lengths: list[int]


class _Module(nn.Module):
    """A dual encoder whose forward takes a batch."""

    def __init__(self, model: DualEncoder) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: ContrastBatch) -> dict[str, Tensor]:
        return self.model(batch.images, batch.text, batch.lengths)


@dataclass(frozen=True)
class ContrastRecipe(Recipe):
    cfg: ContrastConfig
    model: ModelConfig
    tokenizer: TextTokenizer

    def build(self) -> nn.Module:
        encoder = DualEncoder(self.model)
        if self.cfg.init:
            with models.opened(Store(self.cfg.store), self.cfg.init) as folder:
                models.load_backbone(encoder, folder)
        return _Module(encoder)

    def layers(self) -> int:
        return self.model.layers

    def samples_per_batch(self) -> int:
        return self.cfg.batch_size

    def flops(self, batch: ContrastBatch) -> float:
        return contrastive_step(self.model, len(batch.images), batch.lengths)

    def batches(self, rank: int, world: int) -> Callable[[int], ContrastBatch]:
        store = Store(self.cfg.store)
        samples = Samples(
            [store.dataset(f"images/{name}") for name in self.cfg.images],
            columns=["id", "image", "captions"],
            seed=self.cfg.train.seed,
            batch=self.cfg.batch_size,
            rank=rank,
            world=world,
        )
        pictures = Pictures()

        def batch(step: int) -> ContrastBatch:
            pixels, texts = [], []
            for sample in samples(step):
                picture = pictures(sample.row["id"], sample.row["image"]["bytes"])
                pixels.append(self.cfg.view.pixels(picture, sample.rng, self.model.image_size))
                captions = sample.row["captions"] or [""]
                texts.append(captions[int(sample.rng.integers(len(captions)))])
            packed, lengths = self.tokenizer.encode_packed(texts, self.cfg.max_text_length)
            images = torch.from_numpy(np.stack(pixels))
            return ContrastBatch(images, torch.from_numpy(packed), lengths)

        return batch

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        """Recall at 1, 5 and 10, both ways, on held-out pictures and captions."""
        if not self.cfg.held_out:
            return {}
        assert isinstance(module, _Module)
        pictures: list[np.ndarray] = []
        texts: list[np.ndarray] = []
        owners: list[int] = []
        for rows in self.held_out():
            said = [
                (len(pictures) * EVALUATED + i, text)
                for i, row in enumerate(rows)
                for text in captions_of(row)
            ]
            pictures.append(self._encode_pictures(module.model, rows))
            for start in range(0, len(said), EVALUATED):
                part = said[start : start + EVALUATED]
                texts.append(self._encode_texts(module.model, [text for _, text in part]))
                owners += [owner for owner, _ in part]
        return recalls(np.concatenate(pictures), np.concatenate(texts), np.array(owners))

    def held_out(self) -> Iterator[list[dict[str, Any]]]:
        """Rows of the held-out set in batches of `EVALUATED`; the last may be smaller."""
        dataset = Store(self.cfg.store).dataset(self.cfg.held_out)
        rows = filter(_captioned, dataset.first_rows(self.cfg.held_out_images))
        while batch := list(itertools.islice(rows, EVALUATED)):
            yield batch

    def _encode_pictures(self, model: DualEncoder, rows: list[dict[str, Any]]) -> np.ndarray:
        size = self.model.image_size
        pixels = [apply_view(decode(picture_of(row)), WHOLE, size) for row in rows]
        images = torch.from_numpy(np.stack(pixels)).to(model.logit_scale.device)
        return model.encode_images(images).float().cpu().numpy()

    def _encode_texts(self, model: DualEncoder, texts: list[str]) -> np.ndarray:
        packed, lengths = self.tokenizer.encode_packed(texts, self.cfg.max_text_length)
        ids = torch.from_numpy(packed).to(model.logit_scale.device)
        return model.encode_texts(ids, lengths).float().cpu().numpy()

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        assert isinstance(module, _Module)
        weights.save(folder, module.model, self.model, kind="dual_encoder")
        models.add_tokenizer(folder, self.tokenizer)
        data = [f"images/{name}" for name in self.cfg.images]
        return {
            "kind": "dual_encoder",
            "text_tokenizer": self.tokenizer.identity,
            **models.provenance(Store(self.cfg.store), self.cfg, data),
        }


def _captioned(row: dict[str, Any]) -> bool:
    return any(captions_of(row))


def run(cfg: ContrastConfig) -> dict[str, Any]:
    """Train, unless the model is trained already; returns the bundle's info."""
    store = Store(cfg.store)
    model = cfg.model
    if cfg.init:
        with models.opened(store, cfg.init) as folder:
            model, _ = weights.load_config(folder)
            tokenizer = models.tokenizer_of(folder)
    else:
        tokenizer = load_text_tokenizer(store, cfg.text_tokenizer)
        models.check_vocabulary(tokenizer, model)
    if cfg.drop_path is not None:
        model = replace(model, drop_path=cfg.drop_path)
    if cfg.checkpoint_activations is not None:
        model = replace(model, checkpoint_activations=cfg.checkpoint_activations)
    inputs = [store.dataset(f"images/{name}").commit().identity for name in cfg.images]
    if cfg.held_out:
        check_captions(store.dataset(cfg.held_out), "held_out")
    recipe = ContrastRecipe(cfg, model, tokenizer)
    if cfg.held_out and next(recipe.held_out(), None) is None:  # said before training
        raise StoreError(
            f"held_out: no caption in the first {cfg.held_out_images} rows of {cfg.held_out}: name "
            "a set of pictures with captions"
        )
    if cfg.train.workers:
        cluster.start()
    return fit(
        store,
        name=cfg.name,
        output=f"models/{cfg.name}",
        fingerprint=fingerprint("contrast", models.decisive(cfg), [*inputs, tokenizer.identity]),
        recipe=recipe,
        config=cfg.train,
        parameters=config.flatten(cfg),
    )


def main() -> None:
    job.main(PRESETS, __doc__, run)


if __name__ == "__main__":
    main()
