"""A task is one file: with nothing else changed, every job knows what to do with it."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image
from small_models import save_random_model, small_tokenizer

from beit3 import tasks
from beit3.config import PRESETS as MODELS
from beit3.tasks import Example
from pipelines import evaluate, finetune, predict, prepare_task, tokenize_corpus
from pipelines.baselines import blind
from pipelines.finetune import FinetuneConfig
from pipelines.prepare_task import PrepareConfig
from pipelines.recipe import TrainConfig
from pipelines.storage import Store, StoreError
from tuning import ablate, spaces, sweep
from tuning.downstream import TasksConfig, evaluation

SMALL = replace(MODELS["tiny"], layers=2, patch_size=8, hidden=64, mlp=128, vocab_size=256)
COLOURS = {"r": "red", "g": "green"}
# What a user writes: is a picture of one colour red or green?
TASK = """
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from beit3.model import BEiT3
from beit3.objectives import normalise
from beit3.tasks import About, Example, Recipe, Record
from beit3.tasks._batches import stack_images


@dataclass
class Batch:
    images: Tensor
    targets: Tensor


class Model(nn.Module):
    def __init__(self, config, labels):
        super().__init__()
        self.backbone = BEiT3(config)
        self.head = nn.Linear(config.hidden, labels)

    def logits(self, batch):
        return self.head(self.backbone(images=normalise(batch.images)).vision.mean(1))

    def forward(self, batch):
        return {"loss": cross_entropy(self.logits(batch).float(), batch.targets)}


@dataclass(frozen=True)
class Task:
    about: ClassVar[About] = About(
        splits=("train", "dev", "exam"),
        validation_split="dev",
        test_split="exam",
        title="colours right",
        score=("right",),
        selected_by="right",
        small_options={"smoothing": 0.25},
    )
    labels: tuple[str, ...] = ()
    smoothing: float = 0.5

    @staticmethod
    def read(root, split):
        for name in (root / f"{split}.txt").read_text().split():
            yield Record(name, (f"{name}.png",), (Example(name, None, name[0]),))

    @staticmethod
    def read_labels(root, min_count):
        return ["r", "g"]

    @staticmethod
    def recipes():
        return {"base": Recipe("nowhere", 32, 4, 10, 1, 1e-3, 0.9, 0.1, 0.05)}

    def build(self, config):
        return Model(config, len(self.labels))

    def trainable(self, example):
        return True

    def collate(self, samples, tokenizer, rngs=(), *, training=False):
        given = [self.labels.index(s.examples[0].target or "r") for s in samples]
        return Batch(stack_images(samples), torch.tensor(given))

    def predict(self, module, batch, tokenizer):
        return [self.labels[i] for i in module.logits(batch).argmax(1).tolist()]

    def score(self, predictions, examples, *, thorough=False):
        pairs = zip(predictions, examples, strict=True)
        return {"right": sum(p == e.target for p, e in pairs) / len(examples)}

    def blind(self, known, examples):
        given = [example.target for example in known]
        return self.score([max(given, key=given.count)] * len(examples), examples)

    def submission(self, predictions, examples):
        return None
"""


@pytest.fixture(scope="module")
def code(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The folder of the task's file, beside the others'."""
    code = tmp_path_factory.mktemp("code")
    (code / "colours.py").write_text(TASK)
    tasks.__path__.append(str(code))
    yield code
    tasks.__path__.remove(str(code))
    sys.modules.pop("beit3.tasks.colours", None)


