"""Scenes, the content of pictures: a background and one to three separate drawn things.

Pure Python, no drawing. A scene is sampled from a `random.Random`, so that it is a function of a
seed and a name (`derive`) and of nothing else.
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass, replace

SHAPES = ("circle", "square", "triangle", "star", "cross")
SIZES = ("small", "large")
TEXTURES = ("plain", "striped", "dotted")

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (215, 30, 40),
    "green": (25, 150, 55),
    "blue": (30, 70, 225),
    "yellow": (250, 220, 25),
    "purple": (135, 40, 175),
    "orange": (250, 130, 15),
    "white": (252, 252, 252),
}
BACKGROUNDS: dict[str, tuple[int, int, int]] = {
    "sand": (208, 188, 146),
    "grass": (118, 150, 84),
    "night sky": (26, 30, 58),
    "snow": (222, 230, 238),
    "brick wall": (146, 92, 78),
    "water": (112, 160, 184),
}

DIAMETERS = {"small": (0.28, 0.33), "large": (0.42, 0.5)}
"""Diameter of a thing as a share of the picture's short side, by size word."""

RELATIONS = ("left of", "right of", "above", "below")

_REACH = 0.57  # outlines, turned by at most _TILT degrees, stay within this many diameters
_TILT = 10.0
_GAP = 0.03  # between things and at the border, in short sides; half an outline's ink fits in
_CLEAR = 1.7  # a relation is stated when one axis dominates the other by this factor


@dataclass(frozen=True)
class Kind:
    """The look of a thing: one word of SHAPES, COLOURS, SIZES and TEXTURES each."""

    shape: str
    colour: str
    size: str = "large"
    texture: str = "plain"


@dataclass(frozen=True)
class Thing:
    """A drawn thing: centre and diameter in pixels, angle in degrees clockwise."""

    kind: Kind
    x: float
    y: float
    diameter: float
    angle: float = 0.0

    def outline(self) -> list[tuple[float, float]]:
        """Return the polygon of the thing, as (x, y) in pixels, without the closing point."""
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        d = self.diameter
        return [
            (self.x + d * (u * cos - v * sin), self.y + d * (u * sin + v * cos))
            for u, v in _UNIT_OUTLINES[self.kind.shape]
        ]

    def box(self) -> tuple[float, float, float, float]:
        """Return left, top, right and bottom in pixels."""
        xs, ys = zip(*self.outline(), strict=True)
        return min(xs), min(ys), max(xs), max(ys)

    def area(self) -> float:
        """Return the area inside the outline, in square pixels."""
        points = self.outline()
        following = points[1:] + points[:1]
        return abs(
            sum(a[0] * b[1] - b[0] * a[1] for a, b in zip(points, following, strict=True)) / 2
        )


@dataclass(frozen=True)
class Scene:
    """A picture's content: its size in pixels, its background and its things.

    Things of different kinds differ in both shape and colour, so that "the circle" and "the red
    one" name one kind. In a `grey` scene colours are drawn as shades, and language leaves them out.
    """

    width: int
    height: int
    background: str
    things: tuple[Thing, ...]
    grey: bool = False

    def groups(self) -> list[tuple[Kind, int]]:
        """Return each kind with its number of copies, in order of first appearance."""
        counts: dict[Kind, int] = {}
        for thing in self.things:
            counts[thing.kind] = counts.get(thing.kind, 0) + 1
        return list(counts.items())

    def has_copies(self) -> bool:
        """Return whether some kind occurs more than once."""
        return len(self.groups()) < len(self.things)

    def count(self, shape: str | None = None, colour: str | None = None) -> int:
        """Return the number of things of this shape and colour (None: any)."""
        return sum(
            shape in (None, thing.kind.shape) and colour in (None, thing.kind.colour)
            for thing in self.things
        )


def derive(seed: int, name: str) -> random.Random:
    """Return the random generator of `name` under `seed`; equal arguments give equal draws."""
    return random.Random(f"{seed}/{name}")


