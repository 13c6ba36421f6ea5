"""Reads compressed files and archives as streams: nothing is unpacked to disk, nothing is trusted.

Each layer is identified by its first bytes, whatever the file is called: gzip, bzip2, xz, zstd,
lz4, tar and zip, nested in each other, as in `openwebtext.tar.xz`, a tar of xz files that are tars
of texts.

- Names of members are for messages and ids only: no path is ever made from them.
- A file that unpacks to far more than texts and photos do, or is nested too deep, is given up.
- Memory is bounded, except for a zip's directory (about half a kilobyte per member). A zip inside
  another archive is read whole, if it is small.
- Faults of a file are yielded as reasons; faults of its storage are raised.
"""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import re
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from tarfile import HeaderError, ReadError
from typing import Any, BinaryIO, cast

import pyarrow as pa

from pipelines.sources import Malformed, no_surrogates

MAX_DEPTH = 4
"""Layers inside one another: a .tar.xz of .tar.xz has four."""
MAX_EXPANSION = 300
"""Maximum unpacked bytes per packed byte, over the whole file; texts have about 4."""
FREE_BYTES = 64 << 20
"""Bytes that any file may unpack to, however small it is."""
MAX_NESTED_ZIP = 64 << 20
_XZ_MEMORY = 256 << 20  # `xz -9` needs 65 MB
_BLOCK = 1 << 16
_HEAD = 512  # a tar's magic is at 257

_MAGIC = (
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"\x28\xb5\x2f\xfd", "zstd"),
    (b"\x04\x22\x4d\x18", "lz4"),
    (b"PK\x03\x04", "zip"),
    (b"PK\x05\x06", "zip"),  # an empty one
)
PACKED = (".gz", ".bz2", ".xz", ".zst", ".lz4")
ARCHIVES = (".tar", *(f".tar{p}" for p in PACKED), ".tgz", ".tbz2", ".txz", ".zip")


class StorageError(Exception):
    """The storage failed, not the file: worth a retry."""


class BrokenFileError(Exception):
    """A compressed file or archive can't be read (any further); the message says why."""

    reason = ""


class BombError(BrokenFileError):
    """A file unpacks to more than it should."""

    reason = "decompression bomb"


@dataclass(frozen=True)
class Leaf:
    """A file that is not an archive; read its stream before requesting the next leaf."""

    name: str
    """Its path: the outermost file's name, followed by the name within each archive."""
    head: bytes
    """Its first bytes; the stream starts with them."""
    stream: BinaryIO


def leaves(stream: BinaryIO, name: str) -> Iterator[Leaf | Malformed]:
    """The files inside a file, in order; the file itself if it is not an archive.

    Reading a leaf's stream may raise `BrokenFileError`.
    """
    meter = _Meter(stream)
    try:
        yield from _open(io.BufferedReader(meter, _BLOCK), name, meter, MAX_DEPTH)
    except BrokenFileError as error:
        yield Malformed(error.reason or "truncated archive", str(error)[:200], name)


def contents(stream: BinaryIO, name: str, most: int) -> Iterator[tuple[str, bytes] | Malformed]:
    """The files inside an archive as bytes; those of more than `most` bytes are malformed."""
    try:
        for leaf in leaves(stream, name):
            if isinstance(leaf, Malformed):
                yield leaf
                continue
            data = leaf.stream.read(most + 1)
            if len(data) > most:
                yield Malformed("file too large", f"over {most} bytes", leaf.name)
            else:
                yield leaf.name, data
    except BrokenFileError as error:
        yield Malformed(error.reason or "truncated archive", str(error)[:200], name)


def safe_name(name: str) -> str:
    """A member's name as part of an id: no control characters, no "..", not absolute."""
    parts = re.split(r"[/\\]+", re.sub(r"[\x00-\x1f\x7f-\x9f]", "", no_surrogates(name)))
    return "/".join(p for p in parts if p not in ("", ".", ".."))[-300:]


def _open(stream: BinaryIO, name: str, meter: _Meter, depth: int) -> Iterator[Leaf | Malformed]:
    head, stream = _peek(stream)
    kind = next((kind for magic, kind in _MAGIC if head.startswith(magic)), "")
    if head[257:262] == b"ustar" or (not kind and name.endswith(".tar")):
        kind = "tar"
    if not kind:
        yield Leaf(name, head, stream)
    elif depth == 0:
        yield Malformed("nested too deep", f"more than {MAX_DEPTH} layers", name)
    elif kind == "tar":
        yield from _tar(stream, name, meter, depth - 1)
    elif kind == "zip":
        yield from _zip(stream, name, meter, depth - 1)
    else:
        yield from _open(_unpacked(stream, kind, meter), name, meter, depth - 1)


