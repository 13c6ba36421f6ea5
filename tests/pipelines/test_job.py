"""What the jobs' programs share."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_corpus
import yaml

from pipelines import bundles, config, contrast, evaluate, job, pretrain, tokenize_corpus
from pipelines.contrast import ContrastConfig
from pipelines.finetune import FinetuneConfig
from pipelines.recipe import TrainConfig
from pipelines.storage import Store, StoreError
from pipelines.train_image_tokenizer import ImageTokenizerConfig


@dataclass(frozen=True)
class Options:
    store: str = "store"


def raising(error: Exception) -> Callable[[Options], None]:
    def run(chosen: Options) -> None:
        raise error

    return run


@pytest.mark.parametrize("error", [StoreError("no bucket"), ValueError("no"), FileNotFoundError()])
@pytest.mark.parametrize("billed", [False, True])
def test_what_cant_be_used_is_said_in_one_line(
    error: Exception,
    billed: bool,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises(SystemExit) as ended:
        job.main({"": Options()}, "A job.", raising(error), billed=billed)
    assert ended.value.code == 2
    said = capsys.readouterr()
    assert said.err == f"error: {error}\n" and ("node-hours" in said.out) == billed


def test_an_error_of_the_code_keeps_its_traceback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["job"])
    with pytest.raises(KeyError):
        job.main({"": Options()}, "A job.", raising(KeyError("x")))


@pytest.mark.parametrize("program", [contrast, evaluate, pretrain, tokenize_corpus])
def test_an_empty_store_is_no_traceback(
    program: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sys, "argv", ["job", "--store", str(tmp_path)])
    with pytest.raises(SystemExit) as ended:
        program.main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert said.startswith("error: ") and "run the job that makes it" in said
    assert said.count("\n") == 1


def test_a_folder_is_named_whole(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.chdir(tmp_path)
    assert job.located(Options("a/b")) == Options(str(tmp_path / "a/b"))
    for store in ("s3://bucket/a", "file:///a", "/a"):
        assert job.located(Options(store)) == Options(store)
    assert job.located("anything else") == "anything else"


@pytest.mark.parametrize("kind", [ContrastConfig, FinetuneConfig, ImageTokenizerConfig])
def test_a_batch_that_workers_cant_share_is_named(kind: Any) -> None:
    other: dict[str, Any] = {} if kind is FinetuneConfig else {"images": ("cc3m",)}
    with pytest.raises(ValueError, match=r"batch_size 32 is not divisible by train.workers 3"):
        kind(batch_size=32, train=TrainConfig(workers=3), **other)


@pytest.mark.slow
def test_workers_find_a_store_that_is_named_from_where_the_job_was_started(
    corpus: Store, tmp_path: Path
) -> None:
    shutil.copytree(corpus.root, tmp_path / "here")
    options = config.to_dict(small_corpus.pretraining(corpus, train={"workers": 1}))
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options | {"store": "here", "name": "x"}))
    program = Path(pretrain.__file__)
    subprocess.run(
        [sys.executable, program, "--config", "options.yaml"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(program.parent.parent)},
        check=True,
    )
    assert bundles.exists(Store(tmp_path / "here"), "models/x")
    assert {path.name for path in tmp_path.iterdir()} >= {"here", "options.yaml"}
