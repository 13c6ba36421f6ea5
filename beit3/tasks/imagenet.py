"""Image classification on ImageNet-1K.

Published files, in the annotations' folder, which may be the images' folder: `train/n01440764/...`;
`val/n01440764/...`, or flat as published, `val/ILSVRC2012_val_00000001.JPEG`, with the devkit's
ground truth (`ILSVRC2012_devkit_t12/data`) or Kaggle's `LOC_val_solution.csv`. With Kaggle's
`train_cls.txt` no folder of images is listed, so images can be in a bucket. Classes are WordNet ids
in alphabetical order.
Source of head, augmentation and recipe: microsoft/unilm, `beit3/`, whose colour jitter takes no
effect: timm leaves it out where RandAugment is on.
"""

from __future__ import annotations

import csv
import hashlib
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import ModelConfig
from beit3.model import BEiT3
from beit3.tasks import About, Example, Problem, Recipe, Record, Sample
from beit3.tasks._augment import DEVIATION, MEAN, erase, mix, rand_augment
from beit3.tasks._batches import owners, stack_images
from beit3.tasks._heads import start_small
from beit3.text import TextTokenizer

SPLITS = ("train", "val")
SUFFIXES = {".jpeg", ".jpg", ".png"}
TRUTH = "ILSVRC2012_validation_ground_truth.txt"

_TRAIN_IMAGES = 1_281_167
WNID = re.compile(r"n\d{8}")
_SOLUTION = ["ImageId", "PredictionString"]
_HASH_BYTES = hashlib.sha256().digest_size
_UNSEEN = ("text_", "language", "fusion_expert", "mask_token")


@dataclass
class Batch:
    """images: uint8 `[samples, 3, size, size]`; owner: `[examples]`, each one's image; targets:
    `[examples, labels]`, 0..1."""

    images: Tensor
    owner: Tensor
    targets: Tensor
    ids: list[str] = field(default_factory=list)


