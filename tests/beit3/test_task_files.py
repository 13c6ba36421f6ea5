"""Published files that are missing, of another version, or partly bad: what each task says."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from beit3 import tasks
from beit3.tasks import Problem, Record

V2 = {"info": {"version": "2.0"}, "data_subtype": "train2014"}
SENTENCES = [{"raw": "a circle", "sentid": 3}]
COCO = {"split": "train", "filename": "a.jpg", "filepath": "train2014", "cocoid": 9}
FLICKR = {"split": "train", "filename": "7.jpg", "sentences": SENTENCES}


def vqa(root: Path, head: dict[str, Any] = V2, **answers: Any) -> None:
    annotation = {"question_id": 1, "answers": [{"answer": "yes"}] * 10, "answer_type": "yes/no"}
    questions = [{"question_id": 1, "image_id": 5, "question": "Is it?"}]
    for name, content in (
        ("v2_OpenEnded_mscoco_train2014_questions.json", {"questions": questions}),
        ("v2_mscoco_train2014_annotations.json", {"annotations": [annotation | answers]}),
    ):
        (root / name).write_text(json.dumps(head | content))


def karpathy(root: Path, dataset: str, *images: Any, name: str = "") -> None:
    file = root / f"dataset_{name or dataset}.json"
    file.write_text(json.dumps({"dataset": dataset, "images": list(images)}))


def text(root: Path, name: str, content: str) -> None:
    (root / name).write_text(content)


def line(identifier: str) -> str:
    return json.dumps({"identifier": identifier, "sentence": "A circle.", "label": "True"})


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("vqa", r"v2_OpenEnded_mscoco_train2014_questions\.json is missing.*visualqa\.org"),
        ("captioning", r"no dataset_coco\.json or dataset_flickr30k\.json.*Karpathy"),
        ("retrieval", r"no dataset_coco\.json or dataset_flickr30k\.json.*Karpathy"),
        ("nlvr2", r"train\.json is missing.*github\.com/lil-lab/nlvr"),
        ("imagenet", r"no folders like train/n01440764.*image-net\.org"),
    ],
)
def test_a_missing_file_and_where_to_get_it_are_named(name: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=says):
        list(tasks.load(name).read(tmp_path, "train"))


@pytest.mark.parametrize(
    ("name", "write", "says"),
    [
        ("vqa", lambda root: vqa(root, {**V2, "info": {"version": "1.0"}}), "of VQA 1.0, expected"),
        ("vqa", lambda root: vqa(root, {**V2, "data_subtype": "val2014"}), "holds val2014 of VQA"),
        ("vqa", lambda root: vqa(root, {"info": {}}), r"not a file of VQA v2 \('version'\)"),
        ("captioning", lambda root: text(root, "dataset_coco.json", "[]"), "not a file of Karp"),
        ("captioning", lambda root: karpathy(root, "flickr8k", COCO), "its dataset is 'flickr8k'"),
        (
            "retrieval",
            lambda root: karpathy(root, "coco", COCO, name="flickr30k"),
            "its dataset is 'coco', expected flickr30k",
        ),
        (
            "retrieval",
            lambda root: text(root, "dataset_coco.json", '{"dataset": "coco", "images": 3}'),
            "images are no list",
        ),
        (
            "imagenet",
            lambda root: text(root, "LOC_val_solution.csv", "n00000001,val_1\n"),
            "first line is not ImageId,PredictionString",
        ),
    ],
)
def test_a_file_of_another_version_is_refused(
    name: str, write: Callable[[Path], None], says: str, tmp_path: Path
) -> None:
    write(tmp_path)
    with pytest.raises(ValueError, match=says):
        list(tasks.load(name).read(tmp_path, "val" if name == "imagenet" else "train"))


def test_lines_of_another_split_are_no_records_of_this(tmp_path: Path) -> None:
    text(tmp_path, "dev.json", f"{line('train-1-0-0')}\n{line('dev-2-0-0')}\n")
    problem, record = tasks.load("nlvr2").read(tmp_path, "val")
    assert isinstance(record, Record) and isinstance(problem, Problem)
    assert "'train-1-0-0' is not of dev" in problem.detail


@pytest.mark.parametrize(
    ("answers", "says"),
    [
        ({"answers": []}, "answers are no texts"),
        ({"answers": [{"answer": 3}]}, "answers are no texts"),
        ({"answers": None}, "TypeError"),
        ({"question_id": 2}, "question 1 has no annotation"),
        ({"question_id": [1]}, "question 1 has no annotation"),
    ],
)
def test_a_bad_annotation_is_a_problem_of_its_own(
    answers: dict[str, Any], says: str, tmp_path: Path
) -> None:
    vqa(tmp_path, **answers)
    (problem,) = tasks.load("vqa").read(tmp_path, "train")
    assert isinstance(problem, Problem) and says in problem.detail
    assert problem.where == "train2014 questions, 0"


def test_karpathy_s_two_datasets_are_read_each_by_its_format(tmp_path: Path) -> None:
    good = {**COCO, "sentences": SENTENCES}
    bad = [
        COCO,
        {**COCO, "sentences": []},
        {**FLICKR, "cocoid": 1},
        {**good, "split": "dev"},
        {**good, "split": ["train"]},
        "no image",
    ]
    karpathy(tmp_path, "coco", good, *bad, {**good, "split": "val"})
    found = list(tasks.load("retrieval").read(tmp_path, "train"))
    (record,) = [item for item in found if isinstance(item, Record)]
    assert (record.id, record.images) == ("9", ("train2014/a.jpg",))
    assert [e.id for e in record.examples] == ["3"]
    problems = [item for item in found if isinstance(item, Problem)]
    assert [p.where for p in problems] == [f"dataset_coco.json, image {i}" for i in range(1, 7)]
    assert [p.reason for p in problems].count("no captions") == 1
    said = "; ".join(p.detail for p in problems)
    assert re.search(r"'filepath'.*split 'dev' is none of.*split \['train'\] is none of", said)

    karpathy(tmp_path, "flickr30k", FLICKR)
    (record,) = tasks.load("retrieval").read(tmp_path / "dataset_flickr30k.json", "train")
    assert isinstance(record, Record) and (record.id, record.images) == ("7", ("7.jpg",))
    with pytest.raises(FileNotFoundError, match=r"dataset_flickr8k\.json is missing"):
        list(tasks.load("retrieval").read(tmp_path / "dataset_flickr8k.json", "train"))
