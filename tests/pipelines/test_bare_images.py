"""What is stored of an image, and what hostile files may cost."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import time
import zlib
from collections.abc import Callable
from typing import Any

import hostile_web
import numpy as np
import pytest
from hostile_web import jpeg_segment, jpeg_with, png_chunk, png_with
from PIL import Image

from pipelines.bare_images import strip
from pipelines.images import CleanImage, ImagePolicy, Rejected, clean_image

RNG = random.Random(7)
SECRET = b"SECRET 52.5200N 13.4050E"


def kept(data: bytes, policy: ImagePolicy | None = None) -> bytes:
    found = clean_image(data, policy)
    assert isinstance(found, CleanImage), found
    return found.data


def pixels(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(image.convert("RGB"))


def encoded(image: Image.Image, form: str, **options: object) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def exif(orientation: int = 1) -> bytes:
    tags = Image.Exif()
    tags[0x0112] = orientation
    tags[0x010E] = SECRET.decode()
    tags.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)  # GPS
    return tags.tobytes()


# -- what is stored -------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"progressive": True}, {"restart_marker_blocks": 2}])
def test_metadata_of_a_kept_jpeg_goes_and_its_picture_stays(options: dict[str, Any]) -> None:
    plain = hostile_web.picture(RNG, **options)
    assert kept(plain) == plain
    loaded = jpeg_with(
        plain,
        jpeg_segment(0xE1, exif()),
        jpeg_segment(0xE1, b"http://ns.adobe.com/xap/1.0/\0<x>" + SECRET),
        jpeg_segment(0xE2, b"ICC_PROFILE\0\1\1" + SECRET),
        jpeg_segment(0xED, b"Photoshop 3.0\0" + SECRET),
        jpeg_segment(0xE0, b"JFXX\0\x10" + SECRET),
        jpeg_segment(0xFE, SECRET),
    )
    stored = kept(loaded + b"PK\x03\x04" + SECRET)
    assert stored == plain
    assert SECRET not in stored


def test_a_thumbnail_goes() -> None:
    plain = hostile_web.picture(RNG)
    jfif = b"JFIF\0\1\1\0\0\1\0\1" + bytes([20, 20]) + SECRET.ljust(1200, b"\0")
    at = 2 + 2 + 16
    assert plain[2:4] == b"\xff\xe0"
    assert kept(plain[:2] + jpeg_segment(0xE0, jfif) + plain[at:]) == plain


def test_pictures_behind_the_first_go() -> None:
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8)
    first, second = Image.fromarray(noise), Image.new("RGB", (64, 64), "red")
    several = encoded(first, "MPO", save_all=True, append_images=[second])
    stored = kept(several)
    assert len(stored) < len(several) and stored.count(b"\xff\xd8\xff") == 1
    assert np.array_equal(pixels(stored), pixels(several))


def test_cmyk_and_rgb_jpegs_keep_their_colours() -> None:
    image = Image.open(io.BytesIO(hostile_web.picture(RNG)))
    for data in (encoded(image.convert("CMYK"), "JPEG"), encoded(image, "JPEG", keep_rgb=True)):
        loaded = jpeg_with(data, jpeg_segment(0xE1, exif()))
        want, found = pixels(data).astype(int), pixels(kept(loaded)).astype(int)
        assert np.abs(want - found).mean() < 4


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF"])
def test_no_metadata_outlives_a_conversion(form: str) -> None:
    image = Image.open(io.BytesIO(hostile_web.picture(RNG, "PNG"))).convert("RGB")
    icc = SECRET.ljust(200)
    options: dict[str, object] = {"exif": exif(), "icc_profile": icc, "comment": SECRET}
    if form == "PNG":
        from PIL.PngImagePlugin import PngInfo

        options["pnginfo"] = PngInfo()
        options["pnginfo"].add_text("Comment", SECRET.decode())  # type: ignore[attr-defined]
    data = encoded(image, form, **options)
    assert SECRET in data
    stored = kept(data, ImagePolicy(short_side=40))
    assert SECRET not in stored
    with Image.open(io.BytesIO(stored)) as found:
        assert not found.getexif() and set(found.info) <= {
            *("jfif", "jfif_version", "jfif_unit", "jfif_density")
        }


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP"])
@pytest.mark.parametrize("orientation", [1, 3, 6])
def test_the_way_up_is_read_in_each_format(form: str, orientation: int) -> None:
    image = Image.new("RGB", (80, 40))
    image.paste("red", (0, 0, 40, 40))
    stored = pixels(kept(encoded(image, form, exif=exif(orientation))))
    reddest = {1: (20, 20), 3: (20, 60), 6: (20, 20)}[orientation]  # row, column
    assert stored.shape[:2] == ((80, 40) if orientation == 6 else (40, 80))
    assert stored[reddest][0] > 200


@pytest.mark.parametrize(
    "tiff",
    [
        b"II*\0\x08\0\0\0\xff\xff",
        b"II*\0\xff\xff\xff\xff",
        b"MM\0*\0\0\0\x08\0\1\x01\x12\0\3\0\0\0\1\0\x63\0\0",
        b"II*\0\x08\0\0\0\1\0\x12\1\x63\0\1\0\0\0\6\0\0\0",
        b"II*\0",
        b"",
    ],
)
def test_nonsense_in_exif_is_no_way_up(tiff: bytes) -> None:
    plain = hostile_web.picture(RNG)
    assert kept(jpeg_with(plain, jpeg_segment(0xE1, b"Exif\0\0" + tiff))) == plain


VARIANTS: list[tuple[str, str, dict[str, Any]]] = [
    *(("PNG", mode, {}) for mode in ("1", "L", "LA", "P", "RGB", "RGBA", "I;16")),
    ("PNG", "P", {"transparency": 3, "bits": 4}),
    ("PNG", "RGB", {"transparency": (0, 0, 0)}),
    *(("JPEG", "RGB", {"subsampling": kind}) for kind in (0, 1, 2)),
    *(("JPEG", mode, {"progressive": True}) for mode in ("L", "RGB", "CMYK")),
    ("JPEG", "RGB", {"keep_rgb": True, "restart_marker_rows": 1}),
    *(("GIF", mode, {}) for mode in ("1", "L", "P", "RGBA")),
    ("GIF", "P", {"interlace": 1, "transparency": 5}),
    *(("WEBP", mode, {"lossless": lossless}) for mode in ("RGB", "RGBA") for lossless in (0, 1)),
    *(("BMP", mode, {}) for mode in ("1", "L", "P", "RGB", "RGBA")),
]


@pytest.mark.parametrize(("form", "mode", "options"), VARIANTS)
def test_the_bare_file_shows_the_same(form: str, mode: str, options: dict[str, Any]) -> None:
    with Image.open(io.BytesIO(hostile_web.picture(RNG, "PNG"))) as image:
        image = image.convert("RGBA")
    image.putalpha(image.getchannel("R"))
    if mode == "P":
        image = image.convert("RGB").quantize(16)
    else:
        image = image.convert("L").convert(mode) if mode == "I;16" else image.convert(mode)
    data = encoded(image, form, **options)
    bare = strip(data, form)
    assert (bare.width, bare.height) == image.size and len(bare.data) <= len(data) + 8
    with Image.open(io.BytesIO(data)) as one, Image.open(io.BytesIO(bare.data)) as other:
        assert one.mode == other.mode
        assert np.array_equal(np.asarray(one.convert("RGBA")), np.asarray(other.convert("RGBA")))


def test_the_first_frame_of_an_animation() -> None:
    for form in ("GIF", "WEBP"):
        data = hostile_web.animation(random.Random(1), form, 5)
        with Image.open(io.BytesIO(data)) as image:
            first = np.asarray(image.convert("RGB")).astype(int)
        assert np.abs(pixels(kept(data)).astype(int) - first).max() < 8


def test_transparent_gif_and_large_transparent_pictures() -> None:
    image = Image.new("RGBA", (3000, 2000), (255, 0, 0, 0))
    image.paste((0, 0, 255, 255), (0, 1000, 3000, 2000))
    for form in ("PNG", "GIF"):
        found = pixels(kept(encoded(image, form), ImagePolicy(short_side=2000)))
        assert (found[:990] > 250).all() and (found[1010:, :, 2] > 240).all()


# -- what a file may cost -------------------------------------------------------------------------

_ZEROS = zlib.compress(bytes(100 << 20), 9)


def _exif_of_many_entries() -> bytes:
    return b"Exif\0\0II*\0\x08\0\0\0\xff\xff" + b"\1\0" * 32_000


def _gif_comment(size: int) -> bytes:
    comment = b"!\xfe" + (b"\xff" + b"c" * 255) * (size // 256) + b"\0"
    return hostile_web.gif_with(hostile_web.picture(RNG, "GIF"), comment)


COSTLY: dict[str, tuple[Callable[[], bytes], str]] = {
    "PNG, 100 MB in a profile": (lambda: png_with(RNG, png_chunk(b"iCCP", b"x\0\0" + _ZEROS)), ""),
    "PNG, 10 GB in texts": (
        lambda: png_with(RNG, png_chunk(b"zTXt", b"x\0\0" + _ZEROS) * 100),
        "",
    ),
    "PNG of empty chunks": (
        lambda: png_with(RNG, png_chunk(b"teXt", b"") * 1_000_000),
        "too complex",
    ),
    "GIF, 30 MB of comment": (lambda: _gif_comment(30 << 20), ""),
    "GIF of tiny blocks": (
        lambda: b"GIF89a" + bytes(7) + b"!\xfe" + b"\1a" * 8_000_000,
        "too complex",
    ),
    "GIF of junk": (lambda: b"GIF89a" + bytes(30 << 20), "truncated image"),
    "GIF, 500 frames": (lambda: hostile_web.animation(RNG, "GIF", 500), ""),
    "WEBP, huge canvas": (lambda: hostile_web.webp_of(2**24, 2**24), "too many pixels"),
    "WEBP, 60 frames": (lambda: hostile_web.animation(RNG, "WEBP", 60), ""),
    "JPEG, 100 scans": (lambda: hostile_web.jpeg_of_many_scans(80, 1000), ""),
    "JPEG, 1,000 scans": (lambda: hostile_web.jpeg_of_many_scans(1000), "too complex"),
    "JPEG, 90 scans of 36 MP": (lambda: hostile_web.jpeg_of_many_scans(80, 6000), "too complex"),
    "JPEG, EXIF of many entries": (
        lambda: jpeg_with(
            hostile_web.picture(RNG), *[jpeg_segment(0xE1, _exif_of_many_entries())] * 100
        ),
        "",
    ),
    "JPEG of empty segments": (
        lambda: jpeg_with(hostile_web.picture(RNG), b"\xff\xe5\0\2" * 4_000_000),
        "too complex",
    ),
    "JPEG, 30 MB of stuffing": (
        lambda: hostile_web.picture(RNG)[:-2] + b"\xff\0" * (15 << 20) + b"\xff\xd9",
        "",
    ),
    "BMP, huge": (lambda: hostile_web.bmp_of(2**31 - 1, 2**31 - 1), "too many pixels"),
    "BMP, run lengths": (
        lambda: hostile_web.bmp_of(9000, 9000, 1, 8, bytes(1 << 20)),
        "unsupported format",
    ),
}


@pytest.mark.parametrize("name", list(COSTLY))
def test_costly_files_cost_little(name: str) -> None:
    make, reason = COSTLY[name]
    data = make()
    began = time.process_time()
    found = clean_image(data)
    assert time.process_time() - began < 2
    assert (found.reason if isinstance(found, Rejected) else "") == reason


@pytest.mark.slow
@pytest.mark.parametrize("form", ["PNG", "JPEG"])
def test_the_largest_picture_fits_in_memory(form: str) -> None:
    """Of 100 megapixels, by default the most: time and memory of a process of its own."""
    code = """
