"""Imports go one way: tuning -> pipelines -> beit3."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
CLUSTER = {"ray", "deepspeed", "mlflow", "boto3"}
UNWANTED = {
    "beit3": {"pipelines", "tuning", "benchmarks", "tests"} | CLUSTER,
    "pipelines": {"tuning", "benchmarks", "tests"},
    "tuning": {"benchmarks", "tests"},
}
# The demo is a job like the others, and shows every room.
SHOWS_ALL = {"pipelines/demo.py", "pipelines/demo_stages.py"}


def imported(file: Path) -> Iterator[str]:
    """Top-level names of the packages that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("room", UNWANTED)
def test_a_room_imports_none_of_those_above_it(room: str) -> None:
    files = sorted((ROOT / room).rglob("*.py"))
    assert len(files) > 5
    wrong = {
        str(file.relative_to(ROOT)): found
        for file in files
        if (found := UNWANTED[room] & set(imported(file)))
    }
    assert wrong == {name: {"tuning"} for name in SHOWS_ALL if name.startswith(room)}


def test_what_several_jobs_need_is_in_none_of_them() -> None:
    """A job is a program; what others want of it has a module of its own."""
    pipelines = ROOT / "pipelines"
    jobs = {
        file.stem for file in pipelines.glob("*.py") if "\ndef main() -> None:" in file.read_text()
    }
    assert {"pretrain", "finetune", "ingest", "evaluate", "predict"} < jobs
    # A checkpoint is exported with its run's recipe; a finished ingestion reports itself.
    wanted = {("export", "pretrain"), ("ingest", "data_report")}
    found: set[tuple[str, str]] = set()
    for file in pipelines.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pipelines"):
                path = (node.module or "").split(".")
                names = [alias.name for alias in node.names] if path == ["pipelines"] else path[1:2]
                found |= {(file.stem, name) for name in names if name in jobs - {file.stem}}
    assert {pair for pair in found if not pair[0].startswith("demo")} == wanted
