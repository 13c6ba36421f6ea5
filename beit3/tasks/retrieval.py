"""Image-text retrieval on COCO or Flickr30k (Karpathy splits) with the dual encoder.

Published files: `dataset_coco.json` or `dataset_flickr30k.json`, whichever the folder holds.
Source of objective and recipe: microsoft/unilm, `beit3/`.
"""

from __future__ import annotations

import base64
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
from torch import Tensor, nn

from beit3.config import ModelConfig
from beit3.objectives import DualEncoder
from beit3.tasks import About, Example, Problem, Recipe, Record, Sample, _karpathy
from beit3.tasks._batches import owners, pack_texts, stack_images
from beit3.text import TextTokenizer

_TRAIN_CAPTIONS = 566_747  # of COCO
_TRAIN_CAPTIONS_FLICKR30K = 145_000
KS = (1, 5, 10)
_METRICS = [f"{what}_recall_{k}" for what in ("text", "image") for k in KS] + ["mean_recall"]
_QUERIES_AT_ONCE = 1024


@dataclass
class Batch:
    """images: uint8 `[samples, 3, size, size]`; owner: `[captions]`, each one's image;
    text: packed captions of `lengths`; image_ids: id of each caption's image."""

    images: Tensor
    owner: Tensor
    text: Tensor
    lengths: list[int]
    image_ids: list[str] = field(default_factory=list)


class Model(DualEncoder):
    """The dual encoder over batches."""

    def forward(self, batch: Batch) -> dict[str, Tensor]:  # type: ignore[override]
        return super().forward(batch.images[batch.owner], batch.text, batch.lengths)


def pack(vector: np.ndarray) -> str:
    """A vector as JSON-able text: base64 of little-endian float32."""
    return base64.b64encode(vector.astype("<f4").tobytes()).decode()


def unpack(text: str) -> np.ndarray:
    return np.frombuffer(base64.b64decode(text), dtype="<f4")


def _similarity(prediction: dict[str, str]) -> float:
    """Cosine of a text and its image, -1..1, from the prediction of both."""
    return float(np.dot(unpack(prediction["image"]), unpack(prediction["text"])))


