"""CC-News: English news articles of Common Crawl's news crawl.

    python pipelines/ingest.py --source cc_news --annotations /data/cc_news --language en

From huggingface.co/datasets/vblagoje/cc_news: Parquet with the columns title, text, domain, date,
description, url, image_url; the older `cc_news.tar.gz` holds one JSON object per file, whose text
is called `maintext`, as written by news-please. JSON lines with title and text are read, too.
RoBERTa's 76 GB were a crawl of the same source that was never published. A title becomes its
document's first line. The articles belong to their publishers; see Common Crawl's terms of use.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from pipelines.sources import Options, TextItem, _documents

KIND = "text"
UNITS = _documents.UNITS
EXPECTED = "*.parquet, *.jsonl or cc_news.tar.gz"
ORIGIN = "https://huggingface.co/datasets/vblagoje/cc_news"


def read_file(stream: BinaryIO, name: str, options: Options) -> Iterator[TextItem]:
    fields = ("text", "maintext")
    return _documents.documents(stream, name, options, field=fields, title="title")
