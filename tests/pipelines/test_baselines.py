"""Guessing, and what could be known: the two ends of a score on the sample world."""

from __future__ import annotations

import json
import random
from collections import Counter
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest

from beit3 import tasks
from beit3.tasks import Example
from beit3.transforms import centre_view
from pipelines import baselines, prepare_task, task_data
from pipelines.baselines import blind
from pipelines.sample_world import Scene, World, WorldSize, generate, picture
from pipelines.sample_world.ceiling import ceiling, likelihoods
from pipelines.sample_world.language import caption, caption_body
from pipelines.sample_world.likelihood import outcomes
from pipelines.sample_world.scenes import derive
from pipelines.sample_world.writing import coco_picture
from pipelines.storage import Store

SEED = 5
FOLDERS = {"vqa": "vqa", "captioning": "coco", "retrieval": "coco", "nlvr2": "nlvr2"}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    size = replace(WorldSize.tiny(), coco_test=8, imagenet1k=60, nlvr2=80)
    root = tmp_path_factory.mktemp("world")
    return generate(root, seed=SEED, size=size, base_url="http://127.0.0.1:1")


@pytest.fixture(scope="module")
def store(world: World, tmp_path_factory: pytest.TempPathFactory) -> Store:
    store = Store(tmp_path_factory.mktemp("store"))
    for task in tasks.names():
        annotations = world.annotations(FOLDERS.get(task, "imagenet1k"))
        images = annotations if task == "imagenet" else None
        images = images or world.images("nlvr2" if task == "nlvr2" else "coco")
        prepare_task.run(
            replace(
                prepare_task.PRESETS[task], store=store.uri, annotations=str(annotations),
                images=str(images), min_answer_count=1, short_side=32, in_process=True,
            )
        )  # fmt: skip
    return store


def rows(store: Store, task: str) -> list[dict[str, Any]]:
    split = tasks.load(task).about.test_split
    return store.dataset(f"tasks/{task}/{split}").read_table().to_pylist()


def highest(store: Store, task: str) -> dict[str, float]:
    return ceiling(task, rows(store, task), seed=SEED, labels=task_data.labels(store, task))


# -- every course of a writer ---------------------------------------------------------------------


def test_outcomes_of_draws_are_weighted() -> None:
    def write(rng: random.Random) -> str:
        style = rng.random()
        if style < 0.5:
            return "half"
        if 0.5 <= style < 0.6:
            return "tenth"
        return rng.choice(("a", "a", "b")) + str(rng.randint(1, 2))

    found = outcomes(write)
    assert found == pytest.approx(
        {"half": 0.5, "tenth": 0.1, "a1": 0.4 / 3, "a2": 0.4 / 3, "b1": 0.2 / 3, "b2": 0.2 / 3}
    )
    orders = outcomes(lambda rng: "".join(rng.sample("xyz", 2)))
    assert orders == pytest.approx(dict.fromkeys(("xy", "xz", "yx", "yz", "zx", "zy"), 1 / 6))
    assert outcomes(lambda rng: "always") == {"always": 1.0}


def scene_with(things: int, groups: int) -> Scene:
    every = (picture(SEED, f"coco/test/{i}").scene for i in range(500))
    return next(s for s in every if (len(s.things), len(s.groups())) == (things, groups))


@pytest.mark.parametrize(("things", "groups", "distance"), [(1, 1, 0.05), (2, 1, 0.05)])
def test_captions_are_drawn_as_often_as_is_worked_out(
    things: int, groups: int, distance: float
) -> None:
    scene, draws = scene_with(things, groups), 4000
    found = outcomes(partial(caption, scene))
    assert sum(found.values()) == pytest.approx(1.0)
    drawn = Counter(caption(scene, derive(i, "draw")) for i in range(draws))
    assert drawn.keys() <= found.keys()
    # A random sample's distance from its own distribution is about that of its rare texts.
    apart = sum(abs(drawn[text] / draws - weight) for text, weight in found.items()) / 2
    assert apart < distance + len(found) ** 0.5 / draws**0.5


def test_what_is_likely_of_a_scene_is_what_its_writer_does() -> None:
    scenes = [scene_with(1, 1), scene_with(2, 1)]
    every = [outcomes(partial(caption, scene)) for scene in scenes]
    texts = sorted({text for found in every for text in found})
    assert any(", " in text for text in texts)
    found = likelihoods(scenes, texts)
    expected = [[one.get(text, 0.0) for one in every] for text in texts]
    np.testing.assert_allclose(found, expected, atol=1e-12)


def test_related_things_can_be_told_in_either_direction() -> None:
    found = outcomes(partial(caption_body, scene_with(2, 2)))
    assert sum(found.values()) == pytest.approx(1.0)
    words = [text for text in found if " left of " in text or " above " in text]
    opposite = [text for text in found if " right of " in text or " below " in text]
    assert words and opposite


# -- ceilings -------------------------------------------------------------------------------------


def test_every_caption_is_likely_of_its_own_picture(store: Store) -> None:
    found = rows(store, "retrieval")
    scenes = [coco_picture(SEED, int(row["id"])).scene for row in found]
    texts = [e["text"].lower().removesuffix(".") for row in found for e in row["examples"]]
    likely = likelihoods(scenes, texts)
    assert likely.shape == (len(texts), len(scenes))
    owner = [i for i, row in enumerate(found) for _ in row["examples"]]
    assert (likely[np.arange(len(texts)), owner] > 0).all()


