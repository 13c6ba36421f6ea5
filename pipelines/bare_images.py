"""Reduces an image file to the parts needed to decode it, before any decoder sees it.

Each format is walked by its own structure, without unpacking anything. Descriptions, EXIF with its
places and names, thumbnails, colour profiles, further frames and trailing data are dropped; the
size and orientation are read. So no decoder unpacks a text chunk, and none meets a file that is
built to keep it busy. Without their profiles, colours are taken to be sRGB.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Callable
from dataclasses import dataclass

_MOST_PIECES = 65_536
"""Segments or chunks in one file; 10 to 1,000 are usual."""
_MOST_SUB_BLOCKS = 1 << 20
"""In a GIF's first frame and everything before it; a sub-block is up to 255 bytes."""
_MOST_SCANS = 100
"""In a progressive JPEG; each scan costs time for the whole picture; about 10 are usual."""
_FREE_SCANS = 20
_MOST_SCAN_PIXELS = 2_000_000_000
"""Scans beyond the free ones, times pixels. About a second's work."""

_Pieces = list[bytes | memoryview]


class BadFile(ValueError):
    """A file that must not be decoded; the reason is one of few, the detail says more."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(reason, detail)
        self.reason, self.detail = reason, detail


@dataclass(frozen=True)
class Bare:
    """A file without what decoding doesn't need, its size, and its EXIF orientation."""

    data: bytes
    width: int
    height: int
    orientation: int = 1


def strip(data: bytes, form: str) -> Bare:
    """The bare file of an image of format `form`, as identified by its first bytes.

    Raises:
        BadFile: it is not of that format, is cut off, or would take too long to decode.
    """
    try:
        return _STRIP[form](data)
    except (struct.error, IndexError) as error:
        raise BadFile("truncated image", "within its header") from error


# -- JPEG -----------------------------------------------------------------------------------------

_SOI, _EOI, _SOS, _TEM = 0xD8, 0xD9, 0xDA, 0x01
_APP0, _APP1, _APP14 = 0xE0, 0xE1, 0xEE
_FRAMES = (0xC0, 0xC1, 0xC2)  # baseline, extended, progressive: what browsers show
_OTHER_FRAMES = (0xC3, 0xC5, 0xC6, 0xC7, 0xC9, 0xCA, 0xCB, 0xCD, 0xCE, 0xCF)
_TABLES = (0xC4, 0xDB, 0xDC, 0xDD)  # Huffman, quantization, number of lines, restarts
# The next marker, even from the middle of a scan: no stuffed zero, restart or fill byte.
_MARKER = re.compile(rb"\xff[\x01-\xcf\xd8-\xfe]")


def _jpeg(data: bytes) -> Bare:
    view = memoryview(data)
    pieces: _Pieces = [view[:2]]
    size: tuple[int, int] | None = None
    orientation, scans, scan_start, at = 1, 0, 0, 2
    for _ in range(_MOST_PIECES):
        found = _MARKER.search(data, at)
        if scan_start:
            pieces.append(view[scan_start : found.start() if found else len(data)])
            scan_start = 0
        if found is None:
            break
        start, marker = found.start(), data[found.start() + 1]
        if marker == _EOI:
            pieces.append(view[start : start + 2])
            break
        if marker in (_SOI, _TEM):
            at = start + 2
            continue
        body, at = _segment(data, start)
        if marker in _OTHER_FRAMES:
            raise BadFile("unsupported format", "lossless, hierarchical or arithmetic JPEG")
        if marker in _FRAMES:
            if size:
                raise BadFile("broken image", "two frames")
            height, width = struct.unpack_from(">HH", body, 1)
            size = width, height
        elif marker == _SOS:
            scans, scan_start = scans + 1, at
        elif marker == _APP1 and body[:6] == b"Exif\0\0":
            orientation = _orientation(bytes(body[6:]))
        pieces += _needed(marker, view[start:at], body)
    else:
        raise BadFile("too complex", f"over {_MOST_PIECES} segments")
    if not size or not scans:
        raise BadFile("truncated image", "no picture in it")
    work = (scans - _FREE_SCANS) * size[0] * size[1]
    if scans > _MOST_SCANS or work > _MOST_SCAN_PIXELS:
        raise BadFile("too complex", f"{scans} scans of {size[0]}x{size[1]}")
    whole = b"".join(pieces)
    return Bare(data if whole == data else whole, *size, orientation)


