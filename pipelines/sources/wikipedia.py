"""Wikipedia: the articles of a dump, as text.

    python pipelines/ingest.py --source wikipedia --annotations /data/wikipedia --language en

It is published in two forms. `train-00000-of-00041.parquet` and so on, with the columns id, url,
title, text: huggingface.co/datasets/wikimedia/wikipedia, for example the folder 20231101.en. Or the
output of `wikiextractor --json` for `enwiki-latest-pages-articles.xml.bz2` from
dumps.wikimedia.org: `AA/wiki_00` and so on, one JSON object with the same fields per line. The
dump's XML itself is not read. Texts: CC BY-SA and GFDL.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import BinaryIO

from pipelines.sources import Options, TextItem, _documents

KIND = "text"
UNITS = (*_documents.UNITS, "wiki_*")
EXPECTED = "train-*.parquet of Hugging Face's wikimedia/wikipedia, or wikiextractor's AA/wiki_00"
ORIGIN = "https://huggingface.co/datasets/wikimedia/wikipedia or https://dumps.wikimedia.org"


def read_file(stream: BinaryIO, name: str, options: Options) -> Iterator[TextItem]:
    return _documents.documents(stream, name, options)