@pytest.mark.slow
def test_texts_that_fit_several_pictures_lower_the_ceiling(store: Store) -> None:
    found = rows(store, "retrieval")
    own = ceiling("retrieval", found, seed=SEED)
    assert 0.5 < own["image_recall_1"] <= own["image_recall_5"] <= 1.0
    counts = {row["id"]: len(coco_picture(SEED, int(row["id"])).scene.things) for row in found}
    words = {1: "One object.", 2: "Two objects.", 3: "Three objects."}
    vague = [
        {**row, "examples": [{**row["examples"][0], "text": words[counts[row["id"]]]}]}
        for row in found
    ]
    reached = ceiling("retrieval", vague, seed=SEED)
    assert reached["image_recall_1"] < own["image_recall_1"]


def test_exact_annotations_can_be_met(store: Store) -> None:
    assert highest(store, "nlvr2") == {"accuracy": 1.0, "consistency": 1.0}
    labels = task_data.labels(store, "vqa")
    best = highest(store, "vqa")
    poorer = ceiling("vqa", rows(store, "vqa"), seed=SEED, labels=labels[:4])
    assert 0.5 < best["accuracy"] <= 1.0 and poorer["accuracy"] < best["accuracy"]


def test_a_thing_outside_the_middle_square_can_only_be_guessed(store: Store) -> None:
    labels = task_data.labels(store, "imagenet")
    row = rows(store, "imagenet")[0]

    def outside(number: int) -> bool:
        scene = picture(SEED, f"imagenet1k/{labels[0]}/{number}").scene
        box, (left, top, right, bottom) = (
            scene.things[0].box(), centre_view(scene.width, scene.height).box,
        )  # fmt: skip
        across = box[2] <= left * scene.width or box[0] >= right * scene.width
        return across or box[3] <= top * scene.height or box[1] >= bottom * scene.height

    lost = next(i for i in range(20_000) if outside(i))
    seen = next(i for i in range(100) if not outside(i))
    examples = [{**row["examples"][0], "target": f'"{labels[0]}"'}]
    for number, top_1 in ((seen, 1.0), (lost, 0.0)):
        one = {**row, "id": f"{labels[0]}_{number}", "examples": examples}
        found = ceiling("imagenet", [one], seed=SEED, labels=(*labels[1:], labels[0]))
        assert found["top_1"] == top_1


def test_another_writer_says_nearly_the_same(store: Store) -> None:
    reached, guessed = highest(store, "captioning"), blind(store, "captioning")
    assert reached["cider"] > 2 * guessed["cider"] and reached["bleu_4"] > guessed["bleu_4"]


def test_pictures_are_found_by_their_published_id(world: World) -> None:
    karpathy = json.loads((world.annotations("coco") / "dataset_coco.json").read_text())
    shown = [image for image in karpathy["images"] if image["split"] == "test"][:3]
    said = [image["sentences"][0]["raw"].lower().removesuffix(".") for image in shown]
    likely = likelihoods([coco_picture(SEED, image["cocoid"]).scene for image in shown], said)
    assert (likely.diagonal() > 0).all()


def test_ids_below_all_of_a_world_are_refused() -> None:
    with pytest.raises(ValueError, match="image_id: 42 is none of a sample world's"):
        coco_picture(SEED, 42)


# -- without a look at the picture ----------------------------------------------------------------


def test_guesses_never_look_at_the_picture(store: Store) -> None:
    given = {
        split: Counter(
            e["target"].strip('"')
            for row in store.dataset(f"tasks/imagenet/{split}").read_table().to_pylist()
            for e in row["examples"]
        )
        for split in ("train", "val")
    }
    common = given["train"].most_common(1)[0][0]
    expected = given["val"][common] / given["val"].total()
    assert blind(store, "imagenet")["top_1"] == pytest.approx(expected)
    assert blind(store, "retrieval")["image_recall_1"] == 1 / 8
    assert 0 < blind(store, "vqa")["accuracy"] < 0.6
    assert blind(store, "vqa", data="vqa", split="train")["accuracy"] > 0


def test_words_alone_are_answered_as_they_mostly_were(monkeypatch: pytest.MonkeyPatch) -> None:
    def said(*texts: tuple[str, bool]) -> list[Example]:
        return [Example(f"dev-{i}-0-0", text, truth) for i, (text, truth) in enumerate(texts)]

    known = said(*[("A star.", True)] * 3, *[("A red star.", False)] * 2, ("A red cross.", True))
    asked = {
        "a star.": True,  # seen
        "A red circle.": False,  # no such: as of what begins with "a red"
        "Two stars.": True,  # nor of that: the commonest of all
    }
    for text, expected in asked.items():
        data = {"nlvr2/train": known, "nlvr2/test": said((text, expected))}
        monkeypatch.setattr(baselines, "_examples", lambda _, name, data=data: data[name])
        assert blind(Store("unused"), "nlvr2")["accuracy"] == 1, text


@pytest.mark.parametrize("task", tasks.names())
def test_ceilings_are_above_chance(task: str, store: Store) -> None:
    low, top = blind(store, task), highest(store, task)
    for key in low.keys() & top.keys():
        assert top[key] >= low[key], key
