"""ImageNet-1K (ILSVRC2012): 1.28 million photos of a thousand synsets, here without their labels.

    python pipelines/ingest.py --source imagenet1k --annotations /data/imagenet1k

From image-net.org/challenges/LSVRC/2012 (an account and its terms: non-commercial research):
`ILSVRC2012_img_train.tar`, a tar with a tar per synset, read in place with one task per synset; or
unpacked to `train/n01440764.tar` or `train/n01440764/n01440764_10026.JPEG`. Kaggle's copy has
`train` in `ILSVRC/Data/CLS-LOC`.

The validation photos are a benchmark: they are read only if `--splits` names `val`, from
`ILSVRC2012_img_val.tar`, or from `val`, flat or with a folder per class. The devkit's ground truth
is not needed, since images are stored without classes. Photos of the training set are also in
ImageNet-21K. Memory: one photo.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from typing import Any, BinaryIO

from pipelines.sources import ImageItem, Options, _imagenet
from pipelines.sources._archives import TarMember
from pipelines.storage import Store

KIND = "images"
UNITS = ("ILSVRC2012_img_train.tar",)
EXPECTED = "ILSVRC2012_img_train.tar or a folder train (ILSVRC2012_img_val.tar or val for val)"
ORIGIN = "https://image-net.org/challenges/LSVRC/2012/2012-downloads.php"
SPLITS = ("train", "val")
_KAGGLE = "ILSVRC/Data/CLS-LOC"


def find(store: Store, options: Options) -> list[dict[str, Any]]:
    """The units of the chosen splits.

    Raises:
        FileNotFoundError: a chosen split is missing.
        ValueError: the archive of archives can't be read.
    """
    units: list[dict[str, Any]] = []
    for split in options.splits:
        found = _find(store, split)
        if not found:
            raise FileNotFoundError(
                f"{store.uri}: no split {split!r}: expected {EXPECTED}. Get it from {ORIGIN}"
            )
        units += found
    return units


def _find(store: Store, split: str) -> list[dict[str, Any]]:
    archive = f"ILSVRC2012_img_{split}.tar"
    if store.exists(archive):
        size = store.fs.get_file_info(store.path(archive)).size
        whole = [{"file": archive, "bytes": size}]
        return whole if split == "val" else _inner(store, archive)
    for folder in (split, f"{_KAGGLE}/{split}"):
        flat = [u for u in [_imagenet.unpacked(store, folder)] if u["count"]]
        found = flat + _imagenet.synsets(store, folder)
        if found:
            return found
    return []


def _inner(store: Store, archive: str) -> list[dict[str, Any]]:
    """One unit per tar in the tar; only the headers between them are read."""
    units = []
    with store.fs.open_input_file(store.path(archive)) as stream:
        try:
            with tarfile.open(fileobj=stream, mode="r:", tarinfo=TarMember) as outer:
                for member in outer:
                    if member.isfile() and member.name.endswith(".tar"):
                        place = {"start": member.offset_data, "bytes": member.size}
                        units.append({"file": archive, **place})
        except tarfile.TarError as error:
            raise ValueError(f"{archive}: {error}; download it again") from error
    return units


def read_file(stream: BinaryIO, name: str, options: Options) -> Iterator[ImageItem]:
    return _imagenet.photos(stream, name, "imagenet1k")


def read_folder(store: Store, folder: str, options: Options) -> Iterator[ImageItem]:
    return _imagenet.read_folder(store, folder, "imagenet1k")
