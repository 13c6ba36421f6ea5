"""Duplicates: what is found equals a plain search, however it is cut and whoever does it."""

from __future__ import annotations

import functools
import io
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from benchmarks.same_picture import chart
from pipelines import drop_duplicates, duplicates, picture_cells, signature_files, signatures
from pipelines.dataset import Commit, Dataset, PartRecord
from pipelines.duplicate_lists import SAME_BYTES, SAME_PICTURE, Found
from pipelines.duplicates import Sizes, find
from pipelines.images import CleanImage, clean_image
from pipelines.ingest import IMAGE_SCHEMA, TEXT_SCHEMA
from pipelines.sample_world import picture
from pipelines.signatures import Signature, signature
from pipelines.storage import FileRecord, Store, StoreError

MARK, CLEAN = "a" * 16, "b" * 16
SMALL = Sizes(slab_rows=7, bucket_rows=120)


# -- a plain search -------------------------------------------------------------------------------


def same(a: dict[str, Any], b: dict[str, Any]) -> bool:
    """The definition, spelled out: all thresholds, and a cell in common."""
    if a["bits"] is None or b["bits"] is None:
        return a["bits"] is b["bits"] is None and a["sha256"] == b["sha256"]
    one, other = (int.from_bytes(row["bits"]) for row in (a, b))
    apart, either = (one ^ other).bit_count(), (one | other).bit_count()
    if apart > duplicates.MOST_BITS or apart > duplicates.MOST_SHARE * either:
        return False
    colours = zip(a["colours"], b["colours"], strict=True)
    if max(abs(x - y) for x, y in colours) > duplicates.MOST_COLOUR:
        return False
    return bool((keys(a["colours"]) == keys(b["colours"])).any())


@functools.cache
def keys(colours: bytes) -> np.ndarray[Any, Any]:
    return picture_cells.keys(np.frombuffer(colours, np.uint8)[None])[0]


def plain(rows: Sequence[dict[str, Any]], first_new: int = 0) -> dict[int, int]:
    """Every row that goes, by its number, and the row that it repeats: all pairs, one by one."""
    kept: list[int] = []
    gone: dict[int, int] = {}
    for number, row in enumerate(rows):
        likes = [k for k in kept if same(rows[k], row)] if number >= first_new else []
        twins = [k for k in likes if rows[k]["bits"] == row["bits"]]
        twins = [k for k in twins if rows[k]["colours"] == row["colours"]]
        if likes:
            gone[number] = (twins or likes)[0]
        else:
            kept.append(number)
    return gone


# -- random signatures ----------------------------------------------------------------------------


def random_rows(seed: int, count: int) -> list[dict[str, Any]]:
    """Signatures with copies, near copies, chains of them, and rows that can't be seen."""
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for number in range(count):
        kind = rng.choice(["new", "bytes", "equal", "near", "edge", "blind"],
                          p=[0.35, 0.1, 0.1, 0.25, 0.1, 0.1])  # fmt: skip
        earlier = rows[int(rng.integers(len(rows)))] if rows else None
        if kind == "blind":  # one of a few contents
            row = {"sha256": bytes([int(rng.integers(4))]) * 32, "bits": None, "colours": None}
        elif kind == "new" or earlier is None or earlier["bits"] is None:
            field = rng.integers(0, 256, (2, 2, 3)).repeat(4, 0).repeat(4, 1)
            row = {"sha256": rng.bytes(32), "bits": rng.bytes(32),
                   "colours": field.astype(np.uint8).tobytes()}  # fmt: skip
        elif kind == "bytes":
            row = dict(earlier)
        elif kind == "equal":
            row = {**earlier, "sha256": rng.bytes(32)}
        else:
            # Chains: a copy of a copy may be too far from the first.
            flips = int(rng.integers(20, 60)) if kind == "near" else duplicates.MOST_BITS
            flips += int(rng.integers(-1, 2))
            changed = np.unpackbits(np.frombuffer(earlier["bits"], np.uint8))
            changed[rng.choice(256, flips, replace=False)] ^= 1
            level = 3 if kind == "near" else duplicates.MOST_COLOUR + 1
            colours = np.frombuffer(earlier["colours"], np.uint8).astype(int)
            colours[int(rng.integers(192))] += level
            colours = (colours + rng.integers(-2, 3, 192)).clip(0, 255).astype(np.uint8)
            row = {"sha256": rng.bytes(32), "bits": np.packbits(changed).tobytes(),
                   "colours": colours.tobytes()}  # fmt: skip
        rows.append({"id": f"row {number}", **row})
    return rows