def _segment(data: bytes, start: int) -> tuple[memoryview, int]:
    """The body of the segment whose marker is at `start`, and where it ends."""
    (length,) = struct.unpack_from(">H", data, start + 2)
    end = start + 2 + length
    if length < 2:
        raise BadFile("broken image", "a segment of no length")
    if end > len(data):
        raise BadFile("truncated image", "within a segment")
    return memoryview(data)[start + 4 : end], end


def _needed(marker: int, segment: memoryview, body: memoryview) -> _Pieces:
    if marker == _SOS or marker in _FRAMES or marker in _TABLES:
        return [segment]
    # Their colour information is needed; the thumbnail in APP0 is not.
    if marker == _APP0 and body[:5] == b"JFIF\0" and len(body) >= 14:
        return [b"\xff\xe0\0\x10", body[:12], b"\0\0"]
    if marker == _APP14 and body[:5] == b"Adobe" and len(body) >= 12:
        return [b"\xff\xee\0\x0e", body[:12]]
    return []


# -- PNG ------------------------------------------------------------------------------------------


def _png(data: bytes) -> Bare:
    view = memoryview(data)
    pieces: _Pieces = [view[:8]]
    length, kind, width, height = struct.unpack_from(">I4sII", data, 8)
    if kind != b"IHDR" or length != 13:
        raise BadFile("broken image", "no IHDR")
    orientation, at = 1, 8
    for _ in range(_MOST_PIECES):
        if at + 8 > len(data):
            break
        length, kind = struct.unpack_from(">I4s", data, at)
        end = at + length + 12
        if kind in (b"IHDR", b"PLTE", b"tRNS", b"IDAT", b"IEND"):
            pieces.append(view[at:end])  # if its end is missing, the decoder reports it
        elif kind == b"eXIf":
            orientation = _orientation(data[at + 8 : end - 4])
        at = end
        if kind == b"IEND":
            break
    else:
        raise BadFile("too complex", f"over {_MOST_PIECES} chunks")
    return Bare(b"".join(pieces), width, height, orientation)


# -- GIF ------------------------------------------------------------------------------------------

_BLOCK = re.compile(rb"[!,;]")  # an extension, a picture, the end
_CONTROL = 0xF9


def _gif(data: bytes) -> Bare:
    width, height, packed = struct.unpack_from("<HHB", data, 6)
    at = header = 13 + _colours(packed)
    control = b""
    blocks = 0
    while found := _BLOCK.search(data, at):
        start = found.start()
        if data[start] == ord("!"):
            at, blocks = _skip_sub_blocks(data, start + 2, blocks)
            if data[start + 1] == _CONTROL:  # says which colour is transparent
                control = data[start:at] if at - start == 8 else b""
            continue
        if data[start] == ord(";"):
            break
        left, top, wide, high, packed = struct.unpack_from("<HHHHB", data, start + 1)
        end, _ = _skip_sub_blocks(data, start + 11 + _colours(packed), blocks)
        pieces = (data[:header], control, data[start:end], b";")
        # A frame may exceed the canvas; the decoder enlarges the canvas for it.
        return Bare(b"".join(pieces), max(width, left + wide), max(height, top + high))
    raise BadFile("truncated image", "no picture in it")


def _colours(packed: int) -> int:
    return 3 << (packed & 7) + 1 if packed & 0x80 else 0


