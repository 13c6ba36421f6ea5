"""Removes the rows that `pipelines.duplicates` found from a dataset's parts; sets them aside."""

from __future__ import annotations

import functools
import posixpath
from collections import Counter
from collections.abc import Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipelines import signature_files
from pipelines.dataset import Dataset, PartRecord
from pipelines.duplicate_lists import SAME_BYTES, STAGE, Found
from pipelines.parts import each
from pipelines.storage import FileRecord


def drop(table: pa.Table, rows: pa.Table) -> tuple[pa.Table, list[dict[str, Any]]]:
    """A part's table without the rows in its list, and those rows in set-aside form."""
    columns = [c for c in ("id", "url") if c in table.column_names]
    gone = table.select(columns).take(rows["row"]).to_pylist()
    return table.filter(_others(table, rows)), [
        {
            "id": row["id"],
            "url": row.get("url") or "",
            "reason": found["reason"],
            "detail": _detail(found),
            "stage": STAGE,
        }
        for row, found in zip(gone, rows.to_pylist(), strict=True)
    ]


def _others(table: pa.Table, rows: pa.Table) -> pa.Array:
    """Which of a part's rows are not in its list."""
    keep = np.ones(table.num_rows, bool)
    keep[rows["row"].to_numpy()] = False
    return pa.array(keep)


def _detail(found: dict[str, Any]) -> str:
    of = f"{found['of_dataset']}: {found['of']}"
    if found["reason"] == SAME_BYTES:
        return of
    return f"{of}: {found['bits']} bits and {found['colour']} levels of colour differ"


def remove(
    dataset: Dataset,
    mark: str,
    records: Sequence[PartRecord],
    found: Found,
    *,
    here: bool = False,
) -> list[PartRecord]:
    """The parts to commit: those that lose rows are rewritten under `mark`.

    `mark` must differ from the given parts' fingerprint. Removed rows are set aside, and the counts
    that ingestion keeps (rows, images, captions, bytes, set_aside, stages) are adjusted.
    """
    folder = f"data-{mark[:8]}"
    if any(posixpath.dirname(r.file.path) == folder for r in records):
        raise ValueError(f"{dataset.name}: {mark} is the parts' own fingerprint; give another")
    done = dataset.finished_parts(mark)
    todo = [r for r in records if r.file.path in found.lists and r.name not in done]
    units = [{"record": r.to_json(), "list": found.lists[r.file.path]} for r in todo]
    work = functools.partial(_rewrite, dataset, mark)
    for _ in each(f"{dataset.name}: without duplicates", work, units, here=here):
        pass
    done = dataset.finished_parts(mark)
    return [done[r.name] if r.file.path in found.lists else r for r in records]


def _rewrite(dataset: Dataset, mark: str, unit: dict[str, Any]) -> None:
    record = PartRecord.from_json(unit["record"])
    rows = dataset.store.read_table(unit["list"])
    table = dataset.store.read_table(f"{dataset.name}/{record.file.path}")
    aside: list[dict[str, Any]] = []
    if record.set_aside:
        aside = dataset.store.read_table(f"{dataset.name}/{record.set_aside.path}").to_pylist()
    kept, dropped = drop(table, rows)
    lost = table.take(rows["row"])
    stats = _without(record.stats, lost, dropped)
    # Signatures first: the part's record, written last, marks everything as complete.
    signed = signature_files.read(dataset.store, dataset.name, record.file.path)
    folder = f"data-{mark[:8]}"
    written = FileRecord(f"{folder}/part-{record.name}.parquet", 0, 0, "")
    signature_files.write(dataset, written, signed.filter(_others(signed, rows)))
    dataset.write_part(mark, record.name, kept, set_aside=[*aside, *dropped], stats=stats)


def _without(
    stats: dict[str, Any], lost: pa.Table, dropped: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """A part's counts after removal of the `lost` rows; counts it never had are not added."""
    gone = {"rows": lost.num_rows}
    if "image" in lost.column_names:
        sizes = pc.binary_length(pc.struct_field(lost["image"], "bytes"))  # type: ignore[attr-defined]
        gone |= {"images": lost.num_rows, "bytes": pc.sum(sizes).as_py() or 0}  # type: ignore[attr-defined]
        gone["captions"] = len(lost["captions"].combine_chunks().flatten())
    else:
        gone["bytes"] = pc.sum(pc.binary_length(lost["text"])).as_py() or 0  # type: ignore[attr-defined]
    after = {k: v - gone.get(k, 0) if isinstance(v, int) else v for k, v in stats.items()}
    for name, of in (("set_aside", "reason"), ("stages", "stage")):
        added = Counter(row[of] for row in dropped)
        after[name] = dict(sorted((Counter(stats.get(name, {})) + added).items()))
    return after
