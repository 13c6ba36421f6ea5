"""Rows to drop, per file: the result of a search for duplicates in a dataset."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from pipelines.storage import FileRecord, Store

STAGE = "duplicates"
SAME_BYTES = "duplicate: same bytes"
SAME_PICTURE = "duplicate: same picture"

LIST = pa.schema(
    [
        ("row", pa.int32()),  # within the part
        ("reason", pa.string()),
        ("of", pa.string()),  # the id of the row that stays
        ("of_dataset", pa.string()),
        ("bits", pa.int16()),
        ("colour", pa.int16()),
    ]
)


@dataclass(frozen=True)
class Found:
    """The rows to drop from a dataset's files: one object in the store per file that has any."""

    compared: int
    """Rows compared, including those of `against`."""
    counts: dict[str, int] = field(default_factory=dict)
    """Rows to drop, by reason."""
    lists: dict[str, str] = field(default_factory=dict)
    """The name of each file's list, by the file's path within the dataset."""

    def rows(self, store: Store, file: FileRecord) -> pa.Table:
        """A file's list, with the columns of `LIST`, in the order of its rows."""
        name = self.lists.get(file.path)
        return LIST.empty_table() if name is None else store.read_table(name)


def list_of(verdicts: pa.Table, *, start: int, datasets: Sequence[str]) -> pa.Table:
    """A file's list.

    Args:
        verdicts: For each row to drop: its number among all rows (`row`), the id of the row that
            stays (`of`), and how they differ (`same_bytes`, `bits`, `colour`).
        start: The number of the file's first row.
        datasets: For each verdict, the dataset of the row that stays.
    """
    same = verdicts["same_bytes"].to_pylist()
    columns = {
        "row": pa.array(verdicts["row"].to_numpy() - start, pa.int32()),
        "reason": pa.array([SAME_BYTES if bytes_too else SAME_PICTURE for bytes_too in same]),
        "of": verdicts["of"],
        "of_dataset": pa.array(datasets, pa.string()),
        "bits": verdicts["bits"],
        "colour": verdicts["colour"],
    }
    return pa.table(columns, schema=LIST)
