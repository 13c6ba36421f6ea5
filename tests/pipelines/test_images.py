"""What becomes of an image's size and encoding, by policy."""

from __future__ import annotations

import io

import numpy as np
import pytest
from PIL import Image

from pipelines.images import FILTERS, RESIZE_MODES, CleanImage, ImagePolicy, clean_image
from pipelines.ingest_config import IngestConfig


def photo(width: int, height: int) -> Image.Image:
    """A smooth picture, bright on the right and green below."""
    across, down = np.meshgrid(np.linspace(0, 255, width), np.linspace(0, 255, height))
    return Image.fromarray(np.stack([across, down, 255 - across], -1).astype(np.uint8))


def jpeg(image: Image.Image, **options: int) -> bytes:
    out = io.BytesIO()
    image.save(out, "JPEG", **options)
    return out.getvalue()


def cleaned(data: bytes, **policy: object) -> Image.Image:
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
    data = jpeg(photo(600, 400), exif=exif)  # type: ignore[arg-type]
    image = cleaned(data, short_side=100, resize_mode=mode)
    assert image.size == (size[::-1] if turned else size)


def test_the_modes_are_all_tested() -> None:
    assert set(RESIZE_MODES) == {"keep_ratio", "keep_ratio_largest", "center_crop", "border", "no"}


def test_a_crop_keeps_the_middle_and_a_border_is_white() -> None:
    data = jpeg(photo(600, 400), quality=95)
    middle = pixels(photo(600, 400).crop((100, 0, 500, 400)).resize((100, 100)))
    cropped = cleaned(data, short_side=100, resize_mode="center_crop")
    assert np.abs(pixels(cropped) - middle).mean() < 3
    framed = pixels(cleaned(data, short_side=100, resize_mode="border"))
    assert framed[:12].min() > 245 and framed[-12:].min() > 245
    whole = pixels(photo(600, 400).resize((100, 67)))
    assert np.abs(framed[17:83][2:-2] - whole[2:-3]).mean() < 4


@pytest.mark.parametrize(("mode", "size"), [("center_crop", (40, 40)), ("border", (60, 60))])
def test_small_images_become_square_but_not_larger(mode: str, size: tuple[int, int]) -> None:
    assert cleaned(jpeg(photo(60, 40)), short_side=100, resize_mode=mode).size == size


@pytest.mark.parametrize("mode", ["keep_ratio", "keep_ratio_largest", "no"])
def test_what_fits_keeps_its_bytes_unless_told(mode: str) -> None:
    data = jpeg(photo(60, 40), quality=100)
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
    image = pixels(cleaned(data, short_side=100, downscale=downscale))
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