def _skip_sub_blocks(data: bytes, at: int, blocks: int) -> tuple[int, int]:
    """The end of the sub-blocks that start at `at` (or of the data), and their count so far."""
    while at < len(data):
        length = data[at]
        at += length + 1
        blocks += 1
        if not length:
            break
        if blocks > _MOST_SUB_BLOCKS:
            raise BadFile("too complex", f"over {_MOST_SUB_BLOCKS} sub-blocks")
    return at, blocks


# -- WEBP -----------------------------------------------------------------------------------------

_ALPHA_AND_ANIMATION = 0x12  # two of the flags for the chunks present


def _webp(data: bytes) -> Bare:
    end_of_all = struct.unpack_from("<I", data, 4)[0] + 8
    if end_of_all > len(data):
        raise BadFile("truncated image", f"{len(data)} of {end_of_all} bytes")
    pieces: list[bytes] = []
    size: tuple[int, int] | None = None
    orientation, at, animated = 1, 12, False
    for _ in range(_MOST_PIECES):
        if at + 8 > end_of_all:
            break
        kind, length = struct.unpack_from("<4sI", data, at)
        head, body = data[at : at + 8], data[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
        if len(body) < length:
            raise BadFile("truncated image", "within a chunk")
        if kind == b"VP8X":
            here = _u24(body, 4) + 1, _u24(body, 7) + 1
            body = bytes([body[0] & _ALPHA_AND_ANIMATION]) + body[1:]
        elif kind == b"VP8 ":
            width, height = struct.unpack_from("<HH", body, 6)
            here = width & 0x3FFF, height & 0x3FFF
        elif kind == b"VP8L":
            (bits,) = struct.unpack_from("<I", body, 1)
            here = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
        elif kind in (b"ALPH", b"ANIM") or (kind == b"ANMF" and not animated):
            here = None
            animated = animated or kind == b"ANMF"  # one frame is enough
        else:
            if kind == b"EXIF":
                orientation = _orientation(body.removeprefix(b"Exif\0\0"))
            continue
        size = size or here  # the first size found is the canvas, which holds every frame
        pieces += [head, body, b"\0" * (length % 2)]
    else:
        raise BadFile("too complex", f"over {_MOST_PIECES} chunks")
    if not size:
        raise BadFile("broken image", "no picture in it")
    whole = b"WEBP" + b"".join(pieces)
    return Bare(b"RIFF" + struct.pack("<I", len(whole)) + whole, *size, orientation)


def _u24(data: bytes, at: int) -> int:
    return data[at] | data[at + 1] << 8 | data[at + 2] << 16


# -- BMP ------------------------------------------------------------------------------------------


def _bmp(data: bytes) -> Bare:
    (header,) = struct.unpack_from("<I", data, 14)
    if header == 12:
        (width, height), packing = struct.unpack_from("<HH", data, 18), 0
    else:
        width, height, packing = struct.unpack_from("<ii4xI", data, 18)
    if packing not in (0, 3, 6):  # plain, or with masks; Pillow unpacks run lengths in slow Python
        raise BadFile("unsupported format", "compressed BMP")
    return Bare(data, abs(width), abs(height))


# -- EXIF -----------------------------------------------------------------------------------------


def _orientation(tiff: bytes) -> int:
    """EXIF's orientation, 1 to 8; 1 if it has none."""
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None:
        return 1
    try:
        (at,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, at)
        for entry in range(at + 2, at + 2 + 12 * count, 12):
            tag, kind = struct.unpack_from(f"{order}HH", tiff, entry)
            if tag == 0x0112:
                form = {3: "H", 4: "I"}[kind]
                (found,) = struct.unpack_from(f"{order}{form}", tiff, entry + 8)
                return found if 1 <= found <= 8 else 1
    except (struct.error, KeyError):  # as if it had none
        pass
    return 1


_STRIP: dict[str, Callable[[bytes], Bare]] = {
    "JPEG": _jpeg,
    "PNG": _png,
    "GIF": _gif,
    "WEBP": _webp,
    "BMP": _bmp,
}
