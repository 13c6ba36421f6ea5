"""Finds pictures that must not reach pretraining, by what they show.

Benchmarks' test images are all over the web, at other URLs, sizes and qualities, so ids and
checksums don't find them; signatures do (`pipelines.signatures`).

Over 550 drawn test scenes, copies at nine tenths the size and JPEG quality 75 differ in at most 76
bits and 22 levels of colour, so all are found; none of 2600 other scenes is mistaken for one: the
nearest whose colours agree is 107 bits away. Cropped copies and thumbnails lie in between: most,
not all, are found.
"""

from __future__ import annotations

import functools
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines import console
from pipelines.dataset import Dataset
from pipelines.images import CleanImage, ImagePolicy, clean_image
from pipelines.signatures import (
    COLOUR_BYTES,
    HASH_BYTES,
    Signature,
    packed,
    same_picture,
    signature,
)
from pipelines.storage import Store, StoreError

MOST_BITS = 92
"""Maximum number of bits in which the hashes of the same picture differ."""
MOST_SHARE = 0.6
"""The same, as a share of the bits that are set in either."""
MOST_COLOUR = 32
"""Maximum difference, in levels of 255, of the mean colour of any field."""

_VERSION = 2  # of the signatures: raised when they or their file change
_ANY = ImagePolicy(min_side=1, max_aspect=1e9)  # prepared images were filtered already
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("bits", pa.binary(HASH_BYTES)),
        ("colours", pa.binary(COLOUR_BYTES)),
    ]
)


@dataclass(frozen=True)
class Match:
    """The held-out example that a picture matches."""

    dataset: str
    id: str
    bits: int
    colour: int


@dataclass(frozen=True)
class Source:
    """A held-out dataset at one commit, with the file of its signatures."""

    dataset: str
    commit: str

    @property
    def file(self) -> str:
        return f"{self.dataset}/_hashes-{self.commit}-v{_VERSION}.parquet"


class HeldOutPictures:
    """The signatures of held-out pictures: 224 bytes each, whatever the pictures' size."""

    def __init__(
        self, origins: Sequence[tuple[str, str]], bits: Sequence[bytes], colours: Sequence[bytes]
    ) -> None:
        """`origins` are pairs of dataset and example id, one per signature."""
        self.origins = origins
        self._bits, self._colours = packed(bits, colours)

    def __len__(self) -> int:
        return len(self._colours)

    def find(self, data: bytes) -> Match | None:
        """The nearest held-out picture, if it counts as the same."""
        return self.nearest(signature(data)) if len(self) else None

    def nearest(self, picture: Signature) -> Match | None:
        near, bits, colour = same_picture(
            picture,
            self._bits,
            self._colours,
            most_bits=MOST_BITS,
            most_share=MOST_SHARE,
            most_colour=MOST_COLOUR,
        )
        if not near.size:
            return None
        best = int(np.argmin(bits))
        dataset, id = self.origins[near[best]]
        return Match(dataset, id, int(bits[best]), int(colour[best]))


def sources(store: Store, names: Sequence[str]) -> list[Source]:
    """The held-out datasets at their current commits.

    Raises:
        StoreError: one isn't committed, or has no column `images`.
    """
    found = []
    for name in sorted(set(names)):
        dataset = store.dataset(name)
        commit = dataset.commit()
        if commit.files and "images" not in _schema(dataset).names:
            raise StoreError(f"dataset {dataset.uri}: no column 'images', so nothing to hold out")
        found.append(Source(name, commit.identity))
    return found


def prepare(store: Store, held_out: Sequence[Source]) -> None:
    """Write the signatures of each held-out dataset beside it, unless they exist."""
    for source in held_out:
        if store.exists(source.file):
            continue
        dataset = store.dataset(source.dataset)
        total = dataset.commit().rows
        table, unread = _sign(dataset, total)
        store.write_table(source.file, table)
        warning = f"; {unread} could not be read, and are NOT held out" if unread else ""
        console.say(f"{source.dataset}: {table.num_rows:,} pictures are held out{warning}")


@functools.lru_cache(maxsize=2)
def load(store_uri: str, held_out: tuple[Source, ...]) -> HeldOutPictures:
    """The prepared signatures, loaded once per process."""
    store = Store(store_uri)
    origins: list[tuple[str, str]] = []
    bits: list[bytes] = []
    colours: list[bytes] = []
    for source in held_out:
        table = store.read_table(source.file)
        origins += [(source.dataset, id) for id in table["id"].to_pylist()]
        bits += table["bits"].to_pylist()
        colours += table["colours"].to_pylist()
    return HeldOutPictures(origins, bits, colours)


def _schema(dataset: Dataset) -> pa.Schema:
    return pq.read_schema(dataset.paths()[0], filesystem=dataset.store.fs)


def _sign(dataset: Dataset, total: int) -> tuple[pa.Table, int]:
    """The distinct signatures of a dataset's images, and the number of unreadable images."""
    rows: dict[Signature, str] = {}  # many examples ask about one picture
    unread = 0
    with (
        ThreadPoolExecutor(os.cpu_count()) as pool,
        console.bar(f"{dataset.name}: signatures", total) as bar,
    ):
        for chunk in _images(dataset):
            signatures = pool.map(_sign_one, (data for _, data in chunk))
            for (id, _), signed in zip(chunk, signatures, strict=True):
                if signed is None:
                    unread += 1
                else:
                    rows.setdefault(signed, id)
            bar.update(len({id for id, _ in chunk}))
    columns = [list(rows.values()), [s.bits for s in rows], [s.colours for s in rows]]
    arrays = [pa.array(values, field.type) for values, field in zip(columns, _SCHEMA, strict=True)]
    return pa.Table.from_arrays(arrays, schema=_SCHEMA), unread


def _images(dataset: Dataset) -> Iterator[list[tuple[str, bytes]]]:
    """Ids and image bytes, a few rows at a time."""
    for file in dataset.commit().files:
        for batch in dataset.batches(file.path, 64, columns=["id", "images"]):
            ids = [str(id) for id in batch["id"].to_pylist()]
            pairs = zip(ids, batch["images"].to_pylist(), strict=True)
            yield list(
                itertools.chain.from_iterable(
                    ((id, image["bytes"] or b"") for image in images or ()) for id, images in pairs
                )
            )


def _sign_one(data: bytes) -> Signature | None:
    image = clean_image(data, _ANY)  # the same processing as for the pictures to compare
    return signature(image.data) if isinstance(image, CleanImage) else None
