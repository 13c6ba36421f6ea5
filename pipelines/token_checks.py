"""Checks that tokens can be trained on: that they are of the right kind and fit the model."""

from __future__ import annotations

import posixpath
from collections.abc import Sequence
from typing import NamedTuple

import pyarrow.parquet as pq

from beit3.config import Precision
from beit3.text import TextTokenizer
from pipelines import bundles, models
from pipelines.dataset import Commit, Dataset
from pipelines.pretrain_config import OBJECTIVES, PretrainConfig
from pipelines.storage import Store, StoreError
from pipelines.tokenizers import image_tokenizer_shape, load_text_tokenizer


def tokens(store: Store, cfg: PretrainConfig) -> dict[str, list[Dataset]]:
    """The datasets that a run trains on, by kind."""
    return {
        kind: [store.dataset(f"tokens/{name}") for name in cfg.used(kind)] for kind in OBJECTIVES
    }


def check_data(store: Store, cfg: PretrainConfig) -> tuple[list[Dataset], TextTokenizer]:
    """Check all datasets of a run; returns them, the held-out one last, and the text tokenizer.

    Raises:
        StoreError, ValueError: as for `pretrain.run`.
    """
    datasets = tokens(store, cfg)
    held_out = [store.dataset(f"tokens/{cfg.held_out}")] if cfg.held_out else []
    check_kinds({**datasets, "held_out": held_out})
    everything = [*(d for of_kind in datasets.values() for d in of_kind), *held_out]
    tokenizer = check_tokens(store, cfg, everything)
    models.check_vocabulary(tokenizer, cfg.model)
    return everything, tokenizer


def check_kinds(datasets: dict[str, list[Dataset]]) -> None:
    """Check that each dataset is of the kind that it is named for: pictures, texts, or pairs.

    Raises:
        StoreError: a dataset is of another kind, or is missing or empty.
    """
    for kind, of_kind in datasets.items():
        for dataset in of_kind:
            commit = dataset.commit()
            name = dataset.name.removeprefix("tokens/")
            if not commit.rows:
                raise StoreError(
                    f"{kind}: {dataset.uri} has no rows: leave {name!r} out, or ingest it again"
                )
            is_text = commit.lineage["inputs"][0]["dataset"].startswith("text/")
            if is_text != (kind == "texts"):
                holds = "texts, no pictures" if is_text else "pictures, no texts"
                raise StoreError(f"{kind}: {dataset.uri} holds {holds}: name {name!r} elsewhere")
            if kind in ("pairs", "held_out") and not _has_captions(dataset):
                raise StoreError(
                    f"{kind}: no picture of {dataset.uri} has a caption: name {name!r} in images"
                )


class Words(NamedTuple):
    """How a training step computes visual words."""

    tokenizer: str
    """`tokenizers/image/<name>`."""
    precision: Precision


def words_in_step(cfg: PretrainConfig, datasets: Sequence[Dataset]) -> Words | None:
    """How the training step must compute visual words, if they are needed and some of these tokens
    lack them; None otherwise.

    Raises:
        StoreError: the datasets need different precisions.
    """
    found: dict[Precision, tuple[Words, str]] = {}
    for dataset in datasets if cfg.objectives.image_target == "codes" else ():
        lineage = dataset.commit().lineage
        tokenizers = lineage["inputs"][0]["tokenizers"]
        if lineage["config"].get("in_step") and "image" in tokenizers:
            precision: Precision = lineage["config"].get("precision", "fp32")
            words = Words(tokenizers["image"]["name"], precision)
            found.setdefault(precision, (words, dataset.name))
    if len(found) > 1:
        named = ", ".join(f"{name} in {words.precision}" for words, name in found.values())
        raise StoreError(
            f"the step would find visual words in different precisions ({named}): tokenize all of "
            "these datasets with one"
        )
    return next((words for words, _ in found.values()), None)


def _has_captions(dataset: Dataset) -> bool:
    """Whether any row has a caption, according to the files' footers."""
    for path in dataset.paths():
        footer = pq.read_metadata(path, filesystem=dataset.store.fs)
        for number in range(footer.num_row_groups):
            group = footer.row_group(number)
            columns = [group.column(i) for i in range(group.num_columns)]
            captions = next(c for c in columns if c.path_in_schema.startswith("captions."))
            counted = captions.statistics
            # A row without captions has a null in place of the first token.
            if counted is None or captions.num_values > (counted.null_count or 0):
                return True
    return False