def sides(a: Thing, b: Thing) -> set[str]:
    """Return the sides (of RELATIONS) of b's box on which a's box lies entirely."""
    left, top, right, bottom = a.box()
    other_left, other_top, other_right, other_bottom = b.box()
    tests = (right < other_left, left > other_right, bottom < other_top, top > other_bottom)
    return {relation for relation, holds in zip(RELATIONS, tests, strict=True) if holds}


def relation(a: Thing, b: Thing) -> str | None:
    """Return a's relation to b (one of RELATIONS), or None if none is clear."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) >= _CLEAR * abs(dy):
        word = "left of" if dx < 0 else "right of"
    elif abs(dy) >= _CLEAR * abs(dx):
        word = "above" if dy < 0 else "below"
    else:
        return None
    return word if word in sides(a, b) else None


def allowed_colours(background: str, *, grey: bool = False) -> list[str]:
    """Return the colours that stand out clearly from `background`; by shade alone if `grey`."""
    base = BACKGROUNDS[background]
    if grey:
        return [c for c, rgb in COLOURS.items() if abs(_luma(rgb) - _luma(base)) >= 36]
    return [c for c, rgb in COLOURS.items() if math.dist(rgb, base) >= 95]


def sample_scene(rng: random.Random, *, grey: bool = False, kind: Kind | None = None) -> Scene:
    """Sample a scene: about a quarter hold copies of a kind, the others one to three kinds.

    With `kind`, the scene is a single thing of that shape and colour (a labelled example); its
    size, texture and background still vary.
    """
    width, height = _sample_size(rng)
    if kind is not None:
        options = [b for b in BACKGROUNDS if kind.colour in allowed_colours(b, grey=grey)]
        background = rng.choice(options)
        kinds = [replace(kind, size=rng.choice(SIZES), texture=_sample_texture(rng))]
    else:
        background = rng.choice(list(BACKGROUNDS))
        kinds = _sample_kinds(rng, allowed_colours(background, grey=grey))
    things = _place(rng, kinds, width, height)
    return Scene(width, height, background, things, grey)


def synset(kind: Kind) -> str:
    """Return the WordNet-like id of a kind's class, which is its shape and colour."""
    index = _CLASSES.index((kind.colour, kind.shape))
    return f"n{index + 1:08d}"


def synset_kind(wnid: str) -> Kind:
    """Return a kind of the class `wnid`; raises ValueError for an unknown id."""
    index = int(wnid[1:]) - 1 if wnid[:1] == "n" and wnid[1:].isdigit() else -1
    if not 0 <= index < len(_CLASSES):
        raise ValueError(f"no class {wnid!r}: ids run from n00000001 to n{len(_CLASSES):08d}")
    colour, shape = _CLASSES[index]
    return Kind(shape, colour)


def _luma(rgb: tuple[int, int, int]) -> float:
    return 0.299 * rgb[0] + 0.587 * rgb[1] + 0.114 * rgb[2]


def _sample_size(rng: random.Random) -> tuple[int, int]:
    if rng.random() < 0.04:  # the few very wide or tall images of any crawl
        short, ratio = rng.randint(64, 96), rng.uniform(1.8, 2.4)
    else:
        short, ratio = rng.randint(64, 160), math.exp(rng.uniform(0.0, math.log(4 / 3)))
    long = round(short * ratio)
    return (long, short) if rng.random() < 0.6 else (short, long)


def _sample_texture(rng: random.Random) -> str:
    return rng.choices(TEXTURES, (2, 1, 1))[0]


