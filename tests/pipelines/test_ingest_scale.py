"""Ingestion of fifty thousand records on two nodes into S3, and its Parquet in others' hands."""

from __future__ import annotations

import hashlib
import html
import io
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
import pytest
from PIL import Image
from two_nodes import Driver

from pipelines import data_report
from pipelines.data_report import DataReportConfig
from pipelines.dataset import Commit, Dataset
from pipelines.sample_world import World, WorldSize, generate, serve
from pipelines.storage import Store

pytestmark = pytest.mark.timeout(3_000)

ROWS = 50_000
SECONDS = 1_500  # for the ingestion, on a busy machine
PAIRS = ("cc3m", "cc12m", "sbu", "coco", "vg")
FOLDERS = {**{name: name for name in PAIRS}, "imagenet21k": "imagenet", "text_files": "text"}
"""The world's folder of each source."""
REASONS = {
    "404": "http 404",
    "403": "http 403",
    "html": "not an image (HTML)",
    "truncated": "truncated image",
    "zero": "empty body",
}
"""What the web's failures are called; how many time out depends on the machine, too."""


def test_a_world_of_so_many_rows() -> None:
    size = WorldSize.of_rows(ROWS)
    images = size.cc3m + size.cc12m + size.sbu + size.vg + size.imagenet
    assert images + size.coco_train + size.coco_val + size.coco_test + size.text == ROWS
    with pytest.raises(ValueError, match="at least 500"):
        WorldSize.of_rows(10)


@dataclass
class Ingested:
    world: World
    store: Store
    again: int
    """Requests of a second run."""

    def dataset(self, source: str) -> Dataset:
        folder = "text" if source == "text_files" else "images"
        return self.store.dataset(f"{folder}/{source}")

    def tables(self, source: str) -> Iterator[pd.DataFrame]:
        """The committed files, as pandas reads them from the bucket."""
        for path in self.dataset(source).paths():
            yield pd.read_parquet(path, filesystem=self.store.fs)


@pytest.fixture(scope="module")
def ingested(s3_server: str, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Ingested]:
    """All sources, ingested one after the other, and then once more."""
    root, logs = tmp_path_factory.mktemp("world"), tmp_path_factory.mktemp("logs")
    uri = f"s3://beit3-tests/scale-{root.name}-{time.time_ns()}"
    with serve(root) as server:
        clock = time.monotonic()
        world = generate(root, size=WorldSize.of_rows(ROWS), base_url=server.url)
        clock = _tell("the world", clock)
        configs = [config(world, source, uri) for source in FOLDERS]
        with Driver(logs, configs) as driver:
            driver.finish(SECONDS)
            said = driver.said()
        clock = _tell("ingestion", clock)
        before = server.requests
        with Driver(logs, configs) as driver:
            driver.finish(SECONDS)
            assert driver.said().count("already there") == len(FOLDERS), said
        _tell("ingestion, once more", clock)
        yield Ingested(world, Store(uri), server.requests - before)


def _tell(what: str, since: float) -> float:
    now = time.monotonic()
    print(f"{what}: {now - since:.0f} s")
    return now


def config(world: World, source: str, store: str) -> dict[str, Any]:
    return {
        "source": source,
        "annotations": str(world.annotations(FOLDERS[source])),
        "store": store,
        "allow_loopback": True,
        "report": False,
        "threads": 32,
        "timeout": 5.0,
        "retries": 0,
        "shard_size": 1_000,
    }


def test_hugging_face_reads_a_part_of_which_no_record_was_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    dataset = Store(tmp_path / "store").dataset("images/x")
    schema = pa.schema([("id", pa.string())])
    for name, rows in (("00000", []), ("00001", [{"id": "a"}])):
        dataset.write_part("0" * 16, name, pa.Table.from_pylist(rows, schema))
    files = sorted(str(file) for file in Path(tmp_path).rglob("part-*.parquet"))
    cache = str(tmp_path / "cache")
    opened: Any = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=cache)
    assert opened["id"][:] == ["a"]


