"""Karpathy's splits of COCO and Flickr30k: `dataset_coco.json`, `dataset_flickr30k.json`.

Source: "Deep Visual-Semantic Alignments" (arXiv 1412.2306). Captioning and retrieval results are
reported on its splits. COCO's training split is train and restval together. Each file says which
dataset it holds; Flickr30k's images are in one folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beit3.tasks import Problem

DATASETS = {"coco": "dataset_coco.json", "flickr30k": "dataset_flickr30k.json"}
SPLITS = {"train": ("train", "restval"), "val": ("val",), "test": ("test",)}
_SPLITS = {name for names in SPLITS.values() for name in names}


_WHERE = (
    "Get Karpathy's splits from "
    "https://cs.stanford.edu/people/karpathy/deepimagesent/caption_datasets.zip"
)


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
    if root.suffix == ".json":
        if not root.is_file():
            raise FileNotFoundError(f"{root} is missing. {_WHERE}")
        return root
    files = sorted(root.glob("dataset_*.json"))
    if not files:
        raise FileNotFoundError(
            f"{root}: no dataset_coco.json or dataset_flickr30k.json there. {_WHERE}"
        )
    if len(files) > 1:
        raise ValueError(
            f"{root}: {', '.join(f.name for f in files)} are there; name the dataset or the file"
        )
    return files[0]


def read(root: Path, split: str) -> Iterator[Photo | Problem]:
    """The photos of a split, in the file's order.

    Raises:
        FileNotFoundError: the file is missing.
        ValueError: the split is unknown, or the file is not such JSON, or not of the dataset that
            its name says.
    """
    if split not in SPLITS:
        raise ValueError(f"split: {split!r} is none of {', '.join(SPLITS)}")
    file = find(root)
    dataset, images = _load(file)
    others = sorted(_SPLITS - set(SPLITS[split]))
    for place, raw in enumerate(images):
        if not isinstance(raw, dict) or raw.get("split") not in others:
            yield _photo(raw, dataset, f"{file.name}, image {place}")


def _load(file: Path) -> tuple[str, list[Any]]:
    try:
        content = json.loads(file.read_bytes())
        dataset, images = content["dataset"], content["images"]
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file}: not a file of Karpathy's splits ({error})") from error
    named = file.stem.removeprefix("dataset_")
    if dataset not in DATASETS or (named in DATASETS and named != dataset):
        wanted = named if named in DATASETS else " or ".join(DATASETS)
        raise ValueError(f"{file}: its dataset is {dataset!r}, expected {wanted}")
    if not isinstance(images, list):
        raise ValueError(f"{file}: not a file of Karpathy's splits (images are no list)")
    return dataset, images


def _photo(raw: Any, dataset: str, where: str) -> Photo | Problem:
    try:
        if raw["split"] not in sorted(_SPLITS):
            raise ValueError(f"split {raw['split']!r} is none of {', '.join(sorted(_SPLITS))}")
        if dataset == "coco":
            name, path = str(int(raw["cocoid"])), f"{raw['filepath']}/{raw['filename']}"
        else:
            name, path = Path(raw["filename"]).stem, raw["filename"]
        captions = tuple(
            (str(s.get("sentid", i)), " ".join(s["raw"].split()))
            for i, s in enumerate(raw["sentences"])
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        return Problem("malformed record", f"{type(error).__name__}: {error}"[:200], where)
    captions = tuple((key, text) for key, text in captions if text)
    if not captions:
        return Problem("no captions", path, where)
    return Photo(name, path, captions)
