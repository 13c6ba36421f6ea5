"""Evaluation of every task: what is lost counts as wrong, each thing is encoded once, and the
authors' finetuned models are scored like ours."""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from small_models import small_tokenizer
from torch import Tensor, nn

from beit3 import released, tasks, weights
from beit3.config import PRESETS as MODELS
from beit3.objectives import DualEncoder
from beit3.tasks import Example, _caption_metrics, retrieval
from beit3.text import TOKENIZER_FILE
from pipelines import bundles, evaluate, finetuned, import_weights, models, predict, prepare_task
from pipelines.evaluate import EvaluateConfig
from pipelines.import_weights import ImportConfig
from pipelines.prepare_task import PrepareConfig
from pipelines.sample_world import World, WorldSize, generate
from pipelines.storage import Store
from pipelines.task_data import read_examples

FIXTURE = Path(__file__).parents[1] / "beit3/fixtures/released_tiny/weights.safetensors"
SMALL = replace(MODELS["tiny"], layers=2, patch_size=8, hidden=64, mlp=128, vocab_size=256)
SOURCES = {"vqa": "vqa", "nlvr2": "nlvr2", "imagenet": "imagenet1k"}  # else coco
KINDS = {"retrieval": "dual_encoder"}  # of a released checkpoint, else as the task
CLASSES = 7
ANSWERS = ("yes", "no", "2", "3", "red", "blue", "circle")
# Of each task a metric that is a mean over examples, of which a lost one adds nothing.
MEANS = {
    "captioning": "rouge_l",
    "imagenet": "top_5",
    "nlvr2": "accuracy",
    "retrieval": "image_recall_10",
    "vqa": "accuracy",
}


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """METEOR's program takes seconds to start."""
    monkeypatch.setattr(_caption_metrics, "meteor", lambda wanted, found: 0.5)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    size = replace(WorldSize.tiny(), coco_train=32, imagenet1k=60, nlvr2=120)
    return generate(tmp_path_factory.mktemp("world"), size=size, base_url="http://127.0.0.1:1")


def images_of(world: World, task: str) -> Path:
    if task == "imagenet":
        return world.annotations("imagenet1k")
    return world.images("nlvr2" if task == "nlvr2" else "coco")


def prepare(world: World, task: str, store: Store, images: Path) -> None:
    config: PrepareConfig = replace(
        prepare_task.PRESETS[task],
        store=store.uri,
        annotations=str(world.annotations(SOURCES.get(task, "coco"))),
        images=str(images),
        splits=("val",),
        in_process=True,
    )
    prepare_task.run(config)


def add_model(store: Store, task: str, labels: Sequence[str]) -> None:
    """`models/<task>`, as finetuning leaves it, but that it has learned nothing."""
    torch.manual_seed(0)
    module = tasks.create(task, labels=labels).build(SMALL)
    folder = Path(store.path("drafts", task))
    weights.save(folder, module, module.get_submodule("backbone").config, kind=task)  # type: ignore[arg-type]
    models.add_tokenizer(folder, TOKENIZER)
    notes = finetuned.task_notes(task, labels, SMALL)
    notes["options"] |= {"beams": 1, "max_text_length": 8} if task == "captioning" else {}
    (folder / finetuned.TASK_FILE).write_text(json.dumps(notes))
    bundles.save(store, f"models/{task}", folder, {"kind": "finetuned", "task": task})


WORDS = "there is a red circle and two blue squares on the left of sand Is it true that one yes no"
TOKENIZER = small_tokenizer([WORDS, *WORDS.split()] * 30, 60)


def labels_of(world: World, task: str) -> tuple[str, ...]:
    if task == "imagenet":
        return tuple(tasks.load(task).read_labels(world.annotations("imagenet1k"), 1))
    return ANSWERS if task == "vqa" else ()


