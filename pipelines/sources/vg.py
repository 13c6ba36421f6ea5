"""Visual Genome: 108 thousand photos with about 50 region phrases each.

    python pipelines/ingest.py --source vg --annotations /data/vg --images /data/vg

From homes.cs.washington.edu/~ranjay/visualgenome/api.html: `image_data.json` [{image_id, url,
coco_id, ...}] and `region_descriptions.json` [{id, regions [{region_id, image_id, phrase, ...}]}].
An image's captions are its regions' phrases. The photos come from their URLs, or with `--images`
from `images.zip` and `images2.zip`, published there too, or from the folders `VG_100K` and
`VG_100K_2` in them.

Half of the photos are COCO's: those in Karpathy's val and test splits (`dataset_coco.json`) are
held out. The JSON is read whole: region_descriptions.json, 700 MB, takes about 4 GB of memory on
the machine that runs the job. Annotations CC BY 4.0; photos: Flickr licences.
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
    origin = "https://homes.cs.washington.edu/~ranjay/visualgenome/api.html"
    found = [need(root / n, origin) for n in ("image_data.json", "region_descriptions.json")]
    split = karpathy_file(root, options)
    return [*found, split] if split else found


def read(root: Path, options: Options = Options()) -> Iterator[ImageItem]:  # noqa: B008 (frozen)
    """Yield the images in published order with their phrases, then the malformed records."""
    image_file, region_file, *_ = files(root, options)
    held_out = karpathy_held_out(karpathy_file(root, options))
    bad: list[Malformed] = []
    images: dict[int, dict[str, Any]] = {}
    for image in read_json(image_file):
        if not isinstance(image, dict) or not isinstance(image.get("image_id"), int):
            bad.append(Malformed("image without an id", repr(image)[:200], image_file.name))
        elif isinstance(image.get("coco_id"), list | dict):  # it may be one that is held out
            where = f"{image_file.name}: image {image['image_id']}"
            bad.append(Malformed("bad COCO id", repr(image["coco_id"])[:200], where))
        else:
            images.setdefault(image["image_id"], image)
    phrases: dict[int, dict[str, None]] = {}
    for entry in read_json(region_file):
        bad += _add(entry, images, phrases, options.max_captions)
    for image_id, image in images.items():
        name = f"{image_id}.jpg"
        places = (f"VG_100K/{name}", f"VG_100K_2/{name}", name) if options.from_files else ()
        captions = list(phrases.get(image_id, {}))
        record = pair(f"vg/{image_id:09d}", image.get("url"), captions, files=places)
        if isinstance(record, ImageRecord) and image.get("coco_id") in held_out:
            yield HeldOut(record, KARPATHY)
        else:
            yield record
    yield from bad


def _add(
    entry: Any, images: dict[int, Any], phrases: dict[int, dict[str, None]], most: int
) -> list[Malformed]:
    """Add the distinct phrases of one entry to their image, up to `most` per image."""
    if not isinstance(entry, dict) or not isinstance(entry.get("regions"), list):
        return [Malformed("annotation without an image", repr(entry)[:200], "regions")]
    bad = []
    for region in entry["regions"]:
        if not isinstance(region, dict):
            bad.append(Malformed("empty caption", repr(region)[:200], f"entry {entry.get('id')}"))
            continue
        image_id = region.get("image_id", entry.get("id"))
        where = f"region {region.get('region_id')}"
        phrase = region.get("phrase")
        if not isinstance(image_id, int) or image_id not in images:
            bad.append(Malformed(MISSING_IMAGE, f"image {image_id}"[:200], where))
        elif not isinstance(phrase, str) or not clean_text(phrase):
            bad.append(Malformed("empty caption", repr(phrase)[:200], where))
        else:
            known = phrases.setdefault(image_id, {})
            if len(known) < most:
                known.setdefault(clean_text(phrase))
    return bad