import io, resource, time
from PIL import Image
from pipelines.bare_images import strip
from pipelines.images import CleanImage, clean_image
Image.MAX_IMAGE_PIXELS = None
out = io.BytesIO()
{make}
data = out.getvalue()
began = time.process_time()
found = clean_image(data)
assert isinstance(found, CleanImage), found
print(time.process_time() - began, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""
    make = {
        "PNG": "Image.new('RGBA', (10_000, 10_000), 'red').save(out, 'PNG', compress_level=1)",
        "JPEG": "Image.new('RGB', (10_000, 10_000), 'red').save(out, 'JPEG', progressive=True)",
    }[form]
    command = [sys.executable, "-c", code.format(make=make)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    seconds, kilobytes = (float(n) for n in done.stdout.split())
    assert seconds < 20
    assert kilobytes < 1_500_000


def test_formats_that_are_no_pictures_to_us_are_never_opened() -> None:
    eps = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 64 64\n"
    arithmetic = hostile_web.picture(RNG).replace(b"\xff\xc0", b"\xff\xc9", 1)
    for data in (eps, arithmetic, b"II*\0" + bytes(100), struct.pack(">I", 12) + b"jP  "):
        found = clean_image(data)
        assert isinstance(found, Rejected)
        assert found.reason in ("not an image", "unsupported format")