def _sample_kinds(rng: random.Random, colours: list[str]) -> list[Kind]:
    """Return one kind per thing: copies of one (and perhaps another thing), or all different."""
    if rng.random() < 0.25:
        counts = rng.choice(((2,), (3,), (2, 1)))
    else:
        counts = (1,) * rng.choices((1, 2, 3), (9, 9, 2))[0]
    shapes = rng.sample(SHAPES, len(counts))
    chosen = rng.sample(colours, len(counts))
    large = 0.6 if sum(counts) < 3 else 0.4
    kinds: list[Kind] = []
    for shape, colour, copies in zip(shapes, chosen, counts, strict=True):
        size = "large" if rng.random() < large else "small"
        kinds += [Kind(shape, colour, size, _sample_texture(rng))] * copies
    return kinds


def _place(rng: random.Random, kinds: list[Kind], width: int, height: int) -> tuple[Thing, ...]:
    """Place the kinds apart; if they do not fit, all become small, which always fits."""
    for attempt in range(90):
        if attempt == 60:
            kinds = [replace(kind, size="small") for kind in kinds]
        things = [_drop(rng, kind, width, height) for kind in kinds]
        pairs = [(a, b) for i, a in enumerate(things) for b in things[:i]]
        if not all(_apart(a, b, min(width, height)) for a, b in pairs):
            continue
        # Scenes with a clear relation teach more, so the first attempts insist on one.
        if not pairs or attempt >= 25 or any(relation(a, b) for a, b in pairs):
            return tuple(things)
    return tuple(_line_up(rng, kinds, width, height))


def _drop(rng: random.Random, kind: Kind, width: int, height: int) -> Thing:
    short = min(width, height)
    diameter = short * rng.uniform(*DIAMETERS[kind.size])
    border = _REACH * diameter + _GAP * short
    x, y = rng.uniform(border, width - border), rng.uniform(border, height - border)
    angle = 0.0 if kind.shape == "circle" else rng.uniform(-_TILT, _TILT)
    return Thing(kind, x, y, diameter, angle)


def _apart(a: Thing, b: Thing, short: int) -> bool:
    needed = _REACH * (a.diameter + b.diameter) + _GAP * short
    return max(abs(a.x - b.x), abs(a.y - b.y)) >= needed


def _line_up(rng: random.Random, kinds: list[Kind], width: int, height: int) -> list[Thing]:
    things = []
    for i, kind in enumerate(kinds):
        along = (i + 0.5) / len(kinds)
        across = rng.uniform(0.3, 0.7)
        x, y = (along, across) if width >= height else (across, along)
        diameter = min(width, height) * DIAMETERS["small"][0]
        things.append(Thing(kind, x * width, y * height, diameter))
    return things


def _ring(radii: tuple[float, ...], points: int) -> list[tuple[float, float]]:
    steps = [(radii[i % len(radii)], 2 * math.pi * i / points) for i in range(points)]
    return [(r * math.sin(a), -r * math.cos(a)) for r, a in steps]


_UNIT_OUTLINES: dict[str, list[tuple[float, float]]] = {
    "circle": _ring((0.48,), 36),
    "square": [(-0.42, -0.42), (0.42, -0.42), (0.42, 0.42), (-0.42, 0.42)],
    "triangle": [(0.0, -0.48), (0.5, 0.4), (-0.5, 0.4)],
    "star": _ring((0.55, 0.23), 10),
    "cross": [
        (u * sign_u, v * sign_v)
        for sign_u, sign_v, corners in (
            (-1, -1, ((0.48, 0.16), (0.16, 0.16), (0.16, 0.48))),
            (1, -1, ((0.16, 0.48), (0.16, 0.16), (0.48, 0.16))),
            (1, 1, ((0.48, 0.16), (0.16, 0.16), (0.16, 0.48))),
            (-1, 1, ((0.16, 0.48), (0.16, 0.16), (0.48, 0.16))),
        )
        for u, v in corners
    ],
}
# The numbers of shapes and colours are coprime, so this walk visits every combination once, and
# its first few classes already differ in both.
_CLASSES = [
    (list(COLOURS)[i % len(COLOURS)], SHAPES[i % len(SHAPES)])
    for i in range(len(COLOURS) * len(SHAPES))
]
