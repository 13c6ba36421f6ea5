"""Reads published datasets; one module each, for the names of its files and their format.

A source is a module of this package; `load(name)` finds it, so adding a source is adding a file.
Its `KIND` says which functions it has:

- `"pairs"`: images at URLs, with captions. `files(root, options)` lists the annotation files in the
  local folder `root`, and `read(root, options)` yields their records in published order.
  If the images are also published as files, records name them in `files`.
- `"images"`: archives of images. `UNITS` are the archives' name patterns, and
  `read_file(stream, name, options)` yields the records of one of them. A source may have
  `find(store)`, which lists the units itself.
- `"text"`: files of text; `UNITS` and `read_file` as above.

`ORIGIN` says where to get the files, `EXPECTED` what they are called. Sources with `OWN` read the
user's data: their ids begin with the dataset's name, `options.name`.

A bad record never raises: it is yielded as `Malformed`. A missing file raises a `FileNotFoundError`
that says what was expected and where to get it. `_archives` and `_documents` are shared by the
readers of archives and texts.
"""

from __future__ import annotations

import importlib
import json
import pkgutil
import re
import unicodedata
import warnings
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any, BinaryIO

MAX_LINE_BYTES = 1 << 20
MISSING_IMAGE = "annotation names a missing image"


@dataclass(frozen=True)
class Options:
    """Options for reading; each source uses those that concern it."""

    max_captions: int = 50
    """Maximum captions kept per image, the first ones (Visual Genome has about 50 per image)."""
    coco_split: Path | None = None
    """Karpathy's dataset_coco.json; by default looked for beside the annotations."""
    document_chars: int = 4_000
    """Plain text is cut at paragraphs into documents of about this many characters."""
    name: str = ""
    """The dataset's name, with which the ids of a user's own data begin."""
    url_column: str = ""
    """Column of a table's URLs; by default the first of `URL_COLUMNS` that exists."""
    caption_column: str = ""
    """Column of a table's captions; by default the first of `CAPTION_COLUMNS` that exists."""
    splits: tuple[str, ...] = ("train",)
    """Splits to read, for a source that has splits."""
    from_files: bool = False
    """The images are taken from published folders or zips, not from their URLs."""


@dataclass(frozen=True)
class ImageRecord:
    """An image of a source: at a `url`, in one of `files`, or, from an archive, its `data`."""

    id: str
    """`source/published id or line number`: unique, and the same on every reading."""
    url: str | None
    captions: list[str] = field(default_factory=list)
    data: bytes | None = None
    files: tuple[str, ...] = ()
    """Paths that the image may have in the published folders or zips."""


@dataclass(frozen=True)
class TextRecord:
    """A document."""

    id: str
    text: str


@dataclass(frozen=True)
class HeldOut:
    """A valid record that pretraining must not see, because a benchmark tests on it."""

    record: ImageRecord
    reason: str


@dataclass(frozen=True)
class Malformed:
    """A record that can't be used; `where` is its id, or the file and line."""

    reason: str
    detail: str
    where: str
    url: str | None = None


ImageItem = ImageRecord | HeldOut | Malformed
TextItem = TextRecord | Malformed


