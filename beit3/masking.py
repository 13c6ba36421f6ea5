"""Chooses the patches and tokens to hide: the corruption that masked data modelling undoes."""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np


def block_mask(
    grid: int, count: int, rng: np.random.Generator, *, min_block: int = 16, min_aspect: float = 0.3
) -> np.ndarray:
    """Block-wise mask of exactly `count` patches: bool `[grid, grid]`.

    Rectangles of random area and aspect are placed until the budget is spent; single cells are then
    added so that every mask has the same number (BEiT section 2.3; the exact count is BEiT v2's,
    and keeps batched gathers static).

    Raises:
        ValueError: `count` is not within 0..grid*grid.
    """
    if not 0 <= count <= grid * grid:
        raise ValueError(f"count {count} is not within 0..{grid * grid}")
    taken, left = 0, count  # cells as bits, row by row: faster than small arrays
    smallest = min(min_block, max(1, count))
    log_aspect = math.log(min_aspect)
    draw = _uniform(rng).__next__
    while left > 0:
        for _ in range(10):
            least = min(smallest, left)
            area = least + (left - least) * draw() if left > 1 else 1.0
            aspect = math.exp(log_aspect - 2 * log_aspect * draw())
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < grid and 0 < width < grid):
                continue
            top, start = int((grid - height + 1) * draw()), int((grid - width + 1) * draw())
            block = _rectangle(grid, height, width) << top * grid + start
            fresh = (block & ~taken).bit_count()
            if 0 < fresh <= left:
                taken |= block
                left -= fresh
                break
        else:
            break
    cells = grid * grid
    packed = np.frombuffer(taken.to_bytes(cells // 8 + 1, "little"), np.uint8)
    flat = np.unpackbits(packed, count=cells, bitorder="little").view(bool)
    if left > 0:
        flat[rng.choice(np.flatnonzero(~flat), left, replace=False)] = True
    return flat.reshape(grid, grid)


def _uniform(rng: np.random.Generator) -> Iterator[float]:
    """Uniform numbers in 0..1, drawn in bulk: a call costs more than a number."""
    while True:
        yield from rng.random(32).tolist()


@functools.cache
def _rectangle(grid: int, height: int, width: int) -> int:
    """The cells of a rectangle in the first corner."""
    return sum(((1 << width) - 1) << row * grid for row in range(height))


def token_mask(length: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Random mask over a text's tokens, `<s>` and `</s>` spared: bool `[length]`.

    At least one token is masked if there is one to mask; on average, a share of `ratio`.
    """
    mask = np.zeros(length, dtype=bool)
    inner = length - 2
    if inner <= 0 or ratio <= 0:
        return mask
    exact = inner * ratio
    count = int(exact) + int(rng.random() < exact - int(exact))
    count = min(inner, max(1, count))
    mask[1 + rng.choice(inner, count, replace=False)] = True
    return mask


@dataclass(frozen=True)
class Masking:
    """How much is hidden, and which side of pairs ("Image as a Foreign Language" section 2.3)."""

    image: float = 0.4
    """Share of patches hidden, in pictures alone and in pairs."""
    text: float = 0.15
    """Share of tokens hidden in texts alone."""
    pair_text: float = 0.5
    """Share of tokens hidden in captions."""
    pairs: Literal["separate", "joint"] = "separate"
    """joint: both sides of a pair are corrupted at once. separate: only one is, at random, so that
    every prediction sees an intact partner."""
    pair_text_share: float = 0.5
    """With separate masking, the share of pairs whose caption, not picture, is corrupted."""
    min_block: int = 16
    """Minimum patches in a block."""

    def __post_init__(self) -> None:
        for name in ("image", "text", "pair_text", "pair_text_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"masking.{name}: expected a share, got {getattr(self, name)}")
        if self.min_block < 1:
            raise ValueError(f"masking.min_block: expected at least 1, got {self.min_block}")

    def of_image(self, grid: int, rng: np.random.Generator) -> np.ndarray:
        """bool `[grid * grid]`, always the same number of patches."""
        count = round(self.image * grid * grid)
        return block_mask(grid, count, rng, min_block=self.min_block).ravel()

    def of_pair(
        self, grid: int, length: int, rng: np.random.Generator
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masks of a pair's picture `[grid * grid]` and caption `[length]`."""
        both = self.pairs == "joint"
        caption_turn = rng.random() < self.pair_text_share
        no_patches, no_tokens = np.zeros(grid * grid, bool), np.zeros(length, bool)
        hide_text, hide_image = both or caption_turn, both or not caption_turn
        return (
            self.of_image(grid, rng) if hide_image else no_patches,
            token_mask(length, self.pair_text, rng) if hide_text else no_tokens,
        )
