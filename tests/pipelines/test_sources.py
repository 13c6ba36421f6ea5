"""The readers of published annotation formats."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import tarfile
import zipfile
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipelines import sources
from pipelines.sources import HeldOut, ImageRecord, Malformed, Options, TextRecord
from pipelines.storage import Store


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
    assert set(sources.names()) == {
        *("cc3m", "cc12m", "sbu", "coco", "vg", "table", "webdataset", "imagenet1k", "imagenet21k"),
        *("wikipedia", "bookcorpus", "openwebtext", "cc_news", "stories", "text_files"),
    }
    assert all(sources.load(n).KIND in ("pairs", "images", "text") for n in sources.names())
    with pytest.raises(ValueError, match=r"laion.*cc12m, cc3m, cc_news, coco"):
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


def test_coco_and_vg_name_the_published_image_files(tmp_path: Path) -> None:
    coco_folder(tmp_path)
    items = read("coco", tmp_path, Options(from_files=True))
    kept = {i.id: i.files for i in items if isinstance(i, ImageRecord)}
    assert kept["coco/000000000010"] == (
        *("train2017/10.jpg", "10.jpg", "val2014/10.jpg", "10.jpg"),
    )
    assert "coco/000000000050" in kept  # its address is not needed
    write(tmp_path, "image_data.json", [{"image_id": 1}])
    regions = [{"id": 1, "regions": [{"image_id": 1, "phrase": "a dog"}]}]
    write(tmp_path, "region_descriptions.json", regions)
    (item,) = read("vg", tmp_path, Options(from_files=True))
    assert item.files == ("VG_100K/1.jpg", "VG_100K_2/1.jpg", "1.jpg") and item.url is None


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


@pytest.mark.parametrize("odd", [[1], {"a": 1}])
def test_coco_and_vg_set_aside_ids_that_are_none(odd: Any, tmp_path: Path) -> None:
    listed = {"id": 1, "coco_url": "http://c/1.jpg"}
    said = [
        {"id": 1, "image_id": odd, "caption": "whose"},
        {"id": odd, "image_id": 1, "caption": "which"},
        {"id": 2, "image_id": 1, "caption": "good"},
    ]
    write(tmp_path, "captions_train2017.json", {"images": [listed], "annotations": said})
    write(tmp_path, "dataset_coco.json", {"images": []})
    items = read("coco", tmp_path)
    assert items[0] == ImageRecord("coco/000000000001", "http://c/1.jpg", ["good"])
    assert reasons(items) == ["annotation names a missing image", "annotation without an id"]
    photos = [
        {"image_id": 1, "url": "http://v/1.jpg"},
        {"image_id": 2, "url": "http://v/2.jpg", "coco_id": odd},
    ]
    phrases = [{"image_id": odd, "phrase": "whose"}, {"image_id": 1, "phrase": "good"}]
    entries = [{"id": odd, "regions": [{"phrase": "whose"}]}, {"id": 1, "regions": phrases}]
    write(tmp_path, "image_data.json", photos)
    write(tmp_path, "region_descriptions.json", entries)
    items = read("vg", tmp_path)
    assert items[0] == ImageRecord("vg/000000001", "http://v/1.jpg", ["good"])
    assert reasons(items) == ["bad COCO id", *["annotation names a missing image"] * 2]


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


def read_text(name: str, data: bytes, chars: int = 4000, source: str = "text_files") -> list[Any]:
    options = Options(document_chars=chars)
    return list(sources.load(source).read_file(io.BytesIO(data), name, options))


def tar(files: dict[str, bytes], mode: str = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:  # type: ignore[call-overload]
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def parquet(rows: list[dict[str, Any]]) -> bytes:
    out = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), out)
    return out.getvalue()


def texts(items: list[Any]) -> list[str]:
    return [item.text for item in items if isinstance(item, TextRecord)]


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


ARTICLE = {"id": "12", "url": "https://en.wikipedia.org/wiki?curid=12", "title": "Anarchism"}
ARTICLE["text"] = "Anarchism is  a\u0301 philosophy.\n\nIt is\x07 old."
CLEAN = "Anarchism is \u00e1 philosophy.\nIt is old."  # composed, no bell, a line a paragraph


@pytest.mark.parametrize(
    ("name", "data"),
    [
        ("AA/wiki_00", (json.dumps(ARTICLE) + "\n").encode()),
        ("AA/wiki_00.bz2", bz2.compress(json.dumps(ARTICLE).encode())),
        ("a.jsonl.xz", lzma.compress(json.dumps(ARTICLE).encode())),
        ("a.json", b"\xef\xbb\xbf" + json.dumps(ARTICLE, indent=1).encode()),
        ("a.json", json.dumps([ARTICLE]).encode()),
        ("train-00000-of-00041.parquet", parquet([ARTICLE])),
        ("a.jsonl.zst", pa.compress(json.dumps(ARTICLE).encode(), "zstd", asbytes=True)),
    ],
)
def test_wikipedia_as_its_tools_and_hugging_face_write_it(name: str, data: bytes) -> None:
    (item,) = read_text(name, data, source="wikipedia")
    assert item.text == CLEAN and item.id == f"{name}:000000001"
    assert any(fnmatch(Path(name).name, p) for p in sources.load("wikipedia").UNITS)


def test_wikipedia_sets_aside_what_is_no_article() -> None:
    rows: list[dict[str, Any]] = [{"title": "x", "text": None}, {"title": "y", "text": "\n"}]
    items = read_text("a.parquet", parquet(rows), source="wikipedia")
    assert reasons(items) == ["no text field", "empty text"]
    assert reasons(read_text("a.parquet", parquet([{"b": 1}]))) == ["no text field"]
    assert reasons(read_text("a.parquet", parquet(rows)[:-20] + bytes(20))) == ["broken Parquet"]
    assert reasons(read_text("wiki_00", b"<doc id=1>", source="wikipedia")) == ["unknown file type"]
    assert read_text("wiki_00", b"", source="wikipedia") == []


def latin(column: pa.Array) -> pa.Array:
    """The column in Latin-1, but said to be UTF-8, as Arrow lets a careless writer do."""
    data = [None if t is None else t.encode("latin-1") for t in column.to_pylist()]
    return pa.Array.from_buffers(pa.string(), len(data), pa.array(data).buffers())


def test_text_of_another_encoding_in_parquet_costs_its_own_row(tmp_path: Path) -> None:
    said = [f"number {i}" for i in range(130)]
    said[3], said[70] = "caf\u00e9", "na\u00efve"  # in two batches
    out = io.BytesIO()
    column = latin(pa.array([*said[:100], None, *said[100:]]))
    pq.write_table(pa.table({"text": column}), out, row_group_size=40)
    items = read_text("a.parquet", out.getvalue())
    bad = {i.where: i.reason for i in items if isinstance(i, Malformed)}
    assert bad == {
        "a.parquet:4": "not UTF-8",
        "a.parquet:71": "not UTF-8",
        "a.parquet:101": "no text field",
    }
    assert texts(items) == [t for t in said if t.isascii()]
    assert items[-1].id == "a.parquet:000000131"

    urls = [f"http://a/{i}" for i in range(len(said))]
    urls[5] = "http://a/\u00e9"
    lists = pa.ListArray.from_arrays(list(range(len(said) + 1)), latin(pa.array(said)))
    for captions in (latin(pa.array(said)), lists, latin(pa.array(said)).dictionary_encode()):
        pq.write_table(
            pa.table({"url": latin(pa.array(urls)), "text": captions}), tmp_path / "a.parquet"
        )
        items = table(tmp_path)
        bad = {i.where: i.reason for i in items if isinstance(i, Malformed)}
        assert bad == dict.fromkeys(("a.parquet:4", "a.parquet:6", "a.parquet:71"), "not UTF-8")
        assert [i.id for i in items if isinstance(i, ImageRecord)] == [
            f"mine/a.parquet:{i + 1:09d}" for i in range(130) if i not in (3, 5, 70)
        ]


def test_bookcorpus_has_a_sentence_a_line_or_a_book_a_file() -> None:
    lines = "\n".join(f"sentence {i} ." for i in range(6)).encode()
    packed = tar({"books_large_p1.txt": lines}, "w:bz2")
    items = read_text("bookcorpus.tar.bz2", packed, chars=30, source="bookcorpus")
    two = ["sentence 0 . sentence 1 .", "sentence 2 . sentence 3 .", "sentence 4 . sentence 5 ."]
    assert texts(items) == two
    assert items[0].id == "bookcorpus.tar.bz2/books_large_p1.txt:000000001"
    books = {"books1/epubtxt/one.epub.txt": b"It was\nnight.\n\nShe ran.", "books1/x.epub": b"P"}
    items = read_text("books1.tar.gz", tar(books, "w:gz"), source="bookcorpus")
    assert texts(items) == ["It was night.\nShe ran."] and reasons(items) == ["unknown file type"]


def test_openwebtext_is_tars_in_xz_in_tars() -> None:
    long = b"\n\n".join(b"word " * 50 for _ in range(100))  # one page, however long
    pages = {"0000001-a.txt": b"Page\none.\n\nEnd.", "0000002-b.txt": long}
    subset = lzma.compress(tar(pages))
    names = ("openwebtext/urlsf_subset00-1_data.xz", "openwebtext/urlsf_subset00-2_data.xz")
    whole = {names[0]: subset, names[1]: lzma.compress(tar({"0000003-c.txt": b"Three."}))}
    for name, mode in (("openwebtext.tar.xz", "w:xz"), ("urlsf_subset00.tar", "w")):
        items = read_text(name, tar(whole, mode), source="openwebtext")
        assert [i.id for i in items] == [
            f"{name}/{names[0]}/0000001-a.txt:000000001",
            f"{name}/{names[0]}/0000002-b.txt:000000001",
            f"{name}/{names[1]}/0000003-c.txt:000000001",
        ]
        assert items[0].text == "Page one.\nEnd." and len(items[1].text) > 20_000
    assert texts(read_text("urlsf_subset00-1_data.xz", subset, source="openwebtext"))[0] == (
        "Page one.\nEnd."
    )


def test_cc_news_titles_its_articles() -> None:
    article = {"title": "Rain", "maintext": "It rained.", "language": "en"}
    files = {"cc_download_articles/a.org/1.json": json.dumps(article, indent=2).encode()}
    items = read_text("cc_news.tar.gz", tar(files, "w:gz"), source="cc_news")
    assert texts(items) == ["Rain\nIt rained."]
    rows = [{"title": "Sun", "text": "Sun came out."}, {"title": None, "text": "No title."}]
    assert texts(read_text("a.parquet", parquet(rows), source="cc_news")) == [
        "Sun came out.",
        "No title.",
    ]


def test_stories_are_text_or_json_lines_in_a_zip_too() -> None:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("cc-stories.txt", "Once.\n\nThe end.")
        archive.writestr("more.jsonl", '{"text": "Twice."}\n')
        archive.writestr("__MACOSX/._more.jsonl", "x")
        archive.writestr("deep/", "")
    items = read_text("cc-stories.zip", out.getvalue(), source="stories")
    assert texts(items) == ["Once.\nThe end.", "Twice."]
    assert reasons(items) == []


def test_long_lines_and_other_encodings_are_set_aside_in_bounded_memory() -> None:
    long = b"x" * (10 << 20)
    good = b'\n{"text": "good"}'
    assert [type(i) for i in read_text("a.jsonl", b'{"text": "' + long + b'"}' + good)] == [
        Malformed,
        TextRecord,
    ]
    items = read_text("a.txt", long + b"\n\ngood")
    assert reasons(items) == ["line too long"] and texts(items) == ["good"]
    items = read_text("a.txt", "caf\u00e9\n\ngood".encode("latin-1"))
    assert reasons(items) == ["not UTF-8"] and texts(items) == ["good"]
    assert reasons(read_text("a.txt", "good".encode("utf-16"))) == ["not UTF-8"]
    assert texts(read_text("a.json", b'{"text": "a"}\n{"text": "b"}')) == ["a", "b"]
    assert reasons(read_text("a.jsonl", b"[" * 100_000)) == ["not JSON"]  # nested too deep


# -- a user's own data ----------------------------------------------------------------------------


def table(root: Path, **options: str) -> list[Any]:
    return read("table", root, Options(name="mine", **options))  # type: ignore[arg-type]


def test_a_table_of_each_kind_reads_the_same(tmp_path: Path) -> None:
    rows = [{"url": "http://a/1.jpg", "caption": 'a "red", dog'}, {"url": "", "caption": "x"}]
    csv = 'caption,url,extra\n"a ""red"", dog",http://a/1.jpg,1\nx,,2\n'
    tsv = 'url\tcaption\nhttp://a/1.jpg\ta "red", dog\n\tx\n'
    lines = "\n".join(json.dumps(r) for r in rows)
    kinds: dict[str, Any] = {
        "a.csv": csv,
        "b.tsv": "\ufeff" + tsv,
        "c.jsonl": lines,
        "d.parquet": parquet(rows),
        "e.csv.gz": gzip.compress(csv.encode()),
    }
    for name, content in kinds.items():
        root = tmp_path / name
        write(root, f"sub/{name}", content)
        items = table(root)
        assert items[0] == ImageRecord(
            f"mine/sub/{name}:000000001", "http://a/1.jpg", ['a "red", dog']
        )
        assert reasons(items) == ["empty url"] and items[1].where == f"sub/{name}:2"


def test_a_tables_columns_may_be_named_numbered_and_hold_lists(tmp_path: Path) -> None:
    write(tmp_path, "a.parquet", parquet([{"link": "http://a/1", "words": ["one", "two", "one"]}]))
    (item,) = table(tmp_path, url_column="link", caption_column="words")
    assert item.captions == ["one", "two"]
    with pytest.raises(ValueError, match=r"a.parquet: no column 'caption' among link, words"):
        table(tmp_path)
    (tmp_path / "a.parquet").unlink()
    write(tmp_path, "laion.jsonl", '{"URL": "http://a/1", "TEXT": "one"}')
    assert table(tmp_path)[0].captions == ["one"]
    (tmp_path / "laion.jsonl").unlink()
    write(tmp_path, "bare.tsv", "one\thttp://a/1\ntwo\thttp://a/2\n")
    items = table(tmp_path, url_column="1", caption_column="0")
    assert [(i.url, i.captions) for i in items] == [
        ("http://a/1", ["one"]),
        ("http://a/2", ["two"]),
    ]
    (tmp_path / "bare.tsv").unlink()
    with pytest.raises(FileNotFoundError, match=r"no .parquet, .csv, .tsv or .jsonl file there"):
        table(tmp_path)
    write(tmp_path, "a.parquet", b"PAR1 no more")
    with pytest.raises(ValueError, match=r"a.parquet: row 1 of a broken Parquet file"):
        table(tmp_path)


def test_a_hostile_table(tmp_path: Path) -> None:
    rows = [
        b"url,caption",
        b"http://a/1,one",
        b"only one column",
        b"",
        b"http://a/2,caf\xe9",
        b"http://a/3," + b"x" * (10 << 20),
        b"http://a/4,nul\0 inside",
        b'http://a/5,"two\nlines"',
        b'http://a/6,"never closed',
        *[b"http://a/7," + b"y" * 100_000] * 2,
        b"http://a/8,last",
    ]
    write(tmp_path, "a.csv", b"\n".join(rows))
    items = table(tmp_path)
    kept = [(i.url, i.captions) for i in items if isinstance(i, ImageRecord)]
    assert kept == [
        ("http://a/1", ["one"]),
        ("http://a/4", ["nul inside"]),
        ("http://a/5", ["two lines"]),
        ("http://a/8", ["last"]),
    ]
    assert sorted(reasons(items)) == [
        "blank line",
        "broken row",
        "line too long",
        "missing column",
        "not UTF-8",
    ]
    write(tmp_path, "a.csv.gz", gzip.compress(b"\n".join(rows))[:200])
    (tmp_path / "a.csv").unlink()
    assert reasons(table(tmp_path))[-1] == "truncated file"
    (tmp_path / "a.csv.gz").unlink()
    write(tmp_path, "a.jsonl", b'[1]\n{bad\n\n{"url": 7, "caption": "x"}\n{"url": "http://a/1"}')
    assert reasons(table(tmp_path)) == [
        *("not an object", "not JSON", "blank line", "empty url", "empty caption")
    ]


def shard(files: dict[str, bytes], name: str = "00000.tar") -> list[Any]:
    read_file = sources.load("webdataset").read_file
    return list(read_file(io.BytesIO(tar(files)), name, Options(name="mine")))


def test_webdataset_pairs_files_by_name() -> None:
    described = {"caption": "from json", "url": "http://a/1.jpg", "key": "000000000"}
    items = shard(
        {
            "000000000.jpg": b"one",
            "000000000.json": json.dumps(described).encode(),
            "000000000.txt": "\ufefffrom text".encode(),
            "sub/1.png": b"two",
            "sub/1.json": json.dumps({"caption": ["a", "b", "a"]}).encode(),
            "2.WEBP": b"three",
            "3.txt": b"alone",
            "4.jpg": b"four",
            "4.json": b"{oops",
            "5.jpeg": b"five",
            "5.txt": b"caf\xe9",
            "6.seg.png": b"a mask",
            "../../7.jpg": b"seven",
            "../../7.txt": b"out",
            "/etc/8.jpg": b"eight",
            "/etc/8.txt": b"absolute",
        }
    )
    assert [i for i in items if isinstance(i, ImageRecord)] == [
        ImageRecord("mine/00000/000000000", "http://a/1.jpg", ["from text"], b"one"),
        ImageRecord("mine/00000/sub/1", None, ["a", "b"], b"two"),
        ImageRecord("mine/00000/7", None, ["out"], b"seven"),
        ImageRecord("mine/00000/etc/8", None, ["absolute"], b"eight"),
    ]
    assert reasons(items) == [
        *("empty caption", "no image", "not JSON", "not UTF-8", "no image"),
    ]


def test_webdataset_reads_what_img2dataset_writes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NO_ALBUMENTATIONS_UPDATE", "1")
    from img2dataset.writer import WebDatasetSampleWriter

    schema = pa.schema([("key", pa.string()), ("url", pa.string()), ("caption", pa.string())])
    writer = WebDatasetSampleWriter(3, str(tmp_path), True, 5, schema, "jpg")
    meta = {"key": "000030001", "url": "http://a/1.jpg", "caption": "a dog"}
    writer.write(b"\xff\xd8 image", "000030001", "a dog", meta)
    writer.close()
    (written,) = tmp_path.glob("*.tar")
    with written.open("rb") as stream:
        (item,) = sources.load("webdataset").read_file(stream, written.name, Options(name="mine"))
    assert item == ImageRecord(
        "mine/00003/000030001", "http://a/1.jpg", ["a dog"], b"\xff\xd8 image"
    )


# -- ImageNet's units -----------------------------------------------------------------------------


def units(name: str, root: Path, splits: tuple[str, ...] = ("train",)) -> list[Any]:
    return sources.load(name).find(Store(root), Options(splits=splits))


def test_imagenet21k_takes_tars_and_folders(tmp_path: Path) -> None:
    write(tmp_path, "n00000001.tar", tar({"n00000001_1.JPEG": b"1"}))
    write(tmp_path, "n00000001/n00000001_1.JPEG", b"1")  # unpacked too: once is enough
    write(tmp_path, "deep/n00000002/n00000002_1.JPEG", b"22")
    write(tmp_path, "deep/n00000002/.DS_Store", b"x")
    write(tmp_path, "deep/n00000002/notes.md", b"x")
    found = units("imagenet21k", tmp_path)
    assert found[0] == {"folder": "deep/n00000002", "bytes": 2, "count": 1}
    assert [u.get("file") for u in found[1:]] == ["n00000001.tar"]
    source = sources.load("imagenet21k")
    (item,) = source.read_folder(Store(tmp_path), "deep/n00000002", Options())
    assert item == ImageRecord("imagenet21k/n00000002_1", None, data=b"22")
    assert units("imagenet21k", tmp_path / "nothing") == []


def test_imagenet1k_finds_each_published_shape(tmp_path: Path) -> None:
    inner = [tar({f"n0000000{i}_1.JPEG": bytes([i])}) for i in (1, 2)]
    outer = tar({"n00000001.tar": inner[0], "n00000002.tar": inner[1]})
    archive = write(tmp_path, "ILSVRC2012_img_train.tar", outer)
    write(tmp_path, "ILSVRC2012_img_val.tar", tar({"ILSVRC2012_val_00000001.JPEG": b"v"}))
    found = units("imagenet1k", tmp_path)
    assert [u["file"] for u in found] == ["ILSVRC2012_img_train.tar"] * 2
    for unit, data in zip(found, inner, strict=True):
        assert outer[unit["start"] :][: unit["bytes"]] == data
    both = units("imagenet1k", tmp_path, ("train", "val"))
    assert both[2]["file"] == "ILSVRC2012_img_val.tar" and "start" not in both[2]
    archive.write_bytes(b"no tar" * 200)
    with pytest.raises(ValueError, match="download it again"):
        units("imagenet1k", tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no split 'train'.*ILSVRC2012_img_train.tar"):
        units("imagenet1k", tmp_path / "empty")
    for root in (tmp_path / "plain", tmp_path / "kaggle/ILSVRC/Data/CLS-LOC"):
        write(root, "train/n00000001/n00000001_1.JPEG", b"1")
        write(root, "val/ILSVRC2012_val_00000001.JPEG", b"v")
    for root, folder in (("plain", ""), ("kaggle", "ILSVRC/Data/CLS-LOC/")):
        found = units("imagenet1k", tmp_path / root, ("train", "val"))
        assert [u["folder"] for u in found] == [f"{folder}train/n00000001", f"{folder}val"]
