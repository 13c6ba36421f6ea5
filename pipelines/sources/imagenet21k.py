"""ImageNet-21K: 14 million photos without captions.

From image-net.org/download-images (an account and its terms: non-commercial research): one tar per
WordNet id, `n01440764.tar` holding `n01440764_10026.JPEG` and so on, at any depth below the folder.
"""

from __future__ import annotations

import tarfile
from collections.abc import Iterator
from pathlib import PurePosixPath
from typing import BinaryIO

from pipelines.sources import ImageItem, ImageRecord, Malformed, Options, no_surrogates

KIND = "images"
UNITS = ("*.tar",)
ORIGIN = "https://image-net.org/download-images"
MAX_FILE_BYTES = 256 << 20


def read_file(stream: BinaryIO, name: str, options: Options) -> Iterator[ImageItem]:
    """Yield the images of one archive, in its order; `name` is the archive's, for messages."""
    try:
        with tarfile.open(fileobj=stream, mode="r|*") as archive:
            for member in archive:
                file = PurePosixPath(no_surrogates(member.name))
                if not member.isfile() or file.name.startswith("."):
                    continue
                if member.size > MAX_FILE_BYTES:
                    yield Malformed("file too large", f"{member.size} bytes", f"{name}:{file}")
                    continue
                content = archive.extractfile(member)
                assert content is not None  # it is a file
                yield ImageRecord(f"imagenet21k/{file.stem}", None, data=content.read())
    except (tarfile.TarError, EOFError, OSError) as error:
        yield Malformed("truncated archive", f"{type(error).__name__}: {error}"[:200], name)
