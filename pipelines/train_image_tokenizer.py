"""Trains the image tokenizer: VQ-KD, distilled from a teacher.

    python pipelines/train_image_tokenizer.py --store store --images imagenet21k --teacher teacher

The teacher is a dual encoder in the store (from `pipelines/contrast.py`), a CLIP (imported by
`pipelines/import_weights.py`), or the pixels themselves. Writes the bundle
`tokenizers/image/<name>`, whose `health` says whether it is usable; MLflow gets curves of the loss,
codebook usage and perplexity, code maps, and the patches nearest to each code.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from beit3 import vqkd
from beit3.teachers import Teacher
from beit3.tokenizer_health import judge
from beit3.vqkd import PRESETS as SHAPES
from beit3.vqkd import VQKD, VQKDConfig, codebook_health, usage_health
from pipelines import bundles, cluster, config, console, job, models, pictures
from pipelines.config import indifferent
from pipelines.lineage import fingerprint
from pipelines.recipe import Recipe, TrainConfig
from pipelines.run_logger import Logger
from pipelines.samples import Pictures, Samples, ViewConfig
from pipelines.storage import Store
from pipelines.tokenizers import EVALUATED, PIXELS, health_of, open_teacher, teacher_bundle
from pipelines.trainer import fit

DEAD_BELOW = 0.01
"""Average uses per step below which a code counts as dead in the curves."""


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Train a VQ-KD image tokenizer."""

    store: str = indifferent("store", noted="")
    """Where datasets and models live: a folder or an s3:// URI."""
    name: str = "vqkd"
    """The tokenizer becomes `tokenizers/image/<name>`."""
    images: tuple[str, ...] = ("imagenet21k",)
    """Image datasets to learn from (`images/<name>`)."""
    held_out: str = ""
    """Images not trained on, for measuring the health figures (`images/<name>` or
    `tasks/<task>/<split>`); empty: images of the first of `images`."""
    teacher: str = "teacher"
    """The model whose patch features are reconstructed: a dual encoder (`models/<name>`), an
    imported CLIP (`teachers/<name>`, given with that prefix), or `pixels`, normalised per patch."""
    tokenizer: VQKDConfig = field(default_factory=VQKDConfig)
    batch_size: int = 512
    view: ViewConfig = field(default_factory=lambda: ViewConfig(scale=(0.08, 1.0)))
    evaluate_images: int = 128
    """Number of pictures that the health figures are measured on."""
    baseline_images: int = 1024
    """Number of pictures of `images` from which k-means, the baseline, learns."""
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("images: name at least one dataset")
        for name in ("batch_size", "evaluate_images", "baseline_images"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}: expected at least 1, got {getattr(self, name)}")
        self.train.check_shared("batch_size", self.batch_size)
        if self.train.accumulate > 1:
            raise ValueError(
                f"train.accumulate {self.train.accumulate}: the codebook moves with each batch, so "
                "a step in several is another algorithm: set 1, and a smaller batch_size if need be"
            )


# BEiT v2's recipe: 100 epochs of ImageNet-1K at batch 512 (microsoft/unilm beit2 TOKENIZER.md).
_BASE = ImageTokenizerConfig(
    evaluate_images=512,
    train=TrainConfig(
        steps=250_000,
        warmup=25_000,
        learning_rate=2e-4,
        min_learning_rate=1e-5,
        betas=(0.9, 0.99),
        eps=1e-8,
        weight_decay=1e-4,
        clip=0.0,
        precision="bf16",
        workers=8,
        gpus_per_worker=1,
        loader_workers=6,  # as in contrast.py, whose steps take about as long
    ),
)
PRESETS = {
    "base": _BASE,
    "base14": replace(_BASE, tokenizer=SHAPES["base14"]),
    "tiny": ImageTokenizerConfig(
        tokenizer=SHAPES["tiny"],
        batch_size=32,
        view=ViewConfig(scale=(0.5, 1.0), flip=0.0),
        train=TrainConfig(
            steps=200,
            warmup=20,
            learning_rate=1e-3,
            betas=(0.9, 0.99),
            weight_decay=1e-4,
            workers=0,
        ),
    ),
}


@dataclass
class PictureBatch:
    """uint8 `images` `[n, 3, size, size]`."""

    images: Tensor


class Distillation(nn.Module):
    """The tokenizer with its frozen teacher; forward takes a batch."""

    def __init__(self, tokenizer: VQKD, teacher: Teacher) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.teacher = teacher
        self.health: dict[str, Any] | None = None
        """The latest judgement, with its numbers."""

    def forward(self, batch: PictureBatch) -> dict[str, Tensor]:
        results = self.tokenizer(batch.images, self.teacher(batch.images))
        codes = results.pop("codes")
        codebook = self.tokenizer.codebook
        health = {
            "batch": codebook_health(codes, self.tokenizer.config.codebook_size),
            "codebook": usage_health(codebook.usage, DEAD_BELOW),
        }
        scalars = {f"{k}/{name}": v for k, values in health.items() for name, v in values.items()}
        return results | {name: torch.tensor(value) for name, value in scalars.items()}