def check_tokens(store: Store, cfg: PretrainConfig, datasets: Sequence[Dataset]) -> TextTokenizer:
    """Check that all datasets come from one pair of tokenizers, which fits the model."""
    used: dict[str, dict[str, str]] = {"text": {}, "image": {}}
    examples: dict[str, dict[str, str]] = {"text": {}, "image": {}}
    for dataset in datasets:
        commit = dataset.commit()
        of_text = commit.lineage["inputs"][0]["dataset"].startswith("text/")
        key = "max_text_length" if of_text else "max_caption_length"
        longest = commit.lineage["config"][key]
        if longest > cfg.model.max_text_length:
            raise StoreError(
                f"{dataset.uri} was tokenized with {key} {longest}, above the model's "
                f"model.max_text_length {cfg.model.max_text_length}: raise that, or tokenize "
                "again into shorter pieces"
            )
        for kind, made_with in commit.lineage["inputs"][0]["tokenizers"].items():
            identity, name = made_with["identity"], made_with["name"]
            used[kind][identity] = name
            examples[kind].setdefault(identity, f"{dataset.name} with {name}")
    for kind, found in examples.items():
        if len(found) > 1:
            raise StoreError(
                f"the datasets were tokenized with different {kind} tokenizers "
                f"({', '.join(sorted(found.values()))}): tokenize them all with one"
            )
    if used["image"]:
        (identity, name) = next(iter(used["image"].items()))
        shape = image_tokenizer_shape(store, name)
        if bundles.identity(store, f"tokenizers/image/{name}") != identity:
            raise StoreError(
                f"tokenizers/image/{name} is not the one that made these tokens: tokenize again"
            )
        grid = shape.image_size // shape.patch_size
        if grid != cfg.model.grid or shape.image_size != cfg.model.image_size:
            raise StoreError(
                f"visual words are {grid}x{grid} at {shape.image_size} pixels, the model's "
                f"patches {cfg.model.grid}x{cfg.model.grid} at {cfg.model.image_size}: tokenize "
                f"with another tokenizer than {name}, or set model.image_size and model.patch_size"
            )
        codes = cfg.objectives.image_target == "codes"
        if codes and shape.codebook_size != cfg.model.codebook_size:
            raise StoreError(
                f"model.codebook_size {cfg.model.codebook_size} is not the tokenizer's "
                f"{shape.codebook_size} (tokenizers/image/{name}): set it to that"
            )
    (identity, name) = next(iter(used["text"].items()))
    tokenizer = load_text_tokenizer(store, name)
    if tokenizer.identity != identity:
        raise StoreError(
            f"tokenizers/text/{name} is not the one that made these tokens: tokenize again"
        )
    return tokenizer


def check_pictures(datasets: Sequence[Dataset]) -> None:
    """Check that pictures are still those tokenized: tokens refer to them only by part and row.

    Raises:
        StoreError: they are gone, or were replaced by others.
    """
    for dataset in datasets:
        origin = dataset.commit().lineage["inputs"][0]
        if origin["dataset"].startswith("text/"):
            continue  # training reads only their tokens
        source = dataset.store.dataset(origin["dataset"])
        versions = list(source.commits())
        if not versions:
            raise StoreError(
                f"{dataset.uri} was made of {source.uri}, whose pictures training needs, and that "
                f"is not there: restore it, or ingest it, delete {dataset.name} and tokenize again"
            )
        # Pictures added after tokenization do no harm.
        there = _parts(versions[0])
        if not any(v.identity == origin["identity"] and _parts(v) <= there for v in versions):
            raise StoreError(
                f"{dataset.uri} was made of other pictures than {source.uri} has now: delete "
                f"{dataset.name} and tokenize again, or restore those pictures"
            )


def _parts(commit: Commit) -> set[tuple[str, str]]:
    """The name and content hash of each file."""
    return {(posixpath.basename(file.path), file.sha256) for file in commit.files}
