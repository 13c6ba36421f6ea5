"""Conceptual Captions (CC3M): 3.3 million image URLs with cleaned alt texts.

From ai.google.com/research/ConceptualCaptions/download: `Train_GCC-training.tsv` and, optionally,
`Validation_GCC-1.1.0-Validation.tsv`; no header, caption TAB url. The annotations may be used for
any purpose; the images belong to their owners.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from pipelines.sources import ImageItem, Options, need, tsv_pairs

KIND = "pairs"
TRAINING = "Train_GCC-training.tsv"
VALIDATION = "Validation_GCC-1.1.0-Validation.tsv"


def files(root: Path, options: Options) -> list[Path]:
    first = need(root / TRAINING, "https://ai.google.com/research/ConceptualCaptions/download")
    return [first, *(f for f in (root / VALIDATION,) if f.is_file())]


def read(root: Path, options: Options = Options()) -> Iterator[ImageItem]:  # noqa: B008 (frozen)
    for file in files(root, options):
        prefix = "cc3m/" if file.name == TRAINING else "cc3m/validation-"
        yield from tsv_pairs(file, prefix, url_first=False)