@dataclass(frozen=True)
class Task:
    """Retrieval. Predictions: a text's unit vector, and with an image's first text the image's
    too."""

    about: ClassVar[About] = About(
        splits=("train", "val", "test"),
        validation_split="val",
        test_split="test",
        title="retrieval R@1",
        score=("text_recall_1", "image_recall_1"),  # both ways, as the paper's ablations
        selected_by="mean_recall",
        collections=_karpathy.DATASETS,
        asks="query",
        captions=True,
        similarity=_similarity,
    )
    labels: tuple[str, ...] = ()
    max_text_length: int = 64
    """Tokens of a caption, `<s>` and `</s>` included."""

    @staticmethod
    def read(root: Path, split: str) -> Iterator[Record | Problem]:
        """An example per caption; its target is its image's id."""
        for photo in _karpathy.read(root, split):
            if isinstance(photo, Problem):
                yield photo
            else:
                examples = tuple(Example(key, text, photo.id) for key, text in photo.captions)
                yield Record(photo.id, (photo.path,), examples)

    @staticmethod
    def read_labels(root: Path, min_count: int) -> list[str]:
        return []

    @staticmethod
    def recipes() -> dict[str, Recipe]:
        """COCO's recipes, and those of `<size>-flickr30k`."""
        source = "microsoft/unilm beit3/get_started/get_started_for_retrieval.md"
        coco, flickr30k = (n // 3072 for n in (_TRAIN_CAPTIONS, _TRAIN_CAPTIONS_FLICKR30K))
        return {
            size: Recipe(
                source=source,
                image_size=384,
                batch_size=3072,
                steps=epochs * epoch,
                warmup=warmup * epoch,
                learning_rate=rate,
                layer_decay=decay,
                drop_path=0.2,
                weight_decay=0.05,
                checkpoint_activations=True,
            )
            for size, epoch, epochs, warmup, rate, decay in (
                ("base", coco, 15, 3, 2e-4, 0.65),
                ("large", coco, 15, 3, 5e-5, 0.85),
                ("base-flickr30k", flickr30k, 20, 5, 1e-4, 0.65),
                ("large-flickr30k", flickr30k, 20, 5, 5e-5, 0.85),
            )
        }

    def build(self, config: ModelConfig) -> Model:
        return Model(config)

    def trainable(self, example: Example) -> bool:
        return bool(example.text)

    def collate(
        self,
        samples: Sequence[Sample],
        tokenizer: TextTokenizer,
        rngs: Sequence[np.random.Generator] = (),
        *,
        training: bool = False,
    ) -> Batch:
        examples = [example for sample in samples for example in sample.examples]
        text, lengths = pack_texts([e.text for e in examples], tokenizer, self.max_text_length)
        ids = [str(example.target) for example in examples]
        return Batch(stack_images(samples), owners(samples), text, lengths, ids)

    def predict(
        self, module: nn.Module, batch: Batch, tokenizer: TextTokenizer
    ) -> list[dict[str, str | None]]:
        assert isinstance(module, Model)
        pictures = module.encode_images(batch.images).float().cpu().numpy()
        texts = module.encode_texts(batch.text, batch.lengths).float().cpu().numpy()
        predictions: list[dict[str, str | None]] = []
        previous = -1
        for row, owner in enumerate(batch.owner.tolist()):
            first = owner != previous
            previous = owner
            predictions.append(
                {"text": pack(texts[row]), "image": pack(pictures[owner]) if first else None}
            )
        return predictions

    def score(
        self,
        predictions: Sequence[dict[str, str | None] | None],
        examples: Sequence[Example],
        *,
        thorough: bool = False,
    ) -> dict[str, float]:
        """Recall at 1, 5 and 10 (0..1): `text_recall_*` of an image's texts, `image_recall_*` of a
        text's image, and their mean. Every image counts once, even if it occurs twice.
        """
        gallery: dict[str, np.ndarray] = {}
        texts: list[np.ndarray] = []
        text_owners: list[str] = []
        lost = 0
        for prediction, example in zip(predictions, examples, strict=True):
            if prediction is None or not prediction["text"]:
                lost += 1
                continue
            if prediction["image"]:
                gallery.setdefault(str(example.target), unpack(prediction["image"]))
            texts.append(unpack(prediction["text"]))
            text_owners.append(str(example.target))
        if not examples:
            return {}
        if not gallery or not texts:
            return dict.fromkeys(_METRICS, 0.0)
        places = {name: i for i, name in enumerate(gallery)}
        own = np.array([places.get(name, -1) for name in text_owners])
        pictures = np.stack(list(gallery.values()))
        lost_images = len({str(e.target) for e in examples} - set(places))
        return recalls(pictures, np.stack(texts), own, lost_texts=lost, lost_images=lost_images)

    def blind(self, known: Iterable[Example], examples: Sequence[Example]) -> dict[str, float]:
        """Recalls of a random ranking; every image has as many texts as the others."""
        texts = len(examples)
        images = len({str(example.target) for example in examples})
        each = texts // images
        values = {}
        for k in KS:
            drawn = min(k, texts)
            miss = math.comb(texts - each, drawn) / math.comb(texts, drawn)
            values |= {f"text_recall_{k}": 1 - miss, f"image_recall_{k}": min(1.0, k / images)}
        return values

    def submission(
        self, predictions: Sequence[Any], examples: Sequence[Example]
    ) -> list[dict[str, Any]] | None:
        return None


def _similarities(texts: np.ndarray, images: np.ndarray) -> np.ndarray:
    """`[texts, images]`; a vector that is no number is the least similar to all."""
    found = texts @ images.T
    return np.where(np.isnan(found), -np.inf, found)


def recalls(
    images: np.ndarray,
    texts: np.ndarray,
    owner: np.ndarray,
    *,
    lost_texts: int = 0,
    lost_images: int = 0,
) -> dict[str, float]:
    """Recall at 1, 5, 10 both ways, 0..1.

    Candidates with equal similarity share their mean rank, so that a model whose vectors are all
    alike scores at chance.

    Args:
        images: `[images, dim]`, each image once.
        texts: `[texts, dim]`.
        owner: `[texts]` the image of each text, -1 where it is not among `images`.
        lost_texts: Further texts that count as missed.
        lost_images: Further images that count as missed.
    """
    best = np.full(len(images), -np.inf)  # similarity of each image's nearest own text
    text_ranks = np.full(len(texts), np.inf)
    blocks = range(0, len(texts), _QUERIES_AT_ONCE)
    for start in blocks:
        span = slice(start, start + _QUERIES_AT_ONCE)
        similarity = _similarities(texts[span], images)
        own = owner[span]
        known = np.flatnonzero(own >= 0)
        mine = similarity[known, own[known]]
        more = (similarity[known] > mine[:, None]).sum(1)
        equal = (similarity[known] == mine[:, None]).sum(1) - 1
        text_ranks[start + known] = more + equal / 2
        np.maximum.at(best, own[known], mine)
    image_ranks = np.zeros(len(images))
    for start in blocks:
        similarity = _similarities(texts[start : start + _QUERIES_AT_ONCE], images)
        own = owner[start : start + _QUERIES_AT_ONCE]
        known = np.flatnonzero(own >= 0)
        foreign = np.ones(similarity.shape, dtype=bool)
        foreign[known, own[known]] = False
        image_ranks += ((similarity > best) & foreign).sum(0)
        image_ranks += ((similarity == best) & foreign).sum(0) / 2
    image_ranks[np.isinf(best)] = np.inf
    scores = {f"text_recall_{k}": (image_ranks < k).sum() / (len(images) + lost_images) for k in KS}
    for k in KS:
        scores[f"image_recall_{k}"] = (text_ranks < k).sum() / (len(texts) + lost_texts)
    scores["mean_recall"] = sum(scores.values()) / len(scores)
    return {name: float(value) for name, value in scores.items()}
