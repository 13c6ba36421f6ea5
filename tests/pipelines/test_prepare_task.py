"""Preparing a split: what is read, in how much memory, and what becomes of the rest."""

from __future__ import annotations

import hashlib
import json
import tracemalloc
from dataclasses import asdict, replace
from pathlib import Path

import pytest

from beit3 import tasks
from beit3.tasks import Example, Problem, Record
from pipelines import prepare_task
from pipelines.prepare_task import PrepareConfig, pack, unpack
from pipelines.sample_world import World, WorldSize, generate
from pipelines.storage import Store, StoreError


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    root = tmp_path_factory.mktemp("world")
    return generate(root, size=WorldSize.tiny(), base_url="http://127.0.0.1:1")


def test_records_are_packed_and_come_back_in_order() -> None:
    items: list[Record | Problem] = [
        Record(str(i), (f"{i}.jpg",), (Example(f"{i}/0", "a caption", {"n": i}),)) for i in range(5)
    ]
    items.insert(2, Problem("malformed record", "no", "line 3"))
    parts, digest = pack(iter(items), 4)
    plain = json.loads(json.dumps([asdict(item) for item in items]))
    assert [unpack(part) for part in parts] == [plain[:4], plain[4:]]
    # As of the whole list: datasets that were prepared before are found again.
    whole = json.dumps(plain, sort_keys=True).encode()
    assert digest == hashlib.sha256(whole).hexdigest() == pack(iter(items), 2)[1]


def test_a_large_split_is_not_held_in_memory(tmp_path: Path) -> None:
    count = 10_000
    with (tmp_path / "train_cls.txt").open("w") as file:
        for i in range(count):
            wnid = f"n{i % 1000:08d}"
            file.write(f"{wnid}/{wnid}_{i} {i + 1}\n")
    tracemalloc.start()
    try:
        parts, _ = pack(tasks.load("imagenet").read(tmp_path, "train"), 1000)
        kept, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert sum(len(unpack(part)) for part in parts) == count
    # Bytes for an image; as dicts of Python's own its record takes more than 1,500.
    assert kept / count < 60 and peak / count < 300


def test_flickr30k_is_found_beside_coco(world: World, tmp_path: Path) -> None:
    annotations = tmp_path / "annotations"
    annotations.mkdir()
    for name in ("coco", "flickr30k"):
        file = f"dataset_{name}.json"
        (annotations / file).write_bytes((world.annotations(name) / file).read_bytes())
    config: PrepareConfig = replace(
        prepare_task.PRESETS["flickr30k"],
        annotations=str(annotations),
        images=str(world.images("flickr30k")),
        store=str(tmp_path / "store"),
        in_process=True,
    )
    commits = prepare_task.run(config)
    assert [c.dataset for c in commits.values()] == [
        f"tasks/flickr30k/{split}" for split in ("train", "val", "test")
    ]
    assert sum(c.rows for c in commits.values()) == world.size.flickr30k
    assert not any(c.stats["set_aside"] for c in commits.values())
    with pytest.raises(ValueError, match="name the dataset or the file"):
        prepare_task.run(replace(config, dataset="", name="either"))
    (annotations / "dataset_flickr30k.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"dataset_flickr30k\.json is missing"):
        prepare_task.run(replace(config, name="other"))
    with pytest.raises(ValueError, match="dataset: vqa has only one"):
        PrepareConfig(task="vqa", dataset="coco")


def test_a_wrong_folder_of_images_is_no_folder_of_missing_images(
    world: World, tmp_path: Path
) -> None:
    config: PrepareConfig = replace(
        prepare_task.PRESETS["captioning"],
        annotations=str(world.annotations("coco")),
        images=str(world.images("coco") / "val2014"),
        store=str(tmp_path / "store"),
        splits=("val",),
        in_process=True,
    )
    with pytest.raises(FileNotFoundError, match=r"none of the first 6 is in .*, such as val2014/"):
        prepare_task.run(config)
    commit = prepare_task.run(replace(config, images=str(world.images("coco"))))["val"]
    assert commit.rows == 6 and not commit.stats["set_aside"]


def test_a_split_without_a_record_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "dev.json").write_text('{"identifier": "1304-0", "sentence": "A circle."}\n')
    config = PrepareConfig(
        task="nlvr2", annotations=str(tmp_path), splits=("val",), store=str(tmp_path / "store"),
        in_process=True,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"nlvr2, val: not a single good record.*'1304-0' is not"):
        prepare_task.run(config)
    (tmp_path / "dev.json").write_text("")
    with pytest.raises(ValueError, match=r"not a single good record in the published files$"):
        prepare_task.run(config)
    with pytest.raises(StoreError):
        Store(tmp_path / "store").dataset("tasks/nlvr2/val").commit()
