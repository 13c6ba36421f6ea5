"""Draws scenes with Pillow, and encodes them in the many formats that a crawl meets."""

from __future__ import annotations

import io
import math
import random
from functools import cache

import numpy as np
from PIL import Image, ImageDraw, ImageFilter

from .scenes import BACKGROUNDS, COLOURS, Scene, Thing

FORMATS = ("jpeg", "grey", "cmyk", "exif", "png", "palette", "alpha")
"""jpeg: RGB JPEG; grey: one-channel JPEG; cmyk: CMYK JPEG; exif: rotated JPEG with an EXIF
orientation; png: RGB PNG; palette: PNG of 64 colours; alpha: PNG with transparent corners."""

_SCALE = 2  # drawn this many times larger, then reduced: smooth edges
_OUTLINE = 0.12  # width of a thing's outline as a share of its diameter
_INK = (10, 10, 10)
_TILE = 640  # side of the background tiles that pictures are cut from, in drawn pixels


def paint(scene: Scene, rng: random.Random) -> Image.Image:
    """Return the scene as an upright RGB image of its size; `rng` varies light and background."""
    width, height = scene.width * _SCALE, scene.height * _SCALE
    left, top = rng.randint(0, _TILE - width), rng.randint(0, _TILE - height)
    image = _tile(scene.background).crop((left, top, left + width, top + height))
    for thing in scene.things:
        _paint_thing(image, thing)
    return _light(image.reduce(_SCALE), rng)


def encode(image: Image.Image, form: str, rng: random.Random) -> bytes:
    """Return an RGB image as a file of format `form` (one of FORMATS).

    The file shows the image upright once its EXIF orientation is applied. Raises ValueError for
    an unknown format.
    """
    out = io.BytesIO()
    quality = rng.randint(82, 94)
    if form == "jpeg":
        image.save(out, "JPEG", quality=quality)
    elif form == "grey":
        image.convert("L").save(out, "JPEG", quality=quality)
    elif form == "cmyk":
        image.convert("CMYK").save(out, "JPEG", quality=quality)
    elif form == "exif":
        # Each orientation with the rotation that a viewer will undo.
        orientation, turn = rng.choice(
            (
                (3, Image.Transpose.ROTATE_180),
                (6, Image.Transpose.ROTATE_90),
                (8, Image.Transpose.ROTATE_270),
            )
        )
        exif = Image.Exif()
        exif[0x0112] = orientation
        image.transpose(turn).save(out, "JPEG", quality=quality, exif=exif)
    elif form == "png":
        image.save(out, "PNG", compress_level=3)
    elif form == "palette":
        image.quantize(64, method=Image.Quantize.FASTOCTREE).save(out, "PNG", compress_level=3)
    elif form == "alpha":
        mask = Image.new("L", image.size, 0)
        radius = min(image.size) // 10
        corners = (0, 0, image.width - 1, image.height - 1)
        ImageDraw.Draw(mask).rounded_rectangle(corners, radius, fill=255)
        image = image.copy()
        image.putalpha(mask)
        image.save(out, "PNG", compress_level=3)
    else:
        raise ValueError(f"unknown format {form!r}: one of {', '.join(FORMATS)}")
    return out.getvalue()


def suffix(form: str) -> str:
    """Return the file name's ending for a format, with its dot."""
    return ".png" if form in ("png", "palette", "alpha") else ".jpg"


def _shade(rgb: tuple[int, int, int], factor: float) -> tuple[int, int, int]:
    r, g, b = (min(255, round(channel * factor)) for channel in rgb)
    return r, g, b


