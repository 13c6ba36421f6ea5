"""Turns an image from the web into bytes worth storing: checked, upright, RGB, small enough.

The format and the number of pixels are read from the header before anything is decoded, so that a
small file can't unpack into gigabytes. Only JPEG, PNG, WEBP, GIF (first frame) and BMP are opened,
identified by magic number, whatever the server called them, and only the parts of the file that
hold the picture (`pipelines.bare_images`) are read: stored images have no metadata.
"""

from __future__ import annotations

import hashlib
import io
import warnings
from dataclasses import dataclass

from PIL import Image, ImageOps, UnidentifiedImageError

from pipelines.bare_images import BadFile, Bare, strip

REVISION = 2
"""Raised whenever the same bytes and policy would yield different stored bytes than before."""
RESIZE_MODES = ("keep_ratio", "keep_ratio_largest", "center_crop", "border", "no")
FILTERS = {
    "hamming": Image.Resampling.HAMMING,
    "area": Image.Resampling.BOX,
    "bicubic": Image.Resampling.BICUBIC,
    "lanczos": Image.Resampling.LANCZOS,
}
_TURNS = {  # by EXIF orientation
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_MAX_JPEG_SIDE = 65_500
_STRIP_PIXELS = 1 << 22
_MAGIC = (
    (b"\xff\xd8\xff", "JPEG"),
    (b"\x89PNG\r\n\x1a\n", "PNG"),
    (b"GIF87a", "GIF"),
    (b"GIF89a", "GIF"),
    (b"BM", "BMP"),
)
_KNOWN_BUT_REFUSED = (
    (b"II*\x00", "TIFF"),
    (b"MM\x00*", "TIFF"),
    (b"%PDF", "PDF"),
    (b"\x00\x00\x01\x00", "ICO"),
    (b"8BPS", "PSD"),
    (b"\x00\x00\x00\x0cjP  ", "JPEG 2000"),
)


@dataclass(frozen=True)
class ImagePolicy:
    """Which images are kept, and at what size."""

    short_side: int = 288
    """The size in pixels that `resize_mode` shrinks images to; none is enlarged."""
    min_side: int = 32
    """Images whose shorter side, as published, has fewer pixels are set aside."""
    max_aspect: float = 10.0
    """Images whose longer side is more than this many times the shorter one are set aside."""
    max_pixels: int = 100_000_000
    """Images with more pixels, by their header, are never decoded."""
    resize_mode: str = "keep_ratio"
    """Which side gets the size: the shorter (keep_ratio), the longer (keep_ratio_largest), both
    (center_crop; border, which adds white), or neither (no). The names are img2dataset's."""
    downscale: str = "hamming"
    """The filter that shrinks, a key of FILTERS. By CPU time: area, hamming, bicubic, lanczos."""
    encode_quality: int = 92
    """JPEG quality of images that are re-encoded."""
    reencode: bool = False
    """Re-encode even JPEGs that need no change."""


@dataclass(frozen=True)
class CleanImage:
    """An upright RGB image of `width` x `height` pixels; `sha256` is that of `data`."""

    data: bytes
    width: int
    height: int
    sha256: str


@dataclass(frozen=True)
class Rejected:
    """Why an image isn't kept: one of a few stable reasons, and any known detail."""

    reason: str
    detail: str = ""
    stage: str = "decode"


def clean_image(data: bytes, policy: ImagePolicy | None = None) -> CleanImage | Rejected:
    """Check an image, turn it upright, make it RGB and small; deterministic, never raises.

    A JPEG that needs no change keeps its bytes except metadata; all others are encoded as JPEG.
    """
    policy = policy or ImagePolicy()
    if not data:
        return Rejected("empty body")
    kind = _sniff(data)
    if isinstance(kind, Rejected):
        return kind
    try:
        bare = strip(data, kind)
        refused = _refuse_size((bare.width, bare.height), policy)
        if refused:
            return refused
        with warnings.catch_warnings():
            # Pillow warns above its own limit; ours decides.
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)
            image = Image.open(io.BytesIO(bare.data), formats=(kind,))
        with image:
            return _refuse_size(image.size, policy) or _convert(image, bare, policy)
    except BadFile as error:
        return Rejected(error.reason, error.detail)
    except Image.DecompressionBombError as error:
        return Rejected("too many pixels", str(error))
    except Exception as error:  # Pillow's decoders raise nearly anything
        return Rejected(_decode_reason(error), _say(error))


