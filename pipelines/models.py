"""Model bundles: weights, configuration and tokenizer of a trained model, in the store."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import nn

from beit3 import weights
from beit3.config import ModelConfig
from beit3.text import TOKENIZER_FILE, TextTokenizer
from pipelines import bundles, config
from pipelines.lineage import code_version
from pipelines.samples import SEEDING
from pipelines.storage import Store


@contextmanager
def opened(store: Store, name: str) -> Iterator[Path]:
    """A bundle as a verified local folder, for as long as the context lasts."""
    with tempfile.TemporaryDirectory() as folder:
        bundles.load(store, name, Path(folder))
        yield Path(folder)


def load_backbone(module: nn.Module, folder: Path, *also: str) -> None:
    """Load a bundle's backbone, and the modules named in `also`, where the module has them.

    Raises:
        ValueError: shapes differ, or nothing of the bundle fits.
    """
    prefixes = ("backbone.", *(f"{name}." for name in also))
    tensors = {k: v for k, v in weights.load_tensors(folder).items() if k.startswith(prefixes)}
    if not any(key.startswith("backbone.") for key in tensors):
        raise ValueError(f"{folder}: holds no backbone")
    weights.load_into(module, tensors, partial=True)


def add_tokenizer(folder: Path, tokenizer: TextTokenizer) -> None:
    (folder / TOKENIZER_FILE).write_bytes(tokenizer.model)


def tokenizer_of(folder: Path) -> TextTokenizer:
    return TextTokenizer.from_file(folder / TOKENIZER_FILE)


def check_vocabulary(tokenizer: TextTokenizer, model: ModelConfig) -> None:
    """
    Raises:
        ValueError: the tokenizer has ids that the model's embedding lacks.
    """
    if tokenizer.vocab_size > model.vocab_size:
        raise ValueError(
            f"model.vocab_size {model.vocab_size} is smaller than the tokenizer's "
            f"{tokenizer.vocab_size} ids: set model.vocab_size to at least that"
        )


def decisive(cfg: Any) -> dict[str, Any]:
    """Everything except data that a training's result depends on: its options, and the way random
    numbers derive from the seed."""
    return config.decisive(cfg) | {"seeding": SEEDING}


def provenance(store: Store, cfg: Any, datasets: Sequence[str]) -> dict[str, Any]:
    """A bundle's provenance: configuration, code, and data with their own origins."""
    return {
        "config": config.to_dict(cfg),
        "code": code_version(),
        "data": [_origin(store, name) for name in datasets],
    }


def _origin(store: Store, name: str) -> dict[str, Any]:
    """A summary of a dataset's commit, and of the datasets that it was made from."""
    commit = store.dataset(name).find_commit()
    if commit is None:  # the data were deleted after tokenizing
        return {"dataset": name, "missing": True}
    found: dict[str, Any] = {"dataset": name, "identity": commit.identity, "rows": commit.rows}
    source = commit.lineage.get("config", {}).get("source")
    if source:
        found["source"] = source
    inputs = commit.lineage.get("inputs", [])
    for given in inputs:
        found |= {k: given[k] for k in ("tokenizers",) if k in given}
    made_from = [_origin(store, given["dataset"]) for given in inputs if "dataset" in given]
    return found | ({"from": made_from} if made_from else {})
