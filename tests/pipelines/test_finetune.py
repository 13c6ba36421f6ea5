"""From a task's published files to a score, in the small world, in one process."""

from __future__ import annotations

import io
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_corpus
import torch
from PIL import Image
from small_models import save_random_model, small_tokenizer

from beit3 import tasks, weights
from beit3.config import PRESETS as MODELS
from pipelines import evaluate, finetune, models, predict, prepare_task, task_data
from pipelines.evaluate import EvaluateConfig
from pipelines.finetune import FinetuneConfig, FinetuneRecipe
from pipelines.finetuned import load
from pipelines.prepare_task import PrepareConfig
from pipelines.recipe import TrainConfig
from pipelines.sample_world import World, WorldSize, generate
from pipelines.storage import Store, StoreError
from pipelines.task_data import read_examples

SMALL = replace(MODELS["tiny"], layers=2, patch_size=8, hidden=64, mlp=128, vocab_size=256)
TASKS = ("vqa", "captioning", "retrieval")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    size = replace(WorldSize.tiny(), coco_train=32)
    return generate(tmp_path_factory.mktemp("world"), size=size, base_url="http://127.0.0.1:1")


def prepare_config(world: World, store: str, task: str, **changes: Any) -> PrepareConfig:
    start = prepare_task.PRESETS[task]
    return replace(
        start,
        store=store,
        annotations=str(world.annotations("vqa" if task == "vqa" else "coco")),
        images=str(world.images("coco")),
        min_answer_count=1,
        in_process=True,
        **changes,
    )


@pytest.fixture(scope="module")
def store(world: World, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with every task's data and a pretrained model."""
    store = Store(tmp_path_factory.mktemp("store"))
    for task in TASKS:
        prepare_task.run(prepare_config(world, store.uri, task))
    captions = json.loads((world.annotations("coco") / "dataset_coco.json").read_text())["images"]
    tokenizer = small_tokenizer([s["raw"] for image in captions for s in image["sentences"]], 150)
    save_random_model(store, SMALL, tokenizer)
    return store


def finetune_config(store: Store, task: str, **changes: Any) -> FinetuneConfig:
    train = TrainConfig(
        steps=20,
        warmup=2,
        learning_rate=2e-3,
        zero_stage=0,
        workers=0,
        checkpoint_every=0,
        log_every=20,
        threads=1,
    )
    start = finetune.preset("tiny", task)
    options = {"beams": 2, "max_text_length": 12} if task == "captioning" else {}
    settings = {"batch_size": 8, "options": options, "track": False, "train": train}
    return replace(start, store=store.uri, **{**settings, **changes})


def recipe_of(store: Store, cfg: FinetuneConfig) -> FinetuneRecipe:
    with models.opened(store, "models/pretrained") as folder:
        tokenizer = models.tokenizer_of(folder)
    return FinetuneRecipe(cfg, SMALL, tokenizer, task_data.labels(store, cfg.task))


@pytest.fixture(scope="module")
def finetuned(store: Store) -> dict[str, dict[str, Any]]:
    """Every task finetuned, one after the other in this process; their results."""
    return {task: finetune.run(finetune_config(store, task)) for task in TASKS}


# -- data -----------------------------------------------------------------------------------------


def test_prepared_rows_keep_published_order(store: Store, world: World) -> None:
    table = store.dataset("tasks/vqa/train").read_table()
    published = list(tasks.load("vqa").read(world.annotations("vqa"), "train"))
    assert table.column("id").to_pylist() == [getattr(record, "id", None) for record in published]
    row = table.to_pylist()[0]
    assert read_examples(row) == getattr(published[0], "examples", None)
    with Image.open(io.BytesIO(row["images"][0]["bytes"])) as image:
        assert image.format == "JPEG"
    assert task_data.labels(store, "vqa") and not task_data.labels(store, "retrieval")


def test_missing_and_broken_images_are_set_aside(world: World, tmp_path: Path) -> None:
    images = tmp_path / "coco"
    shutil.copytree(world.images("coco"), images)
    files = sorted((images / "train2014").iterdir())
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:400])
    config = prepare_config(world, str(tmp_path / "store"), "vqa", splits=("train",))
    whole = len({r.stem for r in files})
    commit = prepare_task.run(replace(config, images=str(images), part_records=5))["train"]
    assert commit.rows == commit.stats["records"] == whole - 2
    assert commit.stats["set_aside"] == {"missing image": 1, "truncated image": 1}
    aside = Store(tmp_path / "store").dataset("tasks/vqa/train").read_set_aside()
    assert {row["id"] for row in aside} == {str(int(f.stem[-12:])) for f in files[:2]}
    again = prepare_task.run(replace(config, images=str(images), part_records=5))["train"]
    assert again == commit


