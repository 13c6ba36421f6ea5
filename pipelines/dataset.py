"""Datasets: folders of Parquet files in a store, and the commits that define them.

A *dataset* is a folder of Parquet files plus a *commit*: a small JSON object that names every file
with its rows, bytes and SHA-256, the schema, statistics, and the lineage (inputs, configuration,
code).

    <store>/images/cc3m/_commits/00000000.json
    <store>/images/cc3m/data-1f2e3d4c/part-00000.parquet
    <store>/images/cc3m/data-1f2e3d4c/_part-00000.json      that file's record, read on resume

Until the commit exists no reader sees the dataset. A commit never changes; an amendment is a newer
commit beside it. The commit is the only atomic step: it is put with "only if absent", which S3 and
POSIX both offer.
"""

from __future__ import annotations

import datetime
import hashlib
import json
import posixpath
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.lineage import FORMAT_VERSION, code_version
from pipelines.storage import FileRecord, Store, StoreError

ROW_GROUP_ROWS = 256  # small enough to seek in: about 8 MB of 256-pixel JPEGs


@dataclass(frozen=True)
class Commit:
    """A dataset's definition: its files, and where they came from."""

    dataset: str
    job: str
    fingerprint: str
    created: str
    files: list[FileRecord]
    schema: str
    set_aside: list[FileRecord] = field(default_factory=list)
    stats: dict[str, Any] = field(default_factory=dict)
    lineage: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    @property
    def rows(self) -> int:
        return sum(f.rows for f in self.files)

    @property
    def identity(self) -> str:
        """Content hash: equal for two commits with the same files in the same order."""
        names = [[posixpath.basename(f.path), f.rows, f.sha256] for f in self.files]
        return hashlib.sha256(json.dumps(names).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class PartRecord:
    """The contents of one finished part; stored beside it, before and after the commit names it."""

    name: str
    file: FileRecord
    set_aside: FileRecord | None = None
    stats: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @staticmethod
    def from_json(text: str | bytes) -> PartRecord:
        raw = json.loads(text)
        aside = raw["set_aside"]
        raw["file"] = FileRecord(**raw["file"])
        raw["set_aside"] = FileRecord(**aside) if aside else None
        return PartRecord(**raw)


class Dataset:
    """A named dataset in a store: parts while it is being made, a commit when it is complete."""

    def __init__(self, store: Store, name: str) -> None:
        self.store = store
        self.name = name

    @property
    def uri(self) -> str:
        return f"{self.store.uri}/{self.name}"

    # -- reading ---------------------------------------------------------------------------------

    def find_commit(self) -> Commit | None:
        """The newest commit, or None."""
        return next(self.commits(), None)

    def commits(self) -> Iterator[Commit]:
        """All commits, newest first; each amends the next one in this order."""
        for version in reversed(self._versions()):
            raw = self.store.read_json(f"{self.name}/_commits/{version}")
            if raw["format_version"] > FORMAT_VERSION:
                raise StoreError(
                    f"{self.uri}: written by a newer beit3-ray; update this one to read it"
                )
            raw["files"] = [FileRecord(**f) for f in raw["files"]]
            raw["set_aside"] = [FileRecord(**f) for f in raw["set_aside"]]
            yield Commit(**raw)

    def _versions(self) -> list[str]:
        names = self.store.list(f"{self.name}/_commits")
        return [name for name in names if name.endswith(".json")]

    def commit(self) -> Commit:
        """The newest commit.

        Raises:
            StoreError: there is none, so the dataset is missing or half written.
        """
        found = self.find_commit()
        if found is None:
            state = "is half written" if self.store.list(self.name) else "does not exist"
            raise StoreError(f"dataset {self.uri} {state}: run the job that makes it (again)")
        return found

    def paths(self) -> list[str]:
        """Paths of the committed Parquet files, for this store's filesystem."""
        return [self.store.path(self.name, f.path) for f in self.commit().files]

    def read_table(self, columns: Sequence[str] | None = None) -> pa.Table:
        """The whole dataset in memory; for small datasets."""
        commit = self.commit()
        tables = [
            pq.read_table(
                self.store.path(self.name, f.path), columns=columns, filesystem=self.store.fs
            )
            for f in commit.files
            if f.rows
        ]
        return pa.concat_tables(tables) if tables else pa.table({})

    def first_rows(self, count: int) -> Iterator[dict[str, Any]]:
        """The first rows, up to `count`, read as they are taken."""
        for path in self.paths() if count else ():
            with pq.ParquetFile(path, filesystem=self.store.fs) as file:
                for batch in file.iter_batches(batch_size=ROW_GROUP_ROWS):
                    yield from batch.slice(0, count).to_pylist()
                    count -= min(count, batch.num_rows)
                    if not count:
                        return

    def read_set_aside(self) -> list[dict[str, Any]]:
        """Rows that were set aside, each with its `reason`."""
        rows: list[dict[str, Any]] = []
        for record in self.commit().set_aside:
            path = self.store.path(self.name, record.path)
            rows += pq.read_table(path, filesystem=self.store.fs).to_pylist()
        return rows

    # -- writing ---------------------------------------------------------------------------------

    def finished(self, fingerprint: str) -> Commit | None:
        """The commit, if this exact dataset was made already; None if it is still to be made.

        Raises:
            StoreError: the name is taken by a dataset made from other inputs or options.
        """
        found = self.find_commit()
        if found is not None and found.fingerprint != fingerprint:
            raise StoreError(
                f"dataset {self.uri} exists and was made by {found.job!r} from other inputs or "
                "options: choose another name or store, or delete that folder first"
            )
        return found

    def finished_parts(self, fingerprint: str) -> dict[str, PartRecord]:
        """Parts that an earlier, interrupted run of the same job completed, by name."""
        folder = f"{self.name}/data-{fingerprint[:8]}"
        parts = {}
        for entry in self.store.list(folder):
            if entry.startswith("_part-") and entry.endswith(".json"):
                part = PartRecord.from_json(self.store.read(f"{folder}/{entry}"))
                parts[part.name] = part
        return parts

    def write_part(
        self,
        fingerprint: str,
        name: str,
        table: pa.Table,
        *,
        set_aside: Sequence[dict[str, Any]] = (),
        stats: dict[str, Any] | None = None,
    ) -> PartRecord:
        """Write one part: its Parquet file, its set-aside rows, and finally the record of both."""
        folder = f"data-{fingerprint[:8]}"
        data = self.write_table(f"{folder}/part-{name}.parquet", table)
        aside = None
        if set_aside:
            aside_table = pa.Table.from_pylist(list(set_aside))
            aside = self.write_table(f"{folder}/_set-aside-{name}.parquet", aside_table)
        record = PartRecord(name, data, aside, stats or {})
        self.store.write(f"{self.name}/{folder}/_part-{name}.json", record.to_json().encode())
        return record

    def batches(
        self, relative: str, rows: int, columns: Sequence[str] | None = None
    ) -> Iterator[pa.RecordBatch]:
        """One of the dataset's files, at most `rows` rows at a time; absent columns are skipped."""
        with self.store.fs.open_input_file(self.store.path(self.name, relative)) as source:
            file = pq.ParquetFile(source)
            if columns is not None:
                columns = [name for name in columns if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):  # iter_batches keeps row groups it is past
                found = file.read_row_group(group, columns=columns, use_threads=False)
                yield from found.to_batches(rows)  # each CPU has a task of its own

    def write_table(self, relative: str, table: pa.Table) -> FileRecord:
        """Write a Parquet file below the dataset's folder."""
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema, **_encoding(table.schema)) as writer:
            if table.num_rows:  # some readers can't handle an empty row group
                writer.write_table(table, row_group_size=ROW_GROUP_ROWS)
        data = memoryview(sink.getvalue())  # no copy: a part may be hundreds of megabytes
        self.store.write(f"{self.name}/{relative}", data)
        return FileRecord(relative, table.num_rows, data.nbytes, hashlib.sha256(data).hexdigest())

    def publish(
        self,
        fingerprint: str,
        parts: Iterable[PartRecord],
        *,
        job: str,
        schema: pa.Schema,
        stats: dict[str, Any],
        config: Any,
        inputs: Sequence[dict[str, Any]] = (),
    ) -> Commit:
        """Commit the parts, in the order of their names: from now on readers see the dataset.

        Raises:
            StoreError: another dataset was committed under this name in the meantime.
        """
        ordered = sorted(parts, key=lambda part: part.name)
        commit = Commit(
            dataset=self.name,
            job=job,
            fingerprint=fingerprint,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            files=[part.file for part in ordered],
            set_aside=[part.set_aside for part in ordered if part.set_aside],
            schema=str(schema),
            stats=stats,
            lineage={"inputs": list(inputs), "config": config, "code": code_version()},
        )
        if not self._put(commit, 0):
            found = self.finished(fingerprint)  # an equal job may have won the race: all is well
            assert found is not None
            return found
        return commit

    def amend(
        self,
        *,
        files: Sequence[FileRecord],
        set_aside: Sequence[FileRecord],
        stats: dict[str, Any],
        note: dict[str, Any],
    ) -> Commit:
        """Add a commit on top of the newest, which stays: what a reader has opened doesn't change.

        Args:
            files, set_aside, stats: The amended dataset's, old and new together.
            note: What was done, appended to the lineage's `amendments`.

        Raises:
            StoreError: there is no commit, or another job amended it in the meantime.
        """
        version, found = len(self._versions()), self.commit()
        amendments = [*found.lineage.get("amendments", []), note | {"code": code_version()}]
        commit = replace(
            found,
            created=datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
            files=list(files),
            set_aside=list(set_aside),
            stats=stats,
            lineage=found.lineage | {"amendments": amendments},
        )
        if not self._put(commit, version):
            raise StoreError(f"{self.uri}: another job amended it meanwhile; run this one again")
        return commit

    def _put(self, commit: Commit, version: int) -> bool:
        body = json.dumps(asdict(commit), indent=1, default=str).encode()
        return self.store.put_if_absent(f"{self.name}/_commits/{version:08d}.json", body)


def _encoding(schema: pa.Schema) -> dict[str, Any]:
    """How columns are stored: compressed, except pictures, which neither shrink nor repeat.

    Strings have no dictionary: ids and texts do not repeat, and zstd finds whatever does.
    """
    leaves = [leaf for field in schema for leaf in _leaves(field, field.name)]
    others = [path for path, type in leaves if not pa.types.is_binary(type)]
    return {
        "compression": {path: "zstd" if path in others else "none" for path, _ in leaves},
        "use_dictionary": [path for path, type in leaves if _repeats(type)],
    }


def _repeats(type: pa.DataType) -> bool:
    return not (pa.types.is_binary(type) or pa.types.is_string(type))


def _leaves(field: pa.Field, path: str) -> Iterator[tuple[str, pa.DataType]]:
    """The Parquet columns of a field, with their paths."""
    if pa.types.is_struct(field.type):
        for child in field.type.fields:
            yield from _leaves(child, f"{path}.{child.name}")
    elif pa.types.is_nested(field.type):
        yield from _leaves(field.type.value_field, f"{path}.list.element")
    else:
        yield path, field.type
