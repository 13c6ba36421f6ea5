"""Visual question answering on VQAv2, as classification over frequent answers.

Published files: `v2_OpenEnded_mscoco_<year>_questions.json`, `v2_mscoco_<year>_annotations.json`
(https://visualqa.org/download.html); images `train2014/COCO_train2014_000000000123.jpg`.
Source of head, targets and recipe: microsoft/unilm, `beit3/`.
"""

from __future__ import annotations

import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import ModelConfig
from beit3.model import BEiT3
from beit3.objectives import normalise as normalise_pixels
from beit3.tasks import About, Example, Problem, Recipe, Record, Sample
from beit3.tasks._batches import owners, pack_texts, stack_images
from beit3.tasks._guesses import by_first_words
from beit3.tasks._vqa_text import accuracy, normalise
from beit3.text import TextTokenizer

YEARS = {"train": "train2014", "val": "val2014", "test": "test2015", "test-dev": "test-dev2015"}
SOFT = (0.0, 0.3, 0.6, 0.9, 1.0)
"""Target of an answer by the number of annotators who gave it."""

_TRAIN_QUESTIONS = 443_757
normalise_answer = lru_cache(maxsize=1 << 16)(normalise)


@dataclass
class Batch:
    """images: uint8 `[samples, 3, size, size]`; owner: `[questions]`, each one's image;
    text: packed questions of `lengths`; targets: `[questions, labels]`, 0..1."""

    images: Tensor
    owner: Tensor
    text: Tensor
    lengths: list[int]
    targets: Tensor
    ids: list[str] = field(default_factory=list)


class Model(nn.Module):
    """The fusion encoder, and a classifier on the image's `[CLS]`."""

    def __init__(self, config: ModelConfig, labels: int) -> None:
        super().__init__()
        self.backbone = BEiT3(config)
        hidden = config.hidden
        self.pooler_norm = nn.LayerNorm(hidden)
        self.pooler = nn.Linear(hidden, hidden)
        self.head = nn.Sequential(
            nn.Linear(hidden, 2 * hidden),
            nn.LayerNorm(2 * hidden),
            nn.GELU(),
            nn.Linear(2 * hidden, labels),
        )
        first, last = self.head[0], self.head[3]
        assert isinstance(first, nn.Linear) and isinstance(last, nn.Linear)
        for module in (self.pooler, first, last):
            # Xavier rather than the released code's fixed 0.02, which starves narrow models.
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
        # Start with one label expected in all, not half of them: thousands of negatives would
        # otherwise dominate the first steps' gradients.
        nn.init.constant_(last.bias, -math.log(max(1, labels - 1)))

    def logits(self, batch: Batch) -> Tensor:
        """`[questions, labels]`."""
        out = self.backbone(
            images=normalise_pixels(batch.images)[batch.owner],
            text=batch.text,
            lengths=batch.lengths,
            pairs=len(batch.lengths),
        )
        return self.head(torch.tanh(self.pooler(self.pooler_norm(out.image_summary))))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.logits(batch).float()
        # The mean over classes is scaled back to a sum, as published: the head's rate expects it.
        loss = F.binary_cross_entropy_with_logits(logits, batch.targets) * logits.shape[1]
        chosen = batch.targets.gather(1, logits.argmax(1, keepdim=True))
        return {"loss": loss, "soft_accuracy": chosen.mean()}


