"""Pictures for people to look at: code maps, masked inputs, contact sheets."""

from __future__ import annotations

import colorsys
import contextlib

import numpy as np
import pyarrow.parquet as pq
import torch
from PIL import Image
from torch import Tensor

from beit3.transforms import WHOLE, apply_view, decode
from pipelines.dataset import ROW_GROUP_ROWS, Dataset
from pipelines.samples import picture_of
from pipelines.storage import StoreError

ZOOM = 3
GAP = 4
SPREAD = 16  # row groups that pictures are taken from


def some_images(dataset: Dataset, count: int, size: int) -> Tensor:
    """Uncropped pictures from all over a dataset, as uint8 `[n, 3, size, size]`.

    They come from a few evenly spread row groups, since neighbours are often alike (ImageNet-21K is
    stored class by class). Pictures that don't decode are skipped; n may be below `count`.

    Raises:
        StoreError: there is none.
    """
    groups = [
        (dataset.store.path(dataset.name, file.path), group)
        for file in dataset.commit().files
        for group in range(-(-file.rows // ROW_GROUP_ROWS))
    ]
    chosen = {int(i) for i in np.linspace(0, len(groups) - 1, SPREAD)} if groups else set()
    pixels: list[np.ndarray] = []
    for left, number in zip(range(len(chosen), 0, -1), sorted(chosen), strict=True):
        path, group = groups[number]
        file = pq.ParquetFile(path, filesystem=dataset.store.fs)
        column = "image" if "image" in file.schema_arrow.names else "images"
        values = file.read_row_group(group, columns=[column]).column(0)
        enough = len(pixels) + -(-(count - len(pixels)) // left)
        for value in values:
            if len(pixels) >= enough:
                break
            with contextlib.suppress(OSError):
                picture = decode(picture_of({column: value}).as_py())
                pixels.append(apply_view(picture, WHOLE, size))
    if not pixels:
        raise StoreError(f"{dataset.uri} has no pictures")
    return torch.from_numpy(np.stack(pixels))


def to_image(pixels: Tensor | np.ndarray, zoom: int = ZOOM) -> Image.Image:
    """uint8 `[3, height, width]` as a picture, enlarged."""
    array = np.asarray(pixels).transpose(1, 2, 0)
    picture = Image.fromarray(np.ascontiguousarray(array))
    return picture.resize((picture.width * zoom, picture.height * zoom), Image.Resampling.NEAREST)


def code_colour(code: int) -> tuple[int, int, int]:
    """A colour per visual word, far apart for neighbouring numbers."""
    hue = (code * 0.61803398875) % 1.0
    light = 0.45 + 0.4 * ((code * 0.7548776662) % 1.0)
    r, g, b = colorsys.hls_to_rgb(hue, light, 0.75)
    return round(r * 255), round(g * 255), round(b * 255)


def code_map(codes: Tensor, grid: int, size: int) -> np.ndarray:
    """Visual words `[patches]` as coloured cells, uint8 `[3, size, size]`."""
    cells = np.array([code_colour(int(c)) for c in codes], dtype=np.uint8).reshape(grid, grid, 3)
    scale = -(-size // grid)
    return cells.repeat(scale, 0).repeat(scale, 1)[:size, :size].transpose(2, 0, 1)


def sheet(rows: list[list[Image.Image]]) -> Image.Image:
    """Pictures in a grid, one list a row, on white."""
    height = max(p.height for row in rows for p in row)
    width = max(p.width for row in rows for p in row)
    columns = max(len(row) for row in rows)
    page = Image.new(
        "RGB", (columns * (width + GAP) + GAP, len(rows) * (height + GAP) + GAP), "white"
    )
    for y, row in enumerate(rows):
        for x, picture in enumerate(row):
            page.paste(picture, (GAP + x * (width + GAP), GAP + y * (height + GAP)))
    return page


def code_maps(images: Tensor, codes: Tensor, grid: int, columns: int = 6) -> Image.Image:
    """Pictures above the maps of their visual words."""
    size = images.shape[-1]
    pairs = [
        (to_image(image), to_image(code_map(words, grid, size)))
        for image, words in zip(images, codes, strict=True)
    ]
    rows: list[list[Image.Image]] = []
    for start in range(0, len(pairs), columns):
        part = pairs[start : start + columns]
        rows += [[picture for picture, _ in part], [words for _, words in part]]
    return sheet(rows)


def code_patches(
    images: Tensor,
    codes: Tensor,
    patch: int,
    words: int = 12,
    examples: int = 10,
    scores: Tensor | None = None,
) -> Image.Image:
    """Rows of patches that share a visual word, one row for each of the most common words.

    Args:
        scores: `[n, patches]`, how near each patch is to its word: the nearest are shown, nearest
            first. Without scores, a spread of all its patches is shown.
    """
    grid = images.shape[-1] // patch
    counts = torch.bincount(codes.flatten())
    rows = []
    for word in counts.argsort(descending=True)[:words].tolist():
        places = (codes == word).nonzero()
        if scores is None:
            places = places[torch.linspace(0, len(places) - 1, min(examples, len(places))).long()]
        else:
            nearest = scores[codes == word].argsort(descending=True, stable=True)
            places = places[nearest[:examples]]
        row = []
        for image, place in places.tolist():
            y, x = divmod(place, grid)
            cut = images[image, :, y * patch : (y + 1) * patch, x * patch : (x + 1) * patch]
            row.append(to_image(cut, zoom=4))
        rows.append(row)
    return sheet(rows)


def masked_predictions(
    images: Tensor, hidden: Tensor, target: Tensor, predicted: Tensor, patch: int
) -> Image.Image:
    """Columns of four: picture, what the model saw, true words, words with predictions filled in.

    Args:
        images: uint8 `[n, 3, size, size]`.
        hidden: bool `[n, patches]`.
        target: `[n, patches]` visual words.
        predicted: `[n, patches]`, read where hidden.
    """
    size = images.shape[-1]
    grid = size // patch
    columns = []
    for image, mask, words, guess in zip(images, hidden, target, predicted, strict=True):
        cells = mask.view(grid, grid).numpy().repeat(patch, 0).repeat(patch, 1)
        seen = np.where(cells[None], 128, image.numpy()).astype(np.uint8)
        filled = torch.where(mask, guess, words)
        columns.append(
            [
                to_image(image),
                to_image(seen),
                to_image(code_map(words, grid, size)),
                to_image(code_map(filled, grid, size)),
            ]
        )
    return sheet([list(row) for row in zip(*columns, strict=True)])
