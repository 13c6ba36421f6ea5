"""Your own pairs in WebDataset shards: tars of images, each beside its caption.

    python pipelines/ingest.py --source webdataset --name mine --annotations /data/shards

The format is written by img2dataset's `--output_format webdataset`, and read by most tools: in each
`*.tar`, compressed or not, the files of a sample follow one another and share their name up to the
first dot: `000010005.jpg` (or jpeg, png, webp, gif, bmp) with `000010005.txt`, a caption, or
`000010005.json`, an object with `caption` (a text or a list of texts) and perhaps `url`. The text
file takes precedence over the JSON, and other files are ignored.
Nothing is downloaded. Memory: one sample. The licence is your data's own.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from pipelines.sources import (
    ImageItem,
    ImageRecord,
    Malformed,
    Options,
    clean_text,
    no_surrogates,
)
from pipelines.sources._archives import ARCHIVES, contents

KIND = "images"
OWN = True
UNITS = tuple(f"*{kind}" for kind in ARCHIVES)
EXPECTED = "*.tar with a .txt or .json beside each image"
ORIGIN = "img2dataset's webdataset output, or a tool of yours"
MAX_FILE_BYTES = 256 << 20
_IMAGES = ("jpg", "jpeg", "png", "webp", "gif", "bmp")
_CAPTIONS = ("caption", "captions", "text", "TEXT")


def read_file(stream: BinaryIO, name: str, options: Options) -> Iterator[ImageItem]:
    """Yield the samples of a shard, in its order."""
    files = contents(stream, name, MAX_FILE_BYTES)
    for key, group in itertools.groupby(files, _key):
        sample: dict[str, bytes] = {}
        for file in group:
            if isinstance(file, Malformed):
                yield file
            else:
                suffix = file[0].rpartition("/")[2].partition(".")[2].lower()
                known = suffix in (*_IMAGES, "txt", "json")
                sample.setdefault(suffix if known else "other files", file[1] if known else b"")
        if sample:
            inner = key.removeprefix(f"{name}/")
            shard = PurePosixPath(name).with_suffix("").as_posix()
            id = f"{options.name or 'webdataset'}/{shard}/{inner}"
            yield _sample(id, sample, options.max_captions)


def _key(file: tuple[str, bytes] | Malformed) -> str:
    path = file.where if isinstance(file, Malformed) else file[0]
    folder, slash, base = path.rpartition("/")
    return folder + slash + base.partition(".")[0]


def _sample(id: str, sample: dict[str, bytes], most: int) -> ImageItem:
    image = next((sample[s] for s in _IMAGES if s in sample), None)
    described: Any = {}
    if "json" in sample:
        try:
            described = json.loads(sample["json"])
        except (ValueError, RecursionError) as error:
            return Malformed("not JSON", str(error)[:200], id)
    described = described if isinstance(described, dict) else {}
    url = described.get("url")
    url = no_surrogates(url) if isinstance(url, str) else None
    if image is None:
        return Malformed("no image", f"only {', '.join(sorted(sample))}"[:200], id, url)
    if "txt" in sample:
        try:
            captions: Any = sample["txt"].decode("utf-8-sig")
        except UnicodeDecodeError as error:
            return Malformed("not UTF-8", str(error)[:200], id, url)
    else:
        captions = next((described[c] for c in _CAPTIONS if c in described), None)
    captions = captions[:most] if isinstance(captions, list) else [captions]
    cleaned = [clean_text(c) for c in captions if isinstance(c, str)]
    cleaned = list(dict.fromkeys(c for c in cleaned if c))
    if not cleaned:
        return Malformed("empty caption", repr(captions)[:200], id, url)
    return ImageRecord(id, url, cleaned, data=image)
