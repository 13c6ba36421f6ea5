"""OpenWebText: 8 million web pages that Reddit's users linked to.

    python pipelines/ingest.py --source openwebtext --annotations /data/openwebtext

From huggingface.co/datasets/Skylion007/openwebtext: `subsets/urlsf_subset00.tar` to `20`, each
holding `urlsf_subset00-1_data.xz` and so on, each of them a tar of `.txt` files, one page each. The
older `openwebtext.tar.xz` holds the same xz files; JSON lines or Parquet with `text` are read, too.
A file is one task, so the 21 subsets are read on 21 cores, and the single archive on one. The
selection is CC0; the pages belong to their authors.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from pipelines.sources import Options, TextItem, _documents

KIND = "text"
UNITS = (*_documents.UNITS, "urlsf_subset*.xz")
EXPECTED = "urlsf_subset*.tar or openwebtext.tar.xz"
ORIGIN = "https://huggingface.co/datasets/Skylion007/openwebtext"


def read_file(stream: BinaryIO, name: str, options: Options) -> Iterator[TextItem]:
    return _documents.documents(stream, name, options, whole=True)
