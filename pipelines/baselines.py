"""Blind baselines for a task's scores: answers given without looking at the picture."""

from __future__ import annotations

import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from beit3 import tasks
from beit3.tasks import Example
from pipelines.prepare_task import read_examples
from pipelines.storage import Store

# The split that has answers and is not finetuned on; where two qualify, not the one that a sweep
# would select by.
TEST_SPLITS = {
    "vqa": "val",
    "nlvr2": "test",
    "retrieval": "test",
    "captioning": "test",
    "imagenet": "val",
}


def blind(store: Store, task: str, data: str = "", split: str = "") -> dict[str, float]:
    """The task's metrics without looking at the picture.

    Questions and statements get the most common training answer to the same words (a model may
    learn that too), classification the most common classes, captioning a random training caption,
    and retrieval a random ranking.

    Args:
        data: The task's data are `tasks/<data>/<split>`; by default the task's name.
        split: By default the one in `TEST_SPLITS`.

    Raises:
        StoreError: the data are missing.
    """
    examples = _examples(store, f"{data or task}/{split or TEST_SPLITS[task]}")
    if task == "retrieval":
        return retrieval_chance([str(e.target) for e in examples])
    known = _examples(store, f"{data or task}/train")
    guesses: list[Any]
    if task == "captioning":
        rng = np.random.default_rng(0)
        guesses = [known[int(rng.integers(len(known)))].text for _ in examples]
    elif task == "imagenet":
        common = [wnid for wnid, _ in Counter(e.target for e in known).most_common(5)]
        guesses = [common] * len(examples)
    else:
        guesses = _by_words(known, examples)
    return tasks.create(task, labels=(), options=None).score(guesses, examples)


def _by_words(known: Sequence[Example], examples: Sequence[Example]) -> list[Any]:
    """The most common answer among training texts that share an example's longest known prefix."""
    answers: dict[tuple[str, ...], Counter[Any]] = defaultdict(Counter)
    for example in known:
        given = example.target
        given = given["answers"] if isinstance(given, dict) else [given]
        words = _words(example)
        for count in range(len(words) + 1):
            answers[words[:count]].update(given)
    guesses = []
    for example in examples:
        words = _words(example)
        while words not in answers:
            words = words[:-1]
        guesses.append(answers[words].most_common(1)[0][0])
    return guesses


def _words(example: Example) -> tuple[str, ...]:
    return tuple((example.text or "").lower().split())


def retrieval_chance(owners: list[str]) -> dict[str, float]:
    """Recalls of a random ranking.

    Args:
        owners: The image of each text; every image has the same number of texts.
    """
    images, texts = len(set(owners)), len(owners)
    each = texts // images
    values = {}
    for k in (1, 5, 10):
        drawn = min(k, texts)
        miss = math.comb(texts - each, drawn) / math.comb(texts, drawn)
        values |= {f"text_recall_{k}": 1 - miss, f"image_recall_{k}": min(1.0, k / images)}
    return values


def _examples(store: Store, data: str) -> list[Example]:
    rows = store.dataset(f"tasks/{data}").read_table(["examples"]).to_pylist()
    return [example for row in rows for example in read_examples(row)]
