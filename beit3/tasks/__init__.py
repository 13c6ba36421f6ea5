"""Downstream tasks, one file each: `beit3/tasks/<name>.py` defines a class `Task`.

A task knows its published files, its batches, its head and loss, how to predict, its metric, and
its published recipe; `about` is what the jobs must know of it. Adding one means adding one file;
`load(name)` finds it. Files whose names start with an underscore are shared helpers.
"""

from __future__ import annotations

import dataclasses
import importlib
import pkgutil
import statistics
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Protocol, cast

import numpy as np
from torch import nn

from beit3.config import ModelConfig
from beit3.text import TextTokenizer


@dataclass(frozen=True)
class Example:
    """A question, a caption, a pair...: one thing to learn from or to score.

    target: what the task compares a prediction with; JSON values only.
    """

    id: str
    text: str | None
    target: Any = None


@dataclass(frozen=True)
class Record:
    """One or a few images and every example about them.

    images: paths relative to the images' folder, with `/`.
    """

    id: str
    images: tuple[str, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Problem:
    """An entry of the published files that gives no record, and where it is."""

    reason: str
    detail: str
    where: str


@dataclass(frozen=True)
class Sample:
    """A record ready for a batch: decoded images, and one (training) or all of its examples.

    images: each uint8 `[3, size, size]`.
    """

    images: tuple[np.ndarray, ...]
    examples: tuple[Example, ...]


@dataclass(frozen=True)
class Recipe:
    """Published finetuning hyperparameters of one model size; `source` says where."""

    source: str
    image_size: int
    batch_size: int
    steps: int
    warmup: int
    learning_rate: float
    layer_decay: float
    drop_path: float
    weight_decay: float
    betas: tuple[float, float] = (0.9, 0.999)
    head_scale: float = 1.0
    scale: tuple[float, float] = (0.5, 1.0)
    """Smallest and largest share of the picture that a training view shows."""
    flip: float = 0.5
    checkpoint_activations: bool = False
    """A GPU's share of the batch needs its activations recomputed in the backward pass."""


@dataclass(frozen=True)
class About:
    """What preparing, finetuning, evaluating, predicting and tuning know of a task."""

    splits: tuple[str, ...]
    """The published splits that have answers. One must be `train`: it is finetuned on, and the
    classes of the head are its answers."""
    validation_split: str
    """The split that finetuning measures itself on, and that searches select by."""
    test_split: str
    """The split that results are told on: it has answers. Where two qualify, not the one that a
    search would select by."""
    title: str
    """What tables call the score."""
    score: tuple[str, ...]
    """The metrics whose mean is the score."""
    selected_by: str
    """The metric that searches maximise."""
    selected_share: bool = True
    """That metric is a share of one, and so can be shown in per cent."""
    small_options: Mapping[str, float] = field(default_factory=dict)
    """Options for a few hundred steps, in which some of the published ones do only harm."""
    collections: Mapping[str, str] = field(default_factory=dict)
    """Where the splits of several collections are published: the file of each, within the folder
    of annotations. Empty: there is one collection, and `Task.read` takes the folder."""
    images: int = 1
    """Images of a record: 1 or 2."""
    centre_crop: bool = False
    """Evaluate on a picture's central square; else on the whole, squeezed to a square."""
    asks: str = ""
    """The text that a prediction needs beside the images, in a word; empty: none."""
    captions: bool = False
    """The texts of the examples are captions of their images."""
    similarity: Callable[[Any], float] | None = None
    """For a task that ranks images by a text: how near they are, from a prediction."""

    def score_of(self, metrics: Mapping[str, float]) -> float:
        """The score in hundredths, as papers print it."""
        return 100 * statistics.fmean(metrics[name] for name in self.score)


class Task(Protocol):
    """A downstream task. Its dataclass fields other than `labels` are its options, all numbers."""

    about: ClassVar[About]

    labels: tuple[str, ...]
    """The classes of the head; empty for tasks without."""

    @staticmethod
    def read(root: Path, split: str) -> Iterator[Record | Problem]:
        """The records of a split, from the published files, in their order.

        Raises:
            FileNotFoundError: a published file is missing.
            ValueError: the split is unknown, or a file holds something else or another version.
        """
        ...

    @staticmethod
    def read_labels(root: Path, min_count: int) -> list[str]:
        """The head's classes, from the training files; empty for tasks without."""
        ...

    @staticmethod
    def recipes() -> dict[str, Recipe]:
        """Published recipes by model size: `base`, `large`; those for other data than the task's
        usual by size and data: `base-flickr30k`."""
        ...

    def build(self, config: ModelConfig) -> nn.Module:
        """The model: attribute `backbone`; `module(batch)` gives `loss` and other scalars."""
        ...

    def trainable(self, example: Example) -> bool:
        """Whether there is something to learn from an example."""
        ...

    def collate(
        self,
        samples: Sequence[Sample],
        tokenizer: TextTokenizer,
        rngs: Sequence[np.random.Generator] = (),
        *,
        training: bool = False,
    ) -> Any:
        """A batch (a dataclass of tensors on CPU) of every sample's examples.

        Args:
            rngs: One per sample, for training, so that a sample's draws don't depend on which
                worker makes them.
        """
        ...

    def predict(self, module: nn.Module, batch: Any, tokenizer: TextTokenizer) -> list[Any]:
        """JSON-able predictions, one per example of the batch, in order."""
        ...

    def score(
        self, predictions: Sequence[Any], examples: Sequence[Example], *, thorough: bool = False
    ) -> dict[str, float]:
        """Metrics of aligned predictions and examples; a prediction of None counts as wrong.

        Args:
            thorough: Add metrics that take too long for every evaluation in training.
        """
        ...

    def blind(self, known: Iterable[Example], examples: Sequence[Example]) -> dict[str, float]:
        """The metrics of guesses made without looking at the images: the baseline.

        Args:
            known: Examples of the training split, read when iterated over.
        """
        ...

    def submission(
        self, predictions: Sequence[Any], examples: Sequence[Example]
    ) -> list[dict[str, Any]] | str | None:
        """The predictions in the benchmark's format, as JSON or as a CSV file's text; None if it
        takes none."""
        ...


def names() -> list[str]:
    """Names of all tasks."""
    found = (module.name for module in pkgutil.iter_modules(__path__))
    return sorted(name for name in found if not name.startswith("_"))


def load(name: str) -> type[Task]:
    """A task's class.

    Raises:
        ValueError: there is no such task.
    """
    if name not in names():
        raise ValueError(f"task: {name!r} is none of {', '.join(names())}")
    return cast("type[Task]", importlib.import_module(f"{__name__}.{name}").Task)


def create(
    name: str, *, labels: Sequence[str] = (), options: Mapping[str, float] | None = None
) -> Task:
    """A task with its labels and options.

    Raises:
        ValueError: there is no such task, it has no such option, or a value is impossible.
    """
    kind = load(name)
    fields = {f.name: f for f in dataclasses.fields(cast(Any, kind)) if f.name != "labels"}
    unknown = sorted(set(options or {}) - set(fields))
    if unknown:
        there = ", ".join(fields) or "none"
        raise ValueError(f"options: {name} has no {', '.join(unknown)}; it has {there}")
    for key, value in (options or {}).items():
        if isinstance(fields[key].default, int) and value != int(value):
            raise ValueError(f"options.{key}: expected a whole number, got {value}")
    values = {k: type(fields[k].default)(v) for k, v in (options or {}).items()}
    return cast(Any, kind)(labels=tuple(labels), **values)


def options_of(task: Task) -> dict[str, float]:
    """A task's options, as `create` takes them."""
    return {
        f.name: getattr(task, f.name)
        for f in dataclasses.fields(cast(Any, task))
        if f.name != "labels"
    }
