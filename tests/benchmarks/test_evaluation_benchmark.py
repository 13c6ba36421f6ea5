"""The evaluation benchmark: both sides predict the same, or it says so."""

from __future__ import annotations

import pytest

from beit3.tasks import retrieval
from benchmarks import evaluation

SMALL = ["--preset", "tiny", "--pictures", "3", "--batch-size", "2", "--repeats", "1"]


def test_every_task_has_a_line(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation.main([*SMALL, "--tasks", "retrieval", "vqa", "nlvr2", "imagenet"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines[1:]] == [
        "task", "retrieval", "vqa", "nlvr2", "imagenet"
    ]  # fmt: skip
    assert all(float(number) > 0 for line in lines[2:] for number in line.split()[1:6])


def test_a_picture_encoded_twice_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    encode = retrieval.Model.encode_images

    def twice(self: retrieval.Model, images: evaluation.torch.Tensor) -> evaluation.torch.Tensor:
        encode(self, images)
        return encode(self, images)

    monkeypatch.setattr(retrieval.Model, "encode_images", twice)
    with pytest.raises(RuntimeError, match=r"'pictures': 6.*expected .*'pictures': 3"):
        evaluation.main([*SMALL, "--tasks", "retrieval"])


def test_recall_is_timed(capsys: pytest.CaptureFixture[str]) -> None:
    evaluation.main(["--preset", "tiny", "--scoring", "10", "50"])
    assert capsys.readouterr().out.startswith("recall of 10 images and 50 texts")