@dataclass(frozen=True)
class Task:
    """VQAv2. Predictions: the answer's text."""

    about: ClassVar[About] = About(
        splits=("train", "val"),
        validation_split="val",
        test_split="val",
        title="VQA accuracy",
        score=("accuracy",),
        selected_by="accuracy",
        asks="question",
    )
    labels: tuple[str, ...] = ()
    max_text_length: int = 64
    """Tokens of a question, `<s>` and `</s>` included."""

    @staticmethod
    def read(root: Path, split: str) -> Iterator[Record | Problem]:
        """One record per image, in the order of each image's first question.

        Splits: train, val; test and test-dev, which have no published answers.
        """
        if split not in YEARS:
            raise ValueError(f"split: {split!r} is none of {', '.join(YEARS)}")
        year = YEARS[split]
        asked = _load(root / f"v2_OpenEnded_mscoco_{year}_questions.json", "questions", year)
        answered = {}
        if not split.startswith("test"):
            for raw in _load(root / f"v2_mscoco_{year}_annotations.json", "annotations", year):
                if isinstance(raw, dict) and isinstance(raw.get("question_id"), int):
                    answered[raw["question_id"]] = raw
        by_image: dict[int, list[Example]] = defaultdict(list)
        for place, raw in enumerate(asked):
            where = f"{year} questions, {place}"
            try:
                number, image = int(raw["question_id"]), int(raw["image_id"])
                question = " ".join(raw["question"].split())
                target = None
                if not split.startswith("test"):
                    if number not in answered:
                        raise ValueError(f"question {number} has no annotation")
                    target = _target(answered[number])
            except (KeyError, TypeError, ValueError, AttributeError) as error:
                detail = f"{type(error).__name__}: {error}"
                yield Problem("malformed record", detail[:200], where)
                continue
            by_image[image].append(Example(str(number), question, target))
        folder = "test2015" if split.startswith("test") else year
        for image, examples in by_image.items():
            path = f"{folder}/COCO_{folder}_{image:012d}.jpg"
            yield Record(str(image), (path,), tuple(examples))

    @staticmethod
    def read_labels(root: Path, min_count: int) -> list[str]:
        """Normalised most common answers given at least `min_count` times, in published order."""
        year = YEARS["train"]
        counts: Counter[str] = Counter()
        for raw in _load(root / f"v2_mscoco_{year}_annotations.json", "annotations", year):
            if isinstance(raw, dict) and isinstance(raw.get("multiple_choice_answer"), str):
                counts[normalise_answer(raw["multiple_choice_answer"])] += 1
        return [answer for answer, count in counts.items() if answer and count >= min_count]

    @staticmethod
    def recipes() -> dict[str, Recipe]:
        source = "microsoft/unilm beit3/get_started/get_started_for_vqav2.md"
        epoch = _TRAIN_QUESTIONS // 128
        return {
            size: Recipe(
                source=source,
                image_size=480,
                batch_size=128,
                steps=10 * epoch,
                warmup=epoch,
                learning_rate=rate,
                layer_decay=1.0,
                drop_path=drop_path,
                weight_decay=0.01,
                betas=(0.9, 0.98),
                head_scale=20.0,
                checkpoint_activations=size == "large",
            )
            for size, rate, drop_path in (("base", 3e-5, 0.1), ("large", 2e-5, 0.15))
        }

    @cached_property
    def _index(self) -> dict[str, int]:
        return {label: i for i, label in enumerate(self.labels)}

    def build(self, config: ModelConfig) -> Model:
        if not self.labels:
            raise ValueError("vqa: no labels: prepare the training split, which counts the answers")
        return Model(config, len(self.labels))

    def soft_targets(self, target: Any) -> dict[int, float]:
        """Classes that annotators chose, each with its soft target."""
        answers = target["answers"] if target else []
        counts = Counter(normalise_answer(answer) for answer in answers)
        return {
            self._index[answer]: SOFT[min(count, 4)]
            for answer, count in counts.items()
            if answer in self._index
        }

    def trainable(self, example: Example) -> bool:
        return bool(self.soft_targets(example.target))

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
        targets = torch.zeros(len(examples), len(self.labels))
        for row, example in enumerate(examples):
            for label, value in self.soft_targets(example.target).items():
                targets[row, label] = value
        ids = [example.id for example in examples]
        return Batch(stack_images(samples), owners(samples), text, lengths, targets, ids)

    def predict(self, module: nn.Module, batch: Batch, tokenizer: TextTokenizer) -> list[str]:
        assert isinstance(module, Model)
        return [self.labels[i] for i in module.logits(batch).argmax(1).tolist()]

    def score(
        self,
        predictions: Sequence[str | None],
        examples: Sequence[Example],
        *,
        thorough: bool = False,
    ) -> dict[str, float]:
        """Official VQA accuracy, 0..1, over all answered questions and by type of answer."""
        by_type: dict[str, list[float]] = defaultdict(list)
        for prediction, example in zip(predictions, examples, strict=True):
            if not example.target:
                continue
            lost = prediction is None  # "" can be right: it is what the article "a" becomes
            value = 0.0 if lost else accuracy(prediction, example.target["answers"])
            by_type[example.target.get("type") or "other"].append(value)
        every = [value for values in by_type.values() for value in values]
        if not every:
            return {}
        scores = {"accuracy": sum(every) / len(every)}
        for kind, values in sorted(by_type.items()):
            scores[f"accuracy_{kind.replace('/', '_')}"] = sum(values) / len(values)
        return scores

    def blind(self, known: Iterable[Example], examples: Sequence[Example]) -> dict[str, float]:
        """The commonest answer of the training questions that begin alike."""
        guesses = by_first_words(known, examples, lambda target: target["answers"])
        return self.score(guesses, examples)

    def submission(
        self, predictions: Sequence[str | None], examples: Sequence[Example]
    ) -> list[dict[str, Any]]:
        """The evaluation server's format."""
        return [
            {"question_id": int(example.id), "answer": prediction or ""}
            for prediction, example in zip(predictions, examples, strict=True)
        ]


def _target(raw: dict[str, Any]) -> dict[str, Any]:
    answers = [answer["answer"] for answer in raw["answers"]]
    if not answers or not all(isinstance(answer, str) for answer in answers):
        raise ValueError("answers are no texts")
    return {"answers": answers, "type": raw.get("answer_type")}


def _load(file: Path, key: str, year: str) -> list[Any]:
    if not file.exists():
        raise FileNotFoundError(
            f"{file} is missing. Get it from https://visualqa.org/download.html"
        )
    try:
        content = json.loads(file.read_bytes())
        found, version, subset = content[key], content["info"]["version"], content["data_subtype"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a file of VQA v2 ({error})") from error
    if not str(version).startswith("2") or subset != year:
        raise ValueError(f"{file}: holds {subset} of VQA {version}, expected {year} of VQA 2.0")
    if not isinstance(found, list):
        raise ValueError(f"{file}: not a file of VQA v2 ({key} are no list)")
    return found
