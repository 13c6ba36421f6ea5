"""Stores the signatures of a dataset's rows, in a side file beside each of its files.

They outlive the search they were made for (`pipelines.duplicates`): datasets that are compared
again are not read again.
"""

from __future__ import annotations

import functools
import hashlib
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import pyarrow as pa

from pipelines import signatures
from pipelines.dataset import Dataset
from pipelines.parts import each
from pipelines.signatures import COLOUR_BYTES, HASH_BYTES, Signature
from pipelines.storage import FileRecord, Store

SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("sha256", pa.binary(32)),  # of the stored bytes, or of the text
        ("bits", pa.binary(HASH_BYTES)),  # null, like the colours, without a readable picture
        ("colours", pa.binary(COLOUR_BYTES)),
    ]
)
VERSION = 1  # raised when signatures change


def name(dataset: str, path: str) -> str:
    """The name of the signature file of a dataset's file."""
    folder, file = posixpath.split(path)
    stem = file.removesuffix(".parquet")
    return posixpath.join(dataset, folder, f"_signatures-{stem}-v{VERSION}.parquet")


def sign(batches: Iterable[pa.RecordBatch]) -> pa.Table:
    """The signatures of a part's rows, in order, from the column `image`, or else `text`."""
    rows = [row for batch in batches for row in _sign(batch)]
    return pa.Table.from_pylist(rows, SCHEMA)


def read(store: Store, dataset: str, path: str) -> pa.Table:
    return store.read_table(name(dataset, path))


def write(dataset: Dataset, file: FileRecord, signed: pa.Table) -> None:
    """Store signatures beside their part, for a job that has its images at hand anyway."""
    dataset.store.write_table(name(dataset.name, file.path), signed)


def write_missing(dataset: Dataset, files: Sequence[FileRecord], *, here: bool = False) -> None:
    """Write the missing signatures, one task per file.

    Args:
        here: Do everything in this process, without Ray.
    """
    there = _objects(dataset, files)
    todo = [f for f in files if name(dataset.name, f.path) not in there]
    units = [{"dataset": dataset.name, "path": f.path} for f in todo]
    work = functools.partial(_sign_file, dataset.store)
    for _ in each(f"{dataset.name}: signatures", work, units, here=here):
        pass


def _sign(batch: pa.RecordBatch) -> Iterator[dict[str, Any]]:
    names = batch.schema.names
    pictures = "image" in names
    columns = [c for c in ("id", "image", "text", "sha256") if c in names]
    for row in batch.select(columns).to_pylist():
        if pictures:
            data = (row["image"] or {}).get("bytes") or b""
        else:
            data = (row["text"] or "").encode()
        known = row.get("sha256")
        digest = bytes.fromhex(known) if known else hashlib.sha256(data).digest()
        signed = _signature(data) if pictures else None
        yield {
            "id": str(row["id"]),
            "sha256": digest,
            "bits": signed and signed.bits,
            "colours": signed and signed.colours,
        }


def _signature(data: bytes) -> Signature | None:
    try:
        return signatures.signature(data)
    except Exception:  # decoders raise nearly anything; the checksum is compared instead
        return None


def _sign_file(store: Store, unit: dict[str, Any]) -> None:
    columns = ["id", "image", "text", "sha256"]
    batches = store.dataset(unit["dataset"]).batches(unit["path"], 64, columns=columns)
    store.write_table(name(unit["dataset"], unit["path"]), sign(batches))


def _objects(dataset: Dataset, files: Sequence[FileRecord]) -> set[str]:
    """Names of the objects beside these files, with one listing per folder."""
    folders = {posixpath.join(dataset.name, posixpath.dirname(f.path)) for f in files}
    return {posixpath.join(folder, n) for folder in folders for n in dataset.store.list(folder)}