def stored(dataset: Dataset, rows: Sequence[dict[str, Any]], *cuts: int) -> list[FileRecord]:
    """Files of these rows, cut at these places; their signatures are all that there is."""
    files = []
    for number, (start, end) in enumerate(zip((0, *cuts), (*cuts, len(rows)), strict=True)):
        part = pa.Table.from_pylist([{"id": r["id"]} for r in rows[start:end]],
                                    pa.schema([("id", pa.string())]))  # fmt: skip
        file = dataset.write_part(MARK, f"{number:05d}", part).file
        signed = pa.Table.from_pylist(list(rows[start:end]), signature_files.SCHEMA)
        signature_files.write(dataset, file, signed)
        files.append(file)
    return files


def listed(dataset: Dataset, files: Sequence[FileRecord], found: Found) -> list[dict[str, Any]]:
    """All lists, with the rows' numbers in the whole dataset."""
    rows, start = [], 0
    for file in files:
        part = found.rows(dataset.store, file).to_pylist()
        rows += [{**row, "row": row["row"] + start} for row in part]
        start += file.rows
    return rows


@pytest.mark.parametrize("seed", range(3))
def test_equals_a_plain_search_however_it_is_cut(tmp_path: Path, seed: int) -> None:
    rows = random_rows(seed, 160)
    expected = plain(rows)
    assert 50 < len(expected) < 140
    answers = []
    for number, (sizes, cuts) in enumerate(
        [(Sizes(), ()), (SMALL, (5, 5, 60, 61, 130)), (Sizes(1, 10_000), (40, 80)),
         (Sizes(10_000, 50), (40, 80))]
    ):  # fmt: skip
        dataset = Store(tmp_path / str(number)).dataset("images/some")
        files = stored(dataset, rows, *cuts)
        found = find(dataset, files, sizes=sizes, here=True)
        answers.append(listed(dataset, files, found))
        assert found.compared == len(rows)
        assert sum(found.counts.values()) == len(expected)
    assert all(answer == answers[0] for answer in answers)
    assert {a["row"]: a["of"] for a in answers[0]} == {
        row: f"row {of}" for row, of in expected.items()
    }
    for answer in answers[0]:
        own, of = rows[answer["row"]], rows[expected[answer["row"]]]
        assert (answer["reason"] == SAME_BYTES) == (own["sha256"] == of["sha256"])
        if own["bits"] is not None:
            apart = (int.from_bytes(own["bits"]) ^ int.from_bytes(of["bits"])).bit_count()
            assert answer["bits"] == apart


