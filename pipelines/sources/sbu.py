"""SBU Captioned Photos: a million Flickr photos with their owners' captions.

From www.cs.rice.edu/~vo9/sbucaptions: `sbu-captions-all.json`, one object of parallel lists
`image_urls`, `user_ids`, `captions`, read whole into about half a gigabyte of memory. For
research; the photos belong to their owners.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import zip_longest
from pathlib import Path

from pipelines.sources import ImageItem, Malformed, Options, need, pair, read_json

KIND = "pairs"


def files(root: Path, options: Options) -> list[Path]:
    origin = "https://www.cs.rice.edu/~vo9/sbucaptions/"
    return [need(root / "sbu-captions-all.json", origin)]


def read(root: Path, options: Options = Options()) -> Iterator[ImageItem]:  # noqa: B008 (frozen)
    """Yield records in the lists' order; raises ValueError if the file isn't such an object."""
    (file,) = files(root, options)
    raw = read_json(file)
    if not isinstance(raw, dict) or not {"image_urls", "captions"} <= raw.keys():
        raise ValueError(f"{file}: expected an object with image_urls and captions")
    absent = object()
    rows = zip_longest(raw["image_urls"], raw["captions"], fillvalue=absent)
    for index, (url, caption) in enumerate(rows):
        id = f"sbu/{index:09d}"
        if url is absent or caption is absent:
            yield Malformed("lists of unequal length", "no url" if url is absent else "", id)
        else:
            yield pair(id, url, [caption])