class Model(nn.Module):
    """The vision encoder, and a linear classifier on the mean of the patches.

    The encoder has no final norm, since the mean has one; its parts for text are kept unchanged and
    not trained.
    """

    mean: Tensor
    deviation: Tensor

    def __init__(self, config: ModelConfig, labels: int) -> None:
        super().__init__()
        self.backbone = BEiT3(replace(config, final_norm=False))
        self.fc_norm = nn.LayerNorm(config.hidden)
        self.head = nn.Linear(config.hidden, labels)
        start_small(self.head)
        for name, parameter in self.backbone.named_parameters():
            if any(part in name for part in _UNSEEN):
                parameter.requires_grad_(False)
        for name, value in (("mean", MEAN), ("deviation", DEVIATION)):
            self.register_buffer(name, torch.tensor(value).view(3, 1, 1), persistent=False)

    def logits(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, size, size]` to `[n, labels]`."""
        out = self.backbone(images=(images.float() / 255 - self.mean) / self.deviation)
        assert out.vision is not None
        return self.head(self.fc_norm(out.vision[:, 1:].mean(1)))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        logits = self.logits(batch.images).float()[batch.owner]
        accuracy = (logits.argmax(1) == batch.targets.argmax(1)).float().mean()
        return {"loss": F.cross_entropy(logits, batch.targets), "accuracy": accuracy}


@dataclass(frozen=True)
class Task:
    """ImageNet-1K. Predictions: the five likeliest classes, the likeliest first."""

    about: ClassVar[About] = About(
        splits=("train", "val"),
        validation_split="val",
        test_split="val",
        title="ImageNet top-1",
        score=("top_1",),
        selected_by="top_1",
        small_options={"rand_augment": 0.0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0},
        centre_crop=True,
    )
    labels: tuple[str, ...] = ()
    rand_augment: float = 9.0
    """Magnitude of RandAugment, up to 10; 0 turns it off."""
    erase: float = 0.25
    """Probability of random erasing."""
    mixup: float = 0.8
    """Parameter of mixup's beta distribution; 0 turns it off. A worker mixes the images of its own
    share of a batch, so the mixtures depend on the number of workers."""
    cutmix: float = 1.0
    """The same for CutMix. If both are on, each batch gets one of them."""
    label_smoothing: float = 0.1

    def __post_init__(self) -> None:
        if not 0 <= self.rand_augment <= 10:
            raise ValueError(f"options.rand_augment: {self.rand_augment} is not within 0..10")
        for name in ("erase", "label_smoothing"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"options.{name}: {getattr(self, name)} is not within 0..1")
        for name in ("mixup", "cutmix"):
            if getattr(self, name) < 0:
                raise ValueError(f"options.{name}: expected 0 or more, got {getattr(self, name)}")

    @staticmethod
    def read(root: Path, split: str) -> Iterator[Record | Problem]:
        """A record per image; its example's target is the WordNet id.

        Classes are mixed, in an order that depends on the names alone: files are published by
        class, so a part of the split would show few of them.
        """
        if split not in SPLITS:
            raise ValueError(f"split: {split!r} is none of {', '.join(SPLITS)}")
        pairs = _train(root) if split == "train" else _val(root)
        # As bytes, hash first: a million pairs and hashes would take several times the memory.
        found = [_hash(path) + f"{path}\0{wnid}".encode() for path, wnid in pairs]
        found.sort()
        for item in found:
            path, _, wnid = item[_HASH_BYTES:].decode().rpartition("\0")
            if WNID.fullmatch(wnid):
                name, _ = posixpath.splitext(posixpath.basename(path))
                yield Record(name, (path,), (Example(name, None, wnid),))
            else:
                detail = f"class {wnid[:100]!r} is no WordNet id such as n01440764"
                yield Problem("malformed record", detail, path)

    @staticmethod
    def read_labels(root: Path, min_count: int) -> list[str]:
        """The training images' WordNet ids; their place in alphabetical order is the class."""
        return sorted({wnid for _, wnid in _train(root) if WNID.fullmatch(wnid)})

    @staticmethod
    def recipes() -> dict[str, Recipe]:
        source = "microsoft/unilm beit3/get_started/get_started_for_image_classification.md"
        epoch = _TRAIN_IMAGES // 1024
        return {
            size: Recipe(
                source=source,
                image_size=224,
                batch_size=1024,
                steps=50 * epoch,
                warmup=5 * epoch,
                learning_rate=rate,
                layer_decay=decay,
                drop_path=drop_path,
                weight_decay=0.05,
                scale=(0.08, 1.0),
                checkpoint_activations=size == "large",
            )
            for size, rate, decay, drop_path in (
                ("base", 7e-4, 0.65, 0.15),
                ("large", 2e-4, 0.8, 0.25),
            )
        }

    @cached_property
    def _index(self) -> dict[str, int]:
        return {label: i for i, label in enumerate(self.labels)}

    def build(self, config: ModelConfig) -> Model:
        if not self.labels:
            raise ValueError("imagenet: no labels: prepare the training split, which has them all")
        return Model(config, len(self.labels))

    def trainable(self, example: Example) -> bool:
        return example.target in self._index

    def collate(
        self,
        samples: Sequence[Sample],
        tokenizer: TextTokenizer,
        rngs: Sequence[np.random.Generator] = (),
        *,
        training: bool = False,
    ) -> Batch:
        examples = [example for sample in samples for example in sample.examples]
        targets = np.zeros((len(examples), len(self.labels)), np.float32)
        for row, example in enumerate(examples):
            if example.target in self._index:
                targets[row, self._index[example.target]] = 1.0
        images = stack_images(samples)
        if training:
            pairs = zip(images.numpy(), rngs, strict=True)
            pixels = np.stack([self._augment(image, rng) for image, rng in pairs])
            targets = targets * (1 - self.label_smoothing) + self.label_smoothing / len(self.labels)
            pixels, targets = mix(pixels, targets, rngs[0], mixup=self.mixup, cutmix=self.cutmix)
            images = torch.from_numpy(pixels)
        ids = [example.id for example in examples]
        return Batch(images, owners(samples), torch.from_numpy(targets), ids)

    def _augment(self, pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
        if self.rand_augment:
            pixels = rand_augment(pixels, rng, self.rand_augment)
        return erase(pixels, rng) if rng.random() < self.erase else pixels

    def predict(self, module: nn.Module, batch: Batch, tokenizer: TextTokenizer) -> list[list[str]]:
        assert isinstance(module, Model)
        best = module.logits(batch.images).topk(min(5, len(self.labels))).indices[batch.owner]
        return [[self.labels[i] for i in row] for row in best.tolist()]

    def score(
        self,
        predictions: Sequence[list[str] | None],
        examples: Sequence[Example],
        *,
        thorough: bool = False,
    ) -> dict[str, float]:
        """Top-1 and top-5 accuracy, 0..1."""
        pairs = [
            (prediction or [], example.target)
            for prediction, example in zip(predictions, examples, strict=True)
            if example.target is not None
        ]
        if not pairs:
            return {}
        return {f"top_{k}": sum(t in p[:k] for p, t in pairs) / len(pairs) for k in (1, 5)}

    def blind(self, known: Iterable[Example], examples: Sequence[Example]) -> dict[str, float]:
        """For every image the commonest classes of the training split."""
        counts = Counter(example.target for example in known)
        guess = [wnid for wnid, _ in counts.most_common(5)]
        return self.score([guess] * len(examples), examples)

    def submission(
        self, predictions: Sequence[list[str] | None], examples: Sequence[Example]
    ) -> None:
        return None


# -- published files: paths of images, each with its class ----------------------------------------


def _train(root: Path) -> Iterator[tuple[str, str]]:
    listed = root / "train_cls.txt"
    if listed.exists():
        with listed.open(errors="replace") as lines:
            for line in lines:
                if words := line.split():
                    yield f"train/{words[0]}.JPEG", words[0].partition("/")[0]
        return
    yield from _folders(
        root,
        "train",
        "no folders like train/n01440764, and no train_cls.txt. Get ILSVRC2012 from "
        "https://image-net.org and unpack every class's archive to a folder of its own",
    )


def _val(root: Path) -> Iterator[tuple[str, str]]:
    solution = root / "LOC_val_solution.csv"
    truth = next((f for f in (root / TRUTH, _devkit(root) / TRUTH) if f.exists()), None)
    if solution.exists():
        with solution.open(newline="", errors="replace") as file:
            rows = (row for row in csv.reader(file) if row)
            if next(rows, None) != _SOLUTION:
                raise ValueError(f"{solution}: its first line is not {','.join(_SOLUTION)}")
            for row in rows:
                # A class and a box for each object, all of one class.
                yield f"val/{row[0]}.JPEG", " ".join(row[1:]).partition(" ")[0]
    elif truth is not None:
        classes = _devkit_classes(truth.parent / "meta.mat")
        for place, number in enumerate(truth.read_text(errors="replace").split(), 1):
            yield f"val/ILSVRC2012_val_{place:08d}.JPEG", classes.get(number, number)
    else:
        yield from _folders(
            root,
            "val",
            f"no folders like val/n01440764, no LOC_val_solution.csv and no {TRUTH}: one of them "
            "must tell the classes of the validation images",
        )


def _folders(root: Path, split: str, without: str) -> Iterator[tuple[str, str]]:
    """The images in a folder for each class; `without` is the error if there are none."""
    some = False
    for folder in sorted((root / split).glob("n*")):
        if folder.is_dir():
            for file in folder.iterdir():
                if file.suffix.lower() in SUFFIXES:
                    some = True
                    yield f"{split}/{folder.name}/{file.name}", folder.name
    if not some:
        raise FileNotFoundError(f"{root}: {without}")


def _hash(path: str) -> bytes:
    return hashlib.sha256(path.encode()).digest()


def _devkit(root: Path) -> Path:
    return root / "ILSVRC2012_devkit_t12/data"


def _devkit_classes(file: Path) -> dict[str, str]:
    """WordNet ids by the devkit's numbers, which follow another order."""
    from scipy.io import loadmat

    if not file.exists():
        raise FileNotFoundError(f"{file} is missing: it tells what the numbers in {TRUTH} mean")
    try:
        synsets = loadmat(file, squeeze_me=True)["synsets"]
        pairs = zip(synsets["ILSVRC2012_ID"], synsets["WNID"], strict=True)
        return {str(int(number)): str(wnid) for number, wnid in pairs}
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise ValueError(f"{file}: not the devkit's meta.mat ({error})") from error