@pytest.mark.parametrize("first", [0, 1, 70, 159, 160])
def test_other_datasets_come_first_and_stay(tmp_path: Path, first: int) -> None:
    rows = random_rows(9, 160)
    expected = plain(rows, first)
    store = Store(tmp_path)
    before = [store.dataset("images/one"), store.dataset("images/two")]
    half = first // 2
    for dataset, held in zip(before, (rows[:half], rows[half:first]), strict=True):
        files = stored(dataset, held)
        records = [PartRecord(f"{i:05d}", f) for i, f in enumerate(files)]
        dataset.publish(MARK, records, job="t", schema=signature_files.SCHEMA, stats={}, config={})
    dataset = store.dataset("images/new")
    files = stored(dataset, rows[first:], (160 - first) // 3)
    names = [d.name for d in before]
    found = find(dataset, files, against=names, sizes=SMALL, here=True)
    answer = listed(dataset, files, found)
    assert {a["row"] + first: a["of"] for a in answer} == {
        row: f"row {of}" for row, of in expected.items()
    }
    for row in answer:
        of = int(row["of"].split()[1])
        where = names[0] if of < half else names[1] if of < first else dataset.name
        assert row["of_dataset"] == where


def chain(*steps: int) -> list[dict[str, Any]]:
    """Pictures of one colour whose hashes, stripes, have so many leading bits flipped."""
    return [
        {"id": f"row {i}", "sha256": bytes([i]) * 32, "colours": bytes([90]) * 192,
         "bits": np.packbits((np.arange(256) % 2 == 0) ^ (np.arange(256) < step)).tobytes()}
        for i, step in enumerate(steps)
    ]  # fmt: skip


def test_of_a_chain_the_first_and_what_differs_from_it_stay(tmp_path: Path) -> None:
    # 0 ~ 70 ~ 140 ~ 210, and no others; then one that is like two that stay.
    rows = chain(0, 70, 140, 210, 70)
    dataset = Store(tmp_path).dataset("images/some")
    files = stored(dataset, rows, 2)
    found = find(dataset, files, sizes=SMALL, here=True)
    rows_found = listed(dataset, files, found)
    assert {a["row"]: a["of"] for a in rows_found} == {1: "row 0", 3: "row 2", 4: "row 0"}
    # The last one looks like row 1, which went: it names the row that stays.
    assert rows_found[-1]["bits"] == 70 and rows_found[-1]["reason"] == SAME_PICTURE


# -- pictures -------------------------------------------------------------------------------------


def encoded(image: Image.Image, format: str = "JPEG", quality: int = 90) -> bytes:
    out = io.BytesIO()
    image.save(out, format, quality=quality)
    return out.getvalue()


def cleaned(data: bytes) -> bytes:
    clean = clean_image(data)
    assert isinstance(clean, CleanImage)
    return clean.data


def copies(data: bytes) -> dict[str, bytes]:
    with Image.open(io.BytesIO(data)) as stored:
        image = stored.convert("RGB")
    width, height = image.size
    smaller = image.resize((round(0.8 * width), round(0.8 * height)), Image.Resampling.BICUBIC)
    cut = image.crop((round(0.02 * width), round(0.02 * height), width, height))
    quarter = image.crop((0, 0, round(0.75 * width), round(0.75 * height)))
    return {
        "poor": encoded(image, quality=50),
        "smaller": encoded(smaller),
        "webp": encoded(image, "WEBP", 80),
        "cut": encoded(cut),
        "quarter": encoded(quarter),
    }


@pytest.fixture(scope="module")
def drawn() -> list[tuple[str, bytes]]:
    """Thirty scenes, and copies of each."""
    rows = []
    for number in range(30):
        data = cleaned(picture(5, f"cc3m/{number}").file())
        rows.append((f"{number}/first", data))
        rows += [(f"{number}/{kind}", cleaned(copy)) for kind, copy in copies(data).items()]
        rows.append((f"{number}/bytes", data))
    return rows


def image_table(rows: Sequence[tuple[str, bytes]]) -> pa.Table:
    return pa.Table.from_pylist(
        [
            {"id": id, "image": {"bytes": data, "path": None}, "captions": ["one", "two"],
             "url": f"http://x/{id}"}
            for id, data in rows
        ],
        IMAGE_SCHEMA,
    )  # fmt: skip


def test_drawings_on_a_plain_background_are_not_all_one() -> None:
    """Few bits are set and the colours hardly differ, so any two are near; copies are nearer."""
    drawn = [chart(random.Random(i)) for i in range(40)]
    signed = [signature(cleaned(data)) for data in drawn]
    bits, colours = signatures.packed([s.bits for s in signed], [s.colours for s in signed])
    limits = {name: getattr(duplicates, name) for name in ("MOST_BITS", "MOST_COLOUR")}

    def alike(share: float, of: Signature) -> list[int]:
        return signatures.same_picture(
            of, bits, colours, most_bits=limits["MOST_BITS"], most_share=share,
            most_colour=limits["MOST_COLOUR"],
        )[0].tolist()  # fmt: skip

    assert sum(len(alike(1.0, one)) - 1 for one in signed) > 300  # were bits and colours all
    assert sum(len(alike(duplicates.MOST_SHARE, one)) - 1 for one in signed) <= 8
    for place, data in enumerate(drawn):
        made = copies(data)
        for copy in (made[kind] for kind in ("poor", "smaller", "webp")):
            assert place in alike(duplicates.MOST_SHARE, signature(cleaned(copy)))


def test_copies_are_duplicates_if_the_signature_says_so(
    tmp_path: Path, drawn: list[tuple[str, bytes]]
) -> None:
    """Against all pairs, without cells: nothing that is the same is missed."""
    dataset = Store(tmp_path).dataset("images/some")
    files = [dataset.write_part(MARK, "0", image_table(drawn)).file]
    found = listed(dataset, files, find(dataset, files, here=True))
    signed = [signature(data) for _, data in drawn]
    kept: list[int] = []
    expected: dict[int, str] = {}
    for number, own in enumerate(signed):
        bits, colours = signatures.packed([signed[k].bits for k in kept],
                                     [signed[k].colours for k in kept])  # fmt: skip
        likes, *_ = signatures.same_picture(
            own,
            bits,
            colours,
            most_bits=duplicates.MOST_BITS,
            most_share=duplicates.MOST_SHARE,
            most_colour=duplicates.MOST_COLOUR,
        )
        if likes.size:
            expected[number] = drawn[kept[likes[0]]][0]
        else:
            kept.append(number)
    assert {row["row"]: row["of"] for row in found} == expected
    gone = {drawn[row["row"]][0]: row["reason"] for row in found}
    for number in range(30):
        assert gone[f"{number}/bytes"] == SAME_BYTES
        for kind in ("poor", "smaller", "webp"):
            assert gone[f"{number}/{kind}"] == SAME_PICTURE
        assert f"{number}/quarter" not in gone  # another cut of a scene is another picture


def test_signatures_are_kept_beside_their_part(
    tmp_path: Path, drawn: list[tuple[str, bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = Store(tmp_path).dataset("images/some")
    rows = [*drawn[:6], ("broken", b"\xff\xd8 no picture"), ("empty", b"")]
    files = [dataset.write_part(MARK, "0", image_table(rows)).file]
    signature_files.write_missing(dataset, files, here=True)
    name = signature_files.name(dataset.name, files[0].path)
    table = dataset.store.read_table(name)
    assert table.schema == signature_files.SCHEMA
    assert table.equals(signature_files.sign(image_table(rows).to_batches(max_chunksize=3)))
    first = table.to_pylist()[0]
    assert Signature(first["bits"], first["colours"]) == signature(rows[0][1])
    assert [row["bits"] is None for row in table.to_pylist()] == [False] * 6 + [True] * 2

    monkeypatch.setattr(signatures, "signature", None)  # would fail, were it called
    assert find(dataset, files, here=True).compared == len(rows)


def test_texts_repeat_by_their_letters(tmp_path: Path) -> None:
    texts = ["one", "two", "One", "one", "", "two ", "", "one"]
    rows = [{"id": str(i), "text": t, "source": "s"} for i, t in enumerate(texts)]
    dataset = Store(tmp_path).dataset("text/some")
    stats = {"rows": 8, "read": 9, "bytes": sum(len(t) for t in texts), "set_aside": {"x": 1}}
    record = dataset.write_part(MARK, "0", pa.Table.from_pylist(rows, TEXT_SCHEMA), stats=stats)
    found = find(dataset, [record.file], sizes=SMALL, here=True)
    of = {row["row"]: row["of"] for row in listed(dataset, [record.file], found)}
    assert of == {3: "0", 6: "4", 7: "0"} and found.counts == {SAME_BYTES: 3}
    (after,) = drop_duplicates.remove(dataset, CLEAN, [record], found, here=True)
    assert after.stats == {"rows": 5, "read": 9, "bytes": 13, "set_aside": {SAME_BYTES: 3, "x": 1},
                           "stages": {"duplicates": 3}}  # fmt: skip


# -- dropping -------------------------------------------------------------------------------------


def published(dataset: Dataset, records: Sequence[PartRecord]) -> Commit:
    return dataset.publish(CLEAN, records, job="t", schema=IMAGE_SCHEMA, stats={}, config={})


def test_parts_lose_their_duplicates(tmp_path: Path, drawn: list[tuple[str, bytes]]) -> None:
    store = Store(tmp_path)
    dataset = store.dataset("images/some")
    aside = [{"id": "x", "url": "", "reason": "http 404", "detail": "", "stage": "download"}]
    parts = [drawn[:7], drawn[7:9], drawn[9:15], []]  # the second part has one row that goes
    records = []
    for number, rows in enumerate(parts):
        stats = {"rows": len(rows), "images": len(rows), "captions": 2 * len(rows),
                 "bytes": sum(len(data) for _, data in rows), "read": len(rows) + 1,
                 "set_aside": {"http 404": 1}, "stages": {"download": 1}}  # fmt: skip
        records.append(dataset.write_part(MARK, str(number), image_table(rows), set_aside=aside,
                                          stats=stats))  # fmt: skip
    files = duplicates.in_order(reversed(records))
    assert files == [r.file for r in records]
    found = find(dataset, files, sizes=SMALL, here=True)
    gone = listed(dataset, files, found)
    after = drop_duplicates.remove(dataset, CLEAN, records, found, here=True)
    assert after[3] is records[3]  # nothing to lose: it is the same file
    commit = published(dataset, after)

    ids = [id for rows in parts for id, _ in rows]
    lost = [ids[row["row"]] for row in gone]
    assert dataset.read_table(["id"])["id"].to_pylist() == [i for i in ids if i not in lost]
    set_aside = dataset.read_set_aside()
    duplicate = [row for row in set_aside if row["stage"] == "duplicates"]
    assert [row["id"] for row in duplicate] == lost
    assert duplicate[0]["url"] == "http://x/0/poor" and duplicate[0]["reason"] == SAME_PICTURE
    assert duplicate[0]["detail"].startswith("images/some: 0/first: ")
    assert len(set_aside) == 4 + len(lost)
    for record in after:
        stats, table = record.stats, dataset.store.path(dataset.name, record.file.path)
        rows = pq.read_table(table).to_pylist()
        assert stats["rows"] == stats["images"] == len(rows) == record.file.rows
        assert stats["bytes"] == sum(len(row["image"]["bytes"]) for row in rows)
        assert stats["captions"] == 2 * len(rows)
        assert stats["read"] == stats["rows"] + sum(stats["set_aside"].values())
        assert sum(stats["set_aside"].values()) == sum(stats["stages"].values())

    # The clean parts have their signatures, and nothing in them repeats.
    again = find(dataset, commit.files, here=True)
    assert again.lists == {} and again.compared == commit.rows
    with pytest.raises(ValueError, match="own fingerprint"):
        drop_duplicates.remove(dataset, MARK, records, found, here=True)


def test_finished_steps_are_found_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = random_rows(2, 80)
    dataset = Store(tmp_path / "a").dataset("images/some")
    files = stored(dataset, rows, 30)
    whole = find(dataset, files, sizes=SMALL, here=True)

    other = Store(tmp_path / "b").dataset("images/some")
    assert stored(other, rows, 30) == files
    matched: list[int] = []
    match = duplicates._match

    def stops(search: Any, unit: dict[str, Any]) -> None:
        if len(matched) == 5:
            raise KeyboardInterrupt
        matched.append(unit["number"])
        match(search, unit)

    monkeypatch.setattr(duplicates, "_match", stops)
    with pytest.raises(KeyboardInterrupt):
        find(other, files, sizes=SMALL, here=True)

    def goes_on(search: Any, unit: dict[str, Any]) -> None:
        assert unit["number"] not in matched[:5]
        match(search, unit)

    monkeypatch.setattr(duplicates, "_match", goes_on)
    found = find(other, files, sizes=SMALL, here=True)
    assert found == whole
    assert listed(other, files, found) == listed(dataset, files, whole)
    # The buckets are gone, and a search that is done is only read.
    folder = next(n for n in other.store.list(other.name) if n.startswith("_duplicates-"))
    assert other.store.list(f"{other.name}/{folder}") == ["data-aaaaaaaa", "found.json"]
    monkeypatch.setattr(duplicates, "_deal_all", None)
    assert find(other, files, sizes=Sizes(), here=True) == whole


def test_what_is_wrong_is_said(tmp_path: Path) -> None:
    dataset = Store(tmp_path).dataset("images/some")
    files = stored(dataset, random_rows(1, 4))
    with pytest.raises(StoreError, match="images/none"):
        find(dataset, files, against=["images/none"], here=True)
    signature_files.write(dataset, files[0], signature_files.SCHEMA.empty_table())
    with pytest.raises(ValueError, match="0 signatures, not one for each of 4 rows"):
        find(dataset, files, here=True)
    nothing = find(store_of_none(tmp_path), [], here=True)
    assert nothing == Found(0, {}, {})


def store_of_none(root: Path) -> Dataset:
    return Store(root / "none").dataset("images/none")


@pytest.mark.usefixtures("ray_session")
def test_ray_finds_the_same(tmp_path: Path, drawn: list[tuple[str, bytes]], s3_store: str) -> None:
    answers = []
    for uri, here in ((str(tmp_path), True), (s3_store, False)):
        dataset = Store(uri).dataset("images/some")
        parts = [image_table(drawn[start : start + 60]) for start in range(0, len(drawn), 60)]
        records = [dataset.write_part(MARK, f"{i}", part) for i, part in enumerate(parts)]
        files = [r.file for r in records]
        found = find(dataset, files, sizes=Sizes(60, 900), here=here)
        after = drop_duplicates.remove(dataset, CLEAN, records, found, here=here)
        answers.append((listed(dataset, files, found), json.dumps([r.to_json() for r in after])))
    assert answers[0] == answers[1] and answers[0][0]