class TarMember(tarfile.TarInfo):
    """A member of a tar; a damaged or missing header is an error, which `tarfile` by itself takes
    for the archive's end, so that all members after it would be lost unseen."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            ends = type(error).__name__ == "EOFHeaderError"  # blocks of zeros
            if ends or tarfile.offset == 0:  # the latter is an error in `tarfile` too
                raise
            raise ReadError(f"{error} at byte {tarfile.offset}") from error


def _tar(stream: BinaryIO, name: str, meter: _Meter, depth: int) -> Iterator[Leaf | Malformed]:
    with _Readable():
        archive = tarfile.open(  # noqa: SIM115 (closing reads on)
            fileobj=stream, mode="r|", tarinfo=TarMember
        )
    while True:
        with _Readable():
            member = archive.next()
        if member is None:
            return
        cast(Any, archive).members.clear()  # otherwise the list grows with the archive
        inner = safe_name(member.name)
        if not member.isfile() or _hidden(inner):
            continue
        where = f"{name}/{inner}"
        if member.issparse():
            yield Malformed("sparse file", f"{member.size} bytes", where)
            continue
        content = archive.extractfile(member)
        assert content is not None  # it is a file
        yield from _open(_forward(content.read), where, meter, depth)


def _zip(stream: BinaryIO, name: str, meter: _Meter, depth: int) -> Iterator[Leaf | Malformed]:
    if not stream.seekable():
        whole = stream.read(MAX_NESTED_ZIP + 1)
        if len(whole) > MAX_NESTED_ZIP:
            yield Malformed("nested zip too large", f"over {MAX_NESTED_ZIP} bytes", name)
            return
        stream = io.BytesIO(whole)
    with _Readable():
        archive = zipfile.ZipFile(stream)
    for member in archive.infolist():
        inner = safe_name(member.filename)
        if member.is_dir() or _hidden(inner):
            continue
        where = f"{name}/{inner}"
        if member.flag_bits & 1:
            yield Malformed("encrypted", "", where)
            continue
        try:
            with _Readable():
                content = archive.open(member)
        except BrokenFileError as error:  # the other members may be readable
            yield Malformed("broken file", str(error)[:200], where)
            continue
        with content:
            yield from _open(_forward(meter.bounded(content.read)), where, meter, depth)


def _hidden(name: str) -> bool:
    """Whether an operating system left the file: `.DS_Store`, `._n01_1.JPEG`, `__MACOSX/x`."""
    return name.startswith("__MACOSX/") or name.rpartition("/")[2].startswith(".") or not name


def _unpacked(stream: BinaryIO, kind: str, meter: _Meter) -> BinaryIO:
    read: Callable[[int], bytes]
    if kind == "gzip":
        read = gzip.GzipFile(fileobj=stream).read
    elif kind == "bzip2":
        read = bz2.BZ2File(stream).read
    elif kind == "xz":
        read = _Xz(stream).read
    else:
        file = pa.PythonFile(stream, mode="r")
        read = pa.CompressedInputStream(file, kind).read
    return _forward(meter.bounded(read))


class _Xz:
    """Like `lzma.LZMAFile`, but a header can't ask for gigabytes of memory."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.decoder: lzma.LZMADecompressor | None = None
        self.rest = b""  # read, but not yet fed to the decoder

    def read(self, size: int) -> bytes:
        while True:
            if self.decoder is None or self.decoder.eof:
                if self.decoder is not None:  # another stream may follow, after padding
                    self.rest = self.decoder.unused_data.lstrip(b"\0")
                self.rest = self.rest or self.stream.read(_BLOCK).lstrip(b"\0")
                if not self.rest:
                    return b""
                self.decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, memlimit=_XZ_MEMORY)
            fed = self.rest
            if not fed and self.decoder.needs_input:
                fed = self.stream.read(_BLOCK)
                if not fed:
                    raise EOFError("the file ends before its end-of-stream marker")
            self.rest = b""
            data = self.decoder.decompress(fed, size)
            if data:
                return data


class _Meter(io.RawIOBase):
    """The outermost stream: counts the bytes read from it, and the bytes these unpack to."""

    def __init__(self, stream: BinaryIO) -> None:
        self.stream = stream
        self.consumed = self.produced = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.stream.seekable()

    def tell(self) -> int:
        return self.stream.tell()

    def seek(self, offset: int, whence: int = io.SEEK_SET, /) -> int:
        with _Storage():
            return self.stream.seek(offset, whence)

    def readinto(self, buffer: Any, /) -> int:
        with _Storage():
            data = self.stream.read(len(buffer))
        buffer[: len(data)] = data
        self.consumed += len(data)
        return len(data)

    def bounded(self, read: Callable[[int], bytes]) -> Callable[[int], bytes]:
        """`read`, but raising `BombError` if the file grows too much when unpacked."""

        def counted(size: int) -> bytes:
            with _Readable():
                data = read(size)
            self.produced += len(data)
            if self.produced > FREE_BYTES + MAX_EXPANSION * self.consumed:
                raise BombError(f"{self.produced} bytes of {self.consumed}")
            return data

        return counted


class _Forward(io.RawIOBase):
    """A forward-only stream around a function that reads."""

    def __init__(self, read: Callable[[int], bytes]) -> None:
        self._read = read

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any, /) -> int:
        with _Readable():
            data = self._read(len(buffer))
        buffer[: len(data)] = data
        return len(data)


def _forward(read: Callable[[int], bytes]) -> BinaryIO:
    return io.BufferedReader(_Forward(read), _BLOCK)


def _peek(stream: BinaryIO) -> tuple[bytes, BinaryIO]:
    """The first bytes, and a stream that still starts with them."""
    with _Readable():
        head = stream.read(_HEAD)
    if stream.seekable():
        stream.seek(-len(head), io.SEEK_CUR)
        return head, stream
    waiting = io.BytesIO(head)
    return head, _forward(lambda size: waiting.read(size) or stream.read(size))


class _Storage:
    """Gives storage errors their own type, since `tarfile` and others also raise OSError."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            raise StorageError(str(error)) from error


class _Readable:
    """Turns all errors of a decoder into `BrokenFileError`."""

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, Exception) and not isinstance(error, StorageError | BrokenFileError):
            raise BrokenFileError(f"{type(error).__name__}: {error}") from error


def seekable(stream: BinaryIO) -> BinaryIO:
    """A stream of bytes with `seek`, as Parquet needs it.

    Raises:
        BrokenFileError: the stream can't seek, for example inside an archive.
    """
    if not stream.seekable():
        raise BrokenFileError("Parquet inside an archive can't be read: unpack it")
    return cast(BinaryIO, stream)