@pytest.fixture(scope="module")
def published(code: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The task's published files."""
    root = tmp_path_factory.mktemp("published")
    for split, names in {"train": "rrrgg" * 4, "dev": "rg", "exam": "ggrg"}.items():
        listed = [f"{name}-{split}-{i}" for i, name in enumerate(names)]
        (root / f"{split}.txt").write_text("\n".join(listed))
        for name in listed:
            Image.new("RGB", (40, 40), COLOURS[name[0]]).save(root / f"{name}.png")
    return root


@pytest.fixture(scope="module")
def store(published: Path, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """The task's data, and a model finetuned for it."""
    store = Store(tmp_path_factory.mktemp("store"))
    save_random_model(store, SMALL, small_tokenizer(["red green blue", "a b"] * 30, 30))
    prepare_task.run(
        PrepareConfig(
            task="colours", store=store.uri, annotations=str(published), images=str(published),
            in_process=True,
        )
    )  # fmt: skip
    chosen = finetuning(store)
    assert chosen.options == {"smoothing": 0.25}
    assert finetune.run(chosen)["metrics"] == {"right": 1.0}
    return store


def finetuning(store: Store) -> FinetuneConfig:
    train = TrainConfig(
        steps=20, warmup=2, learning_rate=2e-3, zero_stage=0, workers=0, checkpoint_every=0,
        threads=1, evaluate_every=10,
    )  # fmt: skip
    start = finetune.preset("tiny", "colours")
    return replace(start, store=store.uri, batch_size=8, track=False, train=train)


def test_it_is_evaluated_beside_guessing(store: Store) -> None:
    config = replace(
        evaluation(TasksConfig(names=("colours",)), store.uri, "colours", "colours"),
        in_process=True,
    )
    assert config.data == "tasks/colours/exam"
    assert evaluate.run(config)["metrics"] == {"right": 1.0}
    assert blind(store, "colours") == {"right": 0.25}  # red, as in three of five


def test_it_is_tried_on_a_picture(store: Store, published: Path) -> None:
    picture = published / "g-exam-0.png"
    config = predict.PredictConfig(str(picture), model="models/colours", store=store.uri)
    assert predict.run(config) == [{"image": str(picture), "prediction": "g"}]


def test_every_job_has_presets_for_it(code: Path) -> None:
    """Made when a job is imported, so in a process that finds the file from the start."""
    program = f"""
from beit3 import tasks
tasks.__path__.append({str(code)!r})
from pipelines import finetune, prepare_task
from tuning import ablate, compare, sweep
print(next(iter(prepare_task.PRESETS)), prepare_task.PRESETS["colours"].chosen)
for name, preset in finetune.PRESETS.items():
    if name.endswith("colours"):
        print(name, preset.batch_size, preset.train.workers, preset.eval_split)
for name in ("tiny-colours", "gpu-colours"):
    chosen = sweep.PRESETS[name].finetune
    print(name, chosen.batch_size, chosen.train.workers, chosen.eval_split, chosen.options)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "vqa ('train', 'dev', 'exam')",
        "tiny-colours 64 0 dev",
        "base-colours 4 4 dev",
        "tiny-colours 64 0 dev {'smoothing': 0.25}",
        "gpu-colours 4 1 dev {}",
    ], done.stderr


def test_it_is_searched_and_shown_by_its_own_measure(store: Store) -> None:
    base = finetuning(store)
    assert sweep.SweepConfig(finetune=replace(base, track=True)).metric == "right"
    alike = (spaces.load(replace(base, task=task, options={})) for task in ("colours", "nlvr2"))
    assert len({str(spaces.read(space)) for space in alike}) == 1
    text = ablate.tables({"default": {"colours": [{"right": 0.5}]}}, ["colours"])
    assert "| colours right |" in text and "| 50.0 |" in text


def test_its_texts_are_no_captions(store: Store) -> None:
    dataset = store.dataset("tasks/colours/train")
    with pytest.raises(StoreError, match=r"but what colours asks: name a split of captioning or"):
        tokenize_corpus.check_captions(dataset, "pairs")


def test_nothing_is_guessed_from_nothing() -> None:
    asked = [Example("0", "is it red?", {"answers": ["yes"], "type": "yes/no"})]
    unanswered = [Example("1", "is it green?", {"answers": [], "type": "yes/no"})]
    for known in ([], unanswered):
        with pytest.raises(ValueError, match="no answers are known to guess from"):
            tasks.create("vqa").blind(known, asked)


def test_guesses_read_the_training_split_only_if_they_need_it(store: Store) -> None:
    def never() -> Iterator[Example]:
        raise AssertionError("read")
        yield  # a generator

    texts = [Example(str(i), "", str(i // 2)) for i in range(4)]
    assert tasks.create("retrieval").blind(never(), texts)["image_recall_1"] == 0.5
