"""Draws a worker's share of each batch: rows of datasets in the run's order, and pictures."""

from __future__ import annotations

import hashlib
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
from numpy.random.bit_generator import ISeedSequence
from PIL import Image

from beit3.transforms import View, apply_view, decode, sample_view
from pipelines.config import later
from pipelines.dataset import Dataset
from pipelines.loader import Mix, Order, ParquetRows, RowGroup, rows_at_hand, share

SEEDING = 2
"""Incremented when a seed no longer gives the same samples, views and masks as before. It is part
of a run's fingerprint, so a run started under another value can't be resumed."""
PICTURE_CACHE_BYTES = 256 << 20  # decoded pictures kept by a worker; a small dataset fits whole


@dataclass(frozen=True)
class Sample:
    """A row, its position, and the random generator for this draw of it."""

    number: int
    group: RowGroup
    index: int
    row: dict[str, Any]
    rng: np.random.Generator
    epoch: int


class Samples:
    """A callable that returns a worker's samples of a batch, given the batch's number."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        *,
        columns: Sequence[str] | None,
        seed: int,
        batch: int,
        rank: int,
        world: int,
        weights: Sequence[float] = (),
        readers: Mapping[str, Callable[[pa.Array], Any]] | None = None,
    ) -> None:
        """
        Args:
            weights: How often each dataset is drawn; without them, by its number of rows.
            readers: For columns, as in `ParquetRows`.
        """
        kept = rows_at_hand(world, len(weights) or 1)
        self.rows = ParquetRows(datasets, columns, readers=readers, kept=kept)
        self.order: Order | Mix = Order(self.rows.groups, seed)
        if weights:
            of = [[g for g in self.rows.groups if g.dataset == i] for i in range(len(datasets))]
            self.order = Mix([Order(groups, seed) for groups in of], weights, seed)
        self.seed, self.batch, self.rank, self.world = seed, batch, rank, world

    def __call__(self, step: int) -> list[Sample]:
        return [self.sample(g) for g in share(step, self.batch, self.rank, self.world)]

    def sample(self, number: int) -> Sample:
        group, index = self.order.locate(number)
        return Sample(
            number=number,
            group=group,
            index=index,
            row=self.rows.row(group, index),
            rng=np.random.Generator(np.random.PCG64(cast(Any, _Seed(self.seed, number)))),
            epoch=self.order.epoch_of(number),
        )


class _Seed(ISeedSequence):
    """Hashes numbers to a generator's initial state; NumPy's way takes several times as long."""

    def __init__(self, *numbers: int) -> None:
        self._numbers = numbers

    def generate_state(self, n_words: int, dtype: Any = np.uint32) -> np.ndarray:
        wanted = np.dtype(dtype)
        said = repr(self._numbers).encode()
        digest = hashlib.blake2b(said, digest_size=n_words * wanted.itemsize).digest()
        return np.frombuffer(digest, wanted.newbyteorder("<")).astype(wanted, copy=False)


def picture_of(row: Mapping[str, Any]) -> Any:
    """The picture of a row of `images/*`, or the first one of a row of `tasks/*`: bytes, or an
    Arrow scalar if the row holds Arrow scalars."""
    return (row["image"] if "image" in row else row["images"][0])["bytes"]


class Pictures:
    """Decoded pictures, kept while they fit into `PICTURE_CACHE_BYTES`."""

    def __init__(self) -> None:
        self._kept: OrderedDict[str, Image.Image] = OrderedDict()
        self._bytes = 0

    def __call__(self, key: str, data: bytes) -> Image.Image:
        if key in self._kept:
            return self._kept[key]
        try:
            picture = decode(data)
        except OSError as error:
            raise ValueError(f"{key}: a picture that can't be decoded ({error})") from error
        size = picture.width * picture.height * 3
        if self._bytes + size <= PICTURE_CACHE_BYTES:
            self._kept[key] = picture
            self._bytes += size
        return picture


@dataclass(frozen=True)
class ViewConfig:
    """How a view (crop, flip and colours) of a picture is drawn."""

    scale: tuple[float, float] = (0.2, 1.0)
    """Smallest and largest share of the picture's area."""
    aspect: tuple[float, float] = (3 / 4, 4 / 3)
    """Smallest and largest ratio of the crop's width to its height."""
    flip: float = 0.5
    """Probability of mirroring. Use 0 if captions mention left and right."""
    jitter: float = later(0.0)
    """How far brightness, contrast and saturation vary: factors from 1 minus this to 1 plus this.
    The paper pretrains with 0.4."""

    def __post_init__(self) -> None:
        if not 0 < self.scale[0] <= self.scale[1] <= 1:
            raise ValueError(f"view.scale: expected 0 < least <= largest <= 1, got {self.scale}")
        if not 0 <= self.flip <= 1:
            raise ValueError(f"view.flip: expected a probability, got {self.flip}")
        if not 0 <= self.jitter < 1:
            raise ValueError(f"view.jitter: expected 0 <= jitter < 1, got {self.jitter}")

    def draw(self, picture: Image.Image, rng: np.random.Generator) -> View:
        view = sample_view(
            rng,
            picture.width,
            picture.height,
            scale=self.scale,
            aspect=self.aspect,
            flip=self.flip,
        )
        if not self.jitter:
            return view
        drawn = rng.uniform(1 - self.jitter, 1 + self.jitter, 3)
        brightness, contrast, saturation = drawn.astype(np.float32).tolist()  # as tokens store them
        return replace(view, jitter=(brightness, contrast, saturation))

    def pixels(self, picture: Image.Image, rng: np.random.Generator, size: int) -> np.ndarray:
        """A random view as uint8 `[3, size, size]`."""
        return apply_view(picture, self.draw(picture, rng), size)
