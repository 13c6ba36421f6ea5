"""CC-Stories: the million Common Crawl documents most like stories.

    python pipelines/ingest.py --source stories --annotations /data/stories

From huggingface.co/datasets/spacemanidol/cc-stories, a copy of the corpus by Trinh and Le
(arXiv 1806.02847): plain text, `cc-stories.txt`, compressed or in a tar; JSON lines with a `text`
are read, too. Plain text is cut every `document_chars` characters, at paragraphs or between lines.
The texts belong to their authors; see Common Crawl's terms of use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from pipelines.sources import Options, TextItem, _documents

KIND = "text"
UNITS = _documents.UNITS
EXPECTED = "cc-stories.txt, packed or not, or *.jsonl"
ORIGIN = "https://huggingface.co/datasets/spacemanidol/cc-stories"


def read_file(stream: BinaryIO, name: str, options: Options) -> Iterator[TextItem]:
    return _documents.documents(stream, name, options)
