"""Tokenizers in the store: loads them, opens an image tokenizer's teacher, measures its health."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import Tensor

from beit3 import vqkd
from beit3.teachers import PixelTeacher, Teacher, load_teacher
from beit3.text import TextTokenizer
from beit3.tokenizer_health import Baseline, Health, measure
from beit3.vqkd import SHAPE_FILE, VQKD, VQKDConfig
from pipelines import bundles, models, pictures
from pipelines.dataset import Dataset
from pipelines.storage import Store, StoreError

PIXELS = "pixels"
EVALUATED = 64  # images measured at once


def load_text_tokenizer(store: Store, name: str) -> TextTokenizer:
    """A trained text tokenizer from the store."""
    with models.opened(store, f"tokenizers/text/{name}") as folder:
        return models.tokenizer_of(folder)


def load_image_tokenizer(store: Store, name: str) -> tuple[VQKD, str]:
    """A trained image tokenizer from the store, and its identity (content hash)."""
    bundle = f"tokenizers/image/{name}"
    with models.opened(store, bundle) as folder:
        return vqkd.load(folder), bundles.identity(store, bundle)


def image_tokenizer_shape(store: Store, name: str) -> VQKDConfig:
    """The configuration of a tokenizer in the store, without its weights.

    Raises:
        StoreError: there is none.
    """
    bundles.info(store, f"tokenizers/image/{name}")
    return VQKDConfig(**store.read_json(f"tokenizers/image/{name}/{SHAPE_FILE}"))


def open_teacher(store: Store, name: str, tokenizer: VQKDConfig) -> Teacher:
    """The teacher of this name (as in `ImageTokenizerConfig.teacher`) for a tokenizer.

    Raises:
        StoreError: it is missing, or its patch grid can't be adapted to the tokenizer's.
    """
    if name == PIXELS:
        return PixelTeacher(tokenizer.image_size, tokenizer.patch_size)
    bundle = teacher_bundle(name)
    with models.opened(store, bundle) as folder:
        try:
            return load_teacher(folder, tokenizer.image_size, tokenizer.patch_size, bundle)
        except ValueError as error:
            raise StoreError(str(error)) from error


def teacher_bundle(name: str) -> str:
    return name if "/" in name else f"models/{name}"


def health_of(
    tokenizer: VQKD,
    teacher: Teacher | None,
    images: Tensor,
    *,
    learned: Sequence[Dataset],
    baseline_images: int,
    held_out: bool,
) -> Health:
    """Health of a tokenizer on images, uint8 `[n, 3, size, size]`.

    Args:
        teacher: If None, the reconstruction is not measured.
        learned: Datasets from whose images k-means learns; if empty, k-means is left out.
        held_out: Whether the images were not used to train the tokenizer.
    """
    device = tokenizer.codebook.vectors.device

    def targets(some: Tensor) -> Iterator[tuple[Tensor, Tensor | None]]:
        for part in some.split(EVALUATED):
            moved = part.to(device)
            yield moved, None if teacher is None else teacher(moved)

    baseline = None
    if teacher is not None and learned:
        each = -(-baseline_images // len(learned))
        size = tokenizer.config.image_size
        features = (
            target
            for dataset in learned
            for _, target in targets(pictures.some_images(dataset, each, size))
            if target is not None
        )
        baseline = Baseline.of(features, tokenizer.config.codebook_size)
    return measure(tokenizer, targets(images), baseline, held_out=held_out)
