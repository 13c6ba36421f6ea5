"""Your own list: Parquet, CSV, TSV or JSON lines of image URLs and captions.

    python pipelines/ingest.py --source table --name mine --annotations /data/mine \
        --url-column link --caption-column description

Every `*.parquet`, `*.csv`, `*.tsv`, `*.jsonl`, `*.ndjson` below the folder is read, by name; the
last four may be compressed (gz, bz2, xz, zst, lz4). Without the options, the columns are the first
of `URL_COLUMNS` and `CAPTION_COLUMNS` that exist. In JSON lines and Parquet, a caption may be a
list of captions. CSV and TSV start with a header of column names, unless the options are column
numbers, from 0.
CSV is separated by commas and may have quotes; TSV is separated by tabs, and quotes are plain
characters in it, as in the published lists. Memory: a line, or a batch of a Parquet file. The
licence is your data's own.
"""

from __future__ import annotations

import csv
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.sources import (
    MAX_LINE_BYTES,
    ImageItem,
    Malformed,
    Options,
    pair,
    stream_lines,
)
from pipelines.sources._archives import PACKED, BrokenFileError, Leaf, leaves
from pipelines.sources._documents import parquet_rows

KIND = "pairs"
OWN = True
URL_COLUMNS = ("url", "URL", "image_url", "imageUrl", "link")
CAPTION_COLUMNS = ("caption", "captions", "text", "TEXT", "alt", "alt_text", "description")
_KINDS = (".csv", ".tsv", ".jsonl", ".ndjson")
_BATCH = 1000

_Row = tuple[int, Any, Any]  # its number from 1, URL, caption or captions


def files(root: Path, options: Options) -> list[Path]:
    found = [f for f in root.rglob("*") if f.is_file() and _kind(f) and f.name[0] != "."]
    if not found:
        raise FileNotFoundError(
            f"{root}: no .parquet, .csv, .tsv or .jsonl file there. Make one with the columns "
            f"{URL_COLUMNS[0]} and {CAPTION_COLUMNS[0]}, or name your columns by "
            "--url-column and --caption-column"
        )
    return sorted(found)


def read(root: Path, options: Options = Options()) -> Iterator[ImageItem]:  # noqa: B008 (frozen)
    """Yield the rows of all files, in their order.

    Raises:
        ValueError: a file lacks the columns, or is broken Parquet; the message names it.
    """
    for file in files(root, options):
        name = file.relative_to(root).as_posix()
        for row in _rows(file, name, options):
            if isinstance(row, Malformed):
                yield row
                continue
            number, url, captions = row
            captions = (
                captions[: options.max_captions] if isinstance(captions, list) else [captions]
            )
            id = f"{options.name or 'table'}/{name}:{number:09d}"
            yield pair(id, url, captions, f"{name}:{number}")


def _kind(file: Path) -> str:
    """The suffix that gives a file's format; "" for a file that is not read."""
    suffixes = [s.lower() for s in file.suffixes]
    if suffixes and suffixes[-1] == ".parquet":
        return ".parquet"
    while suffixes and suffixes[-1] in PACKED:
        suffixes.pop()
    return suffixes[-1] if suffixes and suffixes[-1] in _KINDS else ""


def _rows(file: Path, name: str, options: Options) -> Iterator[_Row | Malformed]:
    kind = _kind(file)
    if kind == ".parquet":
        yield from _parquet(file, name, options)
        return
    with file.open("rb") as stream:
        for leaf in leaves(stream, name):
            if isinstance(leaf, Malformed):
                yield leaf
                continue
            try:
                if kind in (".csv", ".tsv"):
                    yield from _separated(leaf, kind, options)
                else:
                    yield from _json_lines(leaf, options)
            except BrokenFileError as error:
                yield Malformed(error.reason or "truncated file", str(error)[:200], leaf.name)


def _parquet(file: Path, name: str, options: Options) -> Iterator[_Row | Malformed]:
    number = 0
    try:
        with pq.ParquetFile(file) as table:
            names = table.schema_arrow.names
            url, caption = _columns(names, options, file.name)
            for batch in table.iter_batches(batch_size=_BATCH, columns=[url, caption]):
                for row in parquet_rows(batch):
                    number += 1
                    if isinstance(row, UnicodeDecodeError):
                        yield Malformed("not UTF-8", str(row)[:200], f"{name}:{number}")
                    else:
                        yield number, row[url], row[caption]
    except (pa.ArrowException, OSError) as error:
        raise ValueError(f"{file}: row {number + 1} of a broken Parquet file ({error})") from error


def _separated(leaf: Leaf, kind: str, options: Options) -> Iterator[_Row | Malformed]:
    """Rows of CSV or TSV; a row whose quoted CSV field holds line ends counts once."""
    bad: list[Malformed] = []

    def good() -> Iterator[str]:
        for _, line in stream_lines(leaf.stream, leaf.name, MAX_LINE_BYTES):
            if isinstance(line, Malformed):
                bad.append(line)
            else:
                yield line.replace("\0", " ") + "\n"

    if kind == ".csv":
        reader = csv.reader(good())
    else:
        reader = csv.reader(good(), delimiter="\t", quoting=csv.QUOTE_NONE)
    by_number = options.url_column.isdigit() and options.caption_column.isdigit()
    places = (int(options.url_column), int(options.caption_column)) if by_number else None
    number = 0
    while True:
        try:
            row = next(reader)
        except StopIteration:
            yield from bad
            return
        except csv.Error as error:  # for example, a quote that never ends
            number += 1
            yield Malformed("broken row", str(error), f"{leaf.name}:{number}")
            continue
        yield from bad
        bad.clear()
        if places is None:
            chosen = _columns(row, options, leaf.name)
            places = (row.index(chosen[0]), row.index(chosen[1]))
            continue
        number += 1
        if len(row) <= max(places):
            reason = "missing column" if row else "blank line"
            yield Malformed(reason, repr(row)[:200], f"{leaf.name}:{number}")
        else:
            yield number, row[places[0]], row[places[1]]


def _json_lines(leaf: Leaf, options: Options) -> Iterator[_Row | Malformed]:
    for number, line in stream_lines(leaf.stream, leaf.name, MAX_LINE_BYTES):
        where = f"{leaf.name}:{number}"
        if isinstance(line, Malformed):
            yield line
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
            yield Malformed("not JSON" if line.strip() else "blank line", str(error)[:200], where)
            continue
        if isinstance(row, dict):
            url = _value(row, options.url_column, URL_COLUMNS)
            yield number, url, _value(row, options.caption_column, CAPTION_COLUMNS)
        else:
            yield Malformed("not an object", line[:200], where)


def _value(row: Mapping[str, Any], asked: str, usual: tuple[str, ...]) -> Any:
    return row.get(asked or next((c for c in usual if c in row), ""))


def _columns(have: list[str], options: Options, file: str) -> tuple[str, str]:
    """The names of the columns of URLs and captions.

    Raises:
        ValueError: the file lacks one of them; the message lists the columns it has.
    """
    found = []
    for asked, usual, option in (
        (options.url_column, URL_COLUMNS, "--url-column"),
        (options.caption_column, CAPTION_COLUMNS, "--caption-column"),
    ):
        name = asked or next((c for c in usual if c in have), "")
        if name not in have:
            there = ", ".join(h[:40] for h in have[:20])
            raise ValueError(f"{file}: no column {asked or usual[0]!r} among {there}; see {option}")
        found.append(name)
    return found[0], found[1]
