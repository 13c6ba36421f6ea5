"""Failed downloads tried again, duplicates dropped on the way, and a report of each commit."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pipelines import tracking
from pipelines.ingest import IngestConfig, run
from pipelines.sample_world import World, WorldSize, generate, serve
from pipelines.storage import Store, StoreError


@pytest.fixture
def world(tmp_path: Path) -> World:
    with serve(tmp_path / "world") as server:
        return generate(tmp_path / "world", size=WorldSize.tiny(), base_url=server.url)


def config(world: World, tmp_path: Path, **changes: object) -> IngestConfig:
    return replace(
        IngestConfig(
            source="cc3m",
            annotations=str(world.annotations("cc3m")),
            store=str(tmp_path / "store"),
            allow_loopback=True,
            threads=16,
            timeout=3.0,
            retries=0,
            shard_size=10,
            report=False,
        ),
        **changes,  # type: ignore[arg-type]
    )


def mend(world: World, *, but: str = "") -> None:
    """The web is better now: every address has a picture of its own, but for one that is shut."""
    behaviour = world.web / "behaviour.json"
    rng = np.random.default_rng(0)
    for path in json.loads(behaviour.read_text()):
        file = world.web / path.lstrip("/")
        if not file.exists():
            file.parent.mkdir(parents=True, exist_ok=True)
            noise = rng.integers(0, 256, (6, 6, 3), dtype=np.uint8)
            Image.fromarray(noise).resize((96, 96), Image.Resampling.NEAREST).save(file, "JPEG")
    behaviour.write_text(json.dumps({but: "403"} if but else {}))


@pytest.mark.usefixtures("ray_session")
def test_what_failed_is_tried_again_and_committed_anew(world: World, tmp_path: Path) -> None:
    cfg = config(world, tmp_path)
    again = replace(cfg, retry_failed=True)
    dataset = Store(cfg.store).dataset("images/cc3m")
    with pytest.raises(StoreError, match="images/cc3m: not there yet; ingest it without"):
        run(again)
    with serve(world.root, port=world.port):
        first = run(cfg)
    before = dataset.read_table().to_pylist()
    lost = [row for row in dataset.read_set_aside() if row["stage"] in ("download", "decode")]
    assert len(lost) > 5

    ill = next(row["url"] for row in lost if row["reason"] == "http 404")
    ill = ill.removeprefix(f"http://127.0.0.1:{world.port}")
    mend(world, but=ill)
    with serve(world.root, port=world.port) as server:
        second = run(again)
        fetched = server.requests
    still = sum(row["url"].endswith(ill) for row in lost)
    assert fetched == len(lost)  # those, and no others
    rows = dataset.read_table().to_pylist()
    assert rows[: len(before)] == before
    ids = [row["id"] for row in rows[len(before) :]]
    assert sorted(ids) == sorted(row["id"] for row in lost if not row["url"].endswith(ill))

    # Each record is accounted for once, with its newest reason.
    aside = dataset.read_set_aside()
    assert len({row["id"] for row in [*rows, *aside]}) == len(rows) + len(aside)
    assert second.stats["read"] == first.stats["read"] == len(rows) + len(aside)
    assert second.stats["set_aside"] == dict(Counter(row["reason"] for row in aside))
    assert second.stats["stages"] == dict(Counter(row["stage"] for row in aside))
    assert second.stats["set_aside"].get("http 403", 0) == still
    assert second.rows == second.stats["images"] == len(rows)
    (note,) = second.lineage["amendments"]
    assert (note["tried"], note["recovered"]) == (len(lost), len(lost) - still)

    # The plain job finds it done; another try takes what is left.
    assert run(cfg) == second
    mend(world)
    with serve(world.root, port=world.port) as server:
        third = run(again)
        assert server.requests == still
    assert third.rows == second.rows + still
    with serve(world.root, port=world.port):
        assert run(again) == third  # nothing is left


@pytest.mark.usefixtures("ray_session")
def test_duplicates_go_also_when_they_come_late(world: World, tmp_path: Path) -> None:
    """The list names every picture twice; of some the first URL fails at first."""
    file = next(world.annotations("cc3m").glob("*.tsv"))
    lines = file.read_text().splitlines(keepends=True)
    good = [line for line in lines if line.rpartition("\t")[2].startswith("http")]
    file.write_text("".join(good + good))
    cfg = config(world, tmp_path, unique=True)
    with serve(world.root, port=world.port):
        first = run(cfg)
    dataset = Store(cfg.store).dataset("images/cc3m")
    checksums = [row["sha256"] for row in dataset.read_table(["sha256"]).to_pylist()]
    assert len(set(checksums)) == len(checksums) == first.rows
    dropped = [row for row in dataset.read_set_aside() if row["stage"] == "duplicates"]
    assert len(dropped) >= first.rows
    assert first.stats["set_aside"]["duplicate: same bytes"] >= first.rows

    mend(world)
    with serve(world.root, port=world.port):
        second = run(replace(cfg, retry_failed=True))
    checksums = [row["sha256"] for row in dataset.read_table(["sha256"]).to_pylist()]
    assert len(set(checksums)) == len(checksums) == second.rows > first.rows
    aside = dataset.read_set_aside()
    assert second.stats["set_aside"] == dict(Counter(row["reason"] for row in aside))
    assert second.stats["read"] == second.rows + len(aside)


@pytest.mark.usefixtures("ray_session")
def test_a_report_stands_beside_each_commit(world: World, tmp_path: Path) -> None:
    cfg = config(world, tmp_path, report=True)
    with serve(world.root, port=world.port):
        commit = run(cfg)
    store = Store(cfg.store)
    folder = f"reports/images/cc3m/{commit.identity}"
    assert store.read_json(f"{folder}/stats.json")["kept"] == commit.rows
    assert b"http 404" in store.read(f"{folder}/report.html")
    client = tracking.client(tracking.tracking_uri(store))
    experiment = client.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    (logged,) = client.search_runs([experiment.experiment_id])
    assert logged.data.metrics["data/kept"] == commit.rows


def test_what_cant_be_tried_again_is_said() -> None:
    with pytest.raises(ValueError, match="retry_failed: wikipedia is not downloaded"):
        IngestConfig(source="wikipedia", retry_failed=True)
    with pytest.raises(ValueError, match="against: needs unique"):
        IngestConfig(against=("images/cc3m",))