def test_bad_configurations_are_named() -> None:
    with pytest.raises(ValueError, match="'segment' is none of"):
        PrepareConfig(task="segment")
    with pytest.raises(ValueError, match="like"):
        FinetuneConfig(init="random")
    with pytest.raises(ValueError, match="has no beems"):
        FinetuneConfig(task="captioning", options={"beems": 3})
    with pytest.raises(ValueError, match="part_records"):
        EvaluateConfig(part_records=1000)


def test_presets_carry_the_published_recipes() -> None:
    for size in ("base", "large"):
        for task in TASKS:
            cfg, recipe = finetune.PRESETS[f"{size}-{task}"], tasks.load(task).recipes()[size]
            assert cfg.train.learning_rate == recipe.learning_rate
            assert (cfg.batch_size, cfg.image_size) == (recipe.batch_size, recipe.image_size)


# -- finetuning -----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", TASKS)
def test_finetuning_lowers_the_loss_and_leaves_a_model(
    task: str, store: Store, finetuned: dict[str, dict[str, Any]]
) -> None:
    recipe = recipe_of(store, finetune_config(store, task))
    batches = recipe.batches(0, 1)
    before, after = recipe.build(), load(store, f"models/{task}").module
    with torch.no_grad():
        losses = [
            np.mean([float(m.eval()(batches(i))["loss"]) for i in range(4)])
            for m in (before, after)
        ]
    assert losses[1] < 0.9 * losses[0]
    metric = {"vqa": "accuracy", "captioning": "cider", "retrieval": "mean_recall"}[task]
    assert metric in finetuned[task]["metrics"]
    assert finetuned[task]["steps"] == 20


def test_a_batch_is_a_function_of_its_number(store: Store) -> None:
    recipe = recipe_of(store, finetune_config(store, "captioning"))
    whole = recipe.batches(0, 1)(3)
    shares = [recipe.batches(rank, 2)(3) for rank in (0, 1)]
    both = [share.images[i] for i in range(4) for share in shares]
    assert torch.equal(whole.images, torch.stack(both))
    assert [whole.ids[i] for i in range(8)] == [share.ids[i] for i in range(4) for share in shares]
    texts = [torch.split(share.text, share.lengths) for share in shares]
    assert torch.equal(whole.text, torch.cat([texts[r][i] for i in range(4) for r in (0, 1)]))


def test_pretrained_weights_are_taken_over(store: Store) -> None:
    with models.opened(store, "models/pretrained") as folder:
        tensors = weights.load_tensors(folder)
    built = recipe_of(store, finetune_config(store, "captioning")).build().state_dict()
    for key in ("backbone.text_embedding.weight", "text_head.weight"):
        assert torch.equal(built[key], tensors[key])
    scratch = finetune_config(store, "vqa", init="random", like="models/pretrained")
    random = recipe_of(store, scratch).build().state_dict()
    key = "backbone.text_embedding.weight"
    assert random[key].shape == tensors[key].shape and not torch.equal(random[key], tensors[key])


def test_positions_are_resampled_for_another_image_size(store: Store) -> None:
    cfg = finetune_config(store, "vqa", image_size=64)
    recipe = replace(recipe_of(store, cfg), model=replace(SMALL, image_size=64))
    positions = recipe.build().state_dict()["backbone.vision_embedding.positions"]
    assert positions.shape == (1 + 64, SMALL.hidden)
    batch = recipe.batches(0, 1)(0)
    assert batch.images.shape[-1] == 64 and "loss" in recipe.build()(batch)


def test_a_start_that_does_not_fit_is_an_error(store: Store, tmp_path: Path) -> None:
    module = tasks.create("retrieval").build(SMALL)
    weights.save(tmp_path, torch.nn.Linear(2, 2), SMALL)
    with pytest.raises(ValueError, match="backbone"):
        finetune.load_start(module, tmp_path, SMALL)


def test_splits_without_records_are_named_before_training(store: Store) -> None:
    for split in ("empty", "blank"):
        small_corpus.publish(store, f"tasks/vqa/{split}", task_data.SCHEMA, task="vqa")
    for changes, said in (
        ({"train_split": "empty"}, "tasks/vqa/empty: has no records to train on"),
        ({"eval_split": "blank"}, "eval_split: tasks/vqa/blank has no records: name another, or"),
    ):
        with pytest.raises(StoreError, match=said):
            finetune.run(finetune_config(store, "vqa", name="of-nothing", **changes))


def test_the_same_run_is_skipped_and_another_refused(
    store: Store, finetuned: dict[str, dict[str, Any]]
) -> None:
    assert finetune.run(finetune_config(store, "retrieval")) == finetuned["retrieval"]
    with pytest.raises(StoreError, match="other inputs or options"):
        finetune.run(finetune_config(store, "retrieval", batch_size=4))


# -- evaluation -----------------------------------------------------------------------------------


def evaluate_config(store: Store, task: str, **changes: Any) -> EvaluateConfig:
    start = replace(evaluate.PRESETS["tiny"], store=store.uri, track=False, batch_size=4)
    return replace(start, model=f"models/{task}", data=f"tasks/{task}/val", **changes)