@pytest.fixture(scope="module")
def store(world: World, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with the validation split and a model of every task."""
    store = Store(tmp_path_factory.mktemp("store"))
    for task in tasks.names():
        prepare(world, task, store, images_of(world, task))
        add_model(store, task, labels_of(world, task))
    return store


def config_of(store: Store, task: str, **changes: Any) -> EvaluateConfig:
    start = replace(evaluate.PRESETS["tiny"], store=store.uri, track=False, batch_size=4)
    return replace(start, model=f"models/{task}", data=f"tasks/{task}/val", **changes)


# -- what is lost ----------------------------------------------------------------------------------


@pytest.mark.parametrize("task", tasks.names())
def test_examples_of_an_absent_image_are_counted_as_wrong(
    task: str, world: World, store: Store, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    images = tmp_path / "images"
    shutil.copytree(images_of(world, task), images)
    rows = store.dataset(f"tasks/{task}/val").read_table().to_pylist()
    absent, broken = (row["images"][-1]["path"] for row in (rows[0], rows[-1]))
    (images / absent).unlink()
    (images / broken).write_bytes(b"no picture")
    poorer = Store(tmp_path / "store")
    prepare(world, task, poorer, images)
    add_model(poorer, task, labels_of(world, task))
    assert sum(poorer.dataset(f"tasks/{task}/val").commit().stats["set_aside"].values()) == 2

    scores = evaluate.run(config_of(poorer, task))
    lost = [e["id"] for row in (rows[0], rows[-1]) for e in row["examples"]]
    whole = sum(len(row["examples"]) for row in rows)
    assert (scores["set_aside"], scores["lost_examples"]) == (2, len(lost))
    assert (scores["examples"], scores["failed"]) == (whole, 0)
    said = f"2 records; {len(lost)} examples of theirs count as wrong"
    assert said in capsys.readouterr().out
    left_out = evaluate.run(config_of(poorer, task, missing="left out"))
    assert (left_out["examples"], left_out["lost_examples"]) == (whole - len(lost), 0)
    name, share = MEANS[task], (whole - len(lost)) / whole
    assert left_out["metrics"][name] > 0
    assert scores["metrics"][name] == pytest.approx(share * left_out["metrics"][name])
    if "submission" in scores:  # servers want an answer for every example
        text = poorer.read(scores["submission"]).decode()
        assert all(f"{identifier}" in text for identifier in lost)
    few = evaluate.run(config_of(poorer, task, limit=3, name="few"))
    assert (few["records"], few["set_aside"]) == (3, 0)


@pytest.mark.parametrize("task", tasks.names())
def test_bf16_predicts_nearly_the_same(task: str, store: Store) -> None:
    found = []
    for precision in ("fp32", "bf16"):
        name = f"{task}-{precision}"
        evaluate.run(config_of(store, task, precision=precision, name=name, limit=12))
        table = store.dataset(f"predictions/{name}").read_table(["prediction"]).to_pylist()
        found.append([json.loads(row["prediction"]) for row in table])
    assert len(found[0]) == len(found[1]) >= 6
    if task == "retrieval":  # a unit vector
        full, half = (np.stack([retrieval.unpack(one["text"]) for one in rows]) for rows in found)
        assert (full * half).sum(1).min() > 0.99 and not np.array_equal(full, half)
    else:  # a model that has learned nothing is never sure
        assert np.mean([one == other for one, other in zip(*found, strict=True)]) > 0.5


@pytest.mark.parametrize("task", tasks.names())
def test_a_record_that_breaks_the_model_is_tried_alone_and_lost_alone(
    task: str, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = finetuned.load(store, f"models/{task}")
    rows = store.dataset(f"tasks/{task}/val").read_table().to_pylist()[:4]
    sound, none = evaluate.predict_rows(model, rows)
    assert not none and all(row["prediction"] for row in sound)
    rows[1]["images"][0]["bytes"] = b"no picture"
    chosen, collate = rows[2]["examples"][0]["id"], type(model.task).collate

    def chokes(self: Any, samples: Any, *rest: Any, **options: Any) -> Any:
        if any(e.id == chosen for sample in samples for e in sample.examples):
            raise RuntimeError("no")
        return collate(self, samples, *rest, **options)

    monkeypatch.setattr(type(model.task), "collate", chokes)
    found, aside = evaluate.predict_rows(model, rows)
    assert [(a["id"], a["reason"]) for a in aside] == [
        (rows[1]["id"], "broken record"),
        (rows[2]["id"], "prediction failed"),
    ]
    lost = {rows[1]["id"], rows[2]["id"]}
    assert [f["prediction"] is None for f in found] == [s["id"] in lost for s in sound]
    examples = [Example(f["example"], None, json.loads(f["target"])) for f in found]
    predictions = [f["prediction"] and json.loads(f["prediction"]) for f in found]
    assert model.task.score(predictions, examples)


def test_answers_outside_the_vocabulary_are_counted(store: Store) -> None:
    rows = store.dataset("tasks/vqa/val").read_table().to_pylist()
    examples = [e for row in rows for e in read_examples(row)]
    known = [bool(set(e.target["answers"]) & set(ANSWERS)) for e in examples]
    scores = evaluate.run(config_of(store, "vqa"))
    assert scores["outside_labels"] == known.count(False) > 0
    assert scores["metrics"]["accuracy"] <= known.count(True) / len(known)
    assert evaluate.run(config_of(store, "imagenet"))["outside_labels"] == 0


# -- how often things are encoded ------------------------------------------------------------------


def test_every_image_and_every_text_is_encoded_once(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, Counter[bytes]] = {"images": Counter(), "texts": Counter()}
    encode_images, encode_texts = DualEncoder.encode_images, DualEncoder.encode_texts

    def images(self: DualEncoder, batch: Tensor) -> Tensor:
        seen["images"].update(image.numpy().tobytes() for image in batch)
        return encode_images(self, batch)

    def texts(self: DualEncoder, text: Tensor, lengths: Sequence[int]) -> Tensor:
        seen["texts"].update(str(part.tolist()).encode() for part in text.split(list(lengths)))
        return encode_texts(self, text, lengths)

    monkeypatch.setattr(DualEncoder, "encode_images", images)
    monkeypatch.setattr(DualEncoder, "encode_texts", texts)
    result = evaluate.run(config_of(store, "retrieval", name="counted", part_records=4))
    rows = store.dataset("tasks/retrieval/val").read_table().to_pylist()
    captions = [e["text"] for row in rows for e in row["examples"]]
    assert seen["images"].total() == len(seen["images"]) == len(rows) == result["records"]
    assert seen["texts"].total() == len(captions) == result["examples"]
    assert {f"{way}_recall_{k}" for way in ("text", "image") for k in (1, 5, 10)} < set(
        result["metrics"]
    )


def test_pictures_are_decoded_ahead_and_stay_in_order(store: Store) -> None:
    config = config_of(store, "imagenet", batch_size=3)
    worker = evaluate.Predictor(config, finetuned.load(store, "models/imagenet"))
    (unit,) = evaluate._units(config, store)
    rows = worker.rows_of(unit)
    found = list(worker.batches(rows))
    assert [len(batch) for batch, _ in found][:-1] == [3] * (len(found) - 1)
    ids = [s.examples[0].id for _, samples in found for s in samples]  # type: ignore[union-attr]
    assert ids == [row["examples"][0]["id"] for row in rows]


# -- the authors' models ---------------------------------------------------------------------------


def released_file(path: Path, kind: str) -> dict[str, Tensor]:
    """A small checkpoint with the names and shapes of a released one's, of random heads."""
    random = torch.Generator().manual_seed(0)
    tensors = load_file(FIXTURE)
    config = released.from_released(tensors, heads=4).config
    if kind in ("vqa", "imagenet"):
        tensors = {k: v for k, v in tensors.items() if "encoder.layer_norm" not in k}
    shapes = released._head_shapes(kind, config, CLASSES)
    tensors |= {k: torch.randn(shape, generator=random) for k, shape in shapes.items()}
    save_file(tensors, path)
    return tensors


def labels_file(path: Path, task: str) -> tuple[str, ...]:
    if task == "vqa":
        lines = [json.dumps({"answer": a, "label": i}) for i, a in enumerate(ANSWERS)]
        path.write_text("\n".join(reversed(lines)) + "\n")
        return ANSWERS
    names = tuple(f"n{i:08d}" for i in range(1, CLASSES + 1))
    path.write_text("".join(f"{name} a thing, or two\n" for name in reversed(names)))
    return names


def add_tokenizer(store: Store) -> None:
    folder = Path(store.path("drafts/tokenizer"))
    folder.mkdir(parents=True, exist_ok=True)
    (folder / TOKENIZER_FILE).write_bytes(TOKENIZER.model)
    bundles.save(store, "tokenizers/text/released", folder, {})


@pytest.mark.parametrize("task", tasks.names())
def test_a_released_finetuned_model_is_imported_and_evaluated(
    task: str, store: Store, tmp_path: Path
) -> None:
    kind = KINDS.get(task, task)
    tensors = released_file(tmp_path / "model.safetensors", kind)
    add_tokenizer(store)
    labels: tuple[str, ...] = ()
    config = ImportConfig(
        "model", str(tmp_path / "model.safetensors"), f"released-{task}", store.uri, heads=4
    )
    if task in ("vqa", "imagenet"):
        with pytest.raises(ValueError, match=r"labels: the head has 7 classes without names; give"):
            import_weights.run(config)
        labels = labels_file(tmp_path / "labels.txt", task)
        config = replace(config, labels=str(tmp_path / "labels.txt"))
    info = import_weights.run(config)
    assert info["task"] == task and import_weights.run(config) == info

    model = finetuned.load(store, f"models/released-{task}")
    assert model.task.labels == labels and model.image_size == 32
    options = {"beams": 1.0, "max_text_length": 8.0} if task == "captioning" else {}
    data = f"tasks/{task}/val"
    theirs = evaluate.run(replace(config_of(store, f"released-{task}", options=options), data=data))
    assert (theirs["task"], theirs["failed"]) == (task, 0) and MEANS[task] in theirs["metrics"]

    # The same answers as of the checkpoint's tensors in this task's model.
    loaded = released.from_released(tensors, heads=4)
    plain = tasks.create(task, labels=labels, options=tasks.options_of(model.task))
    module: nn.Module = plain.build(loaded.config).eval()
    weights.load_into(module, loaded.tensors)
    rows = store.dataset(f"tasks/{task}/val").read_table().to_pylist()[:4]
    samples = [finetuned.row_sample(plain, row, 32) for row in rows]
    expected = finetuned.predict(plain, module, TOKENIZER, samples)
    assert model.predict(samples) == expected
    if task == "vqa":
        batch = plain.collate(samples, TOKENIZER)
        with torch.no_grad():
            best = module.logits(batch).argmax(1).tolist()  # type: ignore[operator]
        assert expected == [ANSWERS[i] for i in best]


def test_a_released_pretrained_model_is_imported_and_not_evaluated(
    store: Store, tmp_path: Path
) -> None:
    config = ImportConfig(
        "model", str(tmp_path / "model.safetensors"), "theirs", store.uri, heads=4
    )
    released_file(tmp_path / "model.safetensors", "pretrained")
    add_tokenizer(store)
    info = import_weights.run(config)
    assert (info["kind"], info["steps"]) == ("pretrained", 0) and "task" not in info
    with pytest.raises(Exception, match="not finetuned for a task"):
        finetuned.load(store, "models/theirs")
    with pytest.raises(ValueError, match="labels: a checkpoint of pretrained has no classes"):
        import_weights.run(replace(config, name="other", labels=str(FIXTURE)))


def test_labels_that_do_not_fit_the_head_are_refused(tmp_path: Path) -> None:
    file = tmp_path / "labels"
    for task, text, says in (
        ("vqa", "yes\nno\n", "is not the authors' answer2label.txt"),
        ("vqa", '{"answer": "yes", "label": 1}\n', "its labels are not 0 to 0"),
        ("vqa", '{"answer": "yes"}\n', "'label'"),
        ("vqa", '{"answer": "yes", "label": 0}\n', "1 classes in 1 lines, the head has 2"),
        ("imagenet", "n00000001 a\nn00000001 a\n", "1 classes in 2 lines, the head has 2"),
        ("imagenet", "tench\n", "'tench' is no WordNet id"),
    ):
        file.write_text(text)
        with pytest.raises(ValueError, match=says):
            import_weights.read_labels(task, str(file), 2)
    with pytest.raises(FileNotFoundError):
        import_weights.read_labels("vqa", str(tmp_path / "none"), 2)


def test_a_dual_encoder_retrieves_without_finetuning(store: Store, tmp_path: Path) -> None:
    torch.manual_seed(1)
    model = DualEncoder(SMALL)
    weights.save(tmp_path, model, SMALL, kind="dual_encoder")
    models.add_tokenizer(tmp_path, TOKENIZER)
    bundles.save(store, "models/contrast", tmp_path, {"kind": "dual_encoder"})
    config = replace(config_of(store, "retrieval"), model="models/contrast", name="zero-shot")
    result = evaluate.run(config)
    assert result["task"] == "retrieval" and result["failed"] == 0
    assert 0 < result["metrics"]["image_recall_10"] <= 1
    loaded = finetuned.load(store, "models/contrast")
    for name, value in loaded.module.state_dict().items():
        assert torch.equal(value, model.state_dict()[name])


def test_a_fault_of_the_model_is_no_score(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor is it kept: the next run tries again."""
    config = config_of(store, "vqa", name="of-a-fault")

    def fault(*_: Any) -> list[Any]:
        raise RuntimeError("no memory")

    with monkeypatch.context() as broken:
        broken.setattr(finetuned.Finetuned, "predict", fault)
        with pytest.raises(RuntimeError, match=r"failed on each of \d+ records.*no memory"):
            evaluate.run(config)
    assert evaluate.run(config)["failed"] == 0


def test_records_of_one_name_keep_their_own_predictions(store: Store) -> None:
    model = finetuned.load(store, "models/imagenet")
    rows = store.dataset("tasks/imagenet/val").read_table().to_pylist()[:6]
    alike = [{**row, "id": "sketch_0"} for row in rows]
    wanted, found = (
        [row["prediction"] for row in evaluate.predict_rows(model, given)[0]]
        for given in (rows, alike)
    )
    assert found == wanted and len(set(wanted)) > 1


# -- trying a model --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "options"),
    [
        ("vqa", ["--text", "Is there a circle?"]),
        ("captioning", []),
        ("retrieval", ["--text", "a red circle", "--top", "2"]),
        ("imagenet", []),
        ("nlvr2", ["--text", "There is a circle."]),
    ],
)
def test_every_model_can_be_tried_and_answers_in_lines_or_json(
    task: str,
    options: list[str],
    store: Store,
    world: World,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = sorted((world.images("coco") / "val2014").iterdir())[:3]
    for file in files:
        shutil.copy(file, tmp_path)
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    path, right = tmp_path, tmp_path / files[1].name
    if task == "nlvr2":
        path, options = tmp_path / files[0].name, [*options, "--right", str(right)]
    given = ["--store", store.uri, "--model", f"models/{task}", "--path", str(path), *options]

    def printed(*more: str) -> str:
        monkeypatch.setattr(sys, "argv", ["predict.py", *given, *more])
        predict.main()
        return capsys.readouterr().out

    results = json.loads(printed("--json"))
    good = [result for result in results if "error" not in result]
    kind = {"vqa": str, "captioning": str, "imagenet": list, "nlvr2": bool, "retrieval": float}
    for result in good:
        assert isinstance(result.get("prediction", result.get("similarity")), kind[task])
    assert len(good) == {"nlvr2": 1, "retrieval": 2}.get(task, 3)
    assert len(results) - len(good) == (task != "nlvr2")  # the broken one
    lines = printed().splitlines()
    assert lines == list(predict.lines(results))
    assert all(result["image"] in line for result, line in zip(results, lines, strict=True))
    if task == "nlvr2":
        assert lines == [f"{path}, {right}: {results[0]['prediction']}"]
