"""Text corpora: a folder of `.jsonl` and `.txt` files, each optionally gzipped.

`.jsonl` (Wikipedia, OpenWebText, CC-News dumps as converted by their tools): one object a line with
a `text`, one document each. `.txt` (books, stories): paragraphs between blank lines, gathered in
order into documents of about `document_chars` characters. The licence is the corpus's own.
"""

from __future__ import annotations

import gzip
import json
import zlib
from collections.abc import Iterator
from typing import BinaryIO, cast

from pipelines.sources import Malformed, Options, TextItem, TextRecord, clean_text

KIND = "text"
UNITS = ("*.jsonl", "*.jsonl.gz", "*.txt", "*.txt.gz")
ORIGIN = "the corpus's publisher; any folder of such files will do"


def read_file(stream: BinaryIO, name: str, options: Options) -> Iterator[TextItem]:
    """Yield the documents of one file; their ids are the file's name and their number from 1."""
    if name.endswith(".gz"):
        stream = cast(BinaryIO, gzip.GzipFile(fileobj=stream))
    plain = name.removesuffix(".gz").endswith(".txt")
    try:
        if plain:
            yield from _books(stream, name, options.document_chars)
        else:
            yield from _documents(stream, name)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        yield Malformed("truncated file", f"{type(error).__name__}: {error}"[:200], name)


def _documents(stream: BinaryIO, name: str) -> Iterator[TextItem]:
    for number, line in enumerate(stream, start=1):
        where = f"{name}:{number}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Malformed("not JSON", str(error)[:200], where)
            continue
        text = row.get("text") if isinstance(row, dict) else None
        if not isinstance(text, str):
            yield Malformed("no text field", line[:200].decode(errors="replace"), where)
            continue
        paragraphs = [clean_text(p) for p in text.split("\n")]
        cleaned = "\n".join(p for p in paragraphs if p)
        if cleaned:
            yield TextRecord(f"{name}:{number:09d}", cleaned)
        else:
            yield Malformed("empty text", "", where)


def _books(stream: BinaryIO, name: str, most: int) -> Iterator[TextItem]:
    gathered: list[str] = []
    number = 0
    for paragraph in _paragraphs(stream, name):
        if isinstance(paragraph, Malformed):
            yield paragraph
            continue
        if gathered and sum(map(len, gathered)) + len(paragraph) > most:
            number += 1
            yield TextRecord(f"{name}:{number:09d}", "\n".join(gathered))
            gathered = []
        gathered.append(paragraph)
    if gathered:
        yield TextRecord(f"{name}:{number + 1:09d}", "\n".join(gathered))


def _paragraphs(stream: BinaryIO, name: str) -> Iterator[str | Malformed]:
    """Paragraphs as single lines: books are hard-wrapped."""
    pending: list[str] = []
    for number, raw in enumerate(stream, start=1):
        try:
            line = clean_text(raw.decode())
        except UnicodeDecodeError as error:
            yield Malformed("not UTF-8", str(error)[:200], f"{name}:{number}")
            continue
        if line:
            pending.append(line)
        elif pending:
            yield " ".join(pending)
            pending = []
    if pending:
        yield " ".join(pending)
