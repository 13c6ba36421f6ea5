"""ImageNet-21K: 14 million photos without captions.

    python pipelines/ingest.py --source imagenet21k --annotations /data/imagenet21k

From image-net.org/download-images (an account and its terms: non-commercial research): one tar per
WordNet id, `n01440764.tar` holding `n01440764_10026.JPEG` and so on, at any depth below the folder;
or the tars unpacked, `n01440764/n01440764_10026.JPEG`. A synset present in both forms is read from
its tar. Memory: one photo.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, BinaryIO

from pipelines.sources import ImageItem, Options, _imagenet
from pipelines.storage import Store

KIND = "images"
UNITS = ("*.tar",)
EXPECTED = "*.tar, one per WordNet id, or folders like n01440764"
ORIGIN = "https://image-net.org/download-images"


def find(store: Store, options: Options) -> list[dict[str, Any]]:
    return _imagenet.synsets(store, "")


def read_file(stream: BinaryIO, name: str, options: Options) -> Iterator[ImageItem]:
    """Yield the images of one archive, in its order; `name` is the archive's, for messages."""
    return _imagenet.photos(stream, name, "imagenet21k")


def read_folder(store: Store, folder: str, options: Options) -> Iterator[ImageItem]:
    """Yield the images of an unpacked synset, by name."""
    return _imagenet.read_folder(store, folder, "imagenet21k")
