"""Reads images by the paths that annotations name: in a folder or bucket, or inside the zips there.

The zips are read member by member, in random access, and never unpacked: COCO's `train2017.zip`
holds `train2017/000000000009.jpg`. Paths come from published files, so one that leads out of the
folder is refused. Memory: the zips' directories, about half a kilobyte per image (60 MB for
train2017).
"""

from __future__ import annotations

import functools
import io
import lzma
import posixpath
import zipfile
import zlib
from collections.abc import Sequence
from typing import Any, cast

import pyarrow.fs as pafs

from pipelines.images import Rejected
from pipelines.storage import Store

MISSING = "missing image file"
_STAGE = "files"
_BROKEN = (
    *(zipfile.BadZipFile, EOFError, ValueError, RuntimeError, NotImplementedError),
    *(zlib.error, lzma.LZMAError),
)
_BUFFER = 1 << 18  # an image or two: zips are read at random


class ImageFiles:
    """The images below a URI: a folder with images, a folder with zips, or one zip.

    Raises:
        FileNotFoundError: nothing is there.
    """

    def __init__(self, uri: str) -> None:
        folder, _, name = uri.rstrip("/").rpartition("/")
        single = name.lower().endswith(".zip")
        self.store = Store(folder or "." if single else uri)
        names = self.store.list("")
        zips = [n for n in names if n == name or (not single and n.lower().endswith(".zip"))]
        if not names or (single and not zips):
            raise FileNotFoundError(
                f"{uri}: no images there. Expected the published zips, such as train2017.zip of "
                "https://cocodataset.org/#download, or the folders in them"
            )
        self.only_zips = single
        self.described = [self._describe(name) for name in zips]
        self._names = zips
        self._zips: list[zipfile.ZipFile] | None = None

    def read(self, paths: Sequence[str], most: int) -> bytes | Rejected:
        """The image at the first path that exists; a reason if none does."""
        for path in paths:
            if _leads_out(path):
                return Rejected("bad file name", path[:200], _STAGE)
            for archive in self._opened():
                member = archive.NameToInfo.get(path)
                if member is not None:
                    return _member(archive, member, most)
        for path in () if self.only_zips else paths:
            info = self.store.fs.get_file_info(self.store.path(path))
            if info.type != pafs.FileType.File:
                continue
            if info.size > most:
                return Rejected("file too large", f"{path}: {info.size} bytes", _STAGE)
            return self.store.read(path)
        return Rejected(MISSING, ", ".join(paths)[:200], _STAGE)

    def _opened(self) -> list[zipfile.ZipFile]:
        if self._zips is None:
            self._zips = [self._open(name) for name in self._names]
        return self._zips

    def _open(self, name: str) -> zipfile.ZipFile:
        native = self.store.fs.open_input_file(self.store.path(name))
        try:
            return zipfile.ZipFile(io.BufferedReader(cast(io.RawIOBase, native), _BUFFER))
        except (zipfile.BadZipFile, ValueError) as error:  # Arrow's seeking raises the latter
            raise ValueError(f"{self.store.uri}/{name}: {error}; download it again") from error

    def _describe(self, name: str) -> dict[str, Any]:
        size = self.store.fs.get_file_info(self.store.path(name)).size
        return {"file": posixpath.join("images", name), "bytes": size}


@functools.lru_cache(maxsize=2)
def load(uri: str) -> ImageFiles:
    """The images below a URI, opened once per process."""
    return ImageFiles(uri)


def _leads_out(path: str) -> bool:
    parts = path.replace("\\", "/").split("/")
    return not path.isprintable() or ".." in parts or parts[0] == "" or ":" in parts[0]


def _member(archive: zipfile.ZipFile, member: zipfile.ZipInfo, most: int) -> bytes | Rejected:
    """A member's bytes; the directory may lie about its size, so reading is bounded."""
    try:
        with archive.open(member) as stream:
            data = stream.read(most + 1)
    except _BROKEN as error:
        return Rejected("broken file", f"{type(error).__name__}: {error}"[:200], _STAGE)
    if len(data) > most:
        return Rejected("file too large", f"{member.filename}: over {most} bytes"[:200], _STAGE)
    return data
