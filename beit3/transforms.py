"""Pictures to model inputs: decoding, and views (crop, flip, colours) that replay exactly."""

from __future__ import annotations

import io
import math
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageEnhance, ImageOps, UnidentifiedImageError


@dataclass(frozen=True)
class View:
    """A crop of a picture, whether it is mirrored, and how its colours are changed.

    box: left, top, right, bottom as shares of the picture's width and height (0..1), so that a view
    drawn for one copy of a picture fits a resized one too.
    jitter: factors of brightness, contrast and saturation; None leaves the colours.
    """

    box: tuple[float, float, float, float]
    flip: bool = False
    jitter: tuple[float, float, float] | None = None


WHOLE = View((0.0, 0.0, 1.0, 1.0))
_ENHANCERS = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)


def decode(data: bytes) -> Image.Image:
    """Encoded bytes to an upright RGB picture.

    Raises:
        OSError: the bytes are not a picture, or a broken one.
    """
    try:
        with Image.open(io.BytesIO(data)) as picture:
            ImageOps.exif_transpose(picture, in_place=True)  # loads it
            return picture if picture.mode == "RGB" else picture.convert("RGB")
    except UnidentifiedImageError:  # its message has the bytes' memory address
        raise UnidentifiedImageError("cannot identify image file") from None
    except OSError:
        raise
    except Exception as error:  # Pillow's decoders raise nearly anything on a broken file
        raise OSError(f"{type(error).__name__}: {error}") from error


def sample_view(
    rng: np.random.Generator,
    width: int,
    height: int,
    *,
    scale: tuple[float, float],
    aspect: tuple[float, float] = (3 / 4, 4 / 3),
    flip: float,
) -> View:
    """A random resized crop, as BEiT draws it.

    Args:
        scale: Smallest and largest share of the picture's area.
        aspect: Smallest and largest ratio of the crop's width to its height.
        flip: Probability of mirroring.
    """
    flipped = bool(rng.random() < flip)
    for _ in range(10):
        area = width * height * rng.uniform(*scale)
        ratio = math.exp(rng.uniform(math.log(aspect[0]), math.log(aspect[1])))
        w, h = math.sqrt(area * ratio), math.sqrt(area / ratio)
        if w <= width and h <= height:
            left, top = rng.uniform(0, width - w), rng.uniform(0, height - h)
            box = (left / width, top / height, (left + w) / width, (top + h) / height)
            return View(tuple(round(v, 6) for v in box), flipped)  # type: ignore[arg-type]
    return View(WHOLE.box, flipped)


def centre_view(width: int, height: int) -> View:
    """The largest square in a picture's middle."""
    across, down = (1 - min(width, height) / side for side in (width, height))
    return View((across / 2, down / 2, 1 - across / 2, 1 - down / 2))


def apply_view(
    picture: Image.Image, view: View, size: int, out: np.ndarray | None = None
) -> np.ndarray:
    """Crop, resize to a square (bicubic), perhaps change colours, mirror: uint8 `[3, size, size]`.

    Colours change as in torchvision's ColorJitter, with two differences. ColorJitter changes
    brightness, contrast and saturation in random order; here the order is fixed. ColorJitter
    changes the picture before cropping; here the crop is changed, which has fewer pixels, and
    contrast is relative to the crop's own mean.

    Args:
        out: Array to write to, such as a picture's place in a batch.
    """
    width, height = picture.size
    left, top, right, bottom = view.box
    box = (left * width, top * height, right * width, bottom * height)
    resized = picture.resize((size, size), Image.Resampling.BICUBIC, box=box)
    if view.jitter is not None:
        for enhancer, factor in zip(_ENHANCERS, view.jitter, strict=True):
            resized = enhancer(resized).enhance(factor)
    pixels = np.asarray(resized)
    if view.flip:
        pixels = pixels[:, ::-1]
    out = np.empty((3, size, size), np.uint8) if out is None else out
    out[...] = pixels.transpose(2, 0, 1)
    return out
