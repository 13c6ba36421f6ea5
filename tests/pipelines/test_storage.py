"""Stores, datasets and commits, on a local folder and on S3's protocol."""

from __future__ import annotations

import hashlib
import io
import json
import pickle
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from faulty_proxy import faulty_proxy

from pipelines import dataset as datasets
from pipelines import s3, storage
from pipelines.dataset import ROW_GROUP_ROWS, Commit, Dataset
from pipelines.lineage import code_version, fingerprint
from pipelines.storage import Store, StoreError

PRINT = fingerprint("job", {"seed": 0})
OTHER = fingerprint("job", {"seed": 1})
SCHEMA = pa.schema([("id", pa.int64()), ("text", pa.string())])


@pytest.fixture(params=["local", "s3"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    if request.param == "s3":
        return Store(request.getfixturevalue("s3_store"))
    return Store(tmp_path / "a store")  # the space must survive the way through the URI


def rows(start: int, count: int) -> pa.Table:
    ids = list(range(start, start + count))
    return pa.table({"id": ids, "text": [f"row {i}" for i in ids]}, SCHEMA)


def publish(dataset: Dataset, print_of: str = PRINT, parts: int = 2, count: int = 3) -> Commit:
    records = [
        dataset.write_part(print_of, f"{n:05d}", rows(n * count, count)) for n in range(parts)
    ]
    return dataset.publish(
        print_of, records, job="job", schema=SCHEMA, stats={"rows": parts * count}, config={"a": 1}
    )


# -- objects -------------------------------------------------------------------------------------


def test_objects_are_written_listed_read_and_deleted(store: Store) -> None:
    store.check_writable()
    assert store.list("folder") == []
    assert not store.exists("folder/a.json")
    store.write_json("folder/a.json", {"x": [1, 2]})
    store.write("folder/deep/b", memoryview(b"bytes"))
    assert store.exists("folder/a.json")
    assert store.read_json("folder/a.json") == {"x": [1, 2]}
    assert store.read("folder/deep/b") == b"bytes"
    assert store.list("folder") == ["a.json", "deep"]
    assert store.list("folder", recursive=True) == ["a.json", "deep", "deep/b"]
    store.write("folder/deep/b", b"others")
    assert store.read("folder/deep/b") == b"others"
    store.delete("folder/a.json")
    store.delete("folder/a.json")  # nothing there: nothing happens
    assert store.list("folder") == ["deep"]
    store.delete("folder")
    assert not store.exists("folder/deep/b")
    with pytest.raises(OSError):
        store.read("folder/deep/b")


def test_upload_and_download(store: Store, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"12345")
    record = store.upload(tmp_path / "file", "up/sub/file")
    assert (record.path, record.bytes) == ("up/sub/file", 5)
    assert record.sha256 == hashlib.sha256(b"12345").hexdigest()
    assert store.download("up/sub/file", tmp_path / "down" / "file") == record
    assert (tmp_path / "down" / "file").read_bytes() == b"12345"
    with pytest.raises(StoreError, match="up/sub/other"):
        store.download("up/sub/other", tmp_path / "down" / "other")


@pytest.mark.parametrize("size", [0, 6 << 20, (15 << 20) + 7])
def test_a_file_of_several_pieces(
    size: int, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PIECE_BYTES", 6 << 20)
    monkeypatch.setattr(storage, "PIECES_AT_ONCE", 2)
    data = np.random.default_rng(0).bytes(size)
    (tmp_path / "file").write_bytes(data)
    record = store.upload(tmp_path / "file", "file")
    assert (record.bytes, record.sha256) == (size, hashlib.sha256(data).hexdigest())
    assert store.read("file") == data
    assert store.download("file", tmp_path / "back") == record
    assert (tmp_path / "back").read_bytes() == data


def test_an_upload_that_breaks_off_leaves_nothing(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(storage, "PIECE_BYTES", 6 << 20)
    (tmp_path / "file").write_bytes(bytes(20 << 20))

    def breaks(pieces: Iterator[bytes], target: Any, name: str) -> None:
        target.write(next(pieces))
        raise OSError("the disk is gone")

    monkeypatch.setattr(storage, "_copied", breaks)
    with pytest.raises(OSError, match="the disk is gone"):
        store.upload(tmp_path / "file", "file")
    assert store.list("") == []


def test_check_writable_leaves_nothing(store: Store) -> None:
    store.write("keep", b"")
    store.check_writable()
    assert store.list("") == ["keep"]


def test_a_store_can_be_sent_to_another_process(store: Store) -> None:
    store.write("a", b"1")
    copy = pickle.loads(pickle.dumps(store))
    assert copy.uri == store.uri
    assert copy.read("a") == b"1"
    assert pickle.loads(pickle.dumps(store.dataset("d"))).uri == f"{store.uri}/d"


def test_a_store_has_one_name_however_it_is_written(tmp_path: Path) -> None:
    plain, uri, slash = Store(tmp_path), Store(tmp_path.as_uri()), Store(f"{tmp_path}/")
    assert plain.uri == uri.uri == slash.uri
    assert plain.path("a", "b") == str(tmp_path / "a" / "b")


def test_an_unknown_scheme_is_refused() -> None:
    with pytest.raises(StoreError, match="store nowhere://x"):
        Store("nowhere://x")


def test_an_unwritable_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")  # no folder can be made below it, whoever asks
    store = Store(tmp_path / "file" / "store")
    with pytest.raises(StoreError, match="can't write there") as error:
        store.check_writable()
    assert store.uri in str(error.value)


def test_a_missing_bucket_is_named(s3_server: str) -> None:
    store = Store("s3://no-such-bucket/prefix")
    with pytest.raises(StoreError, match="s3://no-such-bucket/prefix: can't write there"):
        store.check_writable()


def test_a_bucket_that_may_only_be_read_is_named(
    s3_server: str, s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    Store(s3_store).write("a", b"1")
    with faulty_proxy(s3_server, 0.0, forbidden=("PUT", "POST", "DELETE")) as proxy:
        monkeypatch.setenv("AWS_ENDPOINT_URL", proxy.url)
        store = Store(s3_store)
        assert store.read("a") == b"1"
        with pytest.raises(StoreError, match=f"store {s3_store}: can't write there.*credentials"):
            store.check_writable()


# -- the atomic step -----------------------------------------------------------------------------


def test_a_commit_to_a_server_that_is_gone_names_the_object(
    s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(s3, "ATTEMPTS", 1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with pytest.raises(StoreError, match=f"{s3_store}/a: Could not connect"):
        Store(s3_store).put_if_absent("a", b"1")


def test_a_commit_goes_to_the_endpoint_in_the_uri(
    s3_server: str, s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("AWS_ENDPOINT_URL", "AWS_ENDPOINT_URL_S3"):
        monkeypatch.delenv(name, raising=False)
    address = s3_server.removeprefix("http://")
    store = Store(f"{s3_store}?endpoint_override={address}&scheme=http&region=us-east-1")
    assert store.put_if_absent("a", b"1") and not store.put_if_absent("a", b"2")
    assert store.read("a") == b"1"


def test_what_lies_beside_a_folder_in_a_store_comes_with_it(tmp_path: Path) -> None:
    for name in ("vg/regions.json", "coco/dataset_coco.json"):
        (tmp_path / name).parent.mkdir()
        (tmp_path / name).write_text(name)
    beside = "../coco/dataset_coco.json"
    with storage.local_folder(f"file://{tmp_path}/vg", beside) as folder:
        assert (folder / "regions.json").read_text() == "vg/regions.json"
        assert (folder / beside).read_text() == "coco/dataset_coco.json"
        assert folder.parent != tmp_path
    with storage.local_folder(f"file://{tmp_path}/coco", beside) as folder:
        assert (folder / beside).is_file()
    with storage.local_folder(f"file://{tmp_path}/vg", "../none.json") as folder:
        assert not (folder / "../none.json").exists()


def test_put_if_absent_never_overwrites(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    # As a writer sees the store that looked before its rival wrote.
    monkeypatch.setattr(Store, "exists", lambda self, name: False)
    assert store.put_if_absent("a/commit", b"first")
    assert not store.put_if_absent("a/commit", b"second")
    assert store.read("a/commit") == b"first"


def test_of_many_writers_exactly_one_wins(tmp_path: Path) -> None:
    store, writers = Store(tmp_path), 8
    for attempt in range(20):
        together = threading.Barrier(writers)
        won: list[int] = []

        def write(
            number: int, name: str = f"c/{attempt}", meet: threading.Barrier = together
        ) -> None:
            meet.wait()
            if store.put_if_absent(name, str(number).encode()):
                won.append(number)  # noqa: B023 (threads end within the loop)

        threads = [threading.Thread(target=write, args=(n,)) for n in range(writers)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(won) == 1
        assert store.read(f"c/{attempt}") == str(won[0]).encode()


def test_a_put_that_fails_is_reported(s3_server: str) -> None:
    store = Store("s3://no-such-bucket/prefix")
    with pytest.raises(StoreError, match="s3://no-such-bucket/prefix/a"):
        store.put_if_absent("a", b"")


def test_a_write_that_fails_leaves_the_old_object(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path)
    store.write("a", b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        with pytest.raises(OSError, match="disk full"):
            store.write("a", b"new")
    assert store.read("a") == b"old"
    assert store.list("") == ["a"]


# -- datasets ------------------------------------------------------------------------------------


def test_a_dataset_is_seen_from_its_commit_on(store: Store) -> None:
    dataset = store.dataset("images/d")
    readers: list[Callable[[], object]] = [
        dataset.commit,
        dataset.paths,
        dataset.read_table,
        dataset.read_set_aside,
    ]
    for read in readers:
        with pytest.raises(StoreError, match="images/d does not exist: run the job"):
            read()
    record = dataset.write_part(PRINT, "00000", rows(0, 3))
    for read in readers:
        with pytest.raises(StoreError, match="images/d is half written: run the job"):
            read()
    assert dataset.find_commit() is None
    assert dataset.finished(PRINT) is None
    published = dataset.publish(
        PRINT, [record], job="job", schema=SCHEMA, stats={"rows": 3}, config={"a": 1}
    )
    assert dataset.commit() == published == dataset.finished(PRINT)
    assert dataset.read_table().to_pylist() == rows(0, 3).to_pylist()


def test_a_commit_says_what_the_dataset_is(store: Store) -> None:
    dataset = store.dataset("d")
    records = [dataset.write_part(PRINT, n, rows(i, 3)) for i, n in enumerate(["b", "a"])]
    dataset.publish(
        PRINT,
        records,
        job="job",
        schema=SCHEMA,
        stats={"kept": 6},
        config={"seed": 0},
        inputs=[{"dataset": "x", "identity": "1234"}],
    )
    commit = dataset.commit()
    assert (commit.dataset, commit.job, commit.fingerprint) == ("d", "job", PRINT)
    assert [f.path.split("/")[-1] for f in commit.files] == ["part-a.parquet", "part-b.parquet"]
    assert commit.rows == 6
    assert commit.stats == {"kept": 6}
    assert commit.schema == str(SCHEMA)
    assert commit.lineage == {
        "inputs": [{"dataset": "x", "identity": "1234"}],
        "config": {"seed": 0},
        "code": code_version(),
    }


def test_records_describe_the_stored_bytes(store: Store) -> None:
    dataset = store.dataset("d")
    record = dataset.write_part(PRINT, "00000", rows(0, 600), set_aside=[{"id": 1, "reason": "r"}])
    assert record.set_aside is not None
    for file, count in ((record.file, 600), (record.set_aside, 1)):
        data = store.read(f"d/{file.path}")
        assert file.bytes == len(data)
        assert file.sha256 == hashlib.sha256(data).hexdigest()
        assert file.rows == pq.read_metadata(io.BytesIO(data)).num_rows == count


def test_row_groups_are_small(store: Store) -> None:
    dataset = store.dataset("d")
    publish(dataset, parts=1, count=600)
    metadata = pq.read_metadata(dataset.paths()[0], filesystem=store.fs)
    sizes = [metadata.row_group(i).num_rows for i in range(metadata.num_row_groups)]
    assert sizes == [ROW_GROUP_ROWS, ROW_GROUP_ROWS, 600 - 2 * ROW_GROUP_ROWS]


def test_a_committed_dataset_never_changes(store: Store) -> None:
    dataset = store.dataset("d")
    first = publish(dataset)
    body = store.read("d/_commits/00000000.json")
    assert publish(dataset) == first  # an equal job that ran beside it
    with pytest.raises(StoreError, match=r"d exists and was made by 'job' from other inputs"):
        publish(dataset, OTHER, count=5)
    with pytest.raises(StoreError, match="choose another name or store"):
        dataset.finished(OTHER)
    assert store.read("d/_commits/00000000.json") == body
    assert dataset.read_table().num_rows == 6


def test_finished_parts_are_found_again(store: Store) -> None:
    dataset = store.dataset("d")
    assert dataset.finished_parts(PRINT) == {}
    aside = [{"id": 7, "reason": "broken"}]
    written = {
        name: dataset.write_part(PRINT, name, rows(0, 2), set_aside=aside, stats={"n": {"x": 1}})
        for name in ("00000", "00002")
    }
    dataset.write_part(OTHER, "00001", rows(0, 2))  # another job's
    assert dataset.finished_parts(PRINT) == written
    assert set(dataset.finished_parts(OTHER)) == {"00001"}
    # A part whose record was not written yet counts for nothing.
    store.delete(f"d/data-{PRINT[:8]}/_part-00002.json")
    assert set(dataset.finished_parts(PRINT)) == {"00000"}


def test_read_table(store: Store) -> None:
    dataset = store.dataset("d")
    records = [dataset.write_part(PRINT, n, rows(i * 3, c)) for i, (n, c) in enumerate(_SIZES)]
    dataset.publish(PRINT, records, job="job", schema=SCHEMA, stats={}, config={})
    assert dataset.read_table()["id"].to_pylist() == [0, 1, 2, 6, 7]
    assert dataset.read_table(["text"]).column_names == ["text"]


_SIZES = (("a", 3), ("b", 0), ("c", 2))


@pytest.mark.parametrize(("count", "taken"), [(0, 0), (2, 2), (3, 3), (4, 4), (9, 5)])
def test_first_rows_are_read_as_they_are_taken(
    count: int, taken: int, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(datasets, "ROW_GROUP_ROWS", 2)
    dataset = store.dataset("d")
    records = [dataset.write_part(PRINT, n, rows(i * 3, c)) for i, (n, c) in enumerate(_SIZES)]
    dataset.publish(PRINT, records, job="job", schema=SCHEMA, stats={}, config={})
    found = dataset.first_rows(count)
    if count <= 3:
        store.delete(f"d/{records[2].file.path}")  # not opened
    assert [row["id"] for row in found] == [0, 1, 2, 6, 7][:taken]


def test_read_set_aside(store: Store) -> None:
    dataset = store.dataset("d")
    first = dataset.write_part(PRINT, "0", rows(0, 1), set_aside=[{"id": 1, "reason": "broken"}])
    second = dataset.write_part(PRINT, "1", rows(1, 1))
    third = dataset.write_part(PRINT, "2", rows(2, 1), set_aside=[{"id": 2, "reason": "small"}])
    parts = [third, first, second]
    dataset.publish(PRINT, parts, job="job", schema=SCHEMA, stats={}, config={})
    assert dataset.read_set_aside() == [
        {"id": 1, "reason": "broken"},
        {"id": 2, "reason": "small"},
    ]


def test_an_empty_dataset_can_be_read(store: Store) -> None:
    dataset = store.dataset("d")
    dataset.publish(PRINT, [], job="job", schema=SCHEMA, stats={}, config={})
    assert dataset.read_table().num_rows == 0
    assert dataset.read_set_aside() == []


def test_identity_is_that_of_the_content(store: Store) -> None:
    commit = publish(store.dataset("d"))
    assert publish(store.dataset("elsewhere"), OTHER).identity == commit.identity
    assert publish(store.dataset("longer"), count=4).identity != commit.identity
    files = commit.files[::-1]
    assert replace(commit, files=files).identity != commit.identity  # order decides batches


def test_a_newer_format_is_refused(store: Store) -> None:
    dataset = store.dataset("d")
    publish(dataset)
    raw = store.read_json("d/_commits/00000000.json")
    store.write_json("d/_commits/00000000.json", {**raw, "format_version": 99})
    with pytest.raises(StoreError, match="d: written by a newer beit3-ray"):
        dataset.commit()


def test_no_drafts_are_left(tmp_path: Path) -> None:
    store = Store(tmp_path)
    publish(store.dataset("d"))
    publish(store.dataset("d"))
    store.put_if_absent("x", b"")
    store.put_if_absent("x", b"")
    names = sorted(p.name for p in tmp_path.rglob("*") if p.is_file())
    assert names == sorted(
        ["00000000.json", "x"]
        + [f for n in ("00000", "00001") for f in (f"part-{n}.parquet", f"_part-{n}.json")]
    )


def test_fingerprints_depend_on_job_configuration_and_inputs() -> None:
    prints = {
        fingerprint("a", {"x": 1}, ["i"]),
        fingerprint("b", {"x": 1}, ["i"]),
        fingerprint("a", {"x": 2}, ["i"]),
        fingerprint("a", {"x": 1}, ["j"]),
        fingerprint("a", {"x": 1}, ["i", "j"]),
        fingerprint("a", {"x": 1}, ["j", "i"]),
    }
    assert len(prints) == 6
    assert fingerprint("a", {"x": 1, "y": 2}) == fingerprint("a", {"y": 2, "x": 1})


def test_part_records_survive_json(store: Store) -> None:
    record = store.dataset("d").write_part(
        PRINT, "0", rows(0, 1), set_aside=[{"reason": "r"}], stats={"a": 1}
    )
    assert type(record).from_json(record.to_json()) == record
    assert json.loads(record.to_json())["file"]["rows"] == 1


def test_a_dataset_grows_by_a_further_commit(store: Store) -> None:
    dataset = store.dataset("d")
    first = publish(dataset, parts=1, count=3)
    more = dataset.write_part(PRINT, "00001", rows(3, 2))

    def amend() -> Commit:
        return dataset.amend(
            files=[*first.files, more.file], set_aside=[], stats={"rows": 5}, note={"why": "more"}
        )

    second = amend()
    assert dataset.commit() == second == dataset.finished(PRINT)
    assert second.identity != first.identity
    assert [a["why"] for a in second.lineage["amendments"]] == ["more"]
    assert dataset.read_table().num_rows == 5
    assert store.list("d/_commits") == ["00000000.json", "00000001.json"]
    assert list(dataset.commits()) == [second, first]
    assert not list(store.dataset("nothing").commits())
    # A job that listed the commits before another amended can't commit what it made of them.
    stale = Dataset(store, "d")
    stale._versions = lambda: ["00000000.json"]  # type: ignore[method-assign]
    with pytest.raises(StoreError, match="another job amended it meanwhile"):
        stale.amend(files=first.files, set_aside=[], stats={}, note={})
    assert dataset.commit() == second


# -- a bucket with bad days ------------------------------------------------------------------------


def test_errors_of_the_server_change_nothing_but_time(
    s3_server: str, s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One request in seven gets a 500 or 503, half of these though it was done."""
    with faulty_proxy(s3_server, share=0.15) as faults:
        monkeypatch.setenv("AWS_ENDPOINT_URL", faults.url)
        store = Store(s3_store)
        large = bytes(range(256)) * 50_000  # goes up in parts
        contents = {f"a/{i}": f"object {i}".encode() * 50 for i in range(30)} | {"a/large": large}
        for name, data in contents.items():
            store.write(name, data)
        for number in range(10):
            store.put_if_absent(f"b/{number}", b"mine")  # False where its own put was done unseen
            assert not store.put_if_absent(f"b/{number}", b"theirs")
        assert faults.failed > 10
    monkeypatch.setenv("AWS_ENDPOINT_URL", s3_server)
    store = Store(s3_store)
    assert store.list("a") == sorted(n.removeprefix("a/") for n in contents)
    assert all(store.read(name) == data for name, data in contents.items())
    assert all(store.read(f"b/{number}") == b"mine" for number in range(10))


def test_patience_travels_with_the_filesystem(s3_store: str) -> None:
    """Ray's workers get the filesystem itself, and write through it."""
    store = Store(s3_store)
    again = pickle.loads(pickle.dumps(store.fs))
    with again.open_output_stream(store.path("x")) as stream:
        stream.write(b"y")
    assert store.read("x") == b"y"
    assert pickle.loads(pickle.dumps(store)).read("x") == b"y"


def test_an_unknown_option_of_a_bucket_is_named() -> None:
    with pytest.raises(StoreError, match="unknown option endpoint in the URI"):
        Store("s3://bucket/prefix?endpoint=http://127.0.0.1:1")


def test_credentials_in_a_uri_are_refused_and_not_repeated() -> None:
    with pytest.raises(StoreError, match="AWS_ACCESS_KEY_ID") as error:
        Store("s3://KEY:hidden/word@bucket/prefix")
    assert "hidden" not in str(error.value)
    with pytest.raises(StoreError, match="store s3://bucket/prefix: ") as error:
        Store("s3://KEY:hidden@bucket/prefix")
    assert "hidden" not in str(error.value)
