"""Pictures and views: decoding to upright RGB, crops that can be replayed."""

from __future__ import annotations

import io
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from beit3.transforms import WHOLE, View, apply_view, decode, sample_view


def picture(width: int = 40, height: int = 30, seed: int = 0) -> Image.Image:
    """Smooth random colours, so that JPEG and resizing keep them."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (4, 5, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def encoded(image: Image.Image, kind: str, **options: Any) -> bytes:
    sink = io.BytesIO()
    image.save(sink, kind, **options)
    return sink.getvalue()


def difference(a: Image.Image, b: Image.Image) -> float:
    assert a.size == b.size
    return float(np.abs(np.asarray(a, float) - np.asarray(b, float)).mean())


# -- decoding ------------------------------------------------------------------------------------


def test_decode_gives_the_pixels() -> None:
    source = picture()
    decoded = decode(encoded(source, "PNG"))
    assert decoded.mode == "RGB"
    assert difference(decoded, source) == 0


@pytest.mark.parametrize(
    ("orientation", "stored"),
    [
        (2, Image.Transpose.FLIP_LEFT_RIGHT),
        (3, Image.Transpose.ROTATE_180),
        (6, Image.Transpose.ROTATE_90),
        (8, Image.Transpose.ROTATE_270),
    ],
)
def test_decode_turns_a_picture_upright(orientation: int, stored: Image.Transpose) -> None:
    upright = picture()
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encoded(upright.transpose(stored), "JPEG", quality=95, exif=exif)
    assert difference(decode(data), upright) < 4


def test_decode_converts_cmyk() -> None:
    data = encoded(picture().convert("CMYK"), "JPEG", quality=95)
    decoded = decode(data)
    assert decoded.mode == "RGB"
    assert difference(decoded, picture()) < 12


@pytest.mark.parametrize("kind", ["PNG", "GIF"])
def test_decode_converts_a_palette(kind: str) -> None:
    palette = picture().convert("P", palette=Image.Palette.ADAPTIVE)
    decoded = decode(encoded(palette, kind))
    assert decoded.mode == "RGB"
    assert difference(decoded, palette.convert("RGB")) == 0


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "1"])
def test_decode_converts_other_modes(mode: str) -> None:
    decoded = decode(encoded(picture().convert(mode), "PNG"))
    assert decoded.mode == "RGB"
    assert decoded.size == (40, 30)


def test_decode_refuses_what_is_no_picture() -> None:
    whole = encoded(picture(400, 300), "JPEG")
    for data in (b"", b"<html>not found</html>", whole[: len(whole) // 2]):
        with pytest.raises(OSError) as raised:
            decode(data)
        assert " at 0x" not in str(raised.value)  # it is stored, and is to be the same each time


def test_decode_raises_oserror_whatever_the_decoder_raises() -> None:
    """Pillow answers a damaged chunk with SyntaxError, and a huge size with an error of its own."""
    data = encoded(Image.effect_noise((400, 400), 90), "PNG")
    second = data.index(b"IDAT", data.index(b"IDAT") + 4)
    broken = data[:second] + b"!DAT" + data[second + 4 :]
    huge = bytearray(encoded(picture(), "BMP"))
    huge[18:26] = (60_000).to_bytes(4, "little") * 2
    for case in (broken, bytes(huge)):
        with pytest.raises(OSError):
            decode(case)


# -- views ---------------------------------------------------------------------------------------


def test_the_whole_view_is_a_plain_resize() -> None:
    source = picture()
    pixels = apply_view(source, WHOLE, 16)
    expected = np.asarray(source.resize((16, 16), Image.Resampling.BICUBIC))
    assert pixels.shape == (3, 16, 16)
    assert pixels.dtype == np.uint8
    assert pixels.flags["C_CONTIGUOUS"]
    assert (pixels == expected.transpose(2, 0, 1)).all()
    square = picture(16, 16)
    assert (apply_view(square, WHOLE, 16) == np.asarray(square).transpose(2, 0, 1)).all()


def test_a_flipped_view_is_the_mirror() -> None:
    box = (0.1, 0.2, 0.8, 0.9)
    straight, flipped = (apply_view(picture(), View(box, flip), 12) for flip in (False, True))
    assert (flipped == straight[:, :, ::-1]).all()
    assert (flipped != straight).any()


def test_a_view_can_be_written_to_its_place_in_a_batch() -> None:
    batch = np.zeros((2, 3, 12, 12), np.uint8)
    for flip in (False, True):
        view = View((0.1, 0.2, 0.8, 0.9), flip)
        assert apply_view(picture(), view, 12, batch[1]).base is batch
        assert (batch[1] == apply_view(picture(), view, 12)).all()
    assert not batch[0].any()


def test_a_view_crops_its_box() -> None:
    source = picture(40, 30)
    pixels = apply_view(source, View((0.25, 0.5, 0.75, 1.0)), 15)
    expected = source.crop((10, 15, 30, 30)).resize((15, 15), Image.Resampling.BICUBIC)
    # At the border the bicubic kernel of a view reaches over its box; inside they are equal.
    inside = (slice(None), slice(2, -2), slice(2, -2))
    assert (pixels[inside] == np.asarray(expected).transpose(2, 0, 1)[inside]).all()


def test_a_view_can_be_replayed() -> None:
    source = picture()
    view = sample_view(np.random.default_rng(5), 40, 30, scale=(0.2, 1.0), flip=0.5)
    again = View((*view.box,), bool(view.flip))
    assert (apply_view(source, view, 24) == apply_view(source.copy(), again, 24)).all()


def test_sample_view_is_a_function_of_the_seed() -> None:
    draws = [
        sample_view(np.random.default_rng(seed), 64, 48, scale=(0.2, 1.0), flip=0.5)
        for seed in (1, 1, 2)
    ]
    assert draws[0] == draws[1] != draws[2]


@pytest.mark.parametrize(("width", "height"), [(64, 48), (48, 64), (31, 300), (1, 1)])
@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 0.3), (1.0, 1.0)])
def test_views_lie_within_the_picture(width: int, height: int, scale: tuple[float, float]) -> None:
    rng = np.random.default_rng(0)
    for _ in range(200):
        view = sample_view(rng, width, height, scale=scale, flip=0.5)
        left, top, right, bottom = view.box
        assert 0 <= left < right <= 1
        assert 0 <= top < bottom <= 1
        if view.box == WHOLE.box:
            continue
        w, h = (right - left) * width, (bottom - top) * height
        share = w * h / (width * height)
        assert scale[0] - 1e-4 <= share <= scale[1] + 1e-4
        assert 3 / 4 - 1e-2 <= w / h <= 4 / 3 + 1e-2


def test_views_cover_the_scale_the_aspect_and_the_picture() -> None:
    rng = np.random.default_rng(0)
    boxes = np.array([sample_view(rng, 80, 80, scale=(0.2, 0.6), flip=0.5).box for _ in range(500)])
    left, top, right, bottom = boxes.T
    shares = (right - left) * (bottom - top)
    aspects = np.log((right - left) / (bottom - top))
    assert shares.min() < 0.22
    assert shares.max() > 0.58
    assert aspects.min() < math.log(0.78)
    assert aspects.max() > -math.log(0.78)
    assert abs(aspects.mean()) < 0.03
    assert left.min() < 0.02
    assert top.min() < 0.02
    assert right.max() > 0.98
    assert bottom.max() > 0.98


@pytest.mark.parametrize(("flip", "least", "most"), [(0.0, 0, 0), (1.0, 300, 300), (0.5, 120, 180)])
def test_flips_happen_as_often_as_asked(flip: float, least: int, most: int) -> None:
    rng = np.random.default_rng(0)
    flips = sum(sample_view(rng, 64, 48, scale=(0.2, 1.0), flip=flip).flip for _ in range(300))
    assert least <= flips <= most


def test_a_picture_too_narrow_for_the_aspect_is_seen_whole() -> None:
    view = sample_view(np.random.default_rng(0), 10, 1000, scale=(0.9, 1.0), flip=0.0)
    assert view == WHOLE


def jittered(pixels: np.ndarray, brightness: float, contrast: float, saturation: float) -> Any:
    """`[3, height, width]`, by the formulas of torchvision's ColorJitter for tensors."""

    def grey(rgb: np.ndarray) -> np.ndarray:
        return np.floor(np.tensordot([0.2989, 0.587, 0.114], rgb, 1))

    def blend(factor: float, one: np.ndarray, other: Any) -> np.ndarray:
        return np.floor((factor * one + (1 - factor) * other).clip(0, 255))

    pixels = blend(brightness, pixels.astype(float), 0.0)
    pixels = blend(contrast, pixels, grey(pixels).mean())
    return blend(saturation, pixels, grey(pixels))


