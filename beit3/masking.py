"""Which patches and tokens are hidden: the corruption that masked data modelling undoes."""

from __future__ import annotations

import math

import numpy as np


def block_mask(
    grid: int, count: int, rng: np.random.Generator, *, min_block: int = 16, min_aspect: float = 0.3
) -> np.ndarray:
    """Block-wise mask of exactly `count` patches: bool `[grid, grid]`.

    Rectangles of random area and aspect are laid until the budget is spent; single cells are then
    added or removed so that every mask has the same number (BEiT section 2.3; the exact count is
    BEiT v2's, and keeps batched gathers static).

    Raises:
        ValueError: `count` is not within 0..grid*grid.
    """
    if not 0 <= count <= grid * grid:
        raise ValueError(f"count {count} is not within 0..{grid * grid}")
    mask = np.zeros((grid, grid), dtype=bool)
    smallest = min(min_block, max(1, count))
    log_aspect = math.log(min_aspect)
    while mask.sum() < count:
        left = count - int(mask.sum())
        for _ in range(10):
            area = rng.uniform(min(smallest, left), left) if left > 1 else 1.0
            aspect = math.exp(rng.uniform(log_aspect, -log_aspect))
            height, width = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if not (0 < height < grid and 0 < width < grid):
                continue
            top = int(rng.integers(0, grid - height + 1))
            start = int(rng.integers(0, grid - width + 1))
            block = mask[top : top + height, start : start + width]
            if 0 < block.size - block.sum() <= left:
                block[:] = True
                break
        else:
            break
    flat = mask.ravel()
    missing = count - int(flat.sum())
    if missing > 0:
        flat[rng.choice(np.flatnonzero(~flat), missing, replace=False)] = True
    return mask


def token_mask(length: int, ratio: float, rng: np.random.Generator) -> np.ndarray:
    """Random mask over a text's tokens, `<s>` and `</s>` spared: bool `[length]`.

    At least one token is masked where there is one to mask, and `ratio` of them on average.
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
