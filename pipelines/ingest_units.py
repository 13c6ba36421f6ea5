"""Lists the units to ingest: shards of URLs, archives, folders, parts of archives, texts."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator
from fnmatch import fnmatch
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar

import pyarrow as pa
import pyarrow.fs as pafs

from pipelines.dataset import Dataset
from pipelines.ingest_config import IngestConfig
from pipelines.records import sampled
from pipelines.sources import HeldOut, ImageItem, ImageRecord, Malformed, TextRecord
from pipelines.storage import Store

T = TypeVar("T", bound=ImageRecord | TextRecord | HeldOut | Malformed)

URL_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("url", pa.string()),
        ("captions", pa.list_(pa.string())),
        ("files", pa.list_(pa.string())),
        ("reason", pa.string()),  # given if the annotation itself is set aside
        ("detail", pa.string()),
    ]
)


def describe_local(file: Path, root: Path) -> dict[str, Any]:
    """An input file of a pair source, by its checksum."""
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    name = file.relative_to(root).as_posix() if file.is_relative_to(root) else file.name
    return {"file": name, "sha256": digest, "bytes": file.stat().st_size}


def unit_files(
    config: IngestConfig, source: ModuleType
) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """The units of a source of archives or texts, and their description as inputs.

    A unit names a `file` (with `start` and `bytes` for a part of one) or a `folder`. Texts are
    described by checksum; images, being terabytes, by name and size.

    Raises:
        FileNotFoundError: there are none; the message says what was expected.
    """
    folder = Store(config.annotations)
    found = source.find(folder, config.options) if hasattr(source, "find") else None
    if found is None:
        names = folder.list("", recursive=True)
        names = [n for n in names if any(fnmatch(Path(n).name, p) for p in source.UNITS)]
        infos = [folder.fs.get_file_info(folder.path(name)) for name in names]
        pairs = zip(names, infos, strict=True)
        found = [{"file": n, "bytes": i.size} for n, i in pairs if i.type == pafs.FileType.File]
    if not found:
        raise FileNotFoundError(
            f"{config.annotations}: nothing of {config.source} there. Expected {source.EXPECTED}. "
            f"Get it from {source.ORIGIN}"
        )
    units = [{"name": f"{i:05d}", **unit} for i, unit in enumerate(found)]
    return units, [_describe(folder, unit, by_content=source.KIND == "text") for unit in units]


def _describe(folder: Store, unit: dict[str, Any], *, by_content: bool) -> dict[str, Any]:
    described = {"file": unit.get("folder") or unit["file"], "bytes": unit["bytes"]}
    if "start" in unit:
        described["file"] += f"@{unit['start']}"
    if by_content:
        digest = hashlib.sha256()
        with folder.fs.open_input_stream(folder.path(unit["file"])) as stream:
            while chunk := stream.read(1 << 20):
                digest.update(chunk)
        described["sha256"] = digest.hexdigest()
    return described


def records(source: ModuleType, root: Path, config: IngestConfig) -> Iterator[ImageItem]:
    """The records of a pair source that a run takes."""
    return chosen(source.read(root, config.options), config)


def chosen(items: Iterable[T], config: IngestConfig) -> Iterator[T]:
    """The first `config.limit` items of the random sample."""
    if config.sample < 1.0:
        items = (item for item in items if sampled(_id(item), config.sample))
    return islice(items, config.limit)


def _id(item: ImageRecord | TextRecord | HeldOut | Malformed) -> str:
    if isinstance(item, Malformed):
        return item.where
    return item.record.id if isinstance(item, HeldOut) else item.id


def url_shards(
    dataset: Dataset, mark: str, items: Callable[[], Iterator[ImageItem]], size: int
) -> list[dict[str, Any]]:
    """Write all records, good and bad, to the store as shards of URLs, unless already there."""
    store, folder = dataset.store, f"{dataset.name}/data-{mark[:8]}"
    index = f"{folder}/_urls.json"
    if not store.exists(index):
        count = 0
        rows = (_url_row(item) for item in items())
        while chunk := list(islice(rows, size)):
            table = pa.Table.from_pylist(chunk, URL_SCHEMA)
            store.write_table(f"{folder}/_urls-{count:05d}.parquet", table)
            count += 1
        store.write_json(index, {"shards": count})
    count = store.read_json(index)["shards"]
    return [{"name": f"{i:05d}", "urls": f"{folder}/_urls-{i:05d}.parquet"} for i in range(count)]


def _url_row(item: ImageItem) -> dict[str, Any]:
    if isinstance(item, Malformed):
        return {"id": item.where, "url": item.url, "reason": item.reason, "detail": item.detail}
    record = item.record if isinstance(item, HeldOut) else item
    row = {"id": record.id, "url": record.url, "captions": record.captions}
    row["files"] = list(record.files)
    return row | {"reason": item.reason, "detail": ""} if isinstance(item, HeldOut) else row
