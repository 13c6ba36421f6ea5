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
from pipelines.samples import SEEDING, without_later
from pipelines.storage import Store

# Options about where and how fast a job runs; they don't change its result, up to rounding.
INDIFFERENT = {
    "store": "",
    "dry_run": False,
    "assume": None,
    "workers": 0,
    "gpus_per_worker": 0,
    "cpus_per_worker": 0,
    "threads": 0,
    "loader_workers": 0,
    "inspect_step": None,
    "max_failures": 0,
    "checkpoint_every": 0,
    "keep_checkpoints": 0,
    "keep_every": 0,
    "log_every": 0,
    "evaluate_every": 0,
    "on_bad_step": "",
    "spike_factor": 0,
    "max_bad_steps": 0,
    "spot_notice": False,
    "max_hours": 0,
    "max_cost": 0,
    "price_per_hour": 0,
    "zero_stage": 0,
    "offload": False,
    "compile": False,
}


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
    """Everything except data that a run's result depends on: the configuration, without options
    about where and how fast the job runs, and the way random numbers derive from the seed."""
    plain = without_later(config.to_dict(cfg))
    for part in (plain, plain.get("train", {})):
        part.update({k: v for k, v in INDIFFERENT.items() if k in part})
    return plain | {"seeding": SEEDING}


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
