"""Shared by ImageNet's two sources: finds synsets, tarred or unpacked, and reads photos."""

from __future__ import annotations

import posixpath
import re
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import Any, BinaryIO

import pyarrow.fs as pafs

from pipelines.sources import ImageItem, ImageRecord, Malformed, no_surrogates
from pipelines.sources._archives import contents
from pipelines.storage import Store

MAX_FILE_BYTES = 256 << 20
_SYNSET = re.compile(r"n\d{8}")
_PHOTOS = (".jpeg", ".jpg")


def synsets(store: Store, folder: str) -> list[dict[str, Any]]:
    """The units below a folder: tars at any depth, and folders named like synsets."""
    units: list[dict[str, Any]] = []
    for info in _entries(store, folder):
        name = posixpath.join(folder, info.base_name)
        if info.type == pafs.FileType.File:
            if info.base_name.endswith(".tar"):
                units.append({"file": name, "bytes": info.size})
        elif _SYNSET.fullmatch(info.base_name):
            units.append(unpacked(store, name))
        else:
            units += synsets(store, name)
    tarred = {unit["file"].removesuffix(".tar") for unit in units if "file" in unit}
    return [unit for unit in units if unit.get("folder") not in tarred]


def unpacked(store: Store, folder: str) -> dict[str, Any]:
    """The unit of a folder of photos."""
    photos = _photos(store, folder)
    return {"folder": folder, "bytes": sum(p.size for p in photos), "count": len(photos)}


def photos(stream: BinaryIO, name: str, source: str) -> Iterator[ImageItem]:
    """The photos in an archive, and in archives inside it, in its order."""
    for file in contents(stream, name, MAX_FILE_BYTES):
        if isinstance(file, Malformed):
            yield file
        else:
            yield ImageRecord(f"{source}/{PurePosixPath(file[0]).stem}", None, data=file[1])


def read_folder(store: Store, folder: str, source: str) -> Iterator[ImageItem]:
    """The photos in a folder, by name."""
    for info in _photos(store, folder):
        if info.size > MAX_FILE_BYTES:
            yield Malformed("file too large", f"{info.size} bytes", f"{folder}/{info.base_name}")
            continue
        data = store.read(posixpath.join(folder, info.base_name))
        stem = PurePosixPath(no_surrogates(info.base_name)).stem
        yield ImageRecord(f"{source}/{stem}", None, data=data)


def _photos(store: Store, folder: str) -> list[pafs.FileInfo]:
    found = _entries(store, folder)
    return [
        i
        for i in found
        if i.type == pafs.FileType.File and i.base_name.lower().endswith(_PHOTOS)
        and not i.base_name.startswith(".")
    ]  # fmt: skip


def _entries(store: Store, folder: str) -> list[pafs.FileInfo]:
    selector = pafs.FileSelector(store.path(folder) if folder else store.root, allow_not_found=True)
    return sorted(store.fs.get_file_info(selector), key=lambda info: info.base_name)
