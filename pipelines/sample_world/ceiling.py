"""Scores of a perfect reader on the sample world, whose scenes and way of writing are known.

`ceiling(task, rows, seed=...)` takes rows of a prepared split and gives the task's own metrics:

    vqa         each question's best answer among the head's labels
    nlvr2       every statement judged as it is labelled: labels are exact
    imagenet    the right class wherever the middle square, which evaluation sees, shows the thing
    retrieval   captions and pictures matched by how likely the world writes the caption for the
                picture: captions that fit several pictures of the gallery lower the score
    captioning  another writer's caption of the same scene: what people score against each other.
                A model that says what most writers would say can do better
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import numpy as np

from beit3 import tasks
from beit3.tasks import Example, Task
from beit3.tasks.retrieval import recalls
from beit3.transforms import centre_view
from pipelines.task_data import read_examples

from .language import caption, caption_around, caption_body, caption_place
from .likelihood import outcomes
from .pictures import picture
from .scenes import Scene, derive
from .writing import coco_picture

_UNLIKELY = 1e-12  # for captions that the world writes for none of the gallery's pictures
_TIE = 1e-9


TASKS = ("captioning", "imagenet", "nlvr2", "retrieval", "vqa")
"""Those that the world has."""


def ceiling(
    task: str, rows: Sequence[dict[str, Any]], *, seed: int, labels: Sequence[str] = ()
) -> dict[str, float]:
    """Return the task's metrics of a perfect reader.

    Args:
        rows: Rows of `tasks/<name>/<split>`, made from the world of this `seed`.
        labels: The classes of the task's head.

    Raises:
        KeyError: there is no ceiling for this task.
        ValueError: a row is not of a sample world.
    """
    if task == "retrieval":
        return _retrieval(rows, seed)
    scorer = tasks.create(task, labels=labels)
    predict: Callable[[dict[str, Any], Example], Any] = {
        "vqa": lambda row, example: _answer(example, labels, scorer),
        "nlvr2": lambda row, example: example.target,
        "imagenet": lambda row, example: _classes(row, example, seed, labels),
        "captioning": lambda row, example: _another_caption(row, seed),
    }[task]
    pairs = [(predict(row, e), e) for row in rows for e in read_examples(row)]
    return scorer.score([p for p, _ in pairs], [e for _, e in pairs])


def _answer(example: Example, labels: Sequence[str], scorer: Task) -> str:
    return max(labels, key=lambda label: scorer.score([label], [example])["accuracy"])


def _classes(
    row: dict[str, Any], example: Example, seed: int, labels: Sequence[str]
) -> Sequence[str]:
    """The right class alone, or any classes if the middle shows nothing of the thing."""
    wnid, number = row["id"].split("_")
    scene = picture(seed, f"imagenet1k/{wnid}/{number}").scene
    left, top, right, bottom = centre_view(scene.width, scene.height).box
    shown = (left * scene.width, top * scene.height, right * scene.width, bottom * scene.height)
    box = scene.things[0].box()
    seen = box[0] < shown[2] and box[2] > shown[0] and box[1] < shown[3] and box[3] > shown[1]
    return [example.target] if seen else labels[:5]


def _another_caption(row: dict[str, Any], seed: int) -> str:
    item = coco_picture(seed, int(row["id"]))
    return caption(item.scene, derive(seed, f"{item.name}/a further caption"))


def _retrieval(rows: Sequence[dict[str, Any]], seed: int) -> dict[str, float]:
    texts = [_plain(e.text or "") for row in rows for e in read_examples(row)]
    owner = np.array([i for i, row in enumerate(rows) for _ in row["examples"]])
    likely = likelihoods([coco_picture(seed, int(row["id"])).scene for row in rows], texts)
    # For each text, the probability of each picture, with all pictures equally likely a priori.
    found = likely / likely.sum(1, keepdims=True).clip(_UNLIKELY)
    found *= 1 + _TIE * np.random.default_rng(seed).random(found.shape)  # break ties at random
    return recalls(np.eye(len(rows)), found, owner)


def likelihoods(scenes: Sequence[Scene], texts: Sequence[str]) -> np.ndarray:
    """Return how likely the world writes each text, in lower case and without a full stop, as a
    caption of each scene: `[texts, scenes]`."""
    places: dict[str, list[int]] = {}
    parts: set[str] = set()  # possible bodies, so that others can be skipped
    for place, text in enumerate(texts):
        places.setdefault(text, []).append(place)
        words = text.split()
        parts |= {" ".join(words[i:j]) for i in range(len(words)) for j in range(i, len(words) + 1)}
    found = np.zeros((len(texts), len(scenes)))
    for column, scene in enumerate(scenes):
        for body, weight in outcomes(partial(caption_body, scene)).items():
            if body in parts:
                for text, share in outcomes(partial(_around, body, scene)).items():
                    if text in places:
                        found[places[text], column] += weight * share
    return found


def _around(body: str, scene: Scene, rng: random.Random) -> str:
    return caption_around(body, caption_place(scene, rng), rng)


def _plain(text: str) -> str:
    """A caption without the capital letter and full stop of COCO's writers."""
    return text.lower().removesuffix(".")
