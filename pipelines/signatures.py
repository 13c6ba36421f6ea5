"""Describes a picture's look in 224 bytes, nearly independently of its size and quality.

A *signature* is a difference hash (is each of 16 x 16 fields brighter than its left neighbour?) and
the mean colours of 8 x 8 fields. Two pictures are the same if both are close. The hash alone
confuses pictures with empty backgrounds, where noise decides the bits, and the colours alone
confuse similar compositions; together they separate pictures well (`benchmarks/same_picture.py`).
Drawings on a plain background have few bits set and nearly the same colours, so how far apart two
hashes may be also depends on how many bits are set in either. The limits are set by the modules
that compare: `pipelines.leaks`, `pipelines.duplicates`.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image

HASH_SIDE = 16
COLOUR_SIDE = 8
HASH_BYTES = HASH_SIDE**2 // 8
COLOUR_BYTES = 3 * COLOUR_SIDE**2


@dataclass(frozen=True)
class Signature:
    """The packed bits of the hash, and the mean colours."""

    bits: bytes
    colours: bytes


def signature(data: bytes) -> Signature:
    """The signature of an upright image from `clean_image`; raises if it can't be read."""
    with Image.open(io.BytesIO(data)) as image:
        rgb = image.convert("RGB")
    # Box means: a field's content decides, not the number of pixels in it.
    box = Image.Resampling.BOX
    grey = np.asarray(rgb.convert("L").resize((HASH_SIDE + 1, HASH_SIDE), box))
    bits = np.packbits(grey[:, 1:] > grey[:, :-1])
    colours = np.asarray(rgb.resize((COLOUR_SIDE, COLOUR_SIDE), box))
    return Signature(bits.tobytes(), colours.tobytes())


def packed(
    bits: Sequence[bytes], colours: Sequence[bytes]
) -> tuple[NDArray[np.uint64], NDArray[np.uint8]]:
    """Many signatures as two arrays, as `same_picture` takes them.

    Each hash is a column of words, so that one word of all hashes is compared at a time, which
    takes a tenth of the time; each picture's colours are a row.
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
    most_bits: int,
    most_share: float,
    most_colour: int,
) -> tuple[NDArray[Any], NDArray[Any], NDArray[Any]]:
    """Find which of many signatures are of the same picture as this one.

    Args:
        most_bits, most_share: Bits that may differ, and their share of those set in either.
        most_colour: Levels by which the mean colour of a field may differ.

    Returns their indices, ascending, and by how many bits and levels of colour each differs.
    """
    apart: NDArray[Any] = np.zeros(bits.shape[1], np.int16)
    for words, word in zip(bits, np.frombuffer(picture.bits, np.uint64), strict=True):
        apart += np.bitwise_count(words ^ word)
    near = np.flatnonzero(apart <= most_bits)
    own_bits = np.frombuffer(picture.bits, np.uint64)[:, None]
    either = np.bitwise_count(bits[:, near] | own_bits).sum(0, dtype=np.int16)
    near = near[apart[near] <= most_share * either]
    # int16 holds differences of bytes; only the few near ones are compared.
    own = np.frombuffer(picture.colours, np.uint8).astype(np.int16)
    colour = np.abs(colours[near] - own).max(axis=1, initial=0)
    close = colour <= most_colour
    near = near[close]
    return near, apart[near], colour[close]
