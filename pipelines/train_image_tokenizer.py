"""Train the image tokenizer: VQ-KD, distilled from a teacher.

    python pipelines/train_image_tokenizer.py --store store --images imagenet21k --teacher teacher

The teacher is a dual encoder of the store (`pipelines/contrast.py` makes one). Leaves the bundle
`tokenizers/image/<name>`; MLflow gets the loss, codebook usage and perplexity, and code maps.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from beit3 import weights
from beit3.config import ModelConfig
from beit3.objectives import DualEncoder
from beit3.vqkd import PRESETS as SHAPES
from beit3.vqkd import VQKD, VQKDConfig, codebook_health
from pipelines import bundles, cluster, config, models, pictures
from pipelines.samples import Pictures, Samples, ViewConfig
from pipelines.storage import Store, StoreError, fingerprint
from pipelines.tracking import Logger
from pipelines.trainer import TrainConfig, fit

SHAPE_FILE = "vqkd.json"


@dataclass(frozen=True)
class ImageTokenizerConfig:
    """Train a VQ-KD image tokenizer."""

    store: str = "store"
    """Where datasets and models live: a folder or an s3:// URI."""
    name: str = "vqkd"
    """The tokenizer becomes `tokenizers/image/<name>`."""
    images: tuple[str, ...] = ("imagenet21k",)
    """Image datasets to learn from (`images/<name>`)."""
    held_out: str = ""
    """Dataset of images, not learned from, that the health figures are measured on (`images/<name>`
    or `tasks/<task>/<split>`); empty: the first images of `images`."""
    teacher: str = "teacher"
    """Dual encoder whose patch features are reconstructed (`models/<name>`)."""
    tokenizer: VQKDConfig = field(default_factory=VQKDConfig)
    batch_size: int = 512
    view: ViewConfig = field(default_factory=lambda: ViewConfig(scale=(0.08, 1.0)))
    evaluate_images: int = 128
    train: TrainConfig = field(default_factory=TrainConfig)

    def __post_init__(self) -> None:
        if not self.images:
            raise ValueError("images: name at least one dataset")


PRESETS = {
    # BEiT v2's recipe: 100 epochs of ImageNet-1K at batch 512 (microsoft/unilm beit2 TOKENIZER.md).
    "base": ImageTokenizerConfig(
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
        )
    ),
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
    """The tokenizer beside its frozen teacher; forward takes a batch."""

    def __init__(self, tokenizer: VQKD, teacher: DualEncoder) -> None:
        super().__init__()
        self.tokenizer = tokenizer
        self.teacher = teacher.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Distillation:
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batch: PictureBatch) -> dict[str, Tensor]:
        with torch.no_grad():
            target = self.teacher.encode_patches(batch.images)
        results = self.tokenizer(batch.images, target)
        codes = results.pop("codes")
        health = codebook_health(codes, self.tokenizer.config.codebook_size)
        return results | {f"batch/{k}": torch.tensor(v) for k, v in health.items()}


@dataclass(frozen=True)
class ImageTokenizerRecipe:
    cfg: ImageTokenizerConfig
    shape: VQKDConfig

    def build(self) -> nn.Module:
        store = Store(self.cfg.store)
        with models.opened(store, f"models/{self.cfg.teacher}") as folder:
            teacher_shape, _ = weights.load_config(folder)
            teacher = DualEncoder(teacher_shape)
            weights.load_into(teacher, weights.load_tensors(folder))
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
        """Usage, perplexity and cosine on held-out images; code maps beside the images."""
        assert isinstance(module, Distillation)
        store = Store(self.cfg.store)
        name = self.cfg.held_out or f"images/{self.cfg.images[0]}"
        images = pictures.first_images(
            store.dataset(name), self.cfg.evaluate_images, self.shape.image_size
        )
        device = module.tokenizer.codebook.vectors.device
        codes, cosines = [], []
        for part in images.to(device).split(64):
            results = module.tokenizer(part, module.teacher.encode_patches(part))
            codes.append(results["codes"])
            cosines.append(float(results["cosine"]) * len(part))
        all_codes = torch.cat(codes).cpu()
        sheet = pictures.code_maps(images[:12], all_codes[:12], module.tokenizer.grid)
        logger.picture(f"code_maps/step-{step:06d}.png", sheet)
        logger.picture(
            f"code_patches/step-{step:06d}.png",
            pictures.code_patches(images, all_codes, module.tokenizer.config.patch_size),
        )
        health = codebook_health(all_codes, self.shape.codebook_size)
        return {**health, "cosine": sum(cosines) / len(images)}

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        assert isinstance(module, Distillation)
        tensors = {k: v.cpu().contiguous() for k, v in module.tokenizer.state_dict().items()}
        save_file(tensors, folder / weights.WEIGHTS)
        (folder / SHAPE_FILE).write_text(json.dumps(asdict(self.shape), indent=1) + "\n")
        return {"codebook_size": self.shape.codebook_size}


def load(store: Store, name: str) -> tuple[VQKD, str]:
    """A trained tokenizer of the store and its identity (content hash)."""
    bundle = f"tokenizers/image/{name}"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        bundles.load(store, bundle, folder)
        shape = VQKDConfig(**json.loads((folder / SHAPE_FILE).read_text()))
        model = VQKD(shape)
        weights.load_into(model, weights.load_tensors(folder))
    return model.eval(), bundles.identity(store, bundle)


def run(cfg: ImageTokenizerConfig) -> dict[str, Any]:
    """Train, or skip what is trained; returns the bundle's info.

    Raises:
        StoreError: the teacher or a dataset is missing, or the teacher has another patch grid.
    """
    store = Store(cfg.store)
    with models.opened(store, f"models/{cfg.teacher}") as folder:
        teacher, _ = weights.load_config(folder)
    _check_teacher(cfg, teacher)
    shape = replace(cfg.tokenizer, teacher_dim=teacher.hidden)
    inputs = [store.dataset(f"images/{name}").commit().identity for name in cfg.images]
    inputs.append(bundles.identity(store, f"models/{cfg.teacher}"))
    if cfg.train.workers:
        cluster.start()
    return fit(
        store,
        name=cfg.name,
        output=f"tokenizers/image/{cfg.name}",
        fingerprint=fingerprint("train_image_tokenizer", models.decisive(cfg), inputs),
        recipe=ImageTokenizerRecipe(cfg, shape),
        config=cfg.train,
        parameters=config.flatten(cfg),
    )


def _check_teacher(cfg: ImageTokenizerConfig, teacher: ModelConfig) -> None:
    ours, theirs = cfg.tokenizer.image_size // cfg.tokenizer.patch_size, teacher.grid
    if ours != theirs or cfg.tokenizer.image_size != teacher.image_size:
        raise StoreError(
            f"models/{cfg.teacher}: its patch grid is {theirs}x{theirs} at {teacher.image_size} "
            f"pixels, the tokenizer's {ours}x{ours} at {cfg.tokenizer.image_size}: set "
            "tokenizer.image_size and tokenizer.patch_size to the teacher's"
        )


def main() -> None:
    run(config.cli(PRESETS, description=__doc__ or ""))


if __name__ == "__main__":
    main()
