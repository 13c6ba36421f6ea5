"""Gathers the report's content, writes `report.html`, and logs the same to MLflow.

    report = Report(Headline("My run"), ingestion=gather_ingestion(store, ["images/cc3m"]))
    write(report, Path("report.html"))
    to_mlflow(report, logger)

The classes are in `pipelines.report_content`, the page in `pipelines.report_page`.
"""

from __future__ import annotations

import dataclasses
import math
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
from PIL import Image

from pipelines import run_logger, tracking
from pipelines.dataset import Dataset
from pipelines.report_content import (
    Curve,
    IngestedSource,
    IngestionSection,
    Report,
    Sample,
)
from pipelines.report_html import opened
from pipelines.report_page import render
from pipelines.storage import Store

_CAPTIONS = 2  # shown of a picture
_TEXT_CHARS = 400


def write(report: Report, path: Path) -> Path:
    """Write the page; lone surrogates and the like don't make it fail."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(render(report), encoding="utf-8", errors="replace")
    return path


# -- ingestion ------------------------------------------------------------------------------------


def gather_ingestion(
    store: Store, names: Sequence[str], *, samples: int = 6, note: str = ""
) -> IngestionSection:
    """The contents of each ingested dataset, from its commit and a few of its rows.

    Raises:
        StoreError: one of the datasets is missing.
    """
    return IngestionSection([_source(store.dataset(name), samples) for name in names], note)


def _source(dataset: Dataset, samples: int) -> IngestedSource:
    commit = dataset.commit()
    stats = commit.stats
    rows = _some_rows(dataset, samples)
    pictures = [r for r in rows if (r.get("image") or {}).get("bytes")]
    return IngestedSource(
        name=dataset.name.removeprefix("images/"),
        read=stats.get("read", commit.rows),
        rows=commit.rows,
        captions=stats.get("captions", 0),
        bytes=stats.get("bytes", 0),
        set_aside=stats.get("set_aside", {}),
        samples=[
            Sample(r["image"]["bytes"], list(r.get("captions") or ())[:_CAPTIONS]) for r in pictures
        ],
        texts=[_shorten(r["text"]) for r in rows[:2] if r.get("text")],
    )


def _shorten(text: str) -> str:
    return text if len(text) <= _TEXT_CHARS else text[:_TEXT_CHARS].rsplit(" ", 1)[0] + " …"


def _some_rows(dataset: Dataset, count: int) -> list[dict[str, Any]]:
    """A few rows from all over a dataset, always the same ones; reads one row group per file."""
    files = [f for f in dataset.commit().files if f.rows]
    if not files or count < 1:
        return []
    step = max(1, len(files) // count)
    chosen = files[::step][:count]
    each = math.ceil(count / len(chosen))
    rows: list[dict[str, Any]] = []
    for record in chosen:
        path = dataset.store.path(dataset.name, record.path)
        with pq.ParquetFile(path, filesystem=dataset.store.fs) as file:
            columns = [c for c in ("image", "captions", "text") if c in file.schema_arrow.names]
            group = file.read_row_group(0, columns=columns)
        places = [i * group.num_rows // each for i in range(min(each, group.num_rows))]
        rows += group.take(places).to_pylist()
    return rows[:count]


# -- curves ---------------------------------------------------------------------------------------


def gather_curves(
    run: tracking.RunHandle | str, run_id: str, keys: Mapping[str, str] | Sequence[str]
) -> list[Curve]:
    """Metric histories of an MLflow run; keys that were never logged are left out.

    Args:
        run: The run's handle, or a tracking URI.
        run_id: The run, within that tracking server.
        keys: Metric names, or a mapping of names to the labels to show.
    """
    tracker = tracking.client(run if isinstance(run, str) else run.uri)
    labels = keys if isinstance(keys, Mapping) else {key: key for key in keys}
    curves = []
    for key, label in labels.items():
        history = sorted(tracker.get_metric_history(run_id, key), key=lambda m: m.step)
        if history:
            curves.append(Curve(label, [(m.step, m.value) for m in history]))
    return curves


# -- MLflow ---------------------------------------------------------------------------------------


def to_mlflow(report: Report, logger: run_logger.Logger, *, folder: str = "report") -> None:
    """Log the page and its pictures as artifacts, in the background as the logger does."""
    here = Path(tempfile.mkdtemp(prefix="beit3-report-"))
    # The logger reads the file later, so the copy is deleted with the logger.
    weakref.finalize(logger, shutil.rmtree, here, ignore_errors=True)
    logger.file(write(report, here / "report.html"), folder)
    for name, picture in pictures(report):
        logger.picture(f"{folder}/{name}.png", picture)


def pictures(report: Report) -> Iterator[tuple[str, Image.Image]]:
    """Every readable picture in a report, under a path that gives its place in the report."""
    for path, value in _walk(report, ()):
        picture = opened(value)
        if picture is not None:
            yield "/".join(path), picture


def _walk(value: Any, path: tuple[str, ...]) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Pictures, with their paths: field names, and positions in lists."""
    if isinstance(value, Image.Image | bytes):
        yield path, value
    elif dataclasses.is_dataclass(value):
        for field in dataclasses.fields(value):
            yield from _walk(getattr(value, field.name), (*path, field.name))
    elif isinstance(value, Mapping):
        for key, item in value.items():
            yield from _walk(item, (*path, re.sub(r"[^\w-]+", "-", str(key))))
    elif isinstance(value, Sequence) and not isinstance(value, str):
        for number, item in enumerate(value):
            # Retrieval's pairs of query and results are numbered just like lists of pictures.
            yield from _walk(item, (*path, f"{number:02d}"))
