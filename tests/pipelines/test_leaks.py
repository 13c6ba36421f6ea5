"""Held-out pictures are found whatever their encoding, and nothing else is."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image, ImageOps

from pipelines import ingest, leaks
from pipelines.images import CleanImage, clean_image
from pipelines.ingest import IngestConfig
from pipelines.leaks import HeldOutPictures, Source
from pipelines.sample_world import World, WorldSize, generate, picture, serve
from pipelines.signatures import Signature, signature
from pipelines.storage import Store, StoreError

EXAMPLES = pa.schema(
    [
        ("id", pa.string()),
        ("images", pa.list_(pa.struct([("bytes", pa.binary()), ("path", pa.string())]))),
        ("label", pa.int32()),
    ]
)
TASK = "tasks/coco_captioning/test"


def hold_out(store: Store, name: str, rows: list[tuple[str, list[bytes]]], mark: str = "m" * 16):
    """Commit a task's dataset in two files."""
    dataset = store.dataset(name)
    parts = []
    for number in range(2):
        table = pa.Table.from_pylist(
            [
                {"id": id, "images": [{"bytes": b, "path": f"{id}.jpg"} for b in images]}
                for id, images in rows[number::2]
            ],
            EXAMPLES,
        )
        parts.append(dataset.write_part(mark, f"{number}", table))
    return dataset.publish(mark, parts, job="test", schema=EXAMPLES, stats={}, config={})


def cleaned(data: bytes) -> bytes:
    image = clean_image(data)
    assert isinstance(image, CleanImage), image
    return image.data


def again(data: bytes, scale: float, quality: int, format: str = "JPEG") -> bytes:
    """The picture at another size and quality."""
    with Image.open(io.BytesIO(data)) as stored:
        image = ImageOps.exif_transpose(stored).convert("RGB")
    size = (round(image.width * scale), round(image.height * scale))
    out = io.BytesIO()
    image.resize(size, Image.Resampling.BICUBIC).save(out, format, quality=quality)
    return out.getvalue()


@pytest.fixture(scope="module")
def held() -> list[bytes]:
    return [picture(5, f"coco/test/{i}").file() for i in range(60)]


@pytest.fixture(scope="module")
def pictures(held: list[bytes]) -> HeldOutPictures:
    signed = [signature(cleaned(data)) for data in held]
    origins = [("test", str(i)) for i in range(len(held))]
    return HeldOutPictures(origins, [s.bits for s in signed], [s.colours for s in signed])


# -- signatures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "copy",
    [
        lambda data: data,
        lambda data: again(data, 0.9, 75),
        lambda data: again(data, 1.0, 50),
        lambda data: again(data, 1.4, 90),
        lambda data: again(data, 0.8, 80, "WEBP"),
        lambda data: again(data, 1.0, 100, "PNG"),
    ],
    ids=["copy", "reencoded", "poor", "enlarged", "webp", "png"],
)
def test_copies_are_found(
    copy: Callable[[bytes], bytes], held: list[bytes], pictures: HeldOutPictures
) -> None:
    for i, data in enumerate(held):
        match = pictures.find(cleaned(copy(data)))
        assert match is not None and match.id == str(i)


def test_other_scenes_are_not(pictures: HeldOutPictures) -> None:
    sources = ("cc3m", "cc12m", "sbu", "coco/train", "vg", "flickr30k", "nlvr2")
    for source in sources:
        for i in range(60):
            name = f"{source}/{i}/left" if source == "nlvr2" else f"{source}/{i}"
            assert pictures.find(cleaned(picture(5, name).file())) is None, name


def test_empty_backgrounds_are_told_apart_by_colour() -> None:
    def plain(colour: tuple[int, int, int]) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", (64, 48), colour).save(out, "PNG")
        return cleaned(out.getvalue())

    red, blue = signature(plain((200, 30, 30))), signature(plain((30, 30, 200)))
    assert red.bits == blue.bits
    only_red = HeldOutPictures([("a", "1")], [red.bits], [red.colours])
    assert only_red.find(plain((200, 30, 30))) is not None
    assert only_red.find(plain((30, 30, 200))) is None


def test_nothing_is_the_same_as_nothing(held: list[bytes]) -> None:
    assert HeldOutPictures([], [], []).find(cleaned(held[0])) is None