def _paint_thing(image: Image.Image, thing: Thing) -> None:
    left, top, right, bottom = (int(edge * _SCALE) for edge in thing.box())
    left, top, right, bottom = left - 2, top - 2, right + 3, bottom + 3
    size = (right - left, bottom - top)
    around = [(x * _SCALE, y * _SCALE) for x, y in thing.outline()]
    outline = [(x - left, y - top) for x, y in around]
    colour = COLOURS[thing.kind.colour]
    ink = _shade(colour, 0.45)
    layer = Image.new("RGB", size, colour)
    pen = ImageDraw.Draw(layer)
    # A few broad marks: they must survive a reduction to 48 pixels.
    step = thing.diameter * _SCALE / 4
    if thing.kind.texture == "striped":
        for i in range(-6, 12):
            start = i * step
            pen.line((start, size[1], start + size[1], 0), ink, round(step * 0.33))
    elif thing.kind.texture == "dotted":
        radius = step * 0.27
        for i in range(-1, 7):
            for j in range(-1, 7):
                x = size[0] / 2 + (i - 3 + 0.5 * (j % 2)) * step
                y = size[1] / 2 + (j - 3) * step * 0.9
                pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=ink)
    mask = Image.new("L", size, 0)
    ImageDraw.Draw(mask).polygon(outline, fill=255)
    image.paste(layer, (left, top), mask)
    # The same ink for all: a shape is recognizable whatever its colour and background.
    width = round(thing.diameter * _SCALE * _OUTLINE)
    ImageDraw.Draw(image).line([*around, *around[:2]], _INK, width, joint="curve")


def _light(image: Image.Image, rng: random.Random) -> Image.Image:
    """Brighten one side and darken the other a little, like light from one side."""
    angle, strength, level = (
        rng.uniform(0, 2 * math.pi),
        rng.uniform(0, 0.12),
        rng.uniform(0.93, 1.0),
    )
    pixels = np.asarray(image, dtype=np.float32)
    rows = np.linspace(-1, 1, image.height, dtype=np.float32)[:, None] * math.sin(angle)
    columns = np.linspace(-1, 1, image.width, dtype=np.float32)[None, :] * math.cos(angle)
    lit = pixels * (level + strength * 0.7 * (rows + columns))[:, :, None]
    return Image.fromarray(np.clip(lit, 0, 255).astype(np.uint8))


@cache
def _tile(background: str) -> Image.Image:
    """Return a large square of a background, identical in every process."""
    rng = random.Random(f"background/{background}")
    base = BACKGROUNDS[background]
    image = Image.new("RGB", (_TILE, _TILE), base)
    pen = ImageDraw.Draw(image)

    def spot() -> tuple[int, int]:
        return rng.randint(-20, _TILE), rng.randint(-20, _TILE)

    if background == "sand":
        for _ in range(9000):
            x, y = spot()
            pen.rectangle((x, y, x + 1, y + 1), fill=_shade(base, rng.choice((0.8, 0.88, 1.1))))
    elif background == "grass":
        for _ in range(7000):
            x, y = spot()
            tip = (x + rng.randint(-4, 4), y - rng.randint(8, 16))
            pen.line((x, y, *tip), _shade(base, rng.choice((0.72, 0.85, 1.15))), 2)
    elif background == "night sky":
        for _ in range(420):
            x, y = spot()
            r = rng.choice((1, 1, 2))
            pen.ellipse(
                (x - r, y - r, x + r, y + r), fill=_shade((235, 235, 205), rng.uniform(0.5, 1))
            )
    elif background == "snow":
        for _ in range(260):
            x, y = spot()
            w, h = rng.randint(40, 90), rng.randint(14, 30)
            pen.ellipse((x, y, x + w, y + h), fill=_shade(base, rng.choice((0.94, 0.97, 1.04))))
        image = image.filter(ImageFilter.GaussianBlur(3))
    elif background == "brick wall":
        pen.rectangle((0, 0, _TILE, _TILE), fill=(176, 160, 146))
        for row in range(_TILE // 20 + 1):
            for column in range(-1, _TILE // 44 + 1):
                x, y = column * 44 + 22 * (row % 2), row * 20
                pen.rectangle((x, y, x + 40, y + 16), fill=_shade(base, rng.uniform(0.88, 1.08)))
    elif background == "water":
        for row in range(0, _TILE, 12):
            phase, height = rng.uniform(0, 6.3), rng.uniform(2, 4)
            wave = [(x, row + height * math.sin(x / 11 + phase)) for x in range(0, _TILE + 4, 4)]
            pen.line(wave, _shade(base, rng.choice((0.86, 0.92, 1.12))), 4)
    else:
        raise ValueError(f"unknown background {background!r}")
    return image