def _refuse_size(size: tuple[int, int], policy: ImagePolicy) -> Rejected | None:
    width, height = size
    if width * height > policy.max_pixels:
        return Rejected("too many pixels", f"{width}x{height}")
    if min(width, height) < max(policy.min_side, 1):
        return Rejected("too small", f"{width}x{height}", stage="filter")
    if max(width, height) > policy.max_aspect * min(width, height):
        return Rejected("aspect ratio", f"{width}x{height}", stage="filter")
    return None


def _sniff(data: bytes) -> str | Rejected:
    """The Pillow format of an accepted image, by its first bytes."""
    for magic, name in _MAGIC:
        if data.startswith(magic):
            return name
    if data[:4] == b"RIFF" and data[8:12] == b"WEBP":
        return "WEBP"
    if data[4:8] == b"ftyp":
        return Rejected("unsupported format", "AVIF, HEIF or video")
    for magic, name in _KNOWN_BUT_REFUSED:
        if data.startswith(magic):
            return Rejected("unsupported format", name)
    start = data[:2048].removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if b"<svg" in start:
        return Rejected("unsupported format", "SVG")
    if start.startswith(b"<!doctype html") or b"<html" in start:
        return Rejected("not an image (HTML)")
    return Rejected("not an image", repr(data[:16]))


def _convert(image: Image.Image, bare: Bare, policy: ImagePolicy) -> CleanImage:
    width, height = image.size
    scale = _scale(image.size, policy)
    if scale < 1.0 and image.format == "JPEG":
        # libjpeg can decode at 1/2, 1/4 or 1/8 scale; twice the final size loses nothing.
        image.draft(None, (round(2 * scale * width), round(2 * scale * height)))
    image.load()
    turn = _TURNS.get(bare.orientation)
    if bare.orientation >= 5:  # a quarter turn
        width, height = height, width
    shrunk = (max(1, round(width * scale)), max(1, round(height * scale)))
    final = _final_size(shrunk, policy)
    as_is = image.format == "JPEG" and image.mode == "RGB" and turn is None
    if as_is and not policy.reencode and (width, height) == shrunk == final:
        return _clean(bare.data, width, height)
    rgb = _to_rgb(image if turn is None else image.transpose(turn))
    if rgb.size != shrunk:
        rgb = rgb.resize(shrunk, FILTERS[policy.downscale])
    if shrunk != final:
        fill = policy.resize_mode == "border"
        rgb = ImageOps.pad(rgb, final, color="white") if fill else ImageOps.fit(rgb, final)
    if max(final) > _MAX_JPEG_SIDE:
        raise ValueError(f"{final[0]}x{final[1]} is too long for a JPEG")
    rgb.info = {}  # Pillow would write some of what it read
    out = io.BytesIO()
    rgb.save(out, "JPEG", quality=policy.encode_quality)
    return _clean(out.getvalue(), *final)


def _scale(size: tuple[int, int], policy: ImagePolicy) -> float:
    if policy.resize_mode == "no":
        return 1.0
    longer = policy.resize_mode in ("keep_ratio_largest", "border")
    return min(1.0, policy.short_side / (max(size) if longer else min(size)))


def _final_size(shrunk: tuple[int, int], policy: ImagePolicy) -> tuple[int, int]:
    """An image's size after crop or border; square, even if the image is too small to shrink.

    In that case a crop cuts to the shorter side, and a border pads to the longer one.
    """
    if policy.resize_mode == "center_crop":
        return (min(shrunk), min(shrunk))
    if policy.resize_mode == "border":
        return (max(shrunk), max(shrunk))
    return shrunk


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode == "RGB":
        return image
    # Strip by strip: the intermediate images take several times the image's memory.
    width, height = image.size
    rows = max(1, _STRIP_PIXELS // width)
    whole = Image.new("RGB", image.size)
    for top in range(0, height, rows):
        part = image.crop((0, top, width, min(top + rows, height)))
        whole.paste(_strip_to_rgb(part), (0, top))
    return whole


def _strip_to_rgb(image: Image.Image) -> Image.Image:
    if (
        image.mode.startswith("I;16") or image.mode == "I"
    ):  # 16-bit greyscale PNG: keep the high byte
        image = image.convert("I").point(lambda v: v / 256).convert("L")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _clean(data: bytes, width: int, height: int) -> CleanImage:
    return CleanImage(data, width, height, hashlib.sha256(data).hexdigest())


def _decode_reason(error: Exception) -> str:
    text = str(error).lower()
    cut = "truncated" in text or "not processed" in text or "unexpected end" in text
    return "truncated image" if cut or isinstance(error, EOFError) else "broken image"


def _say(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its text differs from run to run
        return "no header that makes sense"
    return f"{type(error).__name__}: {error}"[:200]
