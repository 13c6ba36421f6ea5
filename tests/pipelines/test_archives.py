"""Archives inside archives, sound and hostile."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import tarfile
import zipfile
from typing import Any, BinaryIO

import pyarrow as pa
import pytest

from pipelines.sources import Malformed, _archives
from pipelines.sources._archives import Leaf, StorageError, contents, leaves, safe_name

TEXT = b"some text\n" * 50


def tar(files: dict[str, bytes], mode: Any = "w") -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode=mode) as archive:
        for name, data in files.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return out.getvalue()


def zipped(files: dict[str, bytes]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return out.getvalue()


def found(data: bytes, name: str = "a", most: int = 1 << 20) -> dict[str, Any]:
    """Names and contents; of what was set aside the reason."""
    items = contents(io.BytesIO(data), name, most)
    return dict((i.where, i.reason) if isinstance(i, Malformed) else i for i in items)


@pytest.mark.parametrize("kind", ["gzip", "bzip2", "xz", "zstd", "lz4"])
def test_each_compression_whatever_the_name(kind: str) -> None:
    pack = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress}
    if kind in pack:
        packed = pack[kind](TEXT)
        twice = pack[kind](TEXT[:70]) + pack[kind](TEXT[70:])  # two streams in one file
        assert found(twice) == {"a": TEXT}
    else:
        sink = pa.BufferOutputStream()
        with pa.CompressedOutputStream(sink, kind) as stream:
            stream.write(TEXT)
        packed = sink.getvalue().to_pybytes()
    assert found(packed) == {"a": TEXT}
    assert found(tar({"x.txt": packed})) == {"a/x.txt": TEXT}
    noise = bytes(range(256)) * 3000 + TEXT
    cut = pack[kind](noise)[:-9] if kind in pack else packed[:-9]
    assert list(found(cut).values()) == ["truncated archive"]


def test_archives_in_archives() -> None:
    inner = zipped({"x.txt": TEXT, "y/z.txt": b"z"})
    assert found(tar({"b.zip": inner}, "w:gz")) == {"a/b.zip/x.txt": TEXT, "a/b.zip/y/z.txt": b"z"}
    assert found(zipped({"t.tar": tar({"x": TEXT})})) == {"a/t.tar/x": TEXT}
    assert found(tar({}), "empty.tar") == {} and found(zipped({}), "empty.zip") == {}


def test_names_are_only_names() -> None:
    files = {"../../etc/passwd": b"1", "/etc/shadow": b"2", "..\\up": b"3", "bell\x07": b"4"}
    names = ["a/etc/passwd", "a/etc/shadow", "a/up", "a/bell"]
    assert list(found(tar(files))) == names
    assert list(found(zipped(files))) == names
    assert safe_name("a/" * 500 + "end").endswith("a/end") and len(safe_name("x" * 5000)) == 300


def test_links_devices_and_leftovers_are_passed_by() -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.DIRTYPE):
            info = tarfile.TarInfo("odd")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name in (".DS_Store", "d/._x.txt", "__MACOSX/y"):
            archive.addfile(tarfile.TarInfo(name))
        archive.addfile(tarfile.TarInfo("good"))
    assert found(out.getvalue()) == {"a/good": b""}


@pytest.mark.parametrize("pack", [gzip.compress, bz2.compress, lzma.compress])
def test_a_bomb_is_given_up(pack: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_archives, "FREE_BYTES", 1 << 20)
    zeros = pack(bytes(32 << 20))
    assert len(zeros) < 64 << 10
    assert found(zeros, most=1 << 30) == {"a": "decompression bomb"}
    nested = found(tar({"a.txt": b"1", "b": zeros, "c.txt": b"3"}), most=1 << 30)
    assert nested == {"a/a.txt": b"1", "a": "decompression bomb"}
    assert found(zipped({"b": bytes(32 << 20)}), most=1 << 30) == {"a": "decompression bomb"}
    # Each layer alone is modest: together they are not.
    layers = pack(pack(bytes(32 << 20)))
    assert found(layers, most=1 << 30) == {"a": "decompression bomb"}


def test_a_small_file_may_unpack_to_much_and_a_text_to_some() -> None:
    assert found(gzip.compress(bytes(1 << 20))) == {"a": bytes(1 << 20)}


def test_layers_are_counted() -> None:
    data = TEXT
    for _ in range(_archives.MAX_DEPTH):
        data = gzip.compress(data)
    assert found(data) == {"a": TEXT}
    assert found(gzip.compress(data)) == {"a": "nested too deep"}


def test_an_xz_that_wants_gigabytes_of_memory_gets_none() -> None:
    wide = [{"id": lzma.FILTER_LZMA2, "preset": 0, "dict_size": 1 << 30}]
    # Compressing with such a dictionary takes its memory too: only the header is changed.
    small = lzma.compress(TEXT, filters=[{**wide[0], "dict_size": 1 << 20}])
    header = bytearray(small)
    at = 12 + 4  # the stream's header, then the block's size, flags, filter id and its size
    assert header[at] == 16  # 2**20, as the format writes it
    header[at] = 36  # 2**30
    import zlib

    header[20:24] = zlib.crc32(bytes(header[12:20])).to_bytes(4, "little")
    outcome = list(contents(io.BytesIO(bytes(header)), "a", 1 << 20))
    assert isinstance(outcome[0], Malformed) and "emory" in outcome[0].detail


def test_large_sparse_and_encrypted_members() -> None:
    assert found(tar({"big": bytes(200), "small": b"1"}), most=100) == {
        "a/big": "file too large",
        "a/small": b"1",
    }
    data = bytearray(zipped({"secret": TEXT, "open": TEXT}))
    directory = data.index(b"PK\x01\x02")
    data[directory + 8] |= 1  # the flag of encryption, in the directory
    assert found(bytes(data)) == {"a/secret": "encrypted", "a/open": TEXT}


def test_a_broken_member_of_a_zip_leaves_the_others() -> None:
    data = bytearray(zipped({"one": TEXT, "two": TEXT}))
    data[0:2] = b"PK"
    data[data.index(b"PK\x03\x04", 4)] = 0  # the second member's own header
    assert found(bytes(data)) == {"a/one": TEXT, "a/two": "broken file"}


@pytest.mark.parametrize("size", [0, 1, 100, 511, 512, 700, 1030, 1500])
def test_a_cut_tar_ends_with_a_reason(size: int) -> None:
    whole = tar({"x": TEXT, "y": TEXT})
    for item in leaves(io.BytesIO(whole[:size]), "a.tar"):
        assert isinstance(item, Malformed | Leaf)
        if isinstance(item, Leaf):
            break  # reading on may raise, which `contents` turns into a reason
    assert set(found(whole[:size], "a.tar").values()) <= {TEXT, "truncated archive"}


class _Flaky(io.BytesIO):
    def read(self, size: int | None = -1, /) -> bytes:
        if self.tell() > 5000:
            raise OSError("connection reset")
        return super().read(size)


def test_errors_of_the_storage_are_no_property_of_the_file() -> None:
    stream: BinaryIO = _Flaky(tar({str(i): bytes(70_000) for i in range(3)}))
    with pytest.raises(StorageError, match="connection reset"):
        list(contents(stream, "a", 1 << 20))


@pytest.mark.parametrize("harm", ["a bit flipped", "cut between members", "cut within a header"])
def test_members_after_a_damaged_header_are_not_lost_unseen(harm: str) -> None:
    whole = tar({f"{i}.jpg": b"x" * 100 for i in range(5)})
    third = 2 * 1024  # each member has a block of header and one of content
    broken = {
        "a bit flipped": whole[:third] + bytes([whole[third] ^ 1]) + whole[third + 1 :],
        "cut between members": whole[:third],
        "cut within a header": whole[: third + 100],
    }[harm]
    found = list(contents(io.BytesIO(broken), "photos.tar", 1000))
    assert [one[0] for one in found if not isinstance(one, Malformed)] == [
        "photos.tar/0.jpg", "photos.tar/1.jpg"
    ]  # fmt: skip
    (last,) = [one for one in found if isinstance(one, Malformed)]
    assert last.reason == "truncated archive" and "at byte 2048" in last.detail
    assert len(list(contents(io.BytesIO(whole), "photos.tar", 1000))) == 5