def test_the_nearest_wins_among_many() -> None:
    """Against the plain loop, over random signatures and near copies of them."""
    random = np.random.default_rng(0)
    bits = [random.bytes(32) for _ in range(500)]
    colours = [random.bytes(192) for _ in range(500)]
    found = HeldOutPictures([("d", str(i)) for i in range(500)], bits, colours)
    for i in range(0, 500, 50):
        flipped = np.unpackbits(np.frombuffer(bits[i], np.uint8))
        flipped[random.choice(256, leaks.MOST_BITS + i // 50 - 4, replace=False)] ^= 1
        near = Signature(np.packbits(flipped).tobytes(), colours[i])
        distance = (int.from_bytes(near.bits) ^ int.from_bytes(bits[i])).bit_count()
        match = found.nearest(near)
        assert (match is not None) == (distance <= leaks.MOST_BITS)
        assert match is None or (match.id, match.bits, match.colour) == (str(i), distance, 0)


# -- datasets -------------------------------------------------------------------------------------


def test_signatures_are_made_once(
    tmp_path: Path, held: list[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    # Two questions about one picture, an example with two pictures, a broken one, none.
    rows = [("a", [held[0]]), ("b", [held[0]]), ("c", held[1:3]), ("d", [b"broken"]), ("e", [])]
    commit = hold_out(store, TASK, rows)
    found = leaks.sources(store, [TASK, TASK])
    assert found == [Source(TASK, commit.identity)]
    leaks.prepare(store, found)
    pictures = leaks.load(store.uri, tuple(found))
    assert len(pictures) == 3
    assert [pictures.find(cleaned(held[i])) is not None for i in range(4)] == [True] * 3 + [False]
    match = pictures.find(cleaned(again(held[2], 0.9, 75)))
    assert match is not None and (match.dataset, match.id) == (TASK, "c")

    def never(*_: object) -> None:
        raise AssertionError("made again")

    monkeypatch.setattr(leaks, "_sign", never)
    leaks.prepare(store, found)


def test_what_cant_be_held_out_is_said(tmp_path: Path) -> None:
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="does not exist"):
        leaks.sources(store, [TASK])
    dataset = store.dataset("text/some")
    part = dataset.write_part("m" * 16, "0", pa.table({"id": ["1"], "text": ["x"]}))
    dataset.publish("m" * 16, [part], job="t", schema=EXAMPLES, stats={}, config={})
    with pytest.raises(StoreError, match="no column 'images'"):
        leaks.sources(store, ["text/some"])


# -- ingestion ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    root = tmp_path_factory.mktemp("world")
    size = replace(WorldSize.tiny(), cc12m=60)  # a second block of leaks begins at 50
    with serve(root) as server:
        yield generate(root, size=size, base_url=server.url)


def coco_tests(world: World) -> list[tuple[str, list[bytes]]]:
    return [
        (f"{i}", [picture(world.seed, f"coco/test/{i}").file()])
        for i in range(world.size.coco_test)
    ]


@pytest.mark.usefixtures("ray_session")
def test_leaks_never_reach_a_dataset(world: World, tmp_path: Path) -> None:
    store = Store(tmp_path)
    held = hold_out(store, TASK, coco_tests(world))
    config = IngestConfig(
        report=False,
        source="cc12m",
        annotations=str(world.annotations("cc12m")),
        store=str(tmp_path),
        threads=16,
        timeout=3.0,
        retries=0,
        shard_size=25,
        allow_loopback=True,
        held_out=(TASK,),
    )
    commit = ingest.run(config)
    expected = world.expected_leaks["cc12m"]
    reason = f"held out: same picture as {TASK}"
    assert expected["copy"] and expected["reencoded"]
    assert commit.stats["set_aside"][reason] == sum(expected.values())
    dataset = store.dataset("images/cc12m")
    aside = [row for row in dataset.read_set_aside() if row["reason"] == reason]
    assert {row["stage"] for row in aside} == {"filter"}
    # Copies stand at the sixth place of fifty, re-encoded ones at the seventh, and no others.
    assert [int(Path(row["url"]).stem) % 50 for row in aside] == [5, 6] * (len(aside) // 2)
    assert [row["detail"].partition(":")[0] for row in aside] == [str(i) for i in range(len(aside))]
    assert {"dataset": TASK, "commit": held.identity} in commit.lineage["inputs"]

    # Held-out data decide the output, so the same name can't be had without them.
    assert ingest.run(config) == commit
    with pytest.raises(StoreError, match="other inputs or options"):
        ingest.run(replace(config, held_out=()))
    plain = ingest.run(replace(config, held_out=(), name="plain"))
    assert plain.rows == commit.rows + sum(expected.values())


@pytest.mark.usefixtures("ray_session")
def test_archives_are_searched_too(world: World, tmp_path: Path) -> None:
    store = Store(tmp_path)
    config = IngestConfig(
        report=False,
        source="imagenet21k",
        annotations=str(world.annotations("imagenet")),
        store=str(tmp_path),
    )
    all_rows = ingest.run(replace(config, name="all"))
    rows = store.dataset("images/all").read_table(["id", "image"]).to_pylist()
    leaked = rows[3]
    hold_out(store, TASK, [("x", [again(leaked["image"]["bytes"], 0.9, 75)])])
    commit = ingest.run(replace(config, held_out=(TASK,)))
    assert commit.rows == all_rows.rows - 1
    assert leaked["id"] not in store.dataset("images/imagenet21k").read_table(["id"])["id"]
