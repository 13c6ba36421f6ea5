"""Blind baselines for a task's scores: answers given without looking at the picture."""

from __future__ import annotations

from collections.abc import Iterator

from beit3 import tasks
from beit3.tasks import Example
from pipelines.storage import Store
from pipelines.task_data import read_examples


def blind(store: Store, task: str, data: str = "", split: str = "") -> dict[str, float]:
    """The task's metrics without looking at the picture; see each task's `blind`.

    Args:
        data: The task's data are `tasks/<data>/<split>`; by default the task's name.
        split: By default the task's test split.

    Raises:
        StoreError: the data are missing.
    """
    examples = list(
        _examples(store, f"{data or task}/{split or tasks.load(task).about.test_split}")
    )
    return tasks.create(task).blind(_examples(store, f"{data or task}/train"), examples)


def _examples(store: Store, data: str) -> Iterator[Example]:
    for row in store.dataset(f"tasks/{data}").read_table(["examples"]).to_pylist():
        yield from read_examples(row)
