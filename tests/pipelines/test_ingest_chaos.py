"""Ingestion on two nodes, its processes killed, its store failing: the same dataset every time.

When to kill is a seeded number of finished parts, seen in the store; who dies there is a worker
process, a whole node with its raylet, or the driver with everything, which is then run again. The
bucket keeps every version of every object, so it tells whether a part was made again after it had
been recorded.
"""

from __future__ import annotations

import json
import os
import random
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import boto3
import pyarrow as pa
import pytest
from faulty_proxy import faulty_proxy
from ray import cloudpickle
from two_nodes import Driver

from pipelines.dataset import Dataset, PartRecord
from pipelines.ingest import IngestConfig, run
from pipelines.parts import PartOutput, run_parts
from pipelines.sample_world import Server, World, WorldSize, generate, serve
from pipelines.storage import Store

URLS = 400
PART = 10
SECONDS = 300  # for one run without kills, on a busy machine
PACE = 0.1  # seconds before each answer of the web, so that kills find work under way
TRANSIENT = {"timed out", "connection failed", "incomplete download", "host not found"}

pytestmark = [pytest.mark.timeout(6 * SECONDS)]


@dataclass
class Web:
    world: World
    server: Server

    def config(self, store: str | Path) -> dict[str, Any]:
        """Arguments of an ingestion. A URL is asked for once, and waited for as long as it takes:
        the web's own failures are certain, and none comes from a busy machine."""
        return {
            "source": "cc3m",
            "annotations": str(self.world.annotations("cc3m")),
            "store": str(store),
            "allow_loopback": True,
            "report": False,
            "threads": 4,
            "timeout": 60.0,
            "retries": 0,
            "shard_size": PART,
        }


@pytest.fixture(scope="module")
def web(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Web]:
    root = tmp_path_factory.mktemp("world")
    names = ("cc12m", "sbu", "coco_train", "coco_val", "coco_test", "vg", "flickr30k", "imagenet")
    names += ("synsets", "imagenet1k", "text", "nlvr2")
    size = WorldSize(cc3m=URLS, **dict.fromkeys(names, 1))
    with serve(root) as server, pytest.MonkeyPatch.context() as patch:
        world = generate(root, size=size, base_url=server.url)
        file = world.web / "behaviour.json"
        behaviour = json.loads(file.read_text())
        # Answers that never come would only take time here.
        file.write_text(json.dumps({k: v for k, v in behaviour.items() if v != "timeout"}))
        find, pause = server._http.behaviour, threading.Event()

        def slowly(path: str) -> str:
            pause.wait(PACE)
            return find(path)

        patch.setattr(server._http, "behaviour", slowly)
        yield Web(world, server)


@dataclass
class Found:
    """What an ingestion left: what must be equal whatever happened on the way."""

    rows: list[Any]
    aside: Counter[tuple[str, str]]
    files: list[Any]
    set_aside: list[Any]
    stats: dict[str, Any]
    requests: int = field(default=0, compare=False)
    """How often the web was asked for it."""


def found(dataset: Dataset) -> Found:
    commit = dataset.commit()
    rows = dataset.read_table(["id", "sha256", "captions"]).to_pylist()
    aside = ((row["id"], row["reason"]) for row in dataset.read_set_aside())
    lasting = Counter(pair for pair in aside if pair[1] not in TRANSIENT)
    return Found(rows, lasting, commit.files, commit.set_aside, commit.stats)


