"""Augmentations of classification, on uint8 pixels: RandAugment, random erasing, mixup and CutMix.

They are timm's, named as in microsoft/unilm's recipe for ImageNet: `rand-m9-mstd0.5-inc1`,
`reprob`, `mixup` and `cutmix`. Here every draw comes from a generator that the caller gives.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
from PIL import Image, ImageEnhance, ImageOps

MEAN = (0.485, 0.456, 0.406)
DEVIATION = (0.229, 0.224, 0.225)
"""Statistics of ImageNet's pixels, 0..1."""

_FILL = tuple(round(255 * value) for value in MEAN)
_OPERATIONS = 2  # of RandAugment per image
_CHANCE = 0.5  # that each of them happens
_SPREAD = 0.5  # deviation of their magnitude
_BICUBIC = Image.Resampling.BICUBIC

Operation = Callable[[Image.Image, float, int], Image.Image]
"""Takes a picture, a strength 0..1, and a direction 1 or -1."""


def _solarize_add(picture: Image.Image, strength: float, _: int) -> Image.Image:
    more = int(110 * strength)
    table = [min(255, value + more) if value < 128 else value for value in range(256)]
    return picture.point(table * 3)


def _enhance(kind: Callable[[Image.Image], ImageEnhance._Enhance]) -> Operation:
    return lambda picture, strength, sign: kind(picture).enhance(1 + sign * 0.9 * strength)


def _affine(picture: Image.Image, *matrix: float) -> Image.Image:
    return picture.transform(
        picture.size, Image.Transform.AFFINE, matrix, _BICUBIC, fillcolor=_FILL
    )


OPERATIONS: dict[str, Operation] = {
    "auto contrast": lambda p, s, sign: ImageOps.autocontrast(p),
    "equalize": lambda p, s, sign: ImageOps.equalize(p),
    "invert": lambda p, s, sign: ImageOps.invert(p),
    "rotate": lambda p, s, sign: p.rotate(sign * 30 * s, _BICUBIC, fillcolor=_FILL),
    "posterize": lambda p, s, sign: ImageOps.posterize(p, 4 - int(4 * s)),
    "solarize": lambda p, s, sign: ImageOps.solarize(p, 256 - int(256 * s)),
    "solarize add": _solarize_add,
    "colour": _enhance(ImageEnhance.Color),
    "contrast": _enhance(ImageEnhance.Contrast),
    "brightness": _enhance(ImageEnhance.Brightness),
    "sharpness": _enhance(ImageEnhance.Sharpness),
    "shear x": lambda p, s, sign: _affine(p, 1, sign * 0.3 * s, 0, 0, 1, 0),
    "shear y": lambda p, s, sign: _affine(p, 1, 0, 0, sign * 0.3 * s, 1, 0),
    "translate x": lambda p, s, sign: _affine(p, 1, 0, sign * 0.45 * s * p.width, 0, 1, 0),
    "translate y": lambda p, s, sign: _affine(p, 1, 0, 0, 0, 1, sign * 0.45 * s * p.height),
}


def rand_augment(pixels: np.ndarray, rng: np.random.Generator, magnitude: float) -> np.ndarray:
    """Apply two random operations, each with chance one half (RandAugment, arXiv 1909.13719).

    Args:
        pixels: uint8 `[3, height, width]`.
        magnitude: 0..10; each operation's magnitude is drawn around it.
    """
    picture = Image.fromarray(np.ascontiguousarray(pixels.transpose(1, 2, 0)))
    for name in rng.choice(list(OPERATIONS), _OPERATIONS):
        if rng.random() < _CHANCE:
            strength = float(np.clip(rng.normal(magnitude, _SPREAD), 0, 10)) / 10
            picture = OPERATIONS[str(name)](picture, strength, 1 if rng.random() < 0.5 else -1)
    return np.ascontiguousarray(np.asarray(picture).transpose(2, 0, 1))


def erase(pixels: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Put noise in a rectangle of 2% to a third of the picture (random erasing, arXiv 1708.04896).

    The noise has the mean and deviation of ImageNet's pixels, clipped to bytes.
    """
    height, width = pixels.shape[1:]
    for _ in range(10):
        area = height * width * rng.uniform(0.02, 1 / 3)
        aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
        h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
        if h < height and w < width:
            top, left = rng.integers(height - h + 1), rng.integers(width - w + 1)
            shape = (3, 1, 1)
            noise = np.reshape(MEAN, shape) + np.reshape(DEVIATION, shape) * rng.normal(
                size=(3, h, w)
            )
            pixels = pixels.copy()
            pixels[:, top : top + h, left : left + w] = np.clip(255 * noise, 0, 255)
            break
    return pixels


def mix(
    images: np.ndarray,
    targets: np.ndarray,
    rng: np.random.Generator,
    *,
    mixup: float,
    cutmix: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Mix the first image with the last, the second with the last but one, and so on, and their
    targets likewise: all pixels in one proportion (mixup, arXiv 1710.09412), or a rectangle of the
    other (CutMix, arXiv 1905.04899). If both are on, a coin toss decides for the batch.

    Args:
        images: uint8 `[images, 3, height, width]`.
        targets: `[images, classes]`.
        mixup: Parameter of the beta distribution of the proportion; 0 turns it off.
        cutmix: The same, for the rectangle's area.
    """
    cuts = cutmix > 0 and (mixup <= 0 or rng.random() < 0.5)
    if not cuts and mixup <= 0:
        return images, targets
    own = float(rng.beta(cutmix, cutmix) if cuts else rng.beta(mixup, mixup))
    if cuts:
        height, width = images.shape[2:]
        h, w = (int(side * math.sqrt(1 - own)) for side in (height, width))
        y, x = rng.integers(height), rng.integers(width)
        top, bottom = np.clip((y - h // 2, y + h // 2), 0, height)
        left, right = np.clip((x - w // 2, x + w // 2), 0, width)
        mixed = images.copy()
        mixed[:, :, top:bottom, left:right] = images[::-1, :, top:bottom, left:right]
        own = 1 - (bottom - top) * (right - left) / (height * width)
    else:
        sums = np.float32(own) * images + np.float32(1 - own) * images[::-1]
        mixed = np.rint(sums).astype(np.uint8)
    return mixed, (own * targets + (1 - own) * targets[::-1]).astype(targets.dtype)
