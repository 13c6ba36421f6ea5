"""Reads documents from any published form of a text corpus; shared by the sources of texts.

    .txt, .text                     paragraphs between blank lines, or one sentence per line
    .jsonl, .ndjson, wiki_00        one JSON object per line
    .json                           one JSON object, a list of them, or one per line
    .parquet                        one document per row

Each may be compressed (gz, bz2, xz, zst, lz4), and, except Parquet, inside tars and zips
(`pipelines.sources._archives`). A document is one line per paragraph, in composed Unicode (NFC),
without control characters. Documents of more than `MAX_DOCUMENT_BYTES` are set aside; memory holds
one document at a time (for Parquet, a batch).
"""

from __future__ import annotations

import io
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources import Malformed, Options, TextItem, TextRecord, clean_text, stream_lines
from pipelines.sources._archives import (
    ARCHIVES,
    PACKED,
    BrokenFileError,
    Leaf,
    StorageError,
    leaves,
    seekable,
)

MAX_DOCUMENT_BYTES = 8 << 20
_LINES = (".jsonl", ".ndjson")
_PLAIN = (".txt", ".text")
UNITS = (
    *(f"*{kind}{packed}" for kind in (*_LINES, *_PLAIN, ".json") for packed in ("", *PACKED)),
    *(f"*{kind}" for kind in ARCHIVES),
    "*.parquet",
)
_PARQUET_ROWS = 64


def documents(
    stream: BinaryIO,
    name: str,
    options: Options,
    *,
    field: Sequence[str] = ("text",),
    title: str | None = None,
    whole: bool = False,
) -> Iterator[TextItem]:
    """The documents of a file; ids consist of its name, its members' names, and a number.

    Args:
        stream: The file, seekable.
        name: Its name below the annotations' folder.
        options: `document_chars` is the length to which plain text is cut.
        field: JSON fields or Parquet columns that may hold the text; the first that exists is used.
        title: A field that becomes the document's first line, unless the text starts with it.
        whole: Make a plain text one document, whatever its length.
    """
    reader = _Reader(field, title, MAX_DOCUMENT_BYTES if whole else options.document_chars)
    for leaf in leaves(stream, name):
        if isinstance(leaf, Malformed):
            yield leaf
            continue
        try:
            yield from reader.read(leaf)
        except BrokenFileError as error:
            yield Malformed(error.reason or "truncated file", str(error)[:200], leaf.name)


def parquet_rows(batch: pa.RecordBatch) -> list[dict[str, Any] | UnicodeDecodeError]:
    """A batch's rows; where one has text that is not UTF-8, which Parquet doesn't check, why."""
    try:
        return [*batch.to_pylist()]
    except UnicodeDecodeError:
        return [_row(batch.slice(place, 1)) for place in range(batch.num_rows)]


def _row(batch: pa.RecordBatch) -> dict[str, Any] | UnicodeDecodeError:
    try:
        return batch.to_pylist()[0]
    except UnicodeDecodeError as error:
        return error


