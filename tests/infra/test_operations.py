"""docs/operations.md: the commands in it are commands of this repository."""

from __future__ import annotations

import importlib
import re
import shlex
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text()


def _jobs() -> list[list[str]]:
    joined = TEXT.replace("\\\n", " ")
    return [shlex.split(found) for found in re.findall(r"job python (pipelines/.*)", joined)]


def test_every_job_takes_its_options() -> None:
    from pipelines import config

    jobs = _jobs()
    assert len(jobs) == 7
    for script, *options in jobs:
        assert (ROOT / script).is_file()
        module: Any = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        presets = getattr(module, "PRESETS", None) or pytest.fail(f"{script} has no PRESETS")
        config.cli(presets, description="", args=[*options, "--store", "s3://my-bucket/beit3"])


def test_options_named_in_passing_are_there() -> None:
    from pipelines.recipe import TrainConfig

    fields = set(TrainConfig.__dataclass_fields__)
    named = set(re.findall(r"--train\.([a-z-]+)", TEXT))
    assert named and {name.replace("-", "_") for name in named} <= fields


def test_files_named_are_there() -> None:
    for doc in ("operations.md", "security.md"):
        text = (ROOT / "docs" / doc).read_text().replace("$kind", "cpu")
        for name in re.findall(r"(?:tests/)?infra/[\w./-]*\w", text):
            if not name.endswith(".env") and "/tls" not in name:  # the user's own
                assert (ROOT / name).exists(), f"{doc}: {name}"
