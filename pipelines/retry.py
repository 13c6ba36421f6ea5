"""Retries the failed URLs of a committed dataset: `ingest.py --retry-failed`.

A URL that fails today may work tomorrow. The records whose download failed become new shards, made
into parts like any others; then the dataset is committed again with these parts, and with new
reasons in place of the old ones. The earlier commit stays as it was. If killed and run again, it
resumes where it was. One part's records are held in memory at a time.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from pipelines.dataset import Commit, Dataset
from pipelines.ingest_units import URL_SCHEMA
from pipelines.parts import PartRecord, sum_stats
from pipelines.storage import FileRecord

HOPELESS = (
    "bad url",
    "blocked port",
    "private address",
    "robots: disallowed",
    "too complex",
    "too large",
    "too many pixels",
    "unsupported format",
    "unsupported scheme",
)
"""Reasons for which a retry is pointless."""
_STAGES = ("download", "decode")  # decode, too: a failing server may send a page or half a file


@dataclass
class Failed:
    """The records to retry: the shards to make into parts, and the set-aside files that remain.

    reasons, stages: number of records to retry by their failure's reason, and by its stage.
    """

    units: list[dict[str, Any]] = field(default_factory=list)
    kept: list[FileRecord] = field(default_factory=list)
    reasons: Counter[str] = field(default_factory=Counter)
    stages: Counter[str] = field(default_factory=Counter)


def failed_shards(dataset: Dataset, commit: Commit, mark: str, size: int) -> Failed:
    """Write the records whose download failed as new shards of URLs.

    Args:
        mark: The fingerprint under which the shards of URLs are stored.
        size: Records per shard.
    """
    folder = f"{dataset.name}/data-{mark[:8]}"
    failed = Failed()
    rows = _failed_rows(dataset, commit, folder, failed)
    number = 1 + max((_number(f.path) for f in (*commit.files, *commit.set_aside)), default=-1)
    while chunk := list(islice(rows, size)):
        name = f"{folder}/_urls-{number:05d}.parquet"
        dataset.store.write_table(name, pa.Table.from_pylist(chunk, URL_SCHEMA))
        failed.units.append({"name": f"{number:05d}", "urls": name})
        number += 1
    return failed


def _failed_rows(
    dataset: Dataset, commit: Commit, folder: str, failed: Failed
) -> Iterator[dict[str, Any]]:
    version = len(commit.lineage.get("amendments", []))
    for record in commit.set_aside:
        aside = dataset.store.read_table(f"{dataset.name}/{record.path}")
        hopeless = pc.is_in(aside["reason"], pa.array(HOPELESS))  # type: ignore[attr-defined]
        came_to_nothing = pc.is_in(aside["stage"], pa.array(_STAGES))  # type: ignore[attr-defined]
        again = pc.and_not(came_to_nothing, hopeless)  # type: ignore[attr-defined]
        rows = aside.filter(again)
        if not rows.num_rows:
            failed.kept.append(record)
            continue
        rest = aside.filter(pc.invert(again))  # type: ignore[attr-defined]
        if rest.num_rows:
            path = f"{record.path.rpartition('/')[0]}/_set-aside-{_number(record.path):05d}"
            failed.kept.append(dataset.write_table(f"{path}-{version}.parquet", rest))
        failed.reasons.update(rows["reason"].to_pylist())
        failed.stages.update(rows["stage"].to_pylist())
        ids = set(rows["id"].to_pylist())
        shard = dataset.store.read_table(f"{folder}/_urls-{_number(record.path):05d}.parquet")
        yield from (row for row in shard.to_pylist() if row["id"] in ids)


def _number(path: str) -> int:
    """The number of the part that a file belongs to."""
    found = re.search(r"(?:part|_set-aside)-(\d+)", path)
    assert found is not None, path
    return int(found[1])


def amend(dataset: Dataset, commit: Commit, failed: Failed, parts: list[PartRecord]) -> Commit:
    """Commit the dataset again, with the results of the retried records.

    Raises:
        StoreError: another job amended it in the meantime.
    """
    recovered = sum(part.file.rows for part in parts)
    tried = failed.reasons.total()
    stats = commit.stats | {"read": commit.stats["read"] - tried}  # the parts count them again
    for key, gone in (("set_aside", failed.reasons), ("stages", failed.stages)):
        stats[key] = dict(Counter(stats.get(key, {})) - gone)
    return dataset.amend(
        files=[*commit.files, *(part.file for part in parts if part.file.rows)],
        set_aside=[*failed.kept, *(part.set_aside for part in parts if part.set_aside)],
        stats=sum_stats([stats, *(part.stats for part in parts)]),
        note={"job": "ingest --retry-failed", "tried": tried, "recovered": recovered},
    )
