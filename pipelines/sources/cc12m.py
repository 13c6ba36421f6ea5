"""Conceptual 12M (CC12M): 12 million image URLs with alt texts.

From github.com/google-research-datasets/conceptual-12m: `cc12m.tsv`; no header, url TAB caption.
The annotations may be used for any purpose; the images belong to their owners.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.sources import ImageItem, Options, need, tsv_pairs

KIND = "pairs"


def files(root: Path, options: Options) -> list[Path]:
    origin = "https://github.com/google-research-datasets/conceptual-12m"
    return [need(root / "cc12m.tsv", origin)]


def read(root: Path, options: Options = Options()) -> Iterator[ImageItem]:  # noqa: B008 (frozen)
    for file in files(root, options):
        yield from tsv_pairs(file, "cc12m/", url_first=True)
