"""NLVR2: reader, head, loss, measures, and the file for the official script."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small_tokenizer
from torch import Tensor

from beit3.config import PRESETS
from beit3.tasks import Example, Problem, Record, Sample
from beit3.tasks.nlvr2 import Batch, Model, Task
from beit3.text import TextTokenizer
from pipelines.sample_world import WorldSize, generate

TINY = replace(PRESETS["tiny"], layers=2)
SENTENCES = ("The left image has a circle.", "Both images contain a square.")


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return small_tokenizer(SENTENCES * 30, 40)


def line(identifier: str, sentence: Any = SENTENCES[0], label: Any = "True", **more: Any) -> str:
    return json.dumps({"identifier": identifier, "sentence": sentence, "label": label, **more})


def sample(*examples: Example, seed: int = 0) -> Sample:
    rng = np.random.default_rng(seed)
    images = tuple(rng.integers(0, 256, (3, 48, 48), dtype=np.uint8) for _ in range(2))
    return Sample(images, examples)


def examples() -> list[Sample]:
    """Four pairs of images and seven sentences about them."""
    return [
        sample(
            *(
                Example(f"train-{i}-0-{k}", SENTENCES[k], (i + k) % 2 == 0)
                for k in range(1 + i % 2)
            ),
            seed=i,
        )
        for i in range(4)
    ]


# -- reader ---------------------------------------------------------------------------------------


def test_published_lines_become_pairs_with_their_sentences(tmp_path: Path) -> None:
    lines = [
        line("train-11670-0-0", "The  left image\nhas a circle. ", "False", directory=7),
        line("train-11670-0-1", SENTENCES[1], directory=7),
        line("train-12-3-0", directory=0, left_url="http://x/", validation={"1": "True"}),
        line("train-11670-1-0", label="False", directory=7),
    ]
    (tmp_path / "train.json").write_text("\n".join(lines) + "\n\n")
    (tmp_path / "dev.json").write_text(line("dev-269-0-1"))
    (tmp_path / "test1.json").write_text(line("test1-261-0-0"))
    first, second, third = Task.read(tmp_path, "train")
    assert first == Record(
        "train-11670-0",
        ("train/7/train-11670-0-img0.png", "train/7/train-11670-0-img1.png"),
        (
            Example("train-11670-0-0", "The left image has a circle.", False),
            Example("train-11670-0-1", SENTENCES[1], True),
        ),
    )
    assert isinstance(second, Record) and second.images[0] == "train/0/train-12-3-img0.png"
    assert isinstance(third, Record) and third.id == "train-11670-1"
    for split, path in (("val", "dev/dev-269-0"), ("test", "test1/test1-261-0")):
        (record,) = Task.read(tmp_path, split)
        assert isinstance(record, Record)
        assert record.images == (f"{path}-img0.png", f"{path}-img1.png")


def test_malformed_lines_are_named_and_the_others_kept(tmp_path: Path) -> None:
    bad = [
        ('{"identifier": "dev-1-0-0", "sente', "JSONDecodeError"),
        ("[1]", "TypeError"),
        (line("dev-2-0"), "'dev-2-0' is not split-set-pair-sentence"),
        (line("dev-3-0-0", label="maybe"), "label 'maybe' is neither True nor False"),
        (line("dev-4-0-0", "  "), "sentence is empty"),
        (line("dev-5-0-0", None), "AttributeError"),
        (json.dumps({"identifier": "dev-6-0-0", "sentence": "A."}), "KeyError: 'label'"),
        ("\udcff", "UnicodeDecodeError"),
    ]
    text = "\n".join([line("dev-0-0-0"), *(t for t, _ in bad), line("dev-9-0-0", label=False)])
    (tmp_path / "dev.json").write_bytes(text.encode(errors="surrogateescape"))
    found = list(Task.read(tmp_path, "val"))
    problems = [item for item in found if isinstance(item, Problem)]
    assert [p.where for p in problems] == [f"dev.json, line {2 + i}" for i in range(len(bad))]
    for problem, (_, said) in zip(problems, bad, strict=True):
        assert problem.reason == "malformed record" and said in problem.detail
    kept = [item for item in found if isinstance(item, Record)]
    assert [(r.id, r.examples[0].target) for r in kept] == [("dev-0-0", True), ("dev-9-0", False)]


def test_missing_files_and_unknown_splits_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"test1\.json is missing.*lil-lab/nlvr"):
        list(Task.read(tmp_path, "test"))
    with pytest.raises(ValueError, match="'dev' is none of train, val, test"):
        list(Task.read(tmp_path, "dev"))


def test_the_small_world_is_read_whole(tmp_path: Path) -> None:
    world = generate(tmp_path, size=WorldSize.tiny(), base_url="http://127.0.0.1:1")
    found = [
        r
        for split in ("train", "val", "test")
        for r in Task.read(world.annotations("nlvr2"), split)
    ]
    records = [r for r in found if isinstance(r, Record)]
    assert len(records) == len(found)
    assert sum(len(r.examples) for r in records) == world.counts["nlvr2"]
    assert all((world.images("nlvr2") / path).is_file() for r in records for path in r.images)


# -- model ----------------------------------------------------------------------------------------


def test_each_image_is_read_with_the_sentence(tokenizer: TextTokenizer) -> None:
    batch = Task().collate(examples(), tokenizer)
    assert batch.images.shape == (4, 2, 3, 48, 48)
    assert batch.owner.tolist() == [0, 1, 1, 2, 3, 3]
    assert batch.targets.tolist() == [1, 0, 1, 1, 0, 1]
    torch.manual_seed(0)
    model = Model(TINY).eval()
    torch.nn.init.normal_(model.head.dense1.weight, std=0.1)
    torch.nn.init.normal_(model.head.dense2.weight, std=0.1)
    with torch.no_grad():
        logits = model.logits(batch)
        assert logits.shape == (6, 2)
        # The last sentence by itself, each image alone: as the released model puts it together.
        text = batch.text[-batch.lengths[-1] :]
        parts = []
        for side in (0, 1):
            image = batch.images[3, side].float()[None] / 127.5 - 1
            out = model.backbone(images=image, text=text, lengths=batch.lengths[-1:], pairs=1)
            parts += [out.image_summary, out.text_summary]
        expected = model.head(torch.cat(parts, -1))[0]
        torch.testing.assert_close(logits[-1], expected, atol=1e-4, rtol=0)
        swapped = replace(batch, images=batch.images.flip(1))
        assert not torch.allclose(model.logits(swapped), logits, atol=1e-3)  # left is not right


def test_the_head_has_the_released_names_and_starts_undecided() -> None:
    model = Model(TINY)
    d = TINY.hidden
    shapes = {k: list(v.shape) for k, v in model.state_dict().items() if k.startswith("head.")}
    assert shapes == {
        "head.norm1.weight": [4 * d],
        "head.norm1.bias": [4 * d],
        "head.dense1.weight": [2 * d, 4 * d],
        "head.dense1.bias": [2 * d],
        "head.norm2.weight": [2 * d],
        "head.norm2.bias": [2 * d],
        "head.dense2.weight": [2, 2 * d],
        "head.dense2.bias": [2],
    }
    assert model.head(torch.randn(5, 4 * d)).abs().max() < 1e-2
    for size, millions in (("base", 225.7), ("large", 681.1)):  # published: 226M and 681M
        with torch.device("meta"):
            count = sum(p.numel() for p in Model(PRESETS[size]).parameters())
        assert count / 1e6 == pytest.approx(millions, abs=0.1)


def test_a_head_that_starts_larger_lets_the_gradient_through(tokenizer: TextTokenizer) -> None:
    def gradient(task: Task) -> float:
        torch.manual_seed(0)
        model = task.build(TINY)
        model(task.collate(examples(), tokenizer, training=True))["loss"].backward()
        gradients = [p.grad for p in model.backbone.parameters() if p.grad is not None]
        return float(torch.cat([g.flatten() for g in gradients]).square().mean().sqrt())

    # The authors' start leaves hardly more than Adam's epsilon, 1e-8.
    assert gradient(Task()) < 1e-7
    assert gradient(Task(head_init=1.0)) > 1e-5


@pytest.mark.parametrize("impossible", [0.0, -1.0, float("nan"), float("inf")])
def test_a_head_starts_with_some_weights(impossible: float) -> None:
    with pytest.raises(ValueError, match=r"options\.head_init: .* is no number above 0"):
        Task(head_init=impossible)


def test_loss_and_accuracy_by_hand(
    tokenizer: TextTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Model(TINY)
    logits = torch.tensor([[0.0, 2.0], [1.0, 0.0], [3.0, 0.0]])
    monkeypatch.setattr(model, "logits", lambda batch: logits)
    empty = torch.zeros(0, dtype=torch.long)
    batch = Batch(torch.zeros(0), empty, empty, [], torch.tensor([1, 0, 1]))
    out = model(batch)
    by_hand = (np.log1p(np.exp(-2)) + np.log1p(np.exp(-1)) + np.log1p(np.exp(3))) / 3
    assert float(out["loss"]) == pytest.approx(by_hand, rel=1e-5)
    assert float(out["accuracy"]) == pytest.approx(2 / 3)


def test_a_few_steps_lower_the_loss(tokenizer: TextTokenizer) -> None:
    torch.manual_seed(0)
    task = Task()
    batch = task.collate(examples(), tokenizer, training=True)
    model = task.build(TINY).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    losses: list[float] = []
    for _ in range(30):
        out: dict[str, Tensor] = model(batch)
        losses.append(float(out["loss"].detach()))
        optimizer.zero_grad()
        out["loss"].backward()
        optimizer.step()
    assert losses[0] == pytest.approx(np.log(2), abs=0.01)
    assert losses[-1] < 0.5 * losses[0]
    assert task.predict(model, batch, tokenizer) == [bool(t) for t in batch.targets.tolist()]


def test_one_image_is_no_pair(tokenizer: TextTokenizer) -> None:
    one = Sample((np.zeros((3, 48, 48), np.uint8),), (Example("dev-1-0-0", "A.", True),))
    with pytest.raises(ValueError, match="expected a pair of images, got 1"):
        Task().collate([one], tokenizer)


# -- measures -------------------------------------------------------------------------------------


def official(csv: str, labels: dict[str, str]) -> tuple[float, float]:
    """Precision and consistency as the published script computes them from its CSV file."""
    given = dict(row.strip().split(",")[:2] for row in csv.splitlines() if row)
    right = {name: given[name].lower() == label.lower() for name, label in labels.items()}
    sentences: dict[str, bool] = {}
    for name, correct in right.items():
        split, group, _, number = name.split("-")
        key = f"{split}-{group}--{number}"
        sentences[key] = sentences.get(key, True) and correct
    return sum(right.values()) / len(right), sum(sentences.values()) / len(sentences)


def test_accuracy_consistency_and_the_official_file() -> None:
    targets = {
        "dev-1-0-0": True,
        "dev-1-1-0": False,
        "dev-1-0-1": True,  # another sentence about the same images
        "dev-2-0-0": False,
        "dev-2-1-0": False,
    }
    found = [Example(name, None, target) for name, target in targets.items()]
    predictions = [True, False, False, False, None]
    scores = Task().score(predictions, found)
    assert scores == {"accuracy": pytest.approx(3 / 5), "consistency": pytest.approx(1 / 3)}
    csv = Task().submission(predictions, found)
    assert csv.splitlines() == [
        "dev-1-0-0,True",
        "dev-1-1-0,False",
        "dev-1-0-1,False",
        "dev-2-0-0,False",
        "dev-2-1-0,",
    ]
    labels = {name: str(target) for name, target in targets.items()}
    assert official(csv, labels) == (scores["accuracy"], scores["consistency"])
    assert Task().score([True], [Example("test2-1-0-0", None, None)]) == {}
