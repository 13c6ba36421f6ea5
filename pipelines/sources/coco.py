"""COCO captions: 123 thousand photos with five captions each.

    python pipelines/ingest.py --source coco --annotations /data/coco --images /data/coco

From cocodataset.org/#download ("Train/Val annotations"): every `captions_*.json` in the folder;
`images` [{id, file_name, coco_url, ...}] and `annotations` [{id, image_id, caption}]. The photos
come from their URLs, or with `--images` from the zips published beside the annotations,
`train2017.zip`, `val2014.zip` and so on, or from the folders in them. A photo that is in the files
of both 2014 and 2017 is taken from whichever exists.

With Karpathy's `dataset_coco.json` beside them, the images of his val and test splits are held out,
because captioning and retrieval are tested on them. The JSON is read whole, file by file: about
half a gigabyte of memory. Annotations CC BY 4.0; the photos have Flickr licences.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipelines.sources import (
    KARPATHY,
    MISSING_IMAGE,
    HeldOut,
    ImageItem,
    ImageRecord,
    Malformed,
    Options,
    clean_text,
    karpathy_file,
    karpathy_held_out,
    need,
    pair,
    read_json,
)

KIND = "pairs"
HAS_FILES = True


def files(root: Path, options: Options) -> list[Path]:
    found = sorted(root.glob("captions_*.json"))
    if not found:
        need(root / "captions_train2017.json", "https://cocodataset.org/#download")
    split = karpathy_file(root, options)
    return [*found, split] if split else found


def read(root: Path, options: Options = Options()) -> Iterator[ImageItem]:  # noqa: B008 (frozen)
    """Yield the images in published order with all their captions, then the malformed records."""
    annotations = [f for f in files(root, options) if f.name.startswith("captions_")]
    held_out = karpathy_held_out(karpathy_file(root, options))
    urls: dict[int, Any] = {}
    places: dict[int, tuple[str, ...]] = {}
    captions: dict[int, dict[Any, str]] = {}
    bad: list[Malformed] = []
    for file in annotations:
        raw = read_json(file)
        for image in raw["images"]:
            if isinstance(image, dict) and isinstance(image.get("id"), int):
                urls.setdefault(image["id"], image.get("coco_url"))
                if options.from_files:
                    place = _place(image, file)
                    places[image["id"]] = (*places.get(image["id"], ()), *place)
            else:
                bad.append(Malformed("image without an id", repr(image)[:200], file.name))
        for row in raw["annotations"]:
            problem = _add(row, urls, captions, file.name)
            if problem:
                bad.append(problem)
    for image_id, url in urls.items():
        texts = list(captions.get(image_id, {}).values())[: options.max_captions]
        record = pair(f"coco/{image_id:012d}", url, texts, files=places.get(image_id, ()))
        if isinstance(record, ImageRecord) and image_id in held_out:
            yield HeldOut(record, KARPATHY)
        else:
            yield record
    yield from bad


def _place(image: dict[str, Any], annotations: Path) -> tuple[str, ...]:
    """Possible paths of the photo below the images: `captions_val2014.json` is for `val2014/`."""
    name = image.get("file_name")
    folder = annotations.stem.removeprefix("captions_")
    return (f"{folder}/{name}", name) if isinstance(name, str) and name else ()


def _add(
    row: Any, urls: dict[int, Any], captions: dict[int, dict[Any, str]], file: str
) -> Malformed | None:
    """Add an annotation to its image, by annotation id: the files of 2014 and 2017 share ids."""
    if not isinstance(row, dict) or "image_id" not in row:
        return Malformed("annotation without an image", repr(row)[:200], file)
    where = f"{file}: annotation {row.get('id')}"[:200]
    if not isinstance(row["image_id"], int) or row["image_id"] not in urls:
        return Malformed(MISSING_IMAGE, f"image {row['image_id']}"[:200], where)
    caption = row.get("caption")
    if not isinstance(caption, str) or not clean_text(caption):
        return Malformed("empty caption", repr(caption)[:200], where)
    if isinstance(row.get("id"), list | dict):
        return Malformed("annotation without an id", repr(row)[:200], where)
    captions.setdefault(row["image_id"], {}).setdefault(row.get("id"), caption)
    return None