@pytest.mark.slow
def test_every_record_is_a_row_or_set_aside(ingested: Ingested) -> None:
    world, rows = ingested.world, 0
    for source, folder in FOLDERS.items():
        commit = ingested.dataset(source).commit()
        malformed = sum(world.expected_malformed.get(folder, {}).values())
        aside = sum(commit.stats.get("set_aside", {}).values())
        rows += commit.stats["read"] - malformed
        assert commit.rows + aside == commit.stats["read"], source
        if source != "text_files":
            assert commit.stats["read"] == world.counts[folder] + malformed, source
        if source in PAIRS:
            _check_failures(world, source, commit)
        if source != "text_files":
            ids = [i for table in ingested.tables(source) for i in table["id"]]
            assert len(set(ids)) == len(ids) == commit.rows, source
            assert source == "imagenet21k" or ids == sorted(ids), source
    assert rows >= ROWS  # a book is more than one document
    assert ingested.again == 0


def _check_failures(world: World, source: str, commit: Commit) -> None:
    expected = world.expected_failures.get(source, {})
    aside = Counter(commit.stats["set_aside"])
    for kind, reason in REASONS.items():
        assert aside[reason] == expected.get(kind, 0), (source, reason)
    assert aside["timed out"] >= expected.get("timeout", 0), source


@pytest.mark.slow
def test_pandas_reads_it_and_the_checksums_hold(ingested: Ingested) -> None:
    for source in FOLDERS:
        for table in ingested.tables(source):
            if source == "text_files":
                found = [hashlib.sha256(text.encode()).hexdigest() for text in table["text"]]
            else:
                found = [hashlib.sha256(image["bytes"]).hexdigest() for image in table["image"]]
                for row in table.iloc[::50].itertuples():
                    with Image.open(io.BytesIO(row.image["bytes"])) as image:
                        image.load()
                        assert image.size == (row.width, row.height)
            assert found == list(table["sha256"])


@pytest.mark.slow
def test_the_report_tells_of_every_record(ingested: Ingested, tmp_path: Path) -> None:
    for source in ("cc12m", "text_files"):
        dataset = ingested.dataset(source)
        asked = DataReportConfig(ingested.store.uri, dataset.name, track=False)
        folder = data_report.run(asked, here=True)
        page = ingested.store.read(f"{folder}/report.html")
        (tmp_path / f"{source}.html").write_bytes(page)
        stats, commit = ingested.store.read_json(f"{folder}/stats.json"), dataset.commit()
        assert stats["kept"] == commit.rows
        assert stats["set_aside"] == sum(commit.stats["set_aside"].values())
        reasons = [reason for of in stats["stages"].values() for reason in of]
        assert sorted(reasons) == sorted(commit.stats["set_aside"])
        assert all(html.escape(reason).encode() in page for reason in reasons)
        assert max(stats["languages"], key=stats["languages"].get) == "en"


@pytest.mark.slow
def test_hugging_face_reads_it_and_decodes_the_images(
    ingested: Ingested, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    import datasets

    datasets.disable_progress_bars()
    for source in FOLDERS:
        dataset = ingested.dataset(source)
        files = []
        for number, file in enumerate(dataset.commit().files):
            local = tmp_path / f"{source}-{number}.parquet"
            local.write_bytes(ingested.store.read(f"{dataset.name}/{file.path}"))
            files.append(str(local))
        cache = str(tmp_path / "cache")
        opened: Any = datasets.load_dataset(
            "parquet", data_files=files, split="train", cache_dir=cache
        )
        assert len(opened) == dataset.commit().rows
        if source == "text_files":
            assert all(opened[:100]["text"])
            continue
        opened = opened.cast_column("image", datasets.Image())
        for row in opened.select(range(0, len(opened), 20)):
            image = row["image"]
            assert (image.mode, image.size) == ("RGB", (row["width"], row["height"]))
            image.load()
        for file in files:
            Path(file).unlink()
