"""Pairs of images and plain classification, from published files to a score, in one process."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from small_models import save_random_model, small_tokenizer

from beit3 import tasks, weights
from beit3.config import PRESETS as MODELS
from pipelines import evaluate, finetune, finetuned, models, predict, prepare_task, task_data
from pipelines.evaluate import EvaluateConfig
from pipelines.finetune import FinetuneConfig
from pipelines.predict import PredictConfig
from pipelines.prepare_task import PrepareConfig
from pipelines.recipe import TrainConfig
from pipelines.sample_world import World, WorldSize, generate
from pipelines.storage import Store

SMALL = replace(MODELS["tiny"], layers=2, hidden=64, mlp=128, vocab_size=256)
TASKS = ("nlvr2", "imagenet")
SPLITS = {"nlvr2": ("train", "val", "test"), "imagenet": ("train", "val")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    size = replace(WorldSize.tiny(), imagenet1k=40, nlvr2=80)
    return generate(tmp_path_factory.mktemp("world"), size=size, base_url="http://127.0.0.1:1")


def images_of(world: World, task: str) -> Path:
    return world.images("nlvr2") if task == "nlvr2" else world.annotations("imagenet1k")


@pytest.fixture(scope="module")
def store(world: World, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with both tasks' data, a pretrained model, and both tasks finetuned from it."""
    store = Store(tmp_path_factory.mktemp("store"))
    for task in TASKS:
        config: PrepareConfig = replace(
            prepare_task.PRESETS[task],
            store=store.uri,
            annotations=str(world.annotations("nlvr2" if task == "nlvr2" else "imagenet1k")),
            images=str(images_of(world, task)),
            in_process=True,
        )
        assert config.chosen == SPLITS[task]
        prepare_task.run(config)
    rows = store.dataset("tasks/nlvr2/train").read_table().to_pylist()
    tokenizer = small_tokenizer([e["text"] for row in rows for e in row["examples"]], 100)
    save_random_model(store, SMALL, tokenizer)
    for task in TASKS:
        finetune.run(finetune_config(store, task))
    return store


def finetune_config(store: Store, task: str) -> FinetuneConfig:
    train = TrainConfig(
        steps=6, warmup=1, learning_rate=2e-3, zero_stage=0, workers=0, checkpoint_every=0,
        log_every=6, threads=1,
    )  # fmt: skip
    start = finetune.preset("tiny", task)
    return replace(start, store=store.uri, batch_size=8, track=False, train=train)


def scores(store: Store, task: str, split: str = "val") -> dict[str, Any]:
    start = replace(evaluate.PRESETS["tiny"], store=store.uri, track=False, batch_size=4)
    config: EvaluateConfig = replace(
        start, model=f"models/{task}", data=f"tasks/{task}/{split}", name=f"{task}-{split}"
    )
    return evaluate.run(config)


def test_prepared_data_are_whole(store: Store, world: World) -> None:
    commits = {
        f"{task}/{split}": store.dataset(f"tasks/{task}/{split}").commit()
        for task in TASKS
        for split in SPLITS[task]
    }
    assert not any(commit.stats["set_aside"] for commit in commits.values())
    sums = {
        task: sum(c.stats["examples"] for name, c in commits.items() if name.startswith(task))
        for task in TASKS
    }
    assert sums == {"nlvr2": world.counts["nlvr2"], "imagenet": world.counts["imagenet1k"]}
    row = store.dataset("tasks/nlvr2/train").read_table().to_pylist()[0]
    assert [len(row["images"]), len(row["examples"])] == [2, 4]
    assert task_data.labels(store, "imagenet") == tuple(f"n{i:08d}" for i in range(1, 5))


def test_nlvr2_is_scored_and_leaves_the_official_file(store: Store) -> None:
    result = scores(store, "nlvr2", "test")
    assert result["failed"] == 0 and set(result["metrics"]) == {"accuracy", "consistency"}
    assert result["submission"] == "scores/nlvr2-test.submission.csv"
    lines = store.read(result["submission"]).decode().splitlines()
    rows = store.dataset("tasks/nlvr2/test").read_table().to_pylist()
    asked = {e["id"]: e["target"] for row in rows for e in row["examples"]}
    answers = dict(line.split(",") for line in lines)
    assert answers.keys() == asked.keys() and set(answers.values()) <= {"True", "False"}
    right = [answers[key].lower() == target for key, target in asked.items()]
    assert result["metrics"]["accuracy"] == pytest.approx(np.mean(right))


def test_imagenet_is_scored(store: Store) -> None:
    result = scores(store, "imagenet")
    assert result["failed"] == 0 and "submission" not in result
    # Of four classes the five likeliest hold the right one.
    assert 0 <= result["metrics"]["top_1"] <= result["metrics"]["top_5"] == 1.0


