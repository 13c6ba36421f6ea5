"""Text corpora of any origin: a folder of JSON lines, plain text, Parquet, compressed or not.

    python pipelines/ingest.py --source text_files --name mine --annotations /data/texts

`.jsonl`: one object with a `text` per line, one document each. `.txt`: paragraphs between blank
lines, gathered in order into documents of about `document_chars` characters. For other formats and
archives see `pipelines.sources._documents`. The licence is the corpus's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from pipelines.sources import Options, TextItem, _documents

KIND = "text"
UNITS = _documents.UNITS
EXPECTED = "*.jsonl, *.txt, *.json, *.parquet, *.tar or *.zip, packed or not"
ORIGIN = "the corpus's publisher; any folder of such files will do"


def read_file(stream: BinaryIO, name: str, options: Options) -> Iterator[TextItem]:
    """Yield the documents of one file; their ids are the file's name and their number from 1."""
    return _documents.documents(stream, name, options)