@pytest.mark.parametrize(
    "factors",
    [(1.4, 1.0, 1.0), (1.0, 0.6, 1.0), (1.0, 1.0, 1.4), (0.6, 1.4, 0.6), (1.3, 0.7, 1.2)],
)
def test_colours_change_as_torchvision_changes_them(factors: tuple[float, float, float]) -> None:
    box = (0.1, 0.2, 0.8, 0.9)
    plain = apply_view(picture(), View(box), 20)
    pixels = apply_view(picture(), View(box, jitter=factors), 20)
    assert pixels.shape == plain.shape and pixels.dtype == np.uint8
    assert np.abs(pixels - jittered(plain, *factors)).max() <= 2
    assert np.abs(pixels - plain.astype(float)).mean() > 5
    mirrored = apply_view(picture(), View(box, True, factors), 20)
    assert (mirrored == pixels[:, :, ::-1]).all()


def test_factors_of_one_leave_the_colours() -> None:
    plain, same = (
        apply_view(picture(), View(WHOLE.box, jitter=jitter), 16) for jitter in (None, (1, 1, 1))
    )
    assert (plain == same).all()


def test_views_of_extreme_pictures_can_be_applied() -> None:
    rng = np.random.default_rng(0)
    for size in ((1, 1), (2, 500), (500, 2)):
        for _ in range(20):
            view = sample_view(rng, *size, scale=(0.01, 1.0), flip=0.5)
            for one in (view, replace(view, jitter=(0.6, 1.4, 1.4))):
                assert apply_view(Image.new("RGB", size), one, 8).shape == (3, 8, 8)
