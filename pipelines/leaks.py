"""Pictures that must not reach pretraining, found by what they show.

Benchmarks' test images stand all over the web, at other URLs, sizes and qualities, so ids and
checksums don't find them. Each picture gets a *signature*: a difference hash (is each of 16 x 16
fields brighter than its left neighbour?) and the mean colours of 8 x 8 fields. Two pictures are the
same if both are close. The hash alone confuses pictures with empty backgrounds, where noise decides
the bits, and the colours alone confuse compositions alike; together they are far apart.

Over 550 drawn test scenes, copies of nine tenths the size at JPEG quality 75 differ in at most 76
bits and 22 levels of colour, so all are found; of 2600 other scenes none is taken for one, the
nearest whose colours agree being 107 bits away. Cut copies and thumbnails lie between: most, not
all, are found.
"""

from __future__ import annotations

import functools
import io
import itertools
import os
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray
from PIL import Image

from pipelines import console
from pipelines.images import CleanImage, ImagePolicy, clean_image
from pipelines.storage import Dataset, Store, StoreError

HASH_SIDE = 16  # 256 bits
COLOUR_SIDE = 8  # 192 means
MOST_BITS = 92
"""Bits in which the hashes of one picture may differ."""
MOST_COLOUR = 32
"""Levels, of 255, by which the mean colour of no field may differ more."""

_VERSION = 2  # of the signatures: raised when they or their file change
_ANY = ImagePolicy(min_side=1, max_aspect=1e9)  # prepared images were judged already
_SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("bits", pa.binary(HASH_SIDE**2 // 8)),
        ("colours", pa.binary(3 * COLOUR_SIDE**2)),
    ]
)


@dataclass(frozen=True)
class Signature:
    """What is compared: the packed bits of the hash, and the mean colours."""

    bits: bytes
    colours: bytes


@dataclass(frozen=True)
class Match:
    """The held-out example that a picture is the same as."""

    dataset: str
    id: str
    bits: int
    colour: int


@dataclass(frozen=True)
class Source:
    """A held-out dataset at one commit, and the file of its signatures."""

    dataset: str
    commit: str

    @property
    def file(self) -> str:
        return f"{self.dataset}/_hashes-{self.commit}-v{_VERSION}.parquet"


def signature(data: bytes) -> Signature:
    """The signature of an upright image, as `clean_image` leaves it; raises if it can't be read."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    # Box means: what a field holds decides, whatever the number of pixels in it.
    box = Image.Resampling.BOX
    grey = np.asarray(rgb.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), box))
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    colours = np.asarray(rgb.resize((COLOUR_SIDE, COLOUR_SIDE), box))
    return Signature(bits.tobytes(), colours.tobytes())


def packed(
    bits: Sequence[bytes], colours: Sequence[bytes]
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Many signatures as two arrays, as `same_picture` compares them.

    A column of words for each hash, so that one word of all is compared at a time, which takes a
    tenth of the time; a row for each picture's colours.
    """
    words = np.frombuffer(b"".join(bits), np.uint64).reshape(-1, HASH_SIDE**2 // 64)
    return (
        np.ascontiguousarray(words.T),
        np.frombuffer(b"".join(colours), np.uint8).reshape(-1, 3 * COLOUR_SIDE**2),
    )


def same_picture(
    picture: Signature,
    bits: NDArray[np.uint64],
    colours: NDArray[np.uint8],
    *,
    most_bits: int = MOST_BITS,
    most_colour: int = MOST_COLOUR,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Which of many signatures are of the same picture as this one, ascending.

    The places of those that are, and by how many bits and levels of colour each differs.
    """
    apart: NDArray[Any] = np.zeros(bits.shape[1], np.int16)
    for words, word in zip(bits, np.frombuffer(picture.bits, np.uint64), strict=True):
        apart += np.bitwise_count(words ^ word)
    near = np.flatnonzero(apart <= most_bits)
    # Wide enough for differences of bytes; only the few near ones are compared.
    own = np.frombuffer(picture.colours, np.uint8).astype(np.int16)
    colour = np.abs(colours[near] - own).max(axis=1, initial=0)
    close = colour <= most_colour
    near = near[close]
    return near, apart[near], colour[close]


class HeldOutPictures:
    """The signatures of held-out pictures: 224 bytes each, whatever the pictures' size."""

    def __init__(
        self, origins: Sequence[tuple[str, str]], bits: Sequence[bytes], colours: Sequence[bytes]
    ) -> None:
        """`origins` are pairs of dataset and example id, one for each signature."""
        self.origins = origins
        self._bits, self._colours = packed(bits, colours)

    def __len__(self) -> int:
        return len(self._colours)

    def find(self, data: bytes) -> Match | None:
        """The nearest held-out picture, if it is the same one."""
        return self.nearest(signature(data)) if len(self) else None

    def nearest(self, picture: Signature) -> Match | None:
        near, bits, colour = same_picture(picture, self._bits, self._colours)
        if not near.size:
            return None
        best = int(np.argmin(bits))
        dataset, id = self.origins[near[best]]
        return Match(dataset, id, int(bits[best]), int(colour[best]))


def sources(store: Store, names: Sequence[str]) -> list[Source]:
    """The held-out datasets as they are committed now.

    Raises:
        StoreError: one isn't there, or has no column `images`.
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
    """Write the signatures of each held-out dataset beside it, unless they are there."""
    for source in held_out:
        if store.exists(source.file):
            continue
        dataset = store.dataset(source.dataset)
        total = dataset.commit().rows
        table, unread = _sign(dataset, total)
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        store.write(source.file, sink.getvalue().to_pybytes())
        warning = f"; {unread} could not be read, and are NOT held out" if unread else ""
        console.say(f"{source.dataset}: {table.num_rows:,} pictures are held out{warning}")


@functools.lru_cache(maxsize=2)
def load(store_uri: str, held_out: tuple[Source, ...]) -> HeldOutPictures:
    """The prepared signatures, once in each process."""
    store = Store(store_uri)
    origins: list[tuple[str, str]] = []
    bits: list[bytes] = []
    colours: list[bytes] = []
    for source in held_out:
        table = pq.read_table(io.BytesIO(store.read(source.file)))
        origins += [(source.dataset, id) for id in table["id"].to_pylist()]
        bits += table["bits"].to_pylist()
        colours += table["colours"].to_pylist()
    return HeldOutPictures(origins, bits, colours)


def _schema(dataset: Dataset) -> pa.Schema:
    return pq.read_schema(dataset.paths()[0], filesystem=dataset.store.fs)


def _sign(dataset: Dataset, total: int) -> tuple[pa.Table, int]:
    """The signatures of a dataset's images, each picture once, and how many can't be read."""
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
    for path in dataset.paths():
        with pq.ParquetFile(path, filesystem=dataset.store.fs) as file:
            for batch in file.iter_batches(batch_size=64, columns=["id", "images"]):
                ids = [str(id) for id in batch["id"].to_pylist()]
                pairs = zip(ids, batch["images"].to_pylist(), strict=True)
                yield list(
                    itertools.chain.from_iterable(
                        ((id, image["bytes"] or b"") for image in images or ())
                        for id, images in pairs
                    )
                )


def _sign_one(data: bytes) -> Signature | None:
    image = clean_image(data, _ANY)  # the way that the pictures to compare go, too
    return signature(image.data) if isinstance(image, CleanImage) else None
