"""Parts: units of input become files of a dataset, on tasks or actors, once each."""

from __future__ import annotations

import os
import signal
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from ray import cloudpickle
from ray.exceptions import RayTaskError

from pipelines.parts import PartOutput, Resources, make_dataset, run_parts, sum_stats
from pipelines.storage import Store, StoreError

PRINT = "f" * 16
SCHEMA = pa.schema([("name", pa.string()), ("square", pa.int64())])

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture(scope="module", autouse=True)
def travelling() -> Iterator[None]:
    """Ray's workers can't import this file: its classes travel as they are."""
    here = sys.modules[__name__]
    cloudpickle.register_pickle_by_value(here)
    yield
    cloudpickle.unregister_pickle_by_value(here)


class Squares:
    """Squares of a unit's numbers; writes down who called it, and may come to harm."""

    def __init__(self, folder: str, harm: str = "", at: str = "") -> None:
        self.folder, self.harm, self.at = Path(folder), harm, at
        self._note("made")

    def _note(self, line: str) -> None:
        with (self.folder / "calls").open("a") as file:
            file.write(f"{line} {os.getpid()}\n")

    def __call__(self, unit: dict[str, Any]) -> PartOutput:
        self._note(unit["name"])
        marker = self.folder / "harmed"
        if unit["name"] == self.at and not marker.exists():
            marker.touch()
            if self.harm == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            raise OSError("the disk is full")
        good = [n for n in unit["numbers"] if n >= 0]
        rows = [{"name": unit["name"], "square": n * n} for n in good]
        aside = [{"id": str(n), "reason": "negative"} for n in unit["numbers"] if n < 0]
        counts = {"read": len(unit["numbers"]), "set_aside": {"negative": len(aside)}}
        return PartOutput(pa.Table.from_pylist(rows, SCHEMA), aside, counts)


def maker(folder: Path, *harm: str) -> Callable[[], Squares]:
    def make() -> Squares:
        return Squares(str(folder), *harm)

    return make


def units(count: int = 5) -> list[dict[str, Any]]:
    return [{"name": f"{n:05d}", "numbers": list(range(-n, n + 2))} for n in range(count)]


def calls(folder: Path) -> list[str]:
    """Names of the units that were worked on, and `made` for each worker."""
    return [line.split()[0] for line in (folder / "calls").read_text().splitlines()]


def make(store: Store, name: str, folder: Path, *harm: str, **changes: Any) -> Any:
    return make_dataset(
        store.dataset(name), job="square", fingerprint=PRINT, config={}, inputs=[],
        units=changes.pop("units", units), make_worker=maker(folder, *harm), schema=SCHEMA,
        **changes,
    )  # fmt: skip


