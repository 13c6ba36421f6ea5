"""Stores hold everything that jobs make, in a local folder or an object store, named by one URI.

A *store* is a URI (`/data/store`, `file:///data/store`, `s3://bucket/prefix`). Object stores have
no rename, so objects are written directly to their final place, and appear there whole. Credentials
come from the ordinary AWS chain (environment, profile, instance role) and `AWS_ENDPOINT_URL`; they
are never stored.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import posixpath
import re
import tempfile
import uuid
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.fs as pafs
import pyarrow.parquet as pq

from pipelines import s3

if TYPE_CHECKING:
    from pipelines.dataset import Dataset

PIECE_BYTES = 16 << 20  # pieces in which large files are copied; S3 takes up to 10,000 of them
PIECES_AT_ONCE = 4


class StoreError(Exception):
    """A store or dataset can't be used as requested. The message names it and says what to do."""


@dataclass(frozen=True)
class FileRecord:
    """One Parquet file of a commit. `path` is relative to the dataset's folder."""

    path: str
    rows: int
    bytes: int
    sha256: str


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
            shown = re.sub("//.*@", "//", str(uri))  # without secrets
            raise StoreError(f"store {shown}: {error}") from error

    def __reduce__(self) -> tuple[type[Store], tuple[str]]:
        return Store, (self.uri,)

    def __repr__(self) -> str:
        return f"Store({self.uri!r})"

    def uri_of(self, name: str) -> str:
        """The URI of an object or folder, with this store's options if it has any."""
        address, *options = self.uri.split("?", 1)
        return "?".join([f"{address}/{name}", *options])

    def path(self, *names: str) -> str:
        """The path of an object for this store's pyarrow filesystem."""
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
        """A stream to an object, which appears when the context ends without an error."""
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
        """Write a job's internal Parquet file; for datasets, use `Dataset.write_table`."""
        sink = pa.BufferOutputStream()
        pq.write_table(table, sink, compression="zstd")
        self.write(name, memoryview(sink.getvalue()))

    def put_if_absent(self, name: str, data: bytes) -> bool:
        """Create an object unless it exists; returns False if it did."""
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
                return s3.put_if_absent(self.uri, self.path(name), data)
            except OSError as error:
                raise StoreError(f"{self.uri}/{name}: {error}") from error
        if self.exists(name):
            return False
        self.write(name, data)
        return True

    def delete(self, name: str) -> None:
        """Delete a file or a folder, if it exists."""
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
        from pipelines.dataset import Dataset  # here, because it imports this module

        return Dataset(self, name)


def _copied(pieces: Iterable[bytes], target: Any, name: str) -> FileRecord:
    """Write a file's pieces to a stream; returns the record of the file."""
    digest, size = hashlib.sha256(), 0
    for number, piece in enumerate(pieces, 1):
        target.write(piece)
        digest.update(piece)
        size += len(piece)
        if number % PIECES_AT_ONCE == 0:
            target.flush()  # S3 sends pieces concurrently, and would let any number wait
    return FileRecord(name, 0, size, digest.hexdigest())


@contextlib.contextmanager
def local_folder(place: str, beside: str = "") -> Iterator[Path]:
    """A local folder of published files; a folder at a URI is copied for the time of the block.

    `beside`: a file that belongs to them, relative to the folder (`../coco/x.json`), if it exists.
    """
    if "://" not in place:
        yield Path(place)
        return
    remote = Store(place)
    with tempfile.TemporaryDirectory(prefix="beit3-annotations-") as temporary:
        folder = Path(temporary, "annotations")  # what is beside it is the block's own too
        folder.mkdir()
        pafs.copy_files(remote.root, str(folder), source_filesystem=remote.fs)
        if beside:
            found = posixpath.normpath(posixpath.join(remote.root, beside))
            if remote.fs.get_file_info(found).is_file:
                target = (folder / beside).resolve()
                target.parent.mkdir(parents=True, exist_ok=True)
                pafs.copy_files(found, str(target), source_filesystem=remote.fs)
        yield folder
