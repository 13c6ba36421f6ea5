"""Measures how well signatures tell pictures apart: missed copies, and confused scenes.

    python -m benchmarks.same_picture

Scenes are drawn (`pipelines.sample_world`) and cleaned as in ingestion. Copies of the first
`--copied` are compared with their scene: the largest distance, and how many are missed by the
limits of duplicates (which also need a cell in common) and by those of leaks. All `--scenes` are
compared with each other: how many pairs each of the limits takes for the same. The same for
`--charts`, drawings on a plain background.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Iterator, Sequence

import numpy as np
from PIL import Image, ImageDraw

from pipelines import duplicates, leaks, picture_cells
from pipelines.images import CleanImage, clean_image
from pipelines.sample_world import picture
from pipelines.signatures import Signature, packed, same_picture, signature

LIMITS = {
    "duplicates": (duplicates.MOST_BITS, duplicates.MOST_SHARE, duplicates.MOST_COLOUR),
    "leaks": (leaks.MOST_BITS, leaks.MOST_SHARE, leaks.MOST_COLOUR),
}


def encoded(image: Image.Image, form: str = "JPEG", quality: int = 90) -> bytes:
    out = io.BytesIO()
    image.save(out, form, quality=quality)
    return out.getvalue()


def copies(data: bytes) -> Iterator[tuple[str, bytes]]:
    image = Image.open(io.BytesIO(data)).convert("RGB")

    def scaled(by: float) -> Image.Image:
        size = (round(image.width * by), round(image.height * by))
        return image.resize(size, Image.Resampling.BICUBIC)

    yield "quality 50", encoded(image, quality=50)
    yield "WEBP", encoded(image, "WEBP", 80)
    yield "x 0.9, quality 75", encoded(scaled(0.9), quality=75)
    yield "x 1.5", encoded(scaled(1.5))
    yield "x 0.5", encoded(scaled(0.5))
    yield "quality 20", encoded(image, quality=20)


def cleaned(data: bytes) -> bytes:
    image = clean_image(data)
    if not isinstance(image, CleanImage):
        raise ValueError(f"the world drew a picture that is refused: {image.reason}")
    return image.data


def chart(rng: random.Random) -> bytes:
    """Lines on a white background: many pictures of the web are nearly empty like it."""
    image = Image.new("RGB", (640, 480), "white")
    pen = ImageDraw.Draw(image)
    pen.line([(60, 20), (60, 440), (620, 440)], fill="black", width=2)
    for _ in range(rng.randint(1, 3)):
        height, points = rng.randint(100, 400), list[tuple[int, int]]()
        for x in range(60, 620, 20):
            height = min(430, max(30, height + rng.randint(-40, 40)))
            points.append((x, height))
        pen.line(points, fill=rng.choice(["red", "blue", "green", "black", "orange"]), width=3)
    return encoded(image, quality=92)


def apart(a: Signature, b: Signature) -> tuple[int, float, int]:
    """Distance in bits, as their share of the bits set in either, and in levels of colour."""
    first, second = (int.from_bytes(s.bits) for s in (a, b))
    bits = (first ^ second).bit_count()
    one, other = (np.frombuffer(s.colours, np.uint8).astype(int) for s in (a, b))
    share = bits / max(1, (first | second).bit_count())
    return bits, share, int(np.abs(one - other).max())


def cells(signed: Signature) -> np.ndarray:
    return picture_cells.keys(np.frombuffer(signed.colours, np.uint8)[None])[0]


def report_copies(scenes: Sequence[bytes]) -> None:
    found: dict[str, list[tuple[int, float, int, bool]]] = {}
    for data in scenes:
        own = signature(data)
        for kind, copy in copies(data):
            other = signature(cleaned(copy))
            shared = bool((cells(own) == cells(other)).any())
            found.setdefault(kind, []).append((*apart(own, other), shared))
    print(f"{'copies':20}{'most bits':>12}{'most colour':>12}{'missed by duplicates, leaks':>30}")
    for kind, distances in found.items():
        missed = [
            sum(b > bits or s > share or c > colour or (name == "duplicates" and not shared)
                for b, s, c, shared in distances)
            for name, (bits, share, colour) in LIMITS.items()
        ]  # fmt: skip
        most = (max(d[0] for d in distances), max(d[2] for d in distances))
        said = ", ".join(f"{n:,}" for n in missed) + f" of {len(distances):,}"
        print(f"{kind:20}{most[0]:12}{most[1]:12}{said:>30}")


def report_pairs(what: str, signed: Sequence[Signature]) -> None:
    bits, colours = packed([s.bits for s in signed], [s.colours for s in signed])
    for name, (most_bits, most_share, most_colour) in LIMITS.items():
        same = sum(
            len(same_picture(own, bits[:, :i], colours[:i], most_bits=most_bits,
                             most_share=most_share, most_colour=most_colour)[0])
            for i, own in enumerate(signed) if i
        )  # fmt: skip
        pairs = len(signed) * (len(signed) - 1) // 2
        print(f"different {what} taken for the same by {name}: {same:,} of {pairs:,} pairs")


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.same_picture",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--copied", type=int, default=420)
    parser.add_argument("--scenes", type=int, default=2_600)
    parser.add_argument("--charts", type=int, default=200)
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args()
    count = max(options.copied, options.scenes)
    scenes = [cleaned(picture(options.seed, f"cc3m/{i}").file()) for i in range(count)]
    report_copies(scenes[: options.copied])
    report_pairs("scenes", [signature(data) for data in scenes[: options.scenes]])
    drawn = [cleaned(chart(random.Random(i))) for i in range(options.charts)]
    report_copies(drawn)
    report_pairs("charts", [signature(data) for data in drawn])


if __name__ == "__main__":
    main()
