"""The readers of published annotation formats, and the cleaning of images."""

from __future__ import annotations

import gzip
import io
import json
import struct
import tarfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pipelines import sources
from pipelines.images import CleanImage, ImagePolicy, Rejected, clean_image
from pipelines.sources import HeldOut, ImageRecord, Malformed, Options, TextRecord


def write(folder: Path, name: str, content: str | bytes | list | dict) -> Path:
    file = folder / name
    file.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list | dict):
        content = json.dumps(content)
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    return file


def read(name: str, root: Path, options: Options | None = None) -> list[Any]:
    return list(sources.load(name).read(root, options or Options()))


def reasons(items: list[Any]) -> list[str]:
    return [item.reason for item in items if isinstance(item, Malformed)]


# -- discovery ------------------------------------------------------------------------------------


def test_sources_are_found_by_name() -> None:
    assert {"cc3m", "cc12m", "sbu", "coco", "vg", "imagenet21k", "text_files"} <= set(
        sources.names()
    )
    assert all(sources.load(n).KIND in ("pairs", "images", "text") for n in sources.names())
    with pytest.raises(ValueError, match=r"laion.*cc12m, cc3m, coco"):
        sources.load("laion")


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("cc3m", "Train_GCC-training.tsv"),
        ("cc12m", "cc12m.tsv"),
        ("sbu", "sbu-captions-all.json"),
        ("coco", "captions_train2017.json"),
        ("vg", "image_data.json"),
    ],
)
def test_a_missing_file_is_named_with_its_origin(name: str, file: str, tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{file} is missing. Get it from https://"):
        read(name, tmp_path)


# -- readers --------------------------------------------------------------------------------------


def test_cc3m(tmp_path: Path) -> None:
    rows = [
        b"a red  circle\thttp://a/1.jpg",
        b"no tab here",
        b"",
        b"\thttp://a/2.jpg",
        b"a caption\t ",
        b"nul\x00 and\x07 bell\thttp://a/3.jpg",
        b"\x00\x01\thttp://a/4.jpg",
        b"tab\tin it\thttp://a/5.jpg",
        b"latin \xe9\thttp://a/6.jpg",
        "line\u2028separator é\thttp://a/7.jpg\r".encode(),
        b"x" * (sources.MAX_LINE_BYTES + 5) + b"\thttp://a/8.jpg",
        b"last\thttp://a/9.jpg",
    ]
    write(tmp_path, "Train_GCC-training.tsv", b"\n".join(rows))
    write(tmp_path, "Validation_GCC-1.1.0-Validation.tsv", "v\thttp://a/v.jpg\n")
    items = read("cc3m", tmp_path)
    assert [i for i in items if isinstance(i, ImageRecord)] == [
        ImageRecord("cc3m/000000001", "http://a/1.jpg", ["a red circle"]),
        ImageRecord("cc3m/000000006", "http://a/3.jpg", ["nul and bell"]),
        ImageRecord("cc3m/000000008", "http://a/5.jpg", ["tab in it"]),
        ImageRecord("cc3m/000000010", "http://a/7.jpg", ["line separator é"]),
        ImageRecord("cc3m/000000012", "http://a/9.jpg", ["last"]),
        ImageRecord("cc3m/validation-000000001", "http://a/v.jpg", ["v"]),
    ]
    assert reasons(items) == [
        "missing tab",
        "blank line",
        "empty caption",
        "empty url",
        "empty caption",
        "not UTF-8",
        "line too long",
    ]
    assert items[1].where == "Train_GCC-training.tsv:2"


def test_cc12m_has_the_url_first(tmp_path: Path) -> None:
    write(tmp_path, "cc12m.tsv", "http://a/1.jpg\tone\tmore\nhttp://a/2.jpg\t\n")
    items = read("cc12m", tmp_path)
    assert items[0] == ImageRecord("cc12m/000000001", "http://a/1.jpg", ["one more"])
    assert reasons(items) == ["empty caption"]


def test_sbu(tmp_path: Path) -> None:
    raw = {
        "image_urls": ["http://a/1.jpg", "", "http://a/\ud800.jpg", None, "http://a/5.jpg"],
        "user_ids": [],
        "captions": ["half \ud800 a pair", "x", 7, "y"],
    }
    write(tmp_path, "sbu-captions-all.json", raw)
    items = read("sbu", tmp_path)
    assert items[0] == ImageRecord("sbu/000000000", "http://a/1.jpg", ["half \ufffd a pair"])
    assert reasons(items) == [
        "empty url",
        "empty caption",
        "empty url",
        "lists of unequal length",
    ]
    assert items[2].url == "http://a/\ufffd.jpg"  # or it couldn't be written down
    write(tmp_path, "sbu-captions-all.json", "{not json")
    with pytest.raises(ValueError, match=r"sbu-captions-all.json: not JSON"):
        read("sbu", tmp_path)


def coco_folder(root: Path) -> Path:
    def image(number: int) -> dict[str, Any]:
        return {"id": number, "file_name": f"{number}.jpg", "coco_url": f"http://c/{number}.jpg"}

    captions = [
        {"id": 1, "image_id": 10, "caption": "one"},
        {"id": 2, "image_id": 20, "caption": "two"},
        {"id": 3, "image_id": 10, "caption": "one more "},
        {"id": 4, "image_id": 99, "caption": "nobody's"},
        {"id": 5, "image_id": 10, "caption": " \n"},
        {"id": 6, "image_id": 30, "caption": "three"},
        "not an annotation",
    ]
    train = {"images": [image(10), image(20), image(30), image(40)], "annotations": captions}
    train["images"].append({"id": 50, "file_name": "50.jpg"})
    train["annotations"].append({"id": 7, "image_id": 50, "caption": "no address"})
    write(root, "captions_train2017.json", train)
    # The same image again, as 2014's file and 2017's have it.
    again = {"images": [image(10)], "annotations": captions[:1]}
    write(root, "captions_val2014.json", again)
    splits = [{"cocoid": 20, "split": "test"}, {"cocoid": 30, "split": "val"}]
    splits += [{"cocoid": 10, "split": "restval"}]
    write(root, "dataset_coco.json", {"images": splits})
    return root


def test_coco_groups_captions_and_holds_out_karpathys_val_and_test(tmp_path: Path) -> None:
    items = read("coco", coco_folder(tmp_path))
    kept = [i for i in items if isinstance(i, ImageRecord)]
    assert kept == [ImageRecord("coco/000000000010", "http://c/10.jpg", ["one", "one more"])]
    held = [i for i in items if isinstance(i, HeldOut)]
    assert [i.record.id for i in held] == ["coco/000000000020", "coco/000000000030"]
    assert {i.reason for i in held} == {"held out: COCO Karpathy val/test"}
    assert reasons(items) == [
        "empty caption",  # image 40 has none
        "empty url",
        "annotation names a missing image",
        "empty caption",
        "annotation without an image",
    ]


def test_without_karpathys_file_there_is_a_warning(tmp_path: Path) -> None:
    coco_folder(tmp_path)
    (tmp_path / "dataset_coco.json").unlink()
    with pytest.warns(UserWarning, match="NOT held out"):
        items = read("coco", tmp_path)
    assert sum(isinstance(i, ImageRecord) for i in items) == 3
    with pytest.raises(FileNotFoundError):
        read("coco", tmp_path, Options(coco_split=tmp_path / "elsewhere.json"))


def test_vg_gathers_phrases_and_holds_out_cocos(tmp_path: Path) -> None:
    coco_folder(tmp_path / "coco")
    root = tmp_path / "vg"
    images = [
        {"image_id": 1, "url": "http://v/1.jpg", "coco_id": None},
        {"image_id": 2, "url": "http://v/2.jpg", "coco_id": 20},
        {"image_id": 3, "url": "http://v/3.jpg", "coco_id": 10},
        {"url": "http://v/4.jpg"},
    ]
    phrases = ["a dog", "a cat", "a dog ", "", "a cow"]
    regions = [{"region_id": i, "image_id": 1, "phrase": p} for i, p in enumerate(phrases)]
    entries: list[Any] = [
        {"id": 1, "regions": regions},
        {"id": 2, "regions": [{"region_id": 8, "image_id": 2, "phrase": "held"}]},
        {"id": 3, "regions": [{"region_id": 9, "phrase": "by its entry's id"}]},
        {"id": 7, "regions": [{"region_id": 10, "image_id": 7, "phrase": "nobody's"}]},
        {"id": 8},
    ]
    write(root, "image_data.json", images)
    write(root, "region_descriptions.json", entries)
    items = read("vg", root, Options(max_captions=2))
    assert [i for i in items if isinstance(i, ImageRecord)] == [
        ImageRecord("vg/000000001", "http://v/1.jpg", ["a dog", "a cat"]),
        ImageRecord("vg/000000003", "http://v/3.jpg", ["by its entry's id"]),
    ]
    assert [i.record.id for i in items if isinstance(i, HeldOut)] == ["vg/000000002"]
    assert reasons(items) == [
        "image without an id",
        "empty caption",
        "annotation names a missing image",
        "annotation without an image",
    ]


def test_imagenet21k_reads_a_tar_and_says_where_it_breaks() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name in ("n01_1.JPEG", "._n01_2.JPEG", "deep/n01_3.JPEG"):
            info = tarfile.TarInfo(name)
            info.size = 1000
            archive.addfile(info, io.BytesIO(name.encode().ljust(1000)))
    source = sources.load("imagenet21k")
    items = list(source.read_file(io.BytesIO(out.getvalue()), "n01.tar", Options()))
    assert [i.id for i in items] == ["imagenet21k/n01_1", "imagenet21k/n01_3"]
    assert items[0].data.startswith(b"n01_1.JPEG") and items[0].url is None
    cut = list(source.read_file(io.BytesIO(out.getvalue()[:3800]), "n01.tar", Options()))
    assert reasons(cut) == ["truncated archive"] and len(cut) == 2


def read_text(name: str, data: bytes, chars: int = 4000) -> list[Any]:
    source = sources.load("text_files")
    return list(source.read_file(io.BytesIO(data), name, Options(document_chars=chars)))


def test_text_files_json_lines() -> None:
    lines = ['{"text": "one  a\\nb"}', "", "{oops", '{"title": 1}', '{"text": " "}', "[1]"]
    items = read_text("d/x.jsonl", "\n".join(lines).encode())
    assert items[0] == TextRecord("d/x.jsonl:000000001", "one a\nb")
    assert reasons(items) == ["not JSON", "no text field", "empty text", "no text field"]
    packed = gzip.compress("\n".join(lines).encode())
    assert read_text("x.jsonl.gz", packed)[0].text == "one a\nb"


def test_text_files_books_are_cut_at_paragraphs() -> None:
    book = b"First line\nsecond line.\n\n\nTwo.\n\xff bad\n\nThree is long enough to stand alone."
    items = read_text("b.txt", book, chars=30)
    assert [i.text for i in items if isinstance(i, TextRecord)] == [
        "First line second line.\nTwo.",
        "Three is long enough to stand alone.",
    ]
    assert reasons(items) == ["not UTF-8"]
    noise = np.random.default_rng(0).integers(97, 122, 100_000, dtype=np.uint8).tobytes()
    cut = read_text("b.txt.gz", gzip.compress(noise)[:-5000])
    assert reasons(cut) == ["truncated file"]


# -- images ---------------------------------------------------------------------------------------


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
