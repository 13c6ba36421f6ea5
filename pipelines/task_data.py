"""Prepared data of a task, `tasks/<name>/<split>`: their rows, examples, captions and classes."""

from __future__ import annotations

import json
from collections.abc import Iterable
from typing import Any

import pyarrow as pa

from beit3 import tasks
from beit3.tasks import Example
from pipelines.dataset import Commit, Dataset
from pipelines.storage import Store, StoreError

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        (
            "examples",
            pa.list_(
                pa.struct(
                    [("id", pa.string()), ("text", pa.string()), ("target", pa.string())]  # JSON
                )
            ),
        ),
    ]
)


def read_examples(row: dict[str, Any]) -> tuple[Example, ...]:
    """The examples of a dataset's row."""
    return tuple(Example(e["id"], e["text"], json.loads(e["target"])) for e in row["examples"])


def captions_of(row: dict[str, Any]) -> list[str]:
    """The captions of a row's picture, in `images/*` or in a split of a task about captions."""
    if "captions" in row:
        return row["captions"] or []
    said = ([e.text] if e.text is not None else e.target for e in read_examples(row))
    return [caption for captions in said for caption in captions]


def check_captions(dataset: Dataset, field: str) -> Commit:
    """The commit of a dataset whose rows `captions_of` can read.

    Raises:
        StoreError: it is missing, or belongs to another task. The message names `field`.
    """
    commit = dataset.commit()
    task = commit.lineage["config"].get("task")
    if dataset.name.startswith("tasks/") and not tasks.load(task).about.captions:
        having = " or ".join(name for name in tasks.names() if tasks.load(name).about.captions)
        raise StoreError(
            f"{field}: {dataset.uri} holds no captions, but what {task} asks: name a split of "
            f"{having}"
        )
    return commit


def lost_examples(aside: Iterable[dict[str, Any]]) -> list[Example]:
    """The examples of records that were set aside; malformed records have none."""
    found = [json.loads(row["examples"]) for row in aside if row.get("examples")]
    return [Example(**example) for examples in found for example in examples]


def labels(store: Store, name: str) -> tuple[str, ...]:
    """The answer vocabulary of `tasks/<name>/train`; empty where the task has none.

    Raises:
        StoreError: the training split is not there.
    """
    return tuple(store.dataset(f"tasks/{name}/train").commit().stats.get("labels", ()))
