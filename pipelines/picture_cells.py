"""Locality-sensitive hashing: only pictures that share a cell, as similar ones do, are compared.

Each of `TABLES` tables quantizes ten sums of mean colours, with fixed signs, into cells. Two
pictures are near if they share a cell in any table, which depends only on their two signatures.
"""

from __future__ import annotations

import functools
import hashlib

import numpy as np
from numpy.typing import NDArray

from pipelines.signatures import COLOUR_SIDE

TABLES = 12
_SUMS = 10
_WIDTH = 600.0
_COARSE = 4  # sums are over fields of 4 x 4, twice as coarse as the colours: steadier

DEFINITION = (TABLES, _SUMS, int(_WIDTH))
"""The settings that decide a picture's cells."""


@functools.cache
def _sums() -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The signs of each sum, and the shift of its cells; always the same ones."""
    count = TABLES * _SUMS
    fields = 3 * _COARSE**2
    stream = hashlib.shake_256(b"beit3-ray duplicates").digest(count * fields + 4 * count)
    signs = np.frombuffer(stream, np.uint8, count * fields).reshape(count, fields) & 1
    shifts = np.frombuffer(stream, "<u4", count, offset=count * fields) % int(_WIDTH)
    return signs.astype(np.float32) * 2 - 1, shifts.astype(np.float32)


def keys(colours: NDArray[np.uint8]) -> NDArray[np.uint64]:
    """For each row of mean colours, the number of its cell in each table.

    The sums are exact: integers below 2**24, in whatever order they are added.
    """
    cells = COLOUR_SIDE // _COARSE
    fields = colours.reshape(-1, _COARSE, cells, _COARSE, cells, 3).sum(axis=(2, 4), dtype=np.int32)
    signs, shifts = _sums()
    sums = fields.reshape(-1, 3 * _COARSE**2).astype(np.float32) @ signs.T + shifts
    places = np.floor_divide(sums, np.float32(_WIDTH)).astype(np.int64).astype(np.uint64)
    places = places.reshape(-1, TABLES, _SUMS)
    keys = np.broadcast_to(np.arange(1, TABLES + 1, dtype=np.uint64), places.shape[:2])
    for i in range(_SUMS):
        keys = (keys ^ places[:, :, i]) * np.uint64(0x9E3779B97F4A7C15)
        keys = keys ^ (keys >> np.uint64(29))
    return keys
