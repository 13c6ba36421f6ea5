"""Image captioning on COCO (Karpathy split) by masked language modelling with a causal mask.

Published files: `dataset_coco.json`; images `train2014/COCO_train2014_000000000123.jpg`.
Source of objective, decoding and recipe: microsoft/unilm, `beit3/`; "Image as a Foreign Language"
table 14.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import ModelConfig
from beit3.generate import generate
from beit3.model import BEiT3
from beit3.objectives import normalise
from beit3.tasks import About, Example, Problem, Recipe, Record, Sample, _karpathy
from beit3.tasks._batches import owners, pack_texts, stack_images
from beit3.tasks._caption_metrics import caption_scores
from beit3.text import TextTokenizer

_TRAIN_CAPTIONS = 566_747


@dataclass
class Batch:
    """images: uint8 `[samples, 3, size, size]`; owner: `[captions]`, each one's image;
    text: packed captions of `lengths`, masked; masked_tokens: `[masked]` places in `text`;
    words: `[masked]` the ids that were there."""

    images: Tensor
    owner: Tensor
    text: Tensor
    lengths: list[int]
    masked_tokens: Tensor
    words: Tensor
    ids: list[str] = field(default_factory=list)


class Model(nn.Module):
    """The image-to-text encoder and the vocabulary head of pretraining."""

    passes: Tensor

    def __init__(self, config: ModelConfig, task: Task) -> None:
        super().__init__()
        self.backbone = BEiT3(config)
        self.text_head = nn.Linear(config.hidden, config.vocab_size)
        nn.init.trunc_normal_(self.text_head.weight, std=0.02)
        nn.init.zeros_(self.text_head.bias)
        self.task = task
        # Number of training passes: kept with the weights, so that a resumed run knows it.
        self.register_buffer("passes", torch.zeros((), dtype=torch.long))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        out = self.backbone(
            images=normalise(batch.images)[batch.owner],
            text=batch.text,
            lengths=batch.lengths,
            pairs=len(batch.lengths),
            causal_text=True,
        )
        assert out.text is not None
        logits = self.text_head(out.text[batch.masked_tokens]).float()
        losses = smoothed_loss(logits, batch.words, self.task.label_smoothing)
        if self.training:
            self.passes += 1
        accuracy = (logits.argmax(-1) == batch.words).float().mean()
        return {"loss": self._mean(losses), "accuracy": accuracy}

    def _mean(self, losses: Tensor) -> Tensor:
        """Mean of all, or later in training of all but the worst, `[masked] -> []`."""
        share, after = self.task.drop_worst, self.task.drop_worst_after
        if not (self.training and share):
            return losses.mean()
        keep = max(1, int(len(losses) * (1 - share)))
        best = losses.topk(keep, largest=False).values
        # Compute both: reading the number of passes from a GPU would wait for it.
        return torch.where(self.passes > after, best.mean(), losses.mean())


def smoothed_loss(logits: Tensor, words: Tensor, smoothing: float) -> Tensor:
    """Divergence `[n]` of the prediction from the smoothed one-hot target; 0 where they agree."""
    logprobs = F.log_softmax(logits, -1)
    chosen = logprobs.gather(1, words[:, None])[:, 0]
    if not smoothing:
        return -chosen
    others = logits.shape[1] - 1
    entropy = -(1 - smoothing) * math.log(1 - smoothing) - smoothing * math.log(smoothing / others)
    rest = logprobs.sum(-1) - chosen
    return -(1 - smoothing) * chosen - smoothing / others * rest - entropy


@dataclass(frozen=True)
class Task:
    """COCO captioning. Predictions: the caption's text."""

    about: ClassVar[About] = About(
        splits=("train", "val", "test"),
        validation_split="val",
        test_split="test",
        title="CIDEr",
        score=("cider",),
        selected_by="cider",
        selected_share=False,
        small_options={"drop_worst": 0.0},
        collections=_karpathy.DATASETS,
        captions=True,
    )
    labels: tuple[str, ...] = ()
    max_text_length: int = 32
    """Maximum tokens of a caption, `<s>` and `</s>` included, also in generation."""
    mask_ratio: float = 0.7
    label_smoothing: float = 0.1
    drop_worst: float = 0.2
    """Share of the masked words, those with the largest loss, that are dropped later in training:
    captions disagree, and some are wrong."""
    drop_worst_after: int = 12_000
    """Forward passes after which they are dropped."""
    beams: int = 3
    length_penalty: float = 0.6

    def __post_init__(self) -> None:
        if not 0 < self.mask_ratio <= 1:
            raise ValueError(f"options.mask_ratio: {self.mask_ratio} is not within 0..1")
        if not 0 <= self.label_smoothing < 1:
            raise ValueError(f"options.label_smoothing: {self.label_smoothing} is not within 0..1")
        if not 0 <= self.drop_worst < 1:
            raise ValueError(f"options.drop_worst: {self.drop_worst} is not within 0..1")
        if self.beams < 1:
            raise ValueError(f"options.beams: expected at least 1, got {self.beams}")
        if self.max_text_length < 3:
            raise ValueError(
                f"options.max_text_length: expected at least 3, <s>, a word and </s>, got "
                f"{self.max_text_length}"
            )
        if not math.isfinite(self.length_penalty):
            raise ValueError(f"options.length_penalty: {self.length_penalty} is no number")

    @staticmethod
    def read(root: Path, split: str) -> Iterator[Record | Problem]:
        """Training: an example per caption. Val and test: one example, its target all captions."""
        for photo in _karpathy.read(root, split):
            if isinstance(photo, Problem):
                yield photo
            elif split == "train":
                examples = tuple(Example(key, text) for key, text in photo.captions)
                yield Record(photo.id, (photo.path,), examples)
            else:
                references = [text for _, text in photo.captions]
                yield Record(photo.id, (photo.path,), (Example(photo.id, None, references),))

    @staticmethod
    def read_labels(root: Path, min_count: int) -> list[str]:
        return []

    @staticmethod
    def recipes() -> dict[str, Recipe]:
        source = "microsoft/unilm beit3/get_started/get_started_for_captioning.md"
        epoch = _TRAIN_CAPTIONS // 256
        return {
            size: Recipe(
                source=source,
                image_size=480,
                batch_size=256,
                steps=10 * epoch,
                warmup=epoch,
                learning_rate=rate,
                layer_decay=1.0,
                drop_path=0.1,
                weight_decay=0.05,
                checkpoint_activations=True,
            )
            for size, rate in (("base", 4e-5), ("large", 8e-6))
        }

    def build(self, config: ModelConfig) -> Model:
        return Model(config, self)

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
        owner = owners(samples)
        places = torch.zeros(0, dtype=torch.long)
        words = torch.zeros(0, dtype=torch.long)
        if training:
            packed = text.numpy()
            hidden: list[np.ndarray] = []
            start = 0
            for length, sample in zip(lengths, owner.tolist(), strict=True):
                hidden.append(start + self._hide(length, rngs[sample]))
                start += length
            places = torch.from_numpy(np.concatenate(hidden))
            words = text[places].clone()
            start = 0
            for at, sample in zip(hidden, owner.tolist(), strict=True):
                packed[at] = self._corrupt(packed[at], tokenizer, rngs[sample])
        ids = [example.id for example in examples]
        return Batch(stack_images(samples), owner, text, lengths, places, words, ids)

    def _hide(self, length: int, rng: np.random.Generator) -> np.ndarray:
        """Places to predict, of 1..length-1: `</s>` is a word to learn, `<s>` is not."""
        count = min(max(1, int(length * self.mask_ratio + 0.5)), length - 1)
        return np.sort(1 + rng.choice(length - 1, count, replace=False))

    def _corrupt(
        self, ids: np.ndarray, tokenizer: TextTokenizer, rng: np.random.Generator
    ) -> np.ndarray:
        """80% become `<mask>`, 10% any word, 10% stay (BERT, arXiv 1810.04805)."""
        draw = rng.random(len(ids))
        any_word = rng.integers(4, tokenizer.mask_id, len(ids))
        return np.where(draw < 0.8, tokenizer.mask_id, np.where(draw < 0.9, any_word, ids))

    def predict(self, module: nn.Module, batch: Batch, tokenizer: TextTokenizer) -> list[str]:
        assert isinstance(module, Model)
        captions = generate(
            module.backbone,
            module.text_head,
            batch.images,
            tokenizer,
            max_length=self.max_text_length,
            beams=self.beams,
            length_penalty=self.length_penalty,
        )
        texts = [tokenizer.decode(caption.ids).strip() for caption in captions]
        return [texts[owner] for owner in batch.owner.tolist()]

    def score(
        self,
        predictions: Sequence[str | None],
        examples: Sequence[Example],
        *,
        thorough: bool = False,
    ) -> dict[str, float]:
        """CIDEr (0..10; papers multiply by 100), BLEU-4 and ROUGE-L (0..1); if thorough, METEOR and
        SPICE (0..1)."""
        pairs = [
            (prediction or "", example.target)
            for prediction, example in zip(predictions, examples, strict=True)
            if example.target
        ]
        references = [references for _, references in pairs]
        return caption_scores([p for p, _ in pairs], references, thorough=thorough)

    def blind(self, known: Iterable[Example], examples: Sequence[Example]) -> dict[str, float]:
        """For each image a caption of the training split, drawn at random."""
        texts = [example.text or "" for example in known]
        rng = np.random.default_rng(0)
        return self.score([texts[int(rng.integers(len(texts)))] for _ in examples], examples)

    def submission(
        self, predictions: Sequence[str | None], examples: Sequence[Example]
    ) -> list[dict[str, Any]]:
        """COCO's results format."""
        return [
            {"image_id": _number(example.id), "caption": prediction or ""}
            for prediction, example in zip(predictions, examples, strict=True)
        ]


def _number(identifier: str) -> int | str:
    """COCO's ids are numbers; other pictures keep the names that they have."""
    return int(identifier) if identifier.isdecimal() else identifier
