"""What the tests of the jobs share: a small corpus, tokenized once, and a model trained on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import small_corpus

from pipelines import (
    contrast,
    pretrain,
    stops,
    tokenize_corpus,
    train_image_tokenizer,
    train_text_tokenizer,
)
from pipelines.storage import Store


@pytest.fixture(scope="session")
def corpus(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with images, texts, tokenizers and tokens, each made by its own job. Only add."""
    store = Store(tmp_path_factory.mktemp("corpus"))
    small_corpus.publish_sources(store)
    train_text_tokenizer.run(small_corpus.text_tokenizer(store))
    contrast.run(small_corpus.teacher(store))
    train_image_tokenizer.run(small_corpus.image_tokenizer(store))
    tokenize_corpus.run(small_corpus.tokens(store))
    return store


@pytest.fixture(scope="session")
def pretrained(corpus: Store) -> dict[str, Any]:
    """What two Ray Train workers with ZeRO 1 made of `models/pretrained` in the corpus."""
    return pretrain.run(small_corpus.pretraining(corpus, train={"workers": 2}))


@pytest.fixture
def copied(corpus: Store, tmp_path: Path) -> Callable[..., Store]:
    """Makes a store of one's own with these folders of the corpus."""

    def copy(*folders: str) -> Store:
        for folder in folders:
            shutil.copytree(Path(corpus.root) / folder, tmp_path / "copied" / folder)
        return Store(tmp_path / "copied")

    return copy


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """An empty one."""
    return Store(tmp_path / "store")


@pytest.fixture
def unwatched(monkeypatch: pytest.MonkeyPatch) -> None:
    """Undoes `small_run.keep_watches`."""
    monkeypatch.setattr(stops.Watch, "__enter__", stops.Watch.__enter__)