@dataclass(frozen=True)
class ImageTokenizerRecipe(Recipe):
    cfg: ImageTokenizerConfig
    shape: VQKDConfig

    def build(self) -> nn.Module:
        teacher = open_teacher(Store(self.cfg.store), self.cfg.teacher, self.shape)
        return Distillation(VQKD(self.shape), teacher)

    def layers(self) -> int:
        return self.shape.encoder_layers

    def samples_per_batch(self) -> int:
        return self.cfg.batch_size

    def batches(self, rank: int, world: int) -> Callable[[int], PictureBatch]:
        store = Store(self.cfg.store)
        samples = Samples(
            [store.dataset(f"images/{name}") for name in self.cfg.images],
            columns=["id", "image"],
            seed=self.cfg.train.seed,
            batch=self.cfg.batch_size,
            rank=rank,
            world=world,
        )
        decoded = Pictures()

        def batch(step: int) -> PictureBatch:
            pixels = [
                self.cfg.view.pixels(
                    decoded(s.row["id"], s.row["image"]["bytes"]), s.rng, self.shape.image_size
                )
                for s in samples(step)
            ]
            return PictureBatch(torch.from_numpy(np.stack(pixels)))

        return batch

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        """Health on held-out images; logs code maps with the images, and patches of each code."""
        assert isinstance(module, Distillation)
        store, cfg, tokenizer = Store(self.cfg.store), self.cfg, module.tokenizer
        device = tokenizer.codebook.vectors.device
        images = pictures.some_images(
            store.dataset(cfg.held_out or f"images/{cfg.images[0]}"),
            cfg.evaluate_images,
            self.shape.image_size,
        )
        codes, scores = (
            torch.cat(parts).cpu()
            for parts in zip(
                *(tokenizer.encode_scored(part.to(device)) for part in images.split(EVALUATED)),
                strict=True,
            )
        )
        logger.picture(
            f"code_maps/step-{step:06d}.png",
            pictures.code_maps(images[:12], codes[:12], tokenizer.grid),
        )
        logger.picture(
            f"code_patches/step-{step:06d}.png",
            pictures.code_patches(images, codes, tokenizer.config.patch_size, scores=scores),
        )
        names = [f"images/{name}" for name in cfg.images]
        last = step == cfg.train.steps
        learned = [store.dataset(name) for name in names] if last else []
        found = health_of(
            tokenizer,
            module.teacher,
            images,
            learned=learned,
            baseline_images=cfg.baseline_images,
            held_out=bool(cfg.held_out) and cfg.held_out not in names,
        )
        judged = judge(
            found,
            revived=self.shape.revive_below > 0,
            trained_on=sum(store.dataset(name).commit().rows for name in names),
        )
        module.health = judged.to_dict(found)
        return found.metrics

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        assert isinstance(module, Distillation)
        vqkd.save(folder, module.tokenizer)
        return {
            "codebook_size": self.shape.codebook_size,
            "teacher": self.cfg.teacher,
            "images": list(self.cfg.images),
            "health": module.health,
        }


def run(cfg: ImageTokenizerConfig) -> dict[str, Any]:
    """Train, unless the tokenizer is trained already; returns the bundle's info.

    Raises:
        StoreError: the teacher or a dataset is missing, or the teacher has another patch grid.
    """
    store = Store(cfg.store)
    teacher = open_teacher(store, cfg.teacher, cfg.tokenizer)
    fitting = replace(cfg.tokenizer, teacher_dim=teacher.dim)
    inputs = [store.dataset(f"images/{name}").commit().identity for name in cfg.images]
    if cfg.held_out:
        store.dataset(cfg.held_out).commit()
    if cfg.teacher != PIXELS:
        inputs.append(bundles.identity(store, teacher_bundle(cfg.teacher)))
    if cfg.train.workers:
        cluster.start()
    info = fit(
        store,
        name=cfg.name,
        output=f"tokenizers/image/{cfg.name}",
        fingerprint=fingerprint("train_image_tokenizer", models.decisive(cfg), inputs),
        recipe=ImageTokenizerRecipe(cfg, fitting),
        config=cfg.train,
        parameters=config.flatten(cfg),
    )
    if info.get("health"):
        console.say(info["health"]["text"])
    return info


def main() -> None:
    job.main(PRESETS, __doc__, run)


if __name__ == "__main__":
    main()
