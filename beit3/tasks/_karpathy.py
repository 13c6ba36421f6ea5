"""Karpathy's splits of COCO and Flickr30k: `dataset_coco.json`, `dataset_flickr30k.json`.

Source: "Deep Visual-Semantic Alignments" (arXiv 1412.2306), whose splits captioning and retrieval
report on. COCO's training split is train and restval together.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3.tasks import Problem

SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}


@dataclass(frozen=True)
class Photo:
    """An image of the split with its captions; `captions` are (id, text)."""

    id: str
    path: str
    captions: tuple[tuple[str, str], ...]


def find(root: Path) -> Path:
    """The one `dataset_*.json` in a folder, or the file itself.

    Raises:
        FileNotFoundError: there is none.
        ValueError: there are several.
    """
    if root.is_file():
        return root
    files = sorted(root.glob("dataset_*.json"))
    if not files:
        raise FileNotFoundError(
            f"{root}: no dataset_coco.json or dataset_flickr30k.json there. Get Karpathy's splits "
            "from https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
        )
    if len(files) > 1:
        raise ValueError(
            f"{root}: {', '.join(f.name for f in files)} are there; name the file instead"
        )
    return files[0]


def read(root: Path, split: str) -> Iterator[Photo | Problem]:
    """The photos of a split, in the file's order.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the split is unknown, or the file is no such JSON.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    file = find(root)
    try:
        images = json.loads(file.read_text())["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a file of Karpathy's splits ({error})") from error
    for place, raw in enumerate(images):
        if not isinstance(raw, dict) or raw.get("split") in SPLITS[split]:
            yield _photo(raw, f"{file.name}, image {place}")


def _photo(raw: dict[str, Any], where: str) -> Photo | Problem:
    try:
        name = str(raw.get("cocoid", Path(raw["filename"]).stem))
        path = "/".join(filter(None, (raw.get("filepath"), raw["filename"])))
        captions = tuple(
            (str(s.get("sentid", i)), " ".join(s["raw"].split()))
            for i, s in enumerate(raw["sentences"])
        )
    except (KeyError, TypeError, AttributeError) as error:
        return Problem("malformed record", f"{type(error).__name__}: {error}", where)
    captions = tuple((key, text) for key, text in captions if text)
    if not captions:
        return Problem("no captions", path, where)
    return Photo(name, path, captions)
