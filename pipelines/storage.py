"""The storage layer: stores, datasets and commits, on a local folder or an object store.

A *store* is a URI (`/data/store`, `file:///data/store`, `s3://bucket/prefix`). A *dataset* is a
folder of Parquet files in it plus a *commit*: a small JSON object that names every file with its
rows, bytes and SHA-256, the schema, statistics, and the lineage (inputs, configuration, code).

    <store>/images/cc3m/_commits/00000000.json
    <store>/images/cc3m/data-1f2e3d4c/part-00000.parquet
    <store>/images/cc3m/data-1f2e3d4c/_part-00000.json      what that file holds; resume reads it

Until the commit exists no reader sees the dataset; afterwards it never changes. Object stores have
no rename, so files are written where they will stay, and the commit is the only atomic step: it is
put with "only if absent", which S3 and POSIX both offer. Credentials come from the ordinary AWS
chain (environment, profile, instance role) and `AWS_ENDPOINT_URL`; none is ever stored.
"""

from __future__ import annotations

import contextlib
import datetime
import functools
import hashlib
import importlib.metadata
import json
import os
import posixpath
import re
import subprocess
import tempfile
import uuid
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines import s3

FORMAT_VERSION = 1
PIECE_BYTES = 16 << 20  # of a large file on its way; S3 takes up to 10,000 of them
PIECES_AT_ONCE = 4
ROW_GROUP_ROWS = 256  # small enough to seek in: about 8 MB of 256-pixel JPEGs


class StoreError(Exception):
    """A store or dataset can't be used as asked. The message names it and the way out."""


@dataclass(frozen=True)
class FileRecord:
    """One Parquet file of a commit. `path` is relative to the dataset's folder."""

    path: str
    rows: int
    bytes: int
    sha256: str


@dataclass(frozen=True)
class Commit:
    """What a dataset is: its files, and where they came from."""

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