def names() -> list[str]:
    """The names of all sources."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__) if not m.name.startswith("_"))


def load(name: str) -> ModuleType:
    """The module of a source.

    Raises:
        ValueError: there is no source of this name; the message lists those that exist.
    """
    if name not in names():
        raise ValueError(f"source {name!r}: unknown; one of {', '.join(names())}")
    return importlib.import_module(f"{__name__}.{name}")


# -- shared by the readers ------------------------------------------------------------------------

_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u2028\u2029]+")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_INVISIBLE = re.compile(r"[\u00ad\u200b\u2060\ufeff]")  # soft hyphen, no width at all, BOM


def clean_text(text: str) -> str:
    """One line of composed Unicode (NFC), without controls or runs of spaces; may become ""."""
    if not text.isprintable():  # most texts have none of these
        text = _INVISIBLE.sub("", no_surrogates(_CONTROL.sub(" ", text)))
    return " ".join(unicodedata.normalize("NFC", text).split())


def no_surrogates(text: str) -> str:
    """The text without lone surrogates: JSON and file names may hold them, UTF-8 may not."""
    return _SURROGATE.sub("\N{REPLACEMENT CHARACTER}", text)


def need(file: Path, origin: str) -> Path:
    """`file`, if it exists.

    Raises:
        FileNotFoundError: it doesn't exist; the message says where to get it.
    """
    if not file.is_file():
        raise FileNotFoundError(f"{file} is missing. Get it from {origin}")
    return file


def lines(file: Path) -> Iterator[tuple[int, str | Malformed]]:
    """The lines of a UTF-8 file and their numbers, from 1, in constant memory."""
    with file.open("rb") as stream:
        yield from stream_lines(stream, file.name, MAX_LINE_BYTES)


def stream_lines(stream: BinaryIO, name: str, most: int) -> Iterator[tuple[int, str | Malformed]]:
    """The lines of UTF-8 text and their numbers, from 1; lines over `most` bytes are malformed."""
    number = 0
    while line := stream.readline(most):
        number += 1
        where = f"{name}:{number}"
        if len(line) == most and not line.endswith(b"\n"):
            while line and not line.endswith(b"\n"):
                line = stream.readline(most)
            yield number, Malformed("line too long", f"over {most} bytes", where)
            continue
        try:
            text = line.rstrip(b"\r\n").decode()
        except UnicodeDecodeError as error:
            yield number, Malformed("not UTF-8", str(error)[:200], where)
        else:
            yield number, text.removeprefix("\ufeff") if number == 1 else text


def tsv_pairs(file: Path, prefix: str, *, url_first: bool) -> Iterator[ImageRecord | Malformed]:
    """Records of a headerless file of two tab-separated columns; ids: `prefix` + line number."""
    for number, line in lines(file):
        where = f"{file.name}:{number}"
        if isinstance(line, Malformed):
            yield line
            continue
        # A caption may hold a tab; a URL can't.
        first, tab, second = line.partition("\t") if url_first else line.rpartition("\t")
        if not tab:
            yield Malformed("missing tab" if line.strip() else "blank line", line[:200], where)
            continue
        url, caption = (first, second) if url_first else (second, first)
        yield pair(f"{prefix}{number:09d}", url, [caption], where)


def pair(
    id: str, url: object, captions: list[Any], where: str = "", files: tuple[str, ...] = ()
) -> ImageRecord | Malformed:
    """A record with cleaned captions, or why it can't be one."""
    where = where or id
    address = no_surrogates(url.strip()) if isinstance(url, str) else ""
    if not address and not files:
        return Malformed("empty url", repr(url)[:200], where)
    cleaned = [clean_text(c) for c in captions if isinstance(c, str)]
    cleaned = list(dict.fromkeys(c for c in cleaned if c))
    if not cleaned:
        return Malformed("empty caption", repr(captions)[:200], where, address)
    return ImageRecord(id, address or None, cleaned, files=files)


def read_json(file: Path) -> Any:
    """The content of a JSON file.

    Raises:
        ValueError: it is not JSON; the message names the file.
    """
    try:
        with file.open("rb") as stream:
            return json.load(stream)
    except ValueError as error:
        raise ValueError(f"{file}: not JSON ({error}); download it again") from error


KARPATHY = "held out: COCO Karpathy val/test"
KARPATHY_FILE = "dataset_coco.json"
BESIDE = f"../coco/{KARPATHY_FILE}"  # of other sources' annotations, which leave out its pictures


def karpathy_file(root: Path, options: Options) -> Path | None:
    """The split file: the chosen one, or one in the annotations' folder or in `coco` beside it.

    Raises:
        FileNotFoundError: the chosen file doesn't exist.
    """
    if options.coco_split is not None:
        return need(options.coco_split, "Karpathy's caption_datasets.zip (cs.stanford.edu)")
    places = (root / KARPATHY_FILE, root / BESIDE)
    return next((place for place in places if place.is_file()), None)


def karpathy_held_out(file: Path | None) -> frozenset[int]:
    """COCO image ids of the Karpathy val and test splits; none, with a warning, without a file."""
    if file is None:
        warnings.warn(
            f"no {KARPATHY_FILE} found: COCO's Karpathy val and test images are NOT held out",
            stacklevel=2,
        )
        return frozenset()
    images = read_json(file)["images"]
    return frozenset(int(i["cocoid"]) for i in images if i["split"] in ("val", "test"))