@pytest.mark.parametrize(
    "task", ["vqa", "retrieval", pytest.param("captioning", marks=pytest.mark.slow)]
)
def test_evaluation_agrees_with_the_training_run_and_is_skipped_then(
    task: str,
    store: Store,
    finetuned: dict[str, dict[str, Any]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    result = evaluate.run(evaluate_config(store, task))
    assert result["failed"] == 0
    for name, value in finetuned[task]["metrics"].items():
        assert result["metrics"][name] == pytest.approx(value, abs=1e-3), name
    if task == "vqa":
        submission = store.read_json(result["submission"])
        asked = store.dataset("tasks/vqa/val").commit().stats["examples"]
        assert len(submission) == asked and set(submission[0]) == {"question_id", "answer"}
    monkeypatch.setattr(evaluate, "_predictions", None)  # not called again
    assert evaluate.run(evaluate_config(store, task)) == result


def test_an_evaluation_goes_on_where_it_was_killed(
    store: Store, finetuned: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    config = evaluate_config(store, "vqa", name="killed", part_records=4)
    whole = evaluate.run(replace(config, name="whole"))
    predicted: list[int] = []
    original = evaluate.Predictor.__call__

    def dies_at_the_second(self: Any, unit: dict[str, Any]) -> Any:
        predicted.append(unit["start"])
        if len(predicted) == 2:
            raise KeyboardInterrupt
        return original(self, unit)

    monkeypatch.setattr(evaluate.Predictor, "__call__", dies_at_the_second)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(config)
    result = evaluate.run(config)
    assert predicted == [0, 4, 4, 8]  # the first part was not made again
    assert result["metrics"] == whole["metrics"]


def test_a_broken_example_ends_nothing(
    store: Store, finetuned: dict[str, dict[str, Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load(store, "models/vqa")
    rows = store.dataset("tasks/vqa/val").read_table().to_pylist()[:4]
    sound, none = evaluate.predict_rows(model, rows)
    assert not none
    rows[1]["images"][0]["bytes"] = b"no picture"
    collate = type(model.task).collate

    def chokes(self: Any, samples: Any, *rest: Any, **options: Any) -> Any:
        if any(e.id == rows[2]["examples"][0]["id"] for s in samples for e in s.examples):
            raise RuntimeError("no")
        return collate(self, samples, *rest, **options)

    monkeypatch.setattr(type(model.task), "collate", chokes)
    found, aside = evaluate.predict_rows(model, rows)
    assert [(a["id"], a["reason"]) for a in aside] == [
        (rows[1]["id"], "broken record"),
        (rows[2]["id"], "prediction failed"),
    ]
    assert [f["example"] for f in found] == [s["example"] for s in sound]
    lost = {rows[1]["id"], rows[2]["id"]}
    for one, other in zip(found, sound, strict=True):
        expected = None if one["id"] in lost else other["prediction"]
        assert one["prediction"] == expected


def test_a_pretrained_model_can_t_be_evaluated(store: Store) -> None:
    with pytest.raises(StoreError, match="not finetuned"):
        load(store, "models/pretrained")


# -- trying a model -------------------------------------------------------------------------------


def test_predict(
    store: Store, world: World, finetuned: dict[str, dict[str, Any]], tmp_path: Path
) -> None:
    folder = tmp_path / "photos"
    folder.mkdir()
    for file in sorted((world.images("coco") / "val2014").iterdir())[:3]:
        shutil.copy(file, folder)
    (folder / "broken.jpg").write_bytes(b"no picture")
    base = predict.PredictConfig(store=store.uri, path=str(folder))
    question = replace(base, model="models/vqa", text="Is there a red circle?")
    answers = predict.run(question)
    assert [("error" in a) for a in answers] == [False, False, False, True]
    assert all(a["prediction"] in task_data.labels(store, "vqa") for a in answers[:3])
    one = predict.run(replace(question, path=answers[0]["image"]))
    assert one == answers[:1]
    captions = predict.run(replace(base, model="models/captioning"))
    assert all(isinstance(c["prediction"], str) for c in captions if "error" not in c)
    ranked = predict.run(replace(base, model="models/retrieval", text="a red circle", top=2))
    similar = [r["similarity"] for r in ranked if "error" not in r]
    assert len(similar) == 2 and similar == sorted(similar, reverse=True)
    assert len(list(predict.lines(ranked))) == 3
    with pytest.raises(ValueError, match="give a question"):
        predict.run(replace(base, model="models/vqa"))
    with pytest.raises(FileNotFoundError, match="nowhere"):
        predict.run(replace(question, path="/nowhere"))


@pytest.mark.parametrize("task", ["vqa", "captioning", "retrieval"])
def test_parameters_may_be_split_over_workers(store: Store, task: str) -> None:
    cfg = finetune_config(store, task, name=f"{task}-split")
    train = replace(cfg.train, steps=2, warmup=1, zero_stage=3)
    info = finetune.run(replace(cfg, train=train))
    assert info["steps"] == 2
