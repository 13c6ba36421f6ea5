"""What the tests of infra/ share."""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from mlflow_service import Service, postgres, served

from pipelines import contrast, tokenize_corpus, train_image_tokenizer, train_text_tokenizer
from pipelines.storage import Store

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def aws_apply() -> ModuleType:
    """infra/iam/apply.py, which is a script and belongs to no package."""
    return _module("aws_apply", ROOT / "infra" / "iam" / "apply.py")


@pytest.fixture(scope="session")
def small_corpus() -> ModuleType:
    """tests/pipelines/small_corpus.py."""
    return _module("small_corpus", ROOT / "tests" / "pipelines" / "small_corpus.py")


def _module(name: str, file: Path) -> ModuleType:
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="session")
def mlflow_service(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """MLflow with PostgreSQL, and its artifacts in the mock of S3."""
    programs = postgres()
    if programs is None:
        pytest.skip("PostgreSQL's server is not installed (Debian: apt-get install postgresql)")
    with served(tmp_path_factory.mktemp("mlflow"), programs, "s3://beit3-tests/mlflow") as service:
        yield service


@pytest.fixture(scope="session")
def small_store(
    ray_session: None, small_corpus: Any, tmp_path_factory: pytest.TempPathFactory
) -> Store:
    """Sources, tokenizers and tokens of the small corpus. Only add."""
    store = Store(tmp_path_factory.mktemp("store"))
    small_corpus.publish_sources(store)
    train_text_tokenizer.run(small_corpus.text_tokenizer(store))
    contrast.run(small_corpus.teacher(store))
    train_image_tokenizer.run(small_corpus.image_tokenizer(store))
    tokenize_corpus.run(small_corpus.tokens(store))
    return store