@pytest.fixture(scope="module")
def unbroken(web: Web, ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Found:
    """What comes of it where nothing happens."""
    store, before = tmp_path_factory.mktemp("unbroken"), web.server.requests
    run(IngestConfig(**web.config(store)))
    result = found(Store(store).dataset("images/cc3m"))
    result.requests = web.server.requests - before
    assert len(result.rows) > 0.8 * URLS
    assert set(result.stats["set_aside"]).isdisjoint(TRANSIENT)
    return result


class Bucket:
    """A bucket that keeps what is overwritten or deleted."""

    def __init__(self) -> None:
        self.s3: Any = boto3.client("s3")
        self.name = f"chaos-{uuid.uuid4().hex}"
        self.s3.create_bucket(Bucket=self.name)
        self.s3.put_bucket_versioning(
            Bucket=self.name, VersioningConfiguration={"Status": "Enabled"}
        )

    @property
    def uri(self) -> str:
        return f"s3://{self.name}/store"

    def recorded(self) -> Counter[str]:
        """How often each part was recorded as finished."""
        pages = self.s3.get_paginator("list_object_versions").paginate(Bucket=self.name)
        keys = (version["Key"] for page in pages for version in page.get("Versions", ()))
        names = (key.rsplit("/", 1)[1] for key in keys)
        return Counter(name for name in names if name.startswith("_part-"))


@pytest.fixture
def bucket(s3_server: str) -> Bucket:
    return Bucket()


def kill_on_the_way(
    kinds: list[str], rng: random.Random, web: Web, bucket: Bucket, folder: Path
) -> None:
    """Ingest, killing one after the other at drawn numbers of finished parts, to the good end."""
    config = web.config(bucket.uri)
    parts = -(-(URLS + 4) // PART)  # four lines of the annotations are broken
    points = sorted(rng.sample(range(1, parts - 5), len(kinds)))
    left = list(zip(points, kinds, strict=True))
    while True:
        with Driver(folder, [config]) as driver:
            while left and one_kill(driver, *left[0], bucket):
                _, kind = left.pop(0)
                if kind == "driver":
                    break
            else:
                assert not left, f"it ended before {left}: {driver.said()}"
                driver.finish(SECONDS)
                return


def one_kill(driver: Driver, point: int, kind: str, bucket: Bucket) -> bool:
    """Wait for so many parts, then kill; False if the job ended before."""
    deadline = time.monotonic() + SECONDS
    while driver.process.poll() is None:
        assert time.monotonic() < deadline, driver.said()
        if len(bucket.recorded()) >= point:
            if kind == "driver":
                driver.kill()
                return True
            if driver.kill_worker() if kind == "worker" else driver.kill_node():
                return True
        time.sleep(0.01)
    return False


def check(bucket: Bucket, unbroken: Found) -> None:
    again = {name: n for name, n in bucket.recorded().items() if n > 1}
    assert found(Store(bucket.uri).dataset("images/cc3m")) == unbroken
    assert not again, f"made again though they had been recorded: {again}"


@pytest.mark.slow
def test_a_worker_and_the_driver_killed(
    web: Web, unbroken: Found, bucket: Bucket, tmp_path: Path
) -> None:
    kill_on_the_way(["worker", "driver"], random.Random(0), web, bucket, tmp_path)
    check(bucket, unbroken)


@pytest.fixture
def travelling() -> Iterator[None]:
    """Ray's workers can't import this file: its classes travel as they are."""
    module = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(module)
    yield
    cloudpickle.unregister_pickle_by_value(module)


class Dies(Dataset):
    """Its process dies as soon as it has recorded its first part."""

    def write_part(self, *args: Any, **options: Any) -> PartRecord:
        record = super().write_part(*args, **options)
        died = Path(self.store.root) / "died"
        if not died.exists():
            died.touch()
            os._exit(1)
        return record


@dataclass(frozen=True)
class Noted:
    """A worker that notes what it makes."""

    log: Path

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        with self.log.open("a") as log:
            log.write(f"{unit['name']}\n")
        return PartOutput(pa.table({"number": [1]}))


@pytest.mark.usefixtures("ray_session", "travelling")
def test_a_worker_killed_between_its_record_and_its_end(tmp_path: Path) -> None:
    log = tmp_path / "log"
    units = [{"name": name} for name in ("a", "b", "c")]
    records = run_parts(Dies(Store(tmp_path), "images/x"), "f" * 16, units, partial(Noted, log))
    assert [record.name for record in records] == ["a", "b", "c"]
    assert sorted(log.read_text().split()) == ["a", "b", "c"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("seed", "kinds"),
    [
        (1, ["worker"] * 7),
        (2, ["node"] * 5),
        (3, ["driver"] * 4),
        (4, ["worker", "node", "worker", "driver", "node", "worker"]),
    ],
    ids=["workers", "nodes", "drivers", "all"],
)
def test_killed_again_and_again(
    seed: int, kinds: list[str], web: Web, unbroken: Found, bucket: Bucket, tmp_path: Path
) -> None:
    rng = random.Random(seed)
    kill_on_the_way(rng.sample(kinds, len(kinds)), rng, web, bucket, tmp_path)
    check(bucket, unbroken)


@pytest.mark.slow
def test_a_store_that_fails_every_twentieth_time(
    web: Web, unbroken: Found, bucket: Bucket, s3_server: str, tmp_path: Path
) -> None:
    before = web.server.requests
    with faulty_proxy(s3_server, 0.05) as faults:
        with Driver(tmp_path, [web.config(bucket.uri)], AWS_ENDPOINT_URL=faults.url) as driver:
            driver.finish(SECONDS)
        assert faults.failed > 5
    assert found(Store(bucket.uri).dataset("images/cc3m")) == unbroken
    assert web.server.requests - before == unbroken.requests  # no part was made twice