class _Reader:
    def __init__(self, field: Sequence[str], title: str | None, most: int) -> None:
        self.field, self.title, self.most = field, title, most

    def read(self, leaf: Leaf) -> Iterator[TextItem]:
        file = PurePosixPath(leaf.name.lower())
        while file.suffix in PACKED:
            file = file.with_suffix("")
        if leaf.head.startswith(b"PAR1"):
            return self._parquet(leaf)
        if file.suffix in _PLAIN:
            return self._plain(leaf)
        if file.suffix == ".json":
            return self._json(leaf)
        if file.suffix in _LINES or leaf.head.lstrip(b"\xef\xbb\xbf \r\n\t").startswith(b"{"):
            return self._lines(leaf.stream, leaf.name)
        if not leaf.head:
            return iter(())
        return iter([Malformed("unknown file type", repr(leaf.head[:40]), leaf.name)])

    def _lines(self, stream: BinaryIO, name: str) -> Iterator[TextItem]:
        for number, line in stream_lines(stream, name, MAX_DOCUMENT_BYTES):
            if isinstance(line, Malformed):
                yield line
            elif line.strip():
                yield self._parsed(line, f"{name}:{number}", f"{name}:{number:09d}")

    def _json(self, leaf: Leaf) -> Iterator[TextItem]:
        whole = leaf.stream.read(MAX_DOCUMENT_BYTES)
        rest = leaf.stream.read(1)
        try:
            rows = json.loads(whole) if not rest else None
        except (ValueError, RecursionError):
            rows = None
        if isinstance(rows, dict):
            rows = [rows]
        if isinstance(rows, list):
            for number, row in enumerate(rows, start=1):
                yield self._document(row, f"{leaf.name}:{number}", f"{leaf.name}:{number:09d}")
        else:  # JSON lines, or unreadable
            chained = io.BufferedReader(_Chain([io.BytesIO(whole + rest), leaf.stream]))
            yield from self._lines(chained, leaf.name)

    def _parquet(self, leaf: Leaf) -> Iterator[TextItem]:
        stream = seekable(leaf.stream)
        number = itertools.count(1)
        try:
            with pq.ParquetFile(stream) as file:
                names = set(file.schema_arrow.names)
                field = next((f for f in self.field if f in names), None)
                if field is None:
                    wanted = " or ".join(self.field)
                    yield Malformed("no text field", f"no column {wanted}", leaf.name)
                    return
                columns = [field, *([self.title] if self.title in names else [])]
                for batch in file.iter_batches(batch_size=_PARQUET_ROWS, columns=columns):
                    for row, n in zip(parquet_rows(batch), number, strict=False):
                        where = f"{leaf.name}:{n}"
                        if isinstance(row, UnicodeDecodeError):
                            yield Malformed("not UTF-8", str(row)[:200], where)
                        else:
                            yield self._document(row, where, f"{leaf.name}:{n:09d}")
        except (StorageError, BrokenFileError):
            raise
        except Exception as error:  # Arrow raises several kinds on broken pages
            yield Malformed("broken Parquet", f"{type(error).__name__}: {error}"[:200], leaf.name)

    def _parsed(self, line: str, where: str, id: str) -> TextItem:
        try:
            return self._document(json.loads(line), where, id)
        except (ValueError, RecursionError) as error:
            return Malformed("not JSON", str(error)[:200], where)

    def _document(self, row: Any, where: str, id: str) -> TextItem:
        text = None
        if isinstance(row, dict):
            text = next((row[f] for f in self.field if isinstance(row.get(f), str)), None)
        if text is None:
            return Malformed("no text field", repr(row)[:200], where)
        if len(text) > MAX_DOCUMENT_BYTES:
            return Malformed("document too long", f"{len(text)} characters", where)
        cleaned = _join(text.split("\n"))
        title = clean_text(str(row.get(self.title) or "")) if self.title else ""
        if title and cleaned and not cleaned.startswith(title):
            cleaned = f"{title}\n{cleaned}"
        return TextRecord(id, cleaned) if cleaned else Malformed("empty text", "", where)

    def _plain(self, leaf: Leaf) -> Iterator[TextItem]:
        gathered: list[str] = []
        number = characters = 0
        for paragraph in _paragraphs(leaf, self.most):
            if isinstance(paragraph, Malformed):
                yield paragraph
                continue
            if gathered and characters + len(paragraph) > self.most:
                number += 1
                yield TextRecord(f"{leaf.name}:{number:09d}", "\n".join(gathered))
                gathered, characters = [], 0
            gathered.append(paragraph)
            characters += len(paragraph)
        if gathered:
            yield TextRecord(f"{leaf.name}:{number + 1:09d}", "\n".join(gathered))


def _join(paragraphs: Iterable[str]) -> str:
    return "\n".join(p for p in map(clean_text, paragraphs) if p)


def _paragraphs(leaf: Leaf, most: int) -> Iterator[str | Malformed]:
    """Paragraphs joined to single lines (books are hard-wrapped); long ones cut between lines."""
    pending: list[str] = []
    characters = 0
    for _, line in stream_lines(leaf.stream, leaf.name, MAX_DOCUMENT_BYTES):
        if isinstance(line, Malformed):
            yield line
            continue
        line = clean_text(line)
        if pending and (not line or characters + len(line) > most):
            yield " ".join(pending)
            pending, characters = [], 0
        if line:
            pending.append(line)
            characters += len(line) + 1
    if pending:
        yield " ".join(pending)


class _Chain(io.RawIOBase):
    """Streams one after the other."""

    def __init__(self, streams: Sequence[BinaryIO]) -> None:
        self.streams = streams

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        data = next(filter(None, (s.read(len(buffer)) for s in self.streams)), b"")
        buffer[: len(data)] = data
        return len(data)
