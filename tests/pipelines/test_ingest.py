"""Ingestion, end to end, over a web that misbehaves."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import tarfile
import threading
import time
import zipfile
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar

import pyarrow.parquet as pq
import pytest
from PIL import Image

from pipelines import ingest, ingest_workers, sources
from pipelines.dataset import Commit, PartRecord
from pipelines.fetch import FetchPolicy, failure_reason, fetch_images, refuse
from pipelines.images import CleanImage, Rejected, clean_image
from pipelines.ingest import IngestConfig, plan, run
from pipelines.ingest_config import Assumptions
from pipelines.sample_world import Server, World, WorldSize, generate, serve
from pipelines.storage import Store, StoreError

REASONS = {
    "404": "http 404",
    "403": "http 403",
    "timeout": "timed out",
    "html": "not an image (HTML)",
    "truncated": "truncated image",
    "zero": "empty body",
}


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[World, Server]]:
    root = tmp_path_factory.mktemp("world")
    with serve(root) as server:
        yield generate(root, size=WorldSize.tiny(), base_url=server.url), server


def config(world: World, source: str, store: str | Path, **changes: Any) -> IngestConfig:
    folder = {"text_files": "text", "imagenet21k": "imagenet"}.get(source, source)
    # The timeout is what a busy machine needs; only the URLs that never answer wait so long.
    settings: dict[str, Any] = {"threads": 16, "timeout": 3.0, "retries": 0, "shard_size": 10}
    settings["report"] = False  # test_data_report.py looks at it
    return IngestConfig(
        source=source,
        annotations=str(world.annotations(folder)),
        store=str(store),
        allow_loopback=True,
        **(settings | changes),
    )


def expected_failures(world: World, source: str) -> dict[str, int]:
    return {REASONS[k]: n for k, n in world.expected_failures.get(source, {}).items()}


def good_items(cfg: IngestConfig) -> list[sources.ImageRecord]:
    items = sources.load(cfg.source).read(Path(cfg.annotations), cfg.options)
    return [i for i in items if isinstance(i, sources.ImageRecord)]


# -- end to end -----------------------------------------------------------------------------------


@pytest.mark.usefixtures("ray_session")
@pytest.mark.parametrize("kind", ["local", "s3"])
def test_pairs(
    kind: str, web: tuple[World, Server], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    world, server = web
    uri = str(tmp_path / "store") if kind == "local" else request.getfixturevalue("s3_store")
    cfg = config(world, "cc3m", uri)
    commit = run(cfg)
    dataset = Store(uri).dataset("images/cc3m")

    # What failed: each kind of failure, exactly as often as the world knows of.
    malformed = {"missing tab": 1, "blank line": 1, "empty caption": 1}
    failures = expected_failures(world, "cc3m")
    assert set(failures) == set(REASONS.values())
    assert commit.stats["set_aside"] == failures | malformed
    aside = dataset.read_set_aside()
    assert Counter(row["reason"] for row in aside) == failures | malformed
    assert all(row.keys() == {"id", "url", "reason", "detail", "stage"} for row in aside)
    assert commit.stats["stages"] == dict(Counter(row["stage"] for row in aside))
    assert {r["stage"] for r in aside if r["reason"] == "http 404"} == {"download"}

    # What is there: everything else, redirects too, in the published order.
    table = dataset.read_table()
    assert table.schema.equals(ingest.IMAGE_SCHEMA)
    rows = table.to_pylist()
    records = good_items(cfg)
    bad = {row["id"] for row in aside}
    assert [row["id"] for row in rows] == [r.id for r in records if r.id not in bad]
    assert [row["id"] for row in rows] == sorted(row["id"] for row in rows)
    captions = {r.id: r.captions for r in records}
    assert all(row["captions"] == captions[row["id"]] for row in rows)
    for row in rows:
        with Image.open(io.BytesIO(row["image"]["bytes"])) as image:
            image.load()
            assert (image.format, image.mode) == ("JPEG", "RGB")
            assert image.size == (row["width"], row["height"])
    behaviour = json.loads((world.web / "behaviour.json").read_text())
    moved = [row for row in rows if behaviour.get(row["url"][len(server.url) :]) == "redirect"]
    assert len(moved) == world.redirects["cc3m"] > 0
    assert commit.rows == commit.stats["images"] == len(rows)
    assert commit.stats["read"] == len(rows) + len(aside)
    assert commit.stats["bytes"] == sum(len(row["image"]["bytes"]) for row in rows)
    (described,) = commit.lineage["inputs"]
    assert described["file"] == "Train_GCC-training.tsv" and len(described["sha256"]) == 64

    # A second run does nothing.
    before = server.requests
    assert run(cfg) == commit
    assert server.requests == before

    # A run that was killed goes on: one of the three parts is made again, and only that.
    folder = f"images/cc3m/data-{commit.fingerprint[:8]}"
    store = Store(uri)
    store.delete("images/cc3m/_commits/00000000.json")
    store.delete(f"{folder}/_part-00001.json")
    store.delete(f"{folder}/part-00001.parquet")
    shard = pq.read_table(io.BytesIO(store.read(f"{folder}/_urls-00001.parquet"))).to_pylist()
    urls = {row["url"] for row in shard if row["reason"] is None}
    hops = sum(behaviour.get(url[len(server.url) :]) == "redirect" for url in urls)
    again = run(cfg)
    assert server.requests - before == len(urls) + hops
    assert again.identity == commit.identity
    assert again.files == commit.files and again.stats == commit.stats

    # The name is taken for other options.
    with pytest.raises(StoreError, match="other inputs or options"):
        run(config(world, "cc3m", uri, short_side=64))


@pytest.mark.usefixtures("ray_session")
def test_held_out_images_are_never_fetched(web: tuple[World, Server], tmp_path: Path) -> None:
    world, _ = web
    commit = run(config(world, "coco", tmp_path))
    dataset = Store(tmp_path).dataset("images/coco")
    held = [r for r in dataset.read_set_aside() if r["reason"].startswith("held out")]
    assert len(held) == world.size.coco_val + world.size.coco_test
    splits = json.loads((world.annotations("coco") / "dataset_coco.json").read_text())["images"]
    tested = {f"coco/{i['cocoid']:012d}" for i in splits if i["split"] in ("val", "test")}
    assert {r["id"] for r in held} == tested
    assert not tested & set(dataset.read_table(["id"])["id"].to_pylist())
    fails = expected_failures(world, "coco")
    extra = {"held out: COCO Karpathy val/test": len(held), "annotation names a missing image": 1}
    assert commit.stats["set_aside"] == fails | extra
    assert len(commit.lineage["inputs"]) == 3
    assert commit.stats["captions"] > 4 * commit.rows


@pytest.mark.usefixtures("ray_session")
def test_archives_and_texts(web: tuple[World, Server], tmp_path: Path, s3_store: str) -> None:
    world, _ = web
    images = run(config(world, "imagenet21k", tmp_path))
    assert images.rows == world.counts["imagenet"] and images.stats["set_aside"] == {}
    rows = Store(tmp_path).dataset("images/imagenet21k").read_table().to_pylist()
    assert all(row["captions"] == [] and row["url"] is None for row in rows)
    assert rows[0]["id"].startswith("imagenet21k/n")

    # Texts from a bucket, to a bucket.
    bucket = Store(s3_store)
    for file in world.annotations("text").rglob("*.*"):
        bucket.upload(file, f"raw/{file.relative_to(world.annotations('text')).as_posix()}")
    cfg = IngestConfig("text_files", f"{s3_store}/raw", s3_store, name="small", report=False)
    texts = run(cfg)
    table = bucket.dataset("text/small").read_table()
    assert table.schema.equals(ingest.TEXT_SCHEMA)
    assert texts.rows == table.num_rows >= world.counts["text"] + world.counts["books"]
    assert len(set(table["id"].to_pylist())) == table.num_rows
    assert table["id"][0].as_py() == "small/books/book_01.txt:000000001"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_session")
def test_annotations_in_a_bucket_give_the_same_dataset(
    web: tuple[World, Server], tmp_path: Path, s3_store: str
) -> None:
    world, _ = web
    file = world.annotations("sbu") / "sbu-captions-all.json"
    Store(s3_store).upload(file, f"raw/{file.name}")
    from_bucket = config(world, "sbu", s3_store)
    from_bucket = replace(from_bucket, annotations=f"{s3_store}/raw")
    local = config(world, "sbu", tmp_path, limit=None, processes=1)
    assert run(from_bucket).identity == run(local).identity


# -- in this process -----------------------------------------------------------------------------


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> None:
    """Units are worked on in this process, one after the other, instead of on Ray."""

    def run_parts(dataset: Any, mark: str, units: Any, make: Any, **_: Any) -> list[PartRecord]:
        worker, done = make(), dataset.finished_parts(mark)
        for unit in units:
            if unit["name"] not in done:
                out = worker(unit)
                done[unit["name"]] = dataset.write_part(
                    mark, unit["name"], out.table, set_aside=out.set_aside, stats=out.stats
                )
        return [done[unit["name"]] for unit in units]

    monkeypatch.setattr(ingest, "run_parts", run_parts)
    monkeypatch.setattr(ingest.cluster, "start", lambda: None)


def jpeg(colour: str, size: int = 64) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (size, size), colour).save(out, "JPEG")
    return out.getvalue()


def tar(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def ingested(root: Path, source: str, **changes: Any) -> tuple[Commit, list[Any], list[Any]]:
    """The commit of what lies in `root/data`, its rows, and what was set aside."""
    store = root / "store"
    cfg = IngestConfig(source, str(root / "data"), store=str(store), report=False, **changes)
    commit = run(cfg)
    dataset = Store(store).dataset(cfg.dataset)
    return commit, dataset.read_table().to_pylist(), dataset.read_set_aside()


def answer(monkeypatch: pytest.MonkeyPatch, pictures: dict[str, bytes]) -> None:
    """In place of the web: these URLs have pictures, all others time out."""

    def fetched(urls: Iterable[str], *_: Any) -> dict[str, CleanImage | Rejected]:
        lost = Rejected("timed out", "", "download")
        return {u: clean_image(pictures[u]) if u in pictures else lost for u in urls}

    monkeypatch.setattr(ingest_workers, "fetch_images", fetched)


@pytest.mark.usefixtures("here")
def test_webdataset_becomes_pairs_and_captions_are_sifted(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    samples = {
        "0.jpg": jpeg("red"),
        "0.json": json.dumps(
            {
                "caption": ["a red square", "red", "ein rotes Quadrat auf dem Bild"],
                "url": "http://a/0",
            }
        ).encode(),
        "1.jpg": jpeg("blue"),
        "1.txt": b"blue",
        "2.jpg": b"no image",
        "2.txt": b"a broken thing",
    }
    (tmp_path / "data/00000.tar").write_bytes(tar(samples))
    commit, rows, aside = ingested(
        tmp_path, "webdataset", name="mine", min_caption_words=2, language="en"
    )
    (row,) = rows
    assert (row["id"], row["captions"]) == ("mine/00000/0", ["a red square"])
    assert (row["source"], row["url"]) == ("mine", "http://a/0")
    assert [(r["id"][-1], r["reason"], r["stage"]) for r in aside] == [
        ("0", "caption: too few words", "caption"),
        ("0", "language: de", "caption"),
        ("1", "caption: too few words", "filter"),
        ("2", "not an image", "decode"),
    ]
    assert "ein rotes Quadrat" in aside[1]["detail"]  # nothing is lost
    assert commit.stats["read"] == 3 and commit.stats["captions"] == 1
    assert commit.stats["set_aside"] == {"caption: too few words": 1, "not an image": 1}
    assert commit.stats["captions_set_aside"] == {"caption: too few words": 1, "language: de": 1}


@pytest.mark.usefixtures("here")
def test_captions_are_set_aside_once_and_only_of_records_that_are_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    lines = [
        json.dumps({"url": f"http://a/{name}", "caption": ["a red square", name]})
        for name in ("good", "late", "never")
    ]
    (tmp_path / "data/a.jsonl").write_text("\n".join(lines))
    there = {"http://a/good": jpeg("red")}
    answer(monkeypatch, there)
    for retry, kept in ((False, ["good"]), (True, ["good"]), (True, ["good", "late"])):
        commit, rows, aside = ingested(
            tmp_path, "table", name="mine", min_caption_words=2, retry_failed=retry
        )
        assert [r["url"] for r in rows] == [f"http://a/{name}" for name in kept]
        captions = [r["detail"] for r in aside if r["stage"] == "caption"]
        assert captions == [f"1: {name}" for name in kept]
        assert commit.stats["captions_set_aside"] == {"caption: too few words": len(kept)}
        if retry:
            there["http://a/late"] = jpeg("red")


@pytest.mark.usefixtures("here")
def test_a_dataset_stays_when_one_it_was_compared_with_is_amended(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pictures = {"http://a/1": jpeg("red"), "http://b/1": jpeg("red"), "http://b/2": jpeg("blue")}
    answer(monkeypatch, pictures)
    configs = {}
    for name, against in (("first", ()), ("second", ("images/first",))):
        folder = tmp_path / name
        folder.mkdir()
        urls = [f"http://{'a' if name == 'first' else 'b'}/{i}" for i in (1, 2, 3)]
        lines = [json.dumps({"url": url, "caption": "a square"}) for url in urls]
        (folder / "a.jsonl").write_text("\n".join(lines))
        configs[name] = IngestConfig(
            "table", str(folder), str(tmp_path / "store"), name, report=False,
            unique=bool(against), against=against,
        )  # fmt: skip
        run(configs[name])
    first, second = (Store(tmp_path / "store").dataset(f"images/{name}") for name in configs)
    commit = second.commit()
    assert commit.stats["set_aside"] == {"duplicate: same bytes": 1, "timed out": 1}

    before = first.commit().identity
    pictures["http://a/3"] = pictures["http://b/3"] = jpeg("green")
    run(replace(configs["first"], retry_failed=True))
    assert first.commit().identity != before
    assert run(configs["second"]) == commit
    again = run(replace(configs["second"], retry_failed=True))
    assert again.stats["set_aside"] == {"duplicate: same bytes": 2}  # also of what came late
    assert run(configs["second"]) == again
    with pytest.raises(StoreError, match="other inputs or options"):
        run(replace(configs["second"], against=("images/first", "images/first")))


@pytest.mark.usefixtures("here")
def test_texts_of_one_language_with_their_checksum(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    texts = ["The river runs through the town.", "Der Fluss fließt durch die Stadt."]
    lines = "\n".join(json.dumps({"text": t}) for t in texts)
    (tmp_path / "data/a.jsonl").write_text(lines)
    commit, rows, aside = ingested(tmp_path, "wikipedia", language="en")
    (row,) = rows
    assert row["id"] == "wikipedia/a.jsonl:000000001" and row["source"] == "wikipedia"
    assert row["sha256"] == hashlib.sha256(texts[0].encode()).hexdigest()
    assert commit.stats["set_aside"] == {"language: de": 1}
    assert aside[0]["id"] == "wikipedia/a.jsonl:000000002"


@pytest.mark.usefixtures("here")
def test_a_large_file_becomes_several_parts_in_its_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    for name, count in (("a", 50), ("b", 1)):
        lines = (json.dumps({"text": f"{name} {i} " + "word " * 20_000}) for i in range(count))
        (tmp_path / f"data/{name}.jsonl").write_text("\n".join(lines))
    (tmp_path / "data/c.jsonl").write_text("no json")
    commit, rows, aside = ingested(tmp_path, "text_files", name="big", part_megabytes=1)
    names = [Path(f.path).stem for f in commit.files]
    assert names == [
        *("part-00000", "part-00000-00001", "part-00000-00002", "part-00000-00003"),
        *("part-00000-00004", "part-00001", "part-00002"),
    ]
    assert [r["id"] for r in rows] == [f"big/a.jsonl:{i:09d}" for i in range(1, 51)] + [
        "big/b.jsonl:000000001"
    ]
    assert commit.stats["read"] == commit.rows + len(aside) == 52

    # Interrupted after the first file's second part: made again, to the same files.
    store = Store(tmp_path / "store")
    folder = f"text/big/data-{commit.fingerprint[:8]}"
    store.delete("text/big/_commits/00000000.json")
    for part in ("00000", "00000-00003", "00001"):
        store.delete(f"{folder}/_part-{part}.json")
    again, _, _ = ingested(tmp_path, "text_files", name="big", part_megabytes=1)
    assert again.files == commit.files and again.stats == commit.stats


@pytest.mark.usefixtures("here")
def test_a_file_of_which_much_is_refused_becomes_several_parts_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ingest_workers, "MOST_ASIDE", 4)
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": f"text {i}"}) if i % 3 == 0 else "no json" for i in range(12)]
    (tmp_path / "data/a.jsonl").write_text("\n".join([*lines, *["no json"] * 5]))
    (tmp_path / "data/b.jsonl").write_text(json.dumps({"text": "the last"}))
    commit, rows, aside = ingested(tmp_path, "text_files", name="bad")
    assert [(Path(f.path).stem, f.rows) for f in commit.files] == [
        *(("part-00000", 2), ("part-00000-00001", 2), ("part-00000-00002", 0)),
        *(("part-00000-00003", 0), ("part-00001", 1)),
    ]
    assert [f.rows for f in commit.set_aside] == [4, 4, 4, 1]
    assert [r["text"] for r in rows] == [*(f"text {i}" for i in (0, 3, 6, 9)), "the last"]
    bad = [i + 1 for i in range(17) if i % 3 or i >= 12]
    assert [r["id"] for r in aside] == [f"a.jsonl:{number}" for number in bad]
    assert commit.stats["read"] == 18 and commit.stats["set_aside"] == {"not JSON": 13}

    # Interrupted in the first file: made again, to the same files.
    store = Store(tmp_path / "store")
    store.delete("text/bad/_commits/00000000.json")
    for part in ("00000", "00000-00002"):
        store.delete(f"text/bad/data-{commit.fingerprint[:8]}/_part-{part}.json")
    again, _, _ = ingested(tmp_path, "text_files", name="bad")
    assert (again.files, again.set_aside) == (commit.files, commit.set_aside)
    assert again.stats == commit.stats


@pytest.mark.usefixtures("here")
def test_coco_from_its_zips(tmp_path: Path) -> None:
    data, images = tmp_path / "data", tmp_path / "images"
    data.mkdir()
    images.mkdir()
    listed = [{"id": i, "file_name": f"{i:012d}.jpg", "coco_url": "http://c/x"} for i in (1, 2, 3)]
    captions = [{"id": i, "image_id": i, "caption": f"number {i}"} for i in (1, 2, 3)]
    raw = {"images": listed, "annotations": captions}
    (data / "captions_train2017.json").write_text(json.dumps(raw))
    splits = {"images": [{"cocoid": 3, "split": "test"}]}
    (data / "dataset_coco.json").write_text(json.dumps(splits))
    with zipfile.ZipFile(images / "train2017.zip", "w") as archive:
        archive.writestr("train2017/000000000001.jpg", jpeg("red"))
    commit, rows, aside = ingested(tmp_path, "coco", images=str(images))
    assert [(r["id"], r["captions"]) for r in rows] == [("coco/000000000001", ["number 1"])]
    assert {r["id"]: r["reason"] for r in aside} == {
        "coco/000000000002": "missing image file",
        "coco/000000000003": "held out: COCO Karpathy val/test",
    }
    assert commit.stats["stages"] == {"files": 1, "annotations": 1}
    zips = [i for i in commit.lineage["inputs"] if i["file"].startswith("images/")]
    assert zips == [
        {"file": "images/train2017.zip", "bytes": (images / "train2017.zip").stat().st_size}
    ]


@pytest.mark.usefixtures("here")
def test_the_wrong_folder_of_images_ends_the_job(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    listed = [{"image_id": i, "url": f"http://v/{i}.jpg"} for i in range(60)]
    regions = [{"id": i, "regions": [{"image_id": i, "phrase": "a dog"}]} for i in range(60)]
    (tmp_path / "data/image_data.json").write_text(json.dumps(listed))
    (tmp_path / "data/region_descriptions.json").write_text(json.dumps(regions))
    with (
        pytest.warns(UserWarning, match="NOT held out"),
        pytest.raises(FileNotFoundError, match=r"not one of 60 images is there.*VG_100K/0.jpg"),
    ):
        ingested(tmp_path, "vg", images=str(tmp_path))


@pytest.mark.usefixtures("here")
def test_imagenet1k_from_its_tar_of_tars_and_from_folders(tmp_path: Path) -> None:
    photos = {
        f"n0000000{s}": {f"n0000000{s}_{i}.JPEG": jpeg("red") for i in (1, 2)} for s in (1, 2)
    }
    (tmp_path / "data").mkdir()
    outer = tar({f"{synset}.tar": tar(files) for synset, files in photos.items()})
    (tmp_path / "data/ILSVRC2012_img_train.tar").write_bytes(outer)
    (tmp_path / "data/ILSVRC2012_img_val.tar").write_bytes(tar({"v.JPEG": jpeg("blue")}))
    commit, rows, _ = ingested(tmp_path, "imagenet1k")
    ids = [f"imagenet1k/n0000000{s}_{i}" for s in (1, 2) for i in (1, 2)]
    assert [r["id"] for r in rows] == ids and len(commit.files) == 2
    for synset, files in photos.items():
        folder = tmp_path / "unpacked/data/train" / synset
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name).write_bytes(data)
    _, again, _ = ingested(tmp_path / "unpacked", "imagenet1k")
    assert again == rows
    commit, rows, _ = ingested(tmp_path, "imagenet1k", name="val", splits=("val",))
    assert [r["id"] for r in rows] == ["imagenet1k/v"]


@pytest.mark.usefixtures("here")
def test_archives_folders_and_zips_in_a_bucket(tmp_path: Path, s3_store: str) -> None:
    bucket = Store(s3_store)
    synset = {"n00000001_1.JPEG": jpeg("red"), "n00000001_2.JPEG": jpeg("blue")}
    bucket.write("tar/ILSVRC2012_img_train.tar", tar({"n00000001.tar": tar(synset)}))
    for name, data in synset.items():
        bucket.write(f"folder/train/n00000001/{name}", data)
    shards = {"0.jpg": jpeg("red"), "0.txt": b"a red square"}
    bucket.write("shards/deep/00000.tar.gz", gzip.compress(tar(shards)))
    bucket.write("zip/a.zip", zipped({"a.txt": b"One.\n\nTwo."}))
    kinds = {"tar": "imagenet1k", "folder": "imagenet1k", "shards": "webdataset", "zip": "stories"}
    ids = {}
    for folder, source in kinds.items():
        cfg = IngestConfig(source, f"{s3_store}/{folder}", s3_store, name=folder, report=False)
        assert run(cfg).stats["set_aside"] == {}
        ids[folder] = bucket.dataset(cfg.dataset).read_table(["id"])["id"].to_pylist()
    photos = ["imagenet1k/n00000001_1", "imagenet1k/n00000001_2"]
    assert ids["tar"] == ids["folder"] == photos
    assert ids["shards"] == ["shards/deep/00000.tar/0"]
    assert ids["zip"] == ["zip/a.zip/a.txt:000000001"]


@pytest.mark.usefixtures("here")
def test_a_sample_is_the_same_whatever_else_is_asked(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    lines = [json.dumps({"text": f"text {i}"}) for i in range(200)]
    (tmp_path / "data/a.jsonl").write_text("\n".join(lines))
    ids = {
        name: [r["id"].partition(":")[2] for r in ingested(tmp_path, "text_files", **changes)[1]]
        for name, changes in {
            "half": {"name": "half", "sample": 0.5},
            "fifth": {"name": "fifth", "sample": 0.2},
            "first": {"name": "first", "sample": 0.5, "limit": 5},
        }.items()
    }
    assert set(ids["fifth"]) < set(ids["half"]) and 70 < len(ids["half"]) < 130
    assert ids["first"] == ids["half"][:5]


# -- before anything starts -----------------------------------------------------------------------


def test_a_plan_fetches_nothing(web: tuple[World, Server], tmp_path: Path) -> None:
    world, server = web
    before = server.requests
    found = plan(config(world, "cc3m", tmp_path / "store", dry_run=True))
    assert server.requests == before and not (tmp_path / "store").exists()
    assert found["images"] == world.counts["cc3m"] + 1  # the line with a NUL is cleaned
    assert found["set_aside"] == {"missing tab": 1, "blank line": 1, "empty caption": 1}
    assert found["shards"] == 3
    assume = Assumptions(
        nodes=2, images_per_second=1.0, success=0.5, kilobytes_fetched=100, kilobytes_stored=40,
        node_price=3.0, storage_price=0.5,
    )  # fmt: skip
    cfg = config(world, "cc3m", tmp_path, dry_run=True, assume=assume, short_side=144)
    costs = plan(cfg)
    images = costs["images"]
    assert costs["bytes_to_fetch"] == images * 50_000
    assert costs["bytes_to_store"] == images * 5_000
    assert costs["hours"] == pytest.approx(images / 2 / 3600)
    assert costs["cost_of_machines"] == pytest.approx(images / 3600 * 3.0)
    assert costs["cost_of_storage_a_month"] == pytest.approx(images * 5e3 / 1e9 * 0.5)
    assert 0 < plan(replace(cfg, sample=0.5))["images"] < images
    archives = plan(config(world, "imagenet21k", tmp_path, assume=assume))
    assert archives["hours"] == pytest.approx(archives["bytes"] / 50e6 / 2 / 3600)
    assert plan(config(world, "cc3m", tmp_path, limit=3))["images"] == 3
    assert plan(config(world, "imagenet21k", tmp_path))["files"] == world.size.synsets


def test_a_plan_of_archives_and_texts_heeds_samples_and_limits(tmp_path: Path) -> None:
    (tmp_path / "a.tar").write_bytes(bytes(2_000_000))
    (tmp_path / "b.tar").write_bytes(bytes(6_000_000))
    (tmp_path / "c.jsonl").write_bytes(bytes(4_000_000))
    assume = Assumptions(
        nodes=2, images_per_second=1000, megabytes_per_second=1, kilobytes_stored=40,
        node_price=3, storage_price=1000,
    )  # fmt: skip
    archives = IngestConfig("webdataset", str(tmp_path), assume=assume, short_side=144)
    texts = replace(archives, source="wikipedia")
    for cfg, size in ((archives, 8e6), (texts, 12e6)):
        whole, half = plan(cfg), plan(replace(cfg, sample=0.5))
        assert whole["bytes"] == half["bytes"] == whole["bytes_to_store"] == size
        assert half["hours"] == whole["hours"] == pytest.approx(size / 1e6 / 2 / 3600)
        assert half["bytes_to_store"] == size / 2
        assert half["cost_of_storage_a_month"] == pytest.approx(size / 2 / 1e6)
    few = plan(replace(archives, sample=0.5, limit=100))
    assert few["bytes_to_store"] == 2 * 100 * 10_000
    assert few["hours"] == pytest.approx(2 * 200 / 1000 / 2 / 3600)
    assert few["cost_of_machines"] == pytest.approx(few["hours"] * 2 * 3)
    assert plan(replace(archives, limit=10**6)) == plan(archives)  # no file has so many
    assert plan(replace(texts, limit=100)) == plan(texts)  # nobody knows how long they are


def test_a_dry_run_prints_its_plan(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [f"http://example.org/{i}.jpg,number {i}" for i in range(1500)]
    (tmp_path / "a.csv").write_text("\n".join(["url,caption", *rows, "file:///etc/passwd,x"]))
    arguments = ["ingest.py", "--source", "table", "--annotations", str(tmp_path), "--dry-run"]
    monkeypatch.setattr("sys.argv", [*arguments, "--assume.images-per-second", "1"])
    ingest.main()
    said = capsys.readouterr().out.splitlines()
    assert "images: 1,500" in said and "hours: 0.42" in said
    assert "set_aside: {'unsupported scheme': 1}" in said


def test_what_cant_work_stops_before_it_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def started() -> None:
        raise AssertionError("a cluster was started")

    monkeypatch.setattr(ingest.cluster, "start", started)

    def main(*args: str) -> str:
        monkeypatch.setattr("sys.argv", ["ingest.py", "--store", str(tmp_path / "store"), *args])
        with pytest.raises(SystemExit) as stopped:
            ingest.main()
        assert stopped.value.code == 2
        return " ".join(capsys.readouterr().err.replace("\u2502", " ").split())  # out of its box

    folder = str(tmp_path)
    assert "cc3m" in main("--source", "laion")
    assert "Train_GCC-training.tsv is missing" in main("--annotations", folder)
    nothing = main("--source", "imagenet21k", "--annotations", folder)
    assert "Expected *.tar" in nothing and "https://image-net.org" in nothing
    nothing = main("--source", "openwebtext", "--annotations", folder)
    assert "openwebtext.tar.xz" in nothing and "https://huggingface.co" in nothing
    assert "no .parquet, .csv" in main("--source", "table", "--annotations", folder)
    assert "coco and vg have" in main("--images", folder)
    assert "splits: test" in main("--source", "imagenet1k", "--splits", "test")
    assert "language" in main("--language", "english")
    for option in ("sample", "max_repetition"):
        assert option in main(f"--{option.replace('_', '-')}", "0")
    assert "shard_size" in main("--shard-size", "0")
    (tmp_path / "file").write_text("")
    assert "can't write there" in main("--store", str(tmp_path / "file"), "--annotations", folder)


# -- the web --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("url", "reason"),
    [
        ("http://example.org/a b/é.jpg?x=%20", None),
        ("https://bücher.example/1.jpg", None),
        ("http://8.8.8.8/x.jpg", None),
        ("ftp://example.org/x.jpg", "unsupported scheme"),
        ("file:///etc/passwd", "unsupported scheme"),
        ("x.jpg", "unsupported scheme"),
        ("http:///x.jpg", "bad url"),
        ("http://[::1/x.jpg", "bad url"),
        ("http://example.org:99999/x.jpg", "bad url"),
        ("http://localhost/x.jpg", "private address"),
        ("http://LOCALHOST./x.jpg", "private address"),
        ("http://127.0.0.1/x.jpg", "private address"),
        ("http://127.1/x.jpg", "private address"),
        ("http://2130706433/x.jpg", "private address"),
        ("http://[::1]/x.jpg", "private address"),
        ("http://[::ffff:10.0.0.1]/x.jpg", "private address"),
        ("http://10.1.2.3/x.jpg", "private address"),
        ("http://192.168.0.1/x.jpg", "private address"),
        ("http://169.254.169.254/latest/meta-data", "private address"),
        ("http://0.0.0.0/x.jpg", "private address"),
    ],
)
def test_urls_that_are_never_fetched(url: str, reason: str | None) -> None:
    found = refuse(url)
    assert (found.reason if found else None) == reason


def test_loopback_may_be_allowed_and_private_networks_not() -> None:
    assert refuse("http://127.0.0.1:8000/x.jpg", allow_loopback=True) is None
    assert refuse("http://localhost/x.jpg", allow_loopback=True) is None
    assert refuse("http://169.254.169.254/", allow_loopback=True) is not None


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ("HTTP Error 404: Not Found", "http 404"),
        ("HTTP Error 503: Service Unavailable", "http 503"),
        ("<urlopen error timed out>", "timed out"),
        ("The read operation timed out", "timed out"),
        ("<urlopen error [Errno -2] Name or service not known>", "host not found"),
        ("<urlopen error [Errno 111] Connection refused>", "connection failed"),
        ("[Errno 104] Connection reset by peer", "connection failed"),
        ("Remote end closed connection without response", "connection failed"),
        ("<urlopen error [SSL: CERTIFICATE_VERIFY_FAILED] certificate has expired>", "tls failed"),
        ("Use of image disallowed by X-Robots-Tag directive", "robots: disallowed"),
        ("IncompleteRead(3 bytes read, 9 more expected)", "incomplete download"),
        ("no host given", "download failed"),
    ],
)
def test_reasons_are_few(said: str, reason: str) -> None:
    assert failure_reason(said) == reason


class _Odd(BaseHTTPRequestHandler):
    """Answers that the sample world's server doesn't give."""

    hits: ClassVar[Counter[str]] = Counter()

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        self.hits[self.path] += 1
        body = io.BytesIO()
        Image.new("RGB", (64, 64), "red").save(body, "JPEG")
        headers: dict[str, str] = {}
        status, data, promised = 200, body.getvalue(), None
        if self.path == "/robots":
            headers["X-Robots-Tag"] = "beit3-ray: noai"
        elif self.path == "/other-robot":
            headers["X-Robots-Tag"] = "otherbot: noai"
        elif self.path == "/inside":
            status, headers["Location"] = 302, "http://169.254.169.254/latest"
        elif self.path == "/to-file":
            status, headers["Location"] = 302, "file:///etc/passwd"
        elif self.path == "/loop":
            status, headers["Location"] = 302, "/loop"
        elif self.path == "/large":
            data = data.ljust(3 << 20, b"\0")
        elif self.path == "/cut":
            promised = len(data) + 100
        self.send_response(status)
        self.send_header("Content-Length", str(promised or len(data)))
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.path == "/slow":
            for i in range(40):  # never silent for long, and never done
                try:
                    self.wfile.write(data[i : i + 1])
                    self.wfile.flush()
                except OSError:
                    return
                time.sleep(0.1)
        else:
            self.wfile.write(data)


@pytest.fixture(scope="module")
def odd() -> Iterator[str]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Odd)
    threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


FETCH = FetchPolicy(allow_loopback=True, timeout=10, max_megabytes=2, retries=0, threads=8)


def test_odd_answers(odd: str) -> None:
    paths = ["/ok", "/robots", "/other-robot", "/inside", "/to-file", "/loop", "/large", "/cut"]
    paths += ["/with space/é.jpg"]
    outcomes = fetch_images([odd + p for p in (*paths, "/ok")] + ["http://10.0.0.1/"], FETCH)
    found = {
        url.removeprefix(odd): r.reason if isinstance(r, Rejected) else ""
        for url, r in outcomes.items()
    }
    assert found == {
        "/ok": "",
        "/robots": "robots: disallowed",
        "/other-robot": "",
        "/inside": "private address",
        "/to-file": "unsupported scheme",
        "/loop": "redirect loop",
        "/large": "too large",
        "/cut": "incomplete download",
        "/with space/é.jpg": "",
        "http://10.0.0.1/": "private address",
    }
    assert _Odd.hits["/ok"] == 1  # though it was asked for twice
    assert isinstance(outcomes[odd + "/ok"], CleanImage)


def test_a_trickle_ends(odd: str) -> None:
    impatient = replace(FETCH, max_seconds=0.3)
    (outcome,) = fetch_images([odd + "/slow"], impatient).values()
    assert isinstance(outcome, Rejected) and outcome.reason == "timed out"
    assert outcome.detail == "<urlopen error too slow: over 0.3 s>"


def test_a_network_that_is_down_ends_the_job_rather_than_emptying_the_dataset() -> None:
    urls = [f"http://127.0.0.{i}:9/x.jpg" for i in range(1, 61)]
    few = fetch_images(urls[:3], FETCH)
    assert {r.reason for r in few.values() if isinstance(r, Rejected)} == {"connection failed"}
    with pytest.raises(ConnectionError, match="not one of 60 URLs on 60 hosts could be reached"):
        fetch_images(urls, FETCH)


def test_one_host_that_is_down_ends_nothing_however_many_urls_it_has() -> None:
    found = fetch_images([f"http://127.0.0.1:9/{i}.jpg" for i in range(60)], FETCH)
    assert [r.reason for r in found.values() if isinstance(r, Rejected)] == [
        "connection failed"
    ] * 60