# -- what is made ---------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["local", "s3"])
def test_each_unit_becomes_a_part_in_order(
    kind: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    uri = str(tmp_path / "store") if kind == "local" else request.getfixturevalue("s3_store")
    store = Store(uri)
    commit = make(store, "numbers", tmp_path, extra_stats={"extra": 1})
    assert [f.path.split("/")[-1] for f in commit.files] == [
        f"part-0000{n}.parquet" for n in range(5)
    ]
    rows = store.dataset("numbers").read_table().to_pylist()
    assert rows == [{"name": f"{n:05d}", "square": i * i} for n in range(5) for i in range(n + 2)]
    aside = store.dataset("numbers").read_set_aside()
    assert [row["id"] for row in aside] == [str(-i) for n in range(5) for i in range(n, 0, -1)]
    assert commit.stats == {"read": 30, "set_aside": {"negative": 10}, "extra": 1}
    assert sorted(c for c in calls(tmp_path) if c != "made") == [u["name"] for u in units()]


def test_actors_make_the_same_bytes_as_tasks(tmp_path: Path) -> None:
    folders = {"tasks": Resources(), "one": Resources(actors=1), "two": Resources(actors=2)}
    made = {}
    for name, resources in folders.items():
        (tmp_path / name).mkdir()
        store = Store(tmp_path / name / "store")
        made[name] = make(store, "numbers", tmp_path / name, resources=resources)
        if resources.actors:  # a worker for each actor, not for each part
            assert calls(tmp_path / name).count("made") <= resources.actors
    assert made["tasks"].files == made["one"].files == made["two"].files
    assert made["tasks"].set_aside == made["one"].set_aside == made["two"].set_aside


def test_one_process_makes_the_same_bytes(tmp_path: Path) -> None:
    """And ends what another left half done, with one worker; with none if no part is missing."""
    for name in ("tasks", "here"):
        (tmp_path / name).mkdir()
    tasks = make(Store(tmp_path / "tasks" / "store"), "numbers", tmp_path / "tasks")
    store, folder = Store(tmp_path / "here" / "store"), tmp_path / "here"
    with pytest.raises(OSError, match="the disk is full"):
        make(store, "numbers", folder, "broken", "00002", here=True)
    assert calls(folder) == ["made", "00000", "00001", "00002"]
    found = make(store, "numbers", folder, here=True)
    assert calls(folder)[4:] == ["made", "00002", "00003", "00004"]
    assert found.files == tasks.files and found.stats == tasks.stats
    run_parts(store.dataset("numbers"), PRINT, units(), maker(folder), here=True)
    assert len(calls(folder)) == 8


def test_records_come_in_the_order_of_the_units(tmp_path: Path) -> None:
    dataset = Store(tmp_path / "store").dataset("numbers")
    backwards = units()[::-1]
    records = run_parts(dataset, PRINT, backwards, maker(tmp_path))
    assert [r.name for r in records] == [u["name"] for u in backwards]
    assert [r.file.rows for r in records] == [6, 5, 4, 3, 2]
    assert run_parts(dataset, PRINT, [], maker(tmp_path)) == []


def test_names_must_be_unique(tmp_path: Path) -> None:
    dataset = Store(tmp_path / "store").dataset("numbers")
    with pytest.raises(ValueError, match="numbers: unit names are not unique"):
        run_parts(dataset, PRINT, [*units(2), units(1)[0]], maker(tmp_path))
    assert not (tmp_path / "calls").exists()


# -- again, and after an interruption --------------------------------------------------------------


def test_a_finished_dataset_is_skipped_without_listing_its_units(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path / "store")
    commit = make(store, "numbers", tmp_path)

    def not_asked() -> list[dict[str, Any]]:
        raise AssertionError("units were listed")

    assert make(store, "numbers", tmp_path, units=not_asked) == commit
    assert "numbers: already there (20 rows), skipped" in capsys.readouterr().out
    with pytest.raises(StoreError, match="other inputs or options"):
        make_dataset(
            store.dataset("numbers"), job="square", fingerprint="0" * 16, config={}, inputs=[],
            units=not_asked, make_worker=maker(tmp_path), schema=SCHEMA,
        )  # fmt: skip


@pytest.mark.parametrize("actors", [0, 1])
def test_a_worker_that_fails_ends_the_job_and_finished_parts_stay(
    actors: int, tmp_path: Path
) -> None:
    store = Store(tmp_path / "store")
    resources = Resources(actors=actors)
    with pytest.raises(RayTaskError, match="the disk is full"):
        make(store, "numbers", tmp_path, "fails", "00003", resources=resources)
    assert store.dataset("numbers").find_commit() is None
    left = store.dataset("numbers").finished_parts(PRINT)
    assert "00003" not in left
    before = calls(tmp_path)
    commit = make(store, "numbers", tmp_path, resources=resources)
    again = [c for c in calls(tmp_path)[len(before) :] if c != "made"]
    assert sorted([*left, *again]) == [u["name"] for u in units()]
    (tmp_path / "other").mkdir()
    whole = make(Store(tmp_path / "other" / "store"), "numbers", tmp_path / "other")
    assert commit.files == whole.files and commit.stats == whole.stats


def test_only_missing_parts_are_made(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    dataset = store.dataset("numbers")
    run_parts(dataset, PRINT, units(2), maker(tmp_path))
    run_parts(dataset, "0" * 16, units(), maker(tmp_path))  # another job's are not taken
    before = len(calls(tmp_path))
    commit = make(store, "numbers", tmp_path)
    again = [c for c in calls(tmp_path)[before:] if c != "made"]
    assert sorted(again) == ["00002", "00003", "00004"]
    assert commit.rows == 20 and len(commit.files) == 5


def test_a_part_that_no_unit_names_is_left_out(tmp_path: Path) -> None:
    dataset = Store(tmp_path / "store").dataset("numbers")
    run_parts(dataset, PRINT, units(5), maker(tmp_path))
    assert [r.name for r in run_parts(dataset, PRINT, units(2), maker(tmp_path))] == [
        "00000",
        "00001",
    ]


def test_a_worker_that_is_killed_is_replaced(tmp_path: Path) -> None:
    store = Store(tmp_path / "store")
    commit = make(store, "numbers", tmp_path, "killed", "00002")
    assert (tmp_path / "harmed").exists() and calls(tmp_path).count("00002") == 2
    assert commit.rows == 20
    for file in commit.files:
        assert pq.read_table(store.path("numbers", file.path)).num_rows == file.rows


def test_counts_are_added_up() -> None:
    found = sum_stats(
        [
            {"rows": 2, "set_aside": {"a": 1}},
            {"rows": 3, "set_aside": {"a": 2, "b": 5}, "words": {"7": 1}},
            {},
        ]
    )
    assert found == {"rows": 5, "set_aside": {"a": 3, "b": 5}, "words": {"7": 1}}
    assert sum_stats([]) == {}