def fingerprint(job: str, config: Any, inputs: Iterable[str] = ()) -> str:
    """Hash of everything that decides a job's output: its name, configuration and inputs."""
    payload = {"format": FORMAT_VERSION, "job": job, "config": config, "inputs": list(inputs)}
    text = json.dumps(payload, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def code_version() -> dict[str, str]:
    """Package version and, in a checkout, the git revision; recorded in every commit."""
    version = {"beit3-ray": "unknown"}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version["beit3-ray"] = importlib.metadata.version("beit3-ray")
    here = Path(__file__).resolve().parent
    try:
        revision = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
        if revision.returncode == 0:
            version["git"] = revision.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    return version


class Store:
    """A place for datasets, checkpoints and models, named by one URI.

    Raises:
        StoreError: the URI's scheme is unknown.
    """

    def __init__(self, uri: str | Path) -> None:
        text = str(uri)
        if "://" not in text:
            text = Path(text).absolute().as_uri()
        self.uri = text.rstrip("/")
        try:
            connect = s3.connect if self.uri.startswith("s3://") else pafs.FileSystem.from_uri
            self.fs, self.root = connect(self.uri)
        except (pa.ArrowInvalid, OSError) as error:
            shown = re.sub("//.*@", "//", str(uri))  # without what should be kept secret
            raise StoreError(f"store {shown}: {error}") from error

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def path(self, *names: str) -> str:
        """The path of an object as this store's pyarrow filesystem wants it."""
        return posixpath.join(self.root, *names)

    def check_writable(self) -> None:
        """Write and delete a probe.

        Raises:
            StoreError: the store can't be reached or written.
        """
        probe = f"_probe-{uuid.uuid4().hex}"
        try:
            self.write(probe, b"probe")
            self.delete(probe)
        except OSError as error:
            raise StoreError(
                f"store {self.uri}: can't write there ({error}). Check the URI, the bucket's name, "
                "AWS credentials and AWS_ENDPOINT_URL, or the folder's permissions."
            ) from error

    def exists(self, name: str) -> bool:
        return self.fs.get_file_info(self.path(name)).type != pafs.FileType.NotFound

    def list(self, folder: str, *, recursive: bool = False) -> list[str]:
        """Names of the files and folders below `folder`, sorted, relative to it; [] if absent."""
        base = self.path(folder)
        selector = pafs.FileSelector(base, recursive=recursive, allow_not_found=True)
        return sorted(posixpath.relpath(i.path, base) for i in self.fs.get_file_info(selector))

    def read(self, name: str) -> bytes:
        with self.fs.open_input_stream(self.path(name)) as stream:
            return stream.read()

    def read_json(self, name: str) -> Any:
        return json.loads(self.read(name))

    def write(self, name: str, data: bytes | memoryview) -> None:
        """Write a whole object; readers see all of it or nothing."""
        with self._writing(name) as stream:
            stream.write(data)

    @contextlib.contextmanager
    def _writing(self, name: str) -> Iterator[Any]:
        """A stream to an object, which is there when the context ends well."""
        path = self.path(name)
        if not isinstance(self.fs, pafs.LocalFileSystem):
            stream = self.fs.open_output_stream(path)  # an S3 upload appears when complete
            try:
                yield stream
            except BaseException:
                stream.close()
                self.fs.delete_file(path)
                raise
            stream.close()
            return
        target = Path(path)
        target.parent.mkdir(parents=True, exist_ok=True)
        draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
        try:
            with draft.open("wb") as file:
                yield file
            draft.replace(target)
        finally:
            draft.unlink(missing_ok=True)

    def write_json(self, name: str, value: Any) -> None:
        self.write(name, (json.dumps(value, indent=1, default=str) + "\n").encode())

    def read_table(self, name: str) -> pa.Table:
        return pq.read_table(pa.BufferReader(self.read(name)))

    def write_table(self, name: str, table: pa.Table) -> None:
        """Write a Parquet file of a job's own; those of datasets are `Dataset.write_table`'s."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write(name, memoryview(sink.getvalue()))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create an object unless there is one already; False when there was."""
        if isinstance(self.fs, pafs.LocalFileSystem):
            target = Path(self.path(name))
            target.parent.mkdir(parents=True, exist_ok=True)
            draft = target.with_name(f".{target.name}.{uuid.uuid4().hex}")
            try:
                draft.write_bytes(data)
                os.link(draft, target)  # atomic, and fails if the target exists
                return True
            except FileExistsError:
                return False
            finally:
                draft.unlink(missing_ok=True)
        if isinstance(self.fs, pafs.S3FileSystem):
            try:
                return s3.put_if_absent(self.path(name), data)
            except OSError as error:
                raise StoreError(f"{self.uri}/{name}: {error}") from error
        if self.exists(name):
            return False
        self.write(name, data)
        return True

    def delete(self, name: str) -> None:
        """Delete a file or a folder; nothing happens if there is none."""
        info = self.fs.get_file_info(self.path(name))
        if info.type == pafs.FileType.Directory:
            self.fs.delete_dir(info.path)
        elif info.type == pafs.FileType.File:
            self.fs.delete_file(info.path)

    def upload(self, local: Path, name: str) -> FileRecord:
        """Copy a local file to the store, piece by piece; the record's `rows` is 0."""
        with local.open("rb") as source, self._writing(name) as target:
            return _copied(iter(lambda: source.read(PIECE_BYTES), b""), target, name)

    def download(self, name: str, local: Path) -> FileRecord:
        """Copy an object to a local file, piece by piece; the record's `rows` is 0.

        Raises:
            StoreError: the object can't be read.
        """
        local.parent.mkdir(parents=True, exist_ok=True)
        with local.open("wb") as target:
            return _copied(self._pieces(name), target, name)

    def _pieces(self, name: str) -> Iterator[bytes]:
        try:
            with self.fs.open_input_stream(self.path(name)) as source:
                while piece := source.read(PIECE_BYTES):
                    yield piece
        except OSError as error:
            raise StoreError(f"{self.uri}/{name}: {error}") from error

    def dataset(self, name: str) -> Dataset:
        return Dataset(self, name)


def _copied(pieces: Iterable[bytes], target: Any, name: str) -> FileRecord:
    """Write a file's pieces to a stream; the record of what they were."""
    digest, size = hashlib.sha256(), 0
    for number, piece in enumerate(pieces, 1):
        target.write(piece)
        digest.update(piece)
        size += len(piece)
        if number % PIECES_AT_ONCE == 0:
            target.flush()  # S3 sends pieces beside each other, and would let any number wait
    return FileRecord(name, 0, size, digest.hexdigest())


@contextlib.contextmanager
def local_folder(place: str) -> Iterator[Path]:
    """A folder of published files on this machine; one at another URI is copied for the while."""
    if "://" not in place:
        yield Path(place)
        return
    remote = Store(place)
    with tempfile.TemporaryDirectory(prefix="beit3-annotations-") as folder:
        pafs.copy_files(remote.root, folder, source_filesystem=remote.fs)
        yield Path(folder)


@dataclass(frozen=True)
class PartRecord:
    """What one finished part holds; kept beside it until, and after, the commit names it."""

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
    """A named dataset of a store: parts while it is being made, a commit when it is whole."""

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
        """All commits, the newest first; each amends the one that comes next."""
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
        """The whole dataset in memory: for small ones."""
        commit = self.commit()
        tables = [
            pq.read_table(
                self.store.path(self.name, f.path), columns=columns, filesystem=self.store.fs
            )
            for f in commit.files
            if f.rows
        ]
        return pa.concat_tables(tables) if tables else pa.table({})

    def read_set_aside(self) -> list[dict[str, Any]]:
        """Rows that were set aside, each with its `reason`."""
        rows: list[dict[str, Any]] = []
        for record in self.commit().set_aside:
            path = self.store.path(self.name, record.path)
            rows += pq.read_table(path, filesystem=self.store.fs).to_pylist()
        return rows

    # -- writing ---------------------------------------------------------------------------------

    def finished(self, fingerprint: str) -> Commit | None:
        """The commit, if this very dataset was made already; None if it is still to be made.

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
        """Parts that an earlier, interrupted run of the same job left complete, by name."""
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
        """Write one part: its Parquet file, its set-aside rows, and last the record of both."""
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
        """One of the dataset's files, at most so many rows at a time; of `columns` those it has."""
        with self.store.fs.open_input_file(self.store.path(self.name, relative)) as source:
            file = pq.ParquetFile(source)
            if columns is not None:
                columns = [name for name in columns if name in file.schema_arrow.names]
            for group in range(file.num_row_groups):  # iter_batches keeps row groups it has left
                found = file.read_row_group(group, columns=columns, use_threads=False)
                yield from found.to_batches(rows)  # each CPU has a task of its own

    def write_table(self, relative: str, table: pa.Table) -> FileRecord:
        """Write a Parquet file below the dataset's folder."""
        sink = pa.BufferOutputStream()
        with pq.ParquetWriter(sink, table.schema, **_encoding(table.schema)) as writer:
            if table.num_rows:  # a row group of no rows is more than some readers can take
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
            StoreError: somebody else committed another dataset under this name meanwhile.
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
        """Commit again, over the newest commit, which stays: what a reader opened does not change.

        Args:
            files, set_aside, stats: As they are now, old and new.
            note: What was done, appended to the lineage's `amendments`.

        Raises:
            StoreError: there is no commit, or somebody else amended it meanwhile.
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
    """How columns are stored: small, but pictures as they are, which neither shrink nor repeat.

    Strings have no dictionary: ids and texts do not repeat, and what does repeat zstd finds.
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