def test_an_imagenet_model_keeps_what_reads_text(store: Store) -> None:
    with models.opened(store, "models/pretrained") as folder:
        start = weights.load_tensors(folder)
    with models.opened(store, "models/imagenet") as folder:
        config, _ = weights.load_config(folder)
        tensors = weights.load_tensors(folder)
    assert not config.final_norm and not any("encoder.norm" in key for key in tensors)
    changed = {
        key: not torch.equal(value, start[key])
        for key, value in tensors.items()
        if key.startswith("backbone.")
    }
    assert not changed["backbone.text_embedding.weight"]
    assert not changed["backbone.encoder.blocks.0.experts.language_expert.fc1.weight"]
    assert changed["backbone.encoder.blocks.0.experts.vision_expert.fc1.weight"]


def test_training_augments_and_evaluation_sees_the_middle(store: Store) -> None:
    task = tasks.create("imagenet", labels=task_data.labels(store, "imagenet"))
    picture = Image.new("RGB", (120, 40), (255, 0, 0))
    picture.paste((0, 255, 0), (40, 0, 80, 40))
    out = io.BytesIO()
    picture.save(out, "PNG")
    seen = finetuned.evaluation_image(task, out.getvalue(), 32)
    assert (seen[1] > 200).all() and (seen[0] < 50).all()  # the green square alone
    whole = finetuned.evaluation_image(tasks.create("nlvr2"), out.getvalue(), 32)
    assert (whole[0, :, 0] == 255).all() and (whole[1, :, 16] == 255).all()
    for size in ("base", "large"):
        cfg = finetune.PRESETS[f"{size}-imagenet"]
        assert cfg.options == {} and cfg.view.scale == (0.08, 1.0)
        assert cfg.train.layer_decay < 1 and cfg.batch_size == 1024


def test_predict(store: Store, world: World, tmp_path: Path) -> None:
    left, right = sorted((images_of(world, "nlvr2") / "dev").iterdir())[:2]
    base = PredictConfig(store=store.uri, model="models/nlvr2", path=str(left))
    both = replace(base, right=str(right), text="Both images contain a circle.")
    (answer,) = predict.run(both)
    assert answer == {"image": str(left), "right": str(right), "prediction": answer["prediction"]}
    assert isinstance(answer["prediction"], bool)
    with pytest.raises(ValueError, match="right: models/nlvr2 reads two images"):
        predict.run(replace(both, right=""))
    with pytest.raises(ValueError, match="give a statement"):
        predict.run(replace(both, text=""))
    (tmp_path / "broken.png").write_bytes(b"no picture")
    (lost,) = predict.run(replace(both, right=str(tmp_path / "broken.png")))
    assert lost["error"] == "not an image"
    (named,) = predict.run(replace(base, model="models/imagenet"))
    assert sorted(named["prediction"]) == list(task_data.labels(store, "imagenet"))
    assert next(predict.lines([named])).endswith("; ".join(named["prediction"]))
    names = tmp_path / "LOC_synset_mapping.txt"
    names.write_text("n00000001 tench, Tinca tinca\nn00000002 goldfish\n")
    (called,) = predict.run(replace(base, model="models/imagenet", class_names=str(names)))
    known = {"n00000001": "tench, Tinca tinca", "n00000002": "goldfish"}
    assert called["names"] == [known.get(label, label) for label in named["prediction"]]
    assert next(predict.lines([called])) == f"{left}: {'; '.join(called['names'])}"
    drawn = world.annotations("imagenet1k") / "classes.json"
    (called,) = predict.run(replace(base, model="models/imagenet", class_names=str(drawn)))
    known = json.loads(drawn.read_text())
    assert called["names"] == [known[label] for label in named["prediction"]]
    (one,) = predict.run(replace(base, model="models/imagenet", class_names=str(drawn), top=1))
    assert one["names"] == [known[label] for label in named["prediction"][:1]]
    names.write_text("n99999999 unicorn\n")
    asked = {"models/imagenet": base, "models/nlvr2": both}  # the other has no classes at all
    for model, judged in asked.items():
        with pytest.raises(ValueError, match=r"class_names: .* names none of the \d+ classes of"):
            predict.run(replace(judged, model=model, class_names=str(names)))
    broken_files = {"not JSON": '{"n00000001": "ten', "expected an object": '["tench"]'}
    for reason, content in broken_files.items():
        broken = tmp_path / "classes.json"
        broken.write_text(content)
        with pytest.raises(ValueError, match=f"class_names: .*classes.json: {reason}"):
            predict.run(replace(base, model="models/imagenet", class_names=str(broken)))
