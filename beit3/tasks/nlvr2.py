"""NLVR2: is a sentence about a pair of photographs true?

Published files: `train.json`, `dev.json`, `test1.json`, a JSON object a line
(https://github.com/lil-lab/nlvr, `nlvr2/data`); here they are the splits train, val and test.
Images: `train/<directory>/train-11670-0-img0.png` where a line names a directory, else
`train/...`; `dev/dev-269-0-img0.png`, `test1/...`. The published training archive unpacks to
`images/train`: name `images` as the folder of images and put `dev` and `test1` beside `train`.
Source of head, loss and recipe: microsoft/unilm, `beit3/`.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import ModelConfig
from beit3.model import BEiT3
from beit3.objectives import normalise
from beit3.tasks import About, Example, Problem, Recipe, Record, Sample
from beit3.tasks._batches import owners, pack_texts
from beit3.tasks._guesses import by_first_words
from beit3.tasks._heads import HEAD_INIT, start_small
from beit3.text import TextTokenizer

SPLITS = {"train": "train", "val": "dev", "test": "test1"}

_TRAIN_SENTENCES = 86_373


@dataclass
class Batch:
    """images: uint8 `[samples, 2, 3, size, size]`, left and right; owner: `[sentences]`, each one's
    pair of images; text: packed sentences of `lengths`; targets: `[sentences]`, 1 where true."""

    images: Tensor
    owner: Tensor
    text: Tensor
    lengths: list[int]
    targets: Tensor
    ids: list[str] = field(default_factory=list)


class Head(nn.Module):
    """Two layers, each after a norm. `[n, inputs] -> [n, 2]`; named as in the released files."""

    def __init__(self, inputs: int, hidden: int, scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(inputs)
        self.dense1 = nn.Linear(inputs, hidden)
        self.norm2 = nn.LayerNorm(hidden)
        self.dense2 = nn.Linear(hidden, 2)
        start_small(self.dense1, self.dense2, scale=scale)

    def forward(self, x: Tensor) -> Tensor:
        return self.dense2(F.gelu(self.norm2(self.dense1(self.norm1(x)))))


class Model(nn.Module):
    """The fusion encoder reads the sentence with each image; a classifier reads both summaries."""

    def __init__(self, config: ModelConfig, head_init: float = HEAD_INIT) -> None:
        super().__init__()
        self.backbone = BEiT3(config)
        self.head = Head(4 * config.hidden, 2 * config.hidden, head_init)

    def logits(self, batch: Batch) -> Tensor:
        """`[sentences, 2]`: false, true."""
        pairs = normalise(batch.images)[batch.owner]
        out = self.backbone(
            images=torch.cat([pairs[:, 0], pairs[:, 1]]),
            text=torch.cat([batch.text, batch.text]),
            lengths=2 * batch.lengths,
            pairs=2 * len(batch.lengths),
        )
        left, right = torch.cat([out.image_summary, out.text_summary], -1).chunk(2)
        return self.head(torch.cat([left, right], -1))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.logits(batch).float()
        accuracy = (logits.argmax(1) == batch.targets).float().mean()
        return {"loss": F.cross_entropy(logits, batch.targets), "accuracy": accuracy}


@dataclass(frozen=True)
class Task:
    """NLVR2. Predictions and targets: whether the sentence is true."""

    about: ClassVar[About] = About(
        splits=("train", "val", "test"),
        validation_split="val",
        test_split="test",
        title="NLVR2 accuracy",
        score=("accuracy",),
        selected_by="accuracy",
        small_options={"head_init": 1.0},
        images=2,
        asks="statement",
    )
    labels: tuple[str, ...] = ()
    max_text_length: int = 64
    """Tokens of a sentence, `<s>` and `</s>` included."""
    head_init: float = HEAD_INIT
    """Factor on the classifier's initial weights. If they are as small as the authors', hardly any
    gradient reaches the backbone: long training overcomes that, short training doesn't."""

    def __post_init__(self) -> None:
        if not 0 < self.head_init < math.inf:
            raise ValueError(f"options.head_init: {self.head_init} is no number above 0")

    @staticmethod
    def read(root: Path, split: str) -> Iterator[Record | Problem]:
        """One record per pair of images, in the order of each pair's first sentence."""
        if split not in SPLITS:
            raise ValueError(f"split: {split!r} is none of {', '.join(SPLITS)}")
        file = root / f"{SPLITS[split]}.json"
        if not file.exists():
            raise FileNotFoundError(
                f"{file} is missing. Get it from https://github.com/lil-lab/nlvr, nlvr2/data"
            )
        by_pair: dict[str, list[Example]] = defaultdict(list)
        with file.open("rb") as lines:
            for number, line in enumerate(lines, 1):
                if not line.strip():
                    continue
                try:
                    path, example = _example(json.loads(line), SPLITS[split])
                except (KeyError, TypeError, ValueError, AttributeError) as error:
                    where = f"{file.name}, line {number}"
                    detail = f"{type(error).__name__}: {error}"
                    yield Problem("malformed record", detail[:200], where)
                    continue
                by_pair[path].append(example)
        for path, examples in by_pair.items():
            images = (f"{path}-img0.png", f"{path}-img1.png")
            yield Record(path.rpartition("/")[2], images, tuple(examples))

    @staticmethod
    def read_labels(root: Path, min_count: int) -> list[str]:
        return []

    @staticmethod
    def recipes() -> dict[str, Recipe]:
        """For models without in-domain pretraining; with it, rates are 5e-4 and 1e-4."""
        source = "microsoft/unilm beit3/get_started/get_started_for_nlvr2.md"
        epoch = _TRAIN_SENTENCES // 256
        return {
            size: Recipe(
                source=source,
                image_size=224,
                batch_size=256,
                steps=20 * epoch,
                warmup=5 * epoch,
                learning_rate=rate,
                layer_decay=decay,
                drop_path=0.2,
                weight_decay=0.2,
                checkpoint_activations=size == "large",
            )
            for size, rate, decay in (("base", 7e-4, 0.65), ("large", 3e-4, 0.85))
        }

    def build(self, config: ModelConfig) -> Model:
        return Model(config, self.head_init)

    def trainable(self, example: Example) -> bool:
        return example.target is not None

    def collate(
        self,
        samples: Sequence[Sample],
        tokenizer: TextTokenizer,
        rngs: Sequence[np.random.Generator] = (),
        *,
        training: bool = False,
    ) -> Batch:
        """Raises: ValueError: a sample doesn't have two images."""
        for sample in samples:
            if len(sample.images) != 2:
                raise ValueError(f"nlvr2: expected a pair of images, got {len(sample.images)}")
        examples = [example for sample in samples for example in sample.examples]
        text, lengths = pack_texts([e.text for e in examples], tokenizer, self.max_text_length)
        images = torch.from_numpy(np.stack([np.stack(sample.images) for sample in samples]))
        targets = torch.tensor([int(bool(e.target)) for e in examples], dtype=torch.long)
        ids = [example.id for example in examples]
        return Batch(images, owners(samples), text, lengths, targets, ids)

    def predict(self, module: nn.Module, batch: Batch, tokenizer: TextTokenizer) -> list[bool]:
        assert isinstance(module, Model)
        return [bool(i) for i in module.logits(batch).argmax(1).tolist()]

    def score(
        self,
        predictions: Sequence[bool | None],
        examples: Sequence[Example],
        *,
        thorough: bool = False,
    ) -> dict[str, float]:
        """Official measures, 0..1: `accuracy` of sentences with their pairs of images, and
        `consistency`, the share of sentences that are right with all their pairs."""
        right: list[bool] = []
        by_sentence: dict[tuple[str, ...], list[bool]] = defaultdict(list)
        for prediction, example in zip(predictions, examples, strict=True):
            if example.target is None:
                continue
            right.append(prediction is not None and prediction == example.target)
            split, group, _, sentence = _parts(example.id)
            by_sentence[split, group, sentence].append(right[-1])
        if not right:
            return {}
        consistent = [all(values) for values in by_sentence.values()]
        return {
            "accuracy": sum(right) / len(right),
            "consistency": sum(consistent) / len(consistent),
        }

    def blind(self, known: Iterable[Example], examples: Sequence[Example]) -> dict[str, float]:
        """The commoner answer of the training sentences that begin alike."""
        return self.score(by_first_words(known, examples), examples)

    def submission(self, predictions: Sequence[bool | None], examples: Sequence[Example]) -> str:
        """Input of `nlvr2/eval/metrics.py`: a line `identifier,True` for each example. It wants one
        for every example: one without a prediction has neither answer, and is wrong."""
        return "".join(
            f"{example.id},{'' if prediction is None else bool(prediction)}\n"
            for prediction, example in zip(predictions, examples, strict=True)
        )


def _example(raw: dict[str, Any], folder: str) -> tuple[str, Example]:
    """A line's images, without `-img0.png`, and its example."""
    identifier = raw["identifier"]
    if _parts(identifier)[0] != folder:
        raise ValueError(f"identifier {identifier!r} is not of {folder}")
    sentence = " ".join(raw["sentence"].split())
    label = str(raw["label"]).lower()
    if not sentence:
        raise ValueError("sentence is empty")
    if label not in ("true", "false"):
        raise ValueError(f"label {raw['label']!r} is neither True nor False")
    place = f"{folder}/{raw['directory']}" if "directory" in raw else folder
    pair = identifier.rpartition("-")[0]
    return f"{place}/{pair}", Example(identifier, sentence, label == "true")


def _parts(identifier: str) -> list[str]:
    """Split, set of images, pair in the set, sentence."""
    parts = identifier.split("-")
    if len(parts) != 4:
        raise ValueError(f"identifier {identifier!r} is not split-set-pair-sentence")
    return parts
