"""BookCorpus: 11 thousand free novels, or a new crawl of them.

    python pipelines/ingest.py --source bookcorpus --annotations /data/bookcorpus

It is published in three forms. `bookcorpus.tar.bz2` or the files in it, `books_large_p1.txt` and
`books_large_p2.txt`: one sentence per line, with nothing to mark where one book ends. Or
`books1.tar.gz`, a new crawl: `books1/epubtxt/<title>.txt`, one book each, with paragraphs between
blank lines. Or Parquet with a column `text`. Documents are cut every `document_chars` characters,
between lines. The books belong to their authors; Smashwords' terms allow personal use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from pipelines.sources import Options, TextItem, _documents

KIND = "text"
UNITS = _documents.UNITS
EXPECTED = "bookcorpus.tar.bz2, books_large_p1.txt or books1.tar.gz"
ORIGIN = "https://huggingface.co/datasets/bookcorpus/bookcorpus or the-eye.eu (books1)"


def read_file(stream: BinaryIO, name: str, options: Options) -> Iterator[TextItem]:
    return _documents.documents(stream, name, options)
