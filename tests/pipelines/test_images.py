"""The cleaning of images: formats, colours, ways up; size and encoding by policy."""

from __future__ import annotations

import io
import struct
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines.images import FILTERS, RESIZE_MODES, CleanImage, ImagePolicy, Rejected, clean_image
from pipelines.ingest_config import IngestConfig


def photo(width: int = 120, height: int = 80) -> Image.Image:
    """Left half red, right half blue, with a green top edge: turns and flips are seen."""
    pixels = np.zeros((height, width, 3), np.uint8)
    pixels[:, : width // 2, 0] = 250
    pixels[:, width // 2 :, 2] = 250
    pixels[: height // 4] = (0, 250, 0)
    return Image.fromarray(pixels)


def encoded(image: Image.Image, form: str, **options: Any) -> bytes:
    out = io.BytesIO()
    image.save(out, form, **options)
    return out.getvalue()


def cleaned(data: bytes, policy: ImagePolicy | None = None) -> Image.Image:
    result = clean_image(data, policy)
    assert isinstance(result, CleanImage), result
    image = Image.open(io.BytesIO(result.data))
    assert image.format == "JPEG" and image.mode == "RGB"
    assert image.size == (result.width, result.height)
    assert clean_image(data, policy) == result  # deterministic
    return image


def rejected(data: bytes, policy: ImagePolicy | None = None) -> str:
    result = clean_image(data, policy)
    assert isinstance(result, Rejected), result
    return result.reason


def like_photo(image: Image.Image) -> bool:
    want = np.asarray(photo().resize(image.size), float)
    return bool(np.abs(want - np.asarray(image, float)).mean() < 12)


def test_a_jpeg_that_needs_nothing_keeps_its_bytes() -> None:
    data = encoded(photo(), "JPEG")
    result = clean_image(data)
    assert isinstance(result, CleanImage) and result.data == data
    assert len(result.sha256) == 64


@pytest.mark.parametrize("form", ["PNG", "WEBP", "GIF", "BMP", "JPEG"])
def test_each_format_comes_out_the_same(form: str) -> None:
    assert like_photo(cleaned(encoded(photo(), form)))


def test_colour_kinds() -> None:
    assert like_photo(cleaned(encoded(photo().convert("CMYK"), "JPEG")))
    assert like_photo(cleaned(encoded(photo().quantize(16), "PNG")))
    grey = cleaned(encoded(photo().convert("L"), "JPEG"))
    assert np.ptp(np.asarray(grey).astype(int), axis=2).max() <= 2
    deep = Image.fromarray(np.full((80, 120), 200 * 256, np.uint16))
    assert abs(int(np.asarray(cleaned(encoded(deep, "PNG"))).mean()) - 200) <= 1


def test_transparency_lies_over_white() -> None:
    clear = Image.new("RGBA", (64, 64), (255, 0, 0, 0))
    assert np.asarray(cleaned(encoded(clear, "PNG"))).min() >= 253
    palette = photo(64, 64).quantize(8)
    palette.info["transparency"] = palette.getpixel((1, 1))
    image = cleaned(encoded(palette, "PNG", transparency=palette.getpixel((1, 1))))
    assert np.asarray(image)[2, 2].min() >= 250


@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_is_turned_upright(orientation: int) -> None:
    undo = {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_90,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_270,
    }
    stored = photo().transpose(undo[orientation]) if orientation in undo else photo()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(stored, "JPEG", exif=exif, quality=95)
    image = cleaned(data)
    assert image.size == (120, 80) and like_photo(image)
    small = cleaned(data, ImagePolicy(short_side=40))
    assert small.size == (60, 40) and like_photo(small)


def test_the_short_side_shrinks_and_never_grows() -> None:
    large = encoded(photo(1200, 800), "JPEG")
    assert cleaned(large).size == (432, 288) and like_photo(cleaned(large))
    assert cleaned(encoded(photo(800, 1200), "PNG")).size == (288, 432)
    assert cleaned(encoded(photo(100, 60), "PNG")).size == (100, 60)


def test_filters() -> None:
    assert rejected(encoded(photo(31, 200), "JPEG")) == "too small"
    assert rejected(encoded(photo(440, 40), "JPEG")) == "aspect ratio"
    result = clean_image(encoded(photo(440, 40), "JPEG"))
    assert isinstance(result, Rejected) and result.stage == "filter"
    assert cleaned(encoded(photo(440, 40), "JPEG"), ImagePolicy(max_aspect=11)).height == 40


@pytest.mark.parametrize("form", ["JPEG", "PNG", "WEBP", "GIF", "BMP"])
def test_half_a_file(form: str) -> None:
    noise = np.random.default_rng(0).integers(0, 255, (100, 100, 3), dtype=np.uint8)
    data = encoded(Image.fromarray(noise), form)
    assert rejected(data[: len(data) // 2]) == "truncated image"
    for size in (1, 3, 12, 20, 40):  # inside the header: some reason, no exception
        rejected(data[:size])


def test_what_is_no_image() -> None:
    assert rejected(b"") == "empty body"
    assert rejected(b"\n<!DOCTYPE html><html><p>gone") == "not an image (HTML)"
    assert rejected(b"\xef\xbb\xbf<?xml version='1.0'?><html>") == "not an image (HTML)"
    assert rejected(b"<?xml version='1.0'?><svg width='9'/>") == "unsupported format"
    assert rejected(encoded(photo(), "TIFF")) == "unsupported format"
    assert rejected(b"\x00\x00\x00\x1cftypavif" + bytes(64)) == "unsupported format"
    assert rejected(b"just words") == "not an image"
    assert rejected(encoded(photo(), "PNG")[:40] + b"\x00" * 400) in (
        "broken image",
        "truncated image",
    )


@pytest.mark.parametrize("side", [12_000, 60_000])
def test_a_bomb_is_refused_by_its_header(side: int) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        crc = zlib.crc32(kind + body)
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", crc)

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    data = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"\0"))
    assert rejected(data) == "too many pixels"
    assert rejected(encoded(photo(), "PNG"), ImagePolicy(max_pixels=9_599)) == "too many pixels"


# -- size and encoding, by policy -----------------------------------------------------------------


def gradient(width: int, height: int) -> Image.Image:
    """A smooth picture, bright on the right and green below."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))


def jpeg(image: Image.Image, **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def shrunk(data: bytes, **policy: object) -> Image.Image:
    result = clean_image(data, ImagePolicy(**policy))  # type: ignore[arg-type]
    assert isinstance(result, CleanImage), result
    image = Image.open(io.BytesIO(result.data))
    assert image.size == (result.width, result.height)
    return image


def pixels(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("RGB"), float)


@pytest.mark.parametrize(
    ("mode", "size"),
    [
        ("keep_ratio", (150, 100)),
        ("keep_ratio_largest", (100, 67)),
        ("center_crop", (100, 100)),
        ("border", (100, 100)),
        ("no", (600, 400)),
    ],
)
@pytest.mark.parametrize("turned", [False, True])
def test_each_resize_mode_has_its_size(mode: str, size: tuple[int, int], turned: bool) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6 if turned else 1  # a quarter turn: the upright image is what counts
    data = jpeg(gradient(600, 400), exif=exif)  # type: ignore[arg-type]
    image = shrunk(data, short_side=100, resize_mode=mode)
    assert image.size == (size[::-1] if turned else size)


def test_the_modes_are_all_tested() -> None:
    assert set(RESIZE_MODES) == {"keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"}


def test_a_crop_keeps_the_middle_and_a_border_is_white() -> None:
    data = jpeg(gradient(600, 400), quality=95)
    middle = pixels(gradient(600, 400).crop((100, 0, 500, 400)).resize((100, 100)))
    cropped = shrunk(data, short_side=100, resize_mode="center_crop")
    assert np.abs(pixels(cropped) - middle).mean() < 3
    framed = pixels(shrunk(data, short_side=100, resize_mode="border"))
    assert framed[:12].min() > 245 and framed[-12:].min() > 245
    whole = pixels(gradient(600, 400).resize((100, 67)))
    assert np.abs(framed[17:83][2:-2] - whole[2:-3]).mean() < 4


@pytest.mark.parametrize(("mode", "size"), [("center_crop", (40, 40)), ("border", (60, 60))])
def test_small_images_become_square_but_not_larger(mode: str, size: tuple[int, int]) -> None:
    assert shrunk(jpeg(gradient(60, 40)), short_side=100, resize_mode=mode).size == size


@pytest.mark.parametrize("mode", ["keep_ratio", "keep_ratio_largest", "no"])
def test_what_fits_keeps_its_bytes_unless_told(mode: str) -> None:
    data = jpeg(gradient(60, 40), quality=100)
    kept = clean_image(data, ImagePolicy(resize_mode=mode))
    anew = clean_image(data, ImagePolicy(resize_mode=mode, reencode=True, encode_quality=60))
    assert isinstance(kept, CleanImage) and isinstance(anew, CleanImage)
    assert kept.data == data and len(anew.data) < len(data) / 2
    assert (anew.width, anew.height) == (60, 40)


def test_quality_decides_the_bytes() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (400, 400, 3), np.uint8))
    sizes = [len(clean(jpeg(noise), quality)) for quality in (50, 75, 92)]
    assert sizes[0] < sizes[1] < sizes[2]


def clean(data: bytes, quality: int) -> bytes:
    result = clean_image(data, ImagePolicy(encode_quality=quality))
    assert isinstance(result, CleanImage)
    return result.data


@pytest.mark.parametrize("downscale", FILTERS)
def test_filters_average_what_they_shrink(downscale: str) -> None:
    board = np.indices((400, 400)).sum(0) % 2 * 255  # as fine as can be: grey from afar
    data = jpeg(Image.fromarray(board.astype(np.uint8)).convert("RGB"), quality=95)
    image = pixels(shrunk(data, short_side=100, downscale=downscale))
    assert np.abs(image[5:-5, 5:-5] - 127.5).max() < 12


@pytest.mark.parametrize(
    ("field", "value", "said"),
    [
        ("resize_mode", "stretch", "resize_mode: 'stretch' is none of keep_ratio"),
        ("downscale", "nearest", "downscale: 'nearest' is none of hamming"),
        ("encode_quality", 100, "encode_quality: must be 1 to 95"),
    ],
)
def test_what_the_options_refuse(field: str, value: object, said: str) -> None:
    with pytest.raises(ValueError, match=said):
        IngestConfig(**{field: value})  # type: ignore[arg-type]


def test_the_options_decide_the_dataset() -> None:
    plain = IngestConfig().decides_output()
    for changed in (
        IngestConfig(resize_mode="border"),
        IngestConfig(downscale="area"),
        IngestConfig(encode_quality=80),
        IngestConfig(reencode=True),
    ):
        assert changed.decides_output() != plain
        assert changed.policy != IngestConfig().policy
