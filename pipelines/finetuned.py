"""Loads finetuned models, prepares pictures for them, and predicts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from beit3 import tasks, weights
from beit3.config import ModelConfig, Precision
from beit3.device import computing_in, to_device
from beit3.tasks import Sample, Task
from beit3.text import TextTokenizer
from beit3.transforms import WHOLE, apply_view, centre_view, decode
from pipelines import bundles, models
from pipelines.storage import Store, StoreError
from pipelines.task_data import read_examples

TASK_FILE = "task.json"


@dataclass(frozen=True)
class Finetuned:
    """A finetuned model, ready to predict."""

    name: str
    task_name: str
    task: Task
    module: nn.Module
    tokenizer: TextTokenizer
    image_size: int
    info: dict[str, Any]
    precision: Precision = "fp32"

    @property
    def device(self) -> torch.device:
        return next(self.module.parameters()).device

    def predict(self, samples: Sequence[Sample]) -> list[Any]:
        """Predictions of every example of the samples, in order."""
        with computing_in(self.precision, self.device):
            return predict(self.task, self.module, self.tokenizer, samples)


def task_notes(task: str, labels: Sequence[str], model: ModelConfig) -> dict[str, Any]:
    """`task.json` for a model that was not finetuned here: its task's default options."""
    options = tasks.options_of(tasks.create(task, labels=labels))
    if "max_text_length" in options:
        options["max_text_length"] = min(options["max_text_length"], model.max_text_length)
    size = model.image_size
    return {"task": task, "labels": list(labels), "image_size": size, "options": options}


def read_notes(store: Store, name: str) -> dict[str, Any]:
    """A model's notes from finetuning: `task`, `labels`, `image_size`, `options`.

    Raises:
        StoreError: there is no such bundle, or it can't be evaluated.
    """
    info = bundles.info(store, name)
    if store.exists(f"{name}/{TASK_FILE}"):
        return store.read_json(f"{name}/{TASK_FILE}")
    if info.get("kind") == "dual_encoder":
        shape = ModelConfig(**store.read_json(f"{name}/{weights.CONFIG}")["model"])
        return task_notes("retrieval", (), shape)
    raise StoreError(f"{store.uri}/{name}: not finetuned for a task; run finetune.py on it")


def load(
    store: Store, name: str, options: dict[str, float] | None = None, device: str = "cpu"
) -> Finetuned:
    """Load a finetuned model, or a dual encoder as a model for retrieval.

    Raises:
        StoreError: there is no such bundle, or it is damaged, or can't be evaluated.
        ValueError: the task has no such option.
    """
    notes = read_notes(store, name)
    with models.opened(store, name) as folder:
        config, _ = weights.load_config(folder)
        task = tasks.create(
            notes["task"], labels=notes["labels"], options={**notes["options"], **(options or {})}
        )
        module = task.build(config)
        weights.load_into(module, weights.load_tensors(folder))
        tokenizer = models.tokenizer_of(folder)
    module.to(device).eval()
    info = bundles.info(store, name)
    return Finetuned(name, notes["task"], task, module, tokenizer, notes["image_size"], info)


@torch.no_grad()
def predict(
    task: Task, module: nn.Module, tokenizer: TextTokenizer, samples: Sequence[Sample]
) -> list[Any]:
    """Predictions of every example of the samples, in order."""
    device = next(module.parameters()).device
    return task.predict(module, to_device(task.collate(samples, tokenizer), device), tokenizer)


def evaluation_image(task: Task, data: bytes, size: int) -> np.ndarray:
    """Decode bytes to the picture that a task is evaluated on: uint8 `[3, size, size]`."""
    picture = decode(data)
    view = centre_view(*picture.size) if task.about.centre_crop else WHOLE
    return apply_view(picture, view, size)


def row_sample(task: Task, row: dict[str, Any], size: int) -> Sample:
    """A dataset's row with all of its examples.

    Raises:
        OSError: an image is broken.
    """
    images = tuple(evaluation_image(task, image["bytes"], size) for image in row["images"])
    return Sample(images, read_examples(row))
