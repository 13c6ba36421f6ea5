"""Finds rows that repeat an earlier row: equal bytes, or a picture at another size or quality.

    found = find(dataset, in_order(records), against=("images/cc3m",))  # a list for each part
    records = drop_duplicates.remove(dataset, mark, records, found)     # parts without those rows

**Definition.** Two pictures are the same if their signatures (`pipelines.signatures`) differ by at
most `MOST_BITS` bits, which are at most `MOST_SHARE` of those set in either, and by at most
`MOST_COLOUR` levels of colour. This is stricter than the limits for held-out pictures, where a miss
costs more than a false match: of different drawings on a plain background, some are within those
(`benchmarks/same_picture.py`). Texts and unreadable pictures are compared by checksum.

**What stays.** Rows are ordered: the datasets of `against` as given, then this one; within each, by
file, then by row. In this order, a row is dropped if it is the same as an earlier row *that stays*.
The row named as its original is the first one that stays with an equal signature, or else the first
one that stays and is the same. So in a chain a ~ b ~ c where a and c differ, a and c stay: every
dropped row has a match among those that stay, and no two rows that stay were found the same. Rows
of `against` always stay.

**Which pairs are compared.** Hashes that may differ in 72 of 256 bits share no useful band (73
bands have under four bits each: every pair would be compared), so candidates come from the colours:
two pictures are compared if they share a cell of `pipelines.picture_cells`.
This finds pictures that are the same *and near*: in drawn scenes, every copy re-encoded at a usual
quality, shrunk to nine tenths, or enlarged, and most copies at half the size or at quality 20; one
in 800 pairs of different scenes is compared for nothing. Pairs at the very edge of the definition
can be missed. `pipelines.leaks` compares all with all, since held-out pictures must not be missed;
that is infeasible for 21 million pictures among themselves.

**How.** Every part has a side file of signatures (`pipelines.signature_files`). Slabs of parts deal
their rows, by cell, into buckets; each bucket finds its pairs; then the rule above is applied slab
by slab, in order. A process holds one slab or one bucket, whatever the dataset's size; for 21
million pictures the buckets take about 70 GB of the store while the search runs. A repeated job
reuses finished steps. The result depends only on the rows and their order, not on slabs, buckets or
processes.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from pipelines import picture_cells, signature_files, signatures
from pipelines.dataset import Dataset, PartRecord
from pipelines.duplicate_lists import Found, list_of
from pipelines.lineage import fingerprint
from pipelines.parts import each
from pipelines.picture_cells import TABLES
from pipelines.signatures import COLOUR_BYTES, Signature
from pipelines.storage import FileRecord, Store

MOST_BITS = 72
"""Maximum number of bits in which the hashes of duplicates differ."""
MOST_SHARE = 0.5
"""The same, as a share of the bits that are set in either."""
MOST_COLOUR = 24
"""Maximum difference, in levels of 255, of the mean colour of any field of duplicates."""

_VERSION = 1  # of cells and lists: raised when either changes
_DEALT = pa.schema(
    [("key", pa.uint64()), ("row", pa.int64()), ("table", pa.int8()), *signature_files.SCHEMA]
)
_PAIRS = pa.schema(
    [
        ("row", pa.int64()),
        ("of_row", pa.int64()),
        ("of", pa.string()),
        ("twin", pa.bool_()),  # equal signatures, so both have the same matches
        ("same_bytes", pa.bool_()),
        ("bits", pa.int16()),
        ("colour", pa.int16()),
    ]
)


@dataclass(frozen=True)
class Sizes:
    """How much one process holds at a time. The result doesn't depend on it."""

    slab_rows: int = 500_000
    """Rows in the parts that are dealt, and judged, together: about 250 MB."""
    bucket_rows: int = 500_000
    """Approximate entries per bucket, one per row and table: about 300 MB."""


def in_order(records: Iterable[PartRecord]) -> list[FileRecord]:
    """The parts' files in the order that the dataset will have when it is published."""
    return [record.file for record in sorted(records, key=lambda record: record.name)]


# -- finding --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _File:
    """One of the files compared; `start` is the number of its first row."""

    dataset: str
    path: str
    rows: int
    start: int


@dataclass(frozen=True)
class _Search:
    """One search: what it compares, and how it is split. Small, as every task gets a copy."""

    store: Store
    work: str
    buckets: int
    slab_starts: tuple[int, ...]
    """The number of each slab's first row."""
    first_new: int
    """Rows from here on may be dropped; those before belong to other datasets and stay."""

    def slab(self, row: int) -> int:
        return int(np.searchsorted(self.slab_starts, row, side="right")) - 1

    def dealt(self, bucket: int) -> str:
        return f"{self.work}/bucket-{bucket:05d}"

    def pairs(self, slab: int) -> str:
        return f"{self.work}/pairs-{slab:05d}"

    def judged(self, slab: int) -> str:
        return f"{self.work}/judged-{slab:05d}.parquet"


def find(
    dataset: Dataset,
    files: Sequence[FileRecord],
    *,
    against: Sequence[str] = (),
    sizes: Sizes = Sizes(),  # noqa: B008 (frozen)
    here: bool = False,
) -> Found:
    """Find the rows of a dataset's files that repeat an earlier row, or load an earlier result.

    Args:
        dataset: The dataset that the files belong to; it needn't be committed yet.
        files: The files in the order that the dataset will have.
        against: Committed datasets of the same store whose rows come first, in this order.
        sizes: How much a process holds.
        here: Do everything in this process, without Ray.

    Raises:
        StoreError: a dataset of `against` has no commit.
    """
    store = dataset.store
    compared: list[_File] = []
    identity: list[list[Any]] = []
    for name in (*against, None):
        other = dataset if name is None else store.dataset(name)
        records = list(files) if name is None else other.commit().files
        signature_files.write_missing(other, records, here=here)
        identity.append([other.name, [[f.rows, f.sha256] for f in records]])
        for file in records:
            start = compared[-1].start + compared[-1].rows if compared else 0
            compared.append(_File(other.name, file.path, file.rows, start))
    versions = [_VERSION, signature_files.VERSION]
    mark = fingerprint("duplicates", {"version": versions, "same": _definition()},
                       [json.dumps(i) for i in identity])  # fmt: skip
    folder = f"{dataset.name}/_duplicates-{mark}"
    result = f"{folder}/found.json"
    if not store.exists(result):
        own = compared[len(compared) - len(files) :]
        rows = sum(f.rows for f in compared)
        slabs = _slabs([f for f in compared if f.rows], sizes.slab_rows)
        search = _Search(
            store,
            work=f"{folder}/work-{fingerprint('work', asdict(sizes))[:8]}",
            buckets=max(1, -(-rows * TABLES // sizes.bucket_rows)),
            slab_starts=tuple(slab[0].start for slab in slabs),
            first_new=own[0].start if own else rows,
        )
        _deal_all(search, slabs, here=here)
        _match_all(search, here=here)
        for number, slab in enumerate(slabs):  # in order: each needs the verdicts of those before
            new = slab[-1].start >= search.first_new
            if new and not store.exists(search.judged(number)):
                store.write_table(search.judged(number), _judge(search, number))
        found = _write_lists(search, folder, compared, own, rows)
        store.write_json(result, asdict(found))
        for name in store.list(folder):
            if name.startswith("work-"):  # also abandoned ones of other sizes
                store.delete(f"{folder}/{name}")
    return Found(**store.read_json(result))


def _definition() -> list[float]:
    """The settings that decide whether two pictures are compared, and whether they are the same."""
    return [MOST_BITS, MOST_SHARE, MOST_COLOUR, *picture_cells.DEFINITION]


def _slabs(files: Sequence[_File], rows: int) -> list[list[_File]]:
    slabs: list[list[_File]] = []
    held = rows
    for file in files:
        if held >= rows:
            slabs.append([])
            held = 0
        slabs[-1].append(file)
        held += file.rows
    return slabs


# -- dealing --------------------------------------------------------------------------------------


def _deal_all(search: _Search, slabs: Sequence[Sequence[_File]], *, here: bool) -> None:
    units = [
        {"number": number, "files": [asdict(f) for f in slab]} for number, slab in enumerate(slabs)
    ]
    work = functools.partial(_step, _deal, search, "dealt")
    _each("duplicates: dealing", work, _todo(search, "dealt", units), here=here)


def _deal(search: _Search, unit: dict[str, Any]) -> None:
    """Deal a slab's signatures into the buckets of their cells."""
    files = [_File(**f) for f in unit["files"]]
    tables = [signature_files.read(search.store, f.dataset, f.path) for f in files]
    for file, table in zip(files, tables, strict=True):
        if table.num_rows != file.rows:
            raise ValueError(f"{file.dataset}/{file.path}: {table.num_rows} signatures, not one "
                             f"for each of {file.rows} rows: delete them")  # fmt: skip
    signed = pa.concat_tables(tables).combine_chunks()
    numbers = np.concatenate([np.arange(f.start, f.start + f.rows) for f in files])
    pictured = signed["colours"].is_valid().to_numpy()
    keys = np.zeros((len(numbers), TABLES), np.uint64)
    keys[pictured] = picture_cells.keys(_matrix(signed["colours"], COLOUR_BYTES)[pictured])
    keys[~pictured, 0] = _matrix(signed["sha256"], 32)[~pictured, :8].copy().view(np.uint64)[:, 0]
    used = np.repeat(pictured[:, None], TABLES, axis=1)
    used[:, 0] = True  # rows without a readable picture are compared once, by checksum
    place, table = np.nonzero(used)
    keys = keys[place, table]
    bucket = (keys % np.uint64(search.buckets)).astype(np.int64)
    order = np.argsort(bucket, kind="stable")
    ends = np.searchsorted(bucket[order], np.arange(search.buckets + 1))
    for number in range(search.buckets):
        mine = order[ends[number] : ends[number + 1]]
        if mine.size:
            dealt = signed.take(pa.array(place[mine]))
            columns = [keys[mine], numbers[place[mine]], table[mine].astype(np.int8)]
            arrays = [pa.array(c) for c in columns] + dealt.columns
            name = f"{search.dealt(number)}/{unit['number']:05d}.parquet"
            search.store.write_table(name, pa.Table.from_arrays(arrays, schema=_DEALT))


# -- matching -------------------------------------------------------------------------------------


def _match_all(search: _Search, *, here: bool) -> None:
    units = [{"number": number} for number in range(search.buckets)]
    work = functools.partial(_step, _match, search, "matched")
    _each("duplicates: matching", work, _todo(search, "matched", units), here=here)


def _match(search: _Search, unit: dict[str, Any]) -> None:
    """Find a bucket's pairs, and store them by the slab of the later row."""
    bucket = unit["number"]
    found: defaultdict[int, list[dict[str, Any]]] = defaultdict(list)
    finished: defaultdict[int, list[pa.RecordBatch]] = defaultdict(list)
    for pair in _bucket_pairs(search, bucket):
        slab = search.slab(pair["row"])
        found[slab].append(pair)
        if len(found[slab]) >= 10_000:  # plain rows take ten times the memory
            finished[slab].append(pa.RecordBatch.from_pylist(found.pop(slab), _PAIRS))
    for slab in sorted(found.keys() | finished.keys()):
        last = pa.RecordBatch.from_pylist(found.pop(slab, []), _PAIRS)
        table = pa.Table.from_batches([*finished[slab], last])
        search.store.write_table(f"{search.pairs(slab)}/{bucket:05d}.parquet", table)


def _bucket_pairs(search: _Search, bucket: int) -> Iterator[dict[str, Any]]:
    folder = search.dealt(bucket)
    tables = [search.store.read_table(f"{folder}/{n}") for n in search.store.list(folder)]
    if not tables:
        return
    dealt = pa.concat_tables(tables).combine_chunks()
    order = np.lexsort((dealt["row"].to_numpy(), dealt["key"].to_numpy()))
    dealt = dealt.take(pa.array(order))
    keys, rows = dealt["key"].to_numpy(), dealt["row"].to_numpy()
    edges = np.flatnonzero(np.diff(keys, prepend=~keys[0], append=~keys[-1]))
    for start, end in itertools.pairwise(edges.tolist()):
        # A cell with one row, or with none that may be dropped, yields no pairs.
        if end - start > 1 and rows[end - 1] >= search.first_new:
            yield from _cell_pairs(dealt.slice(start, end - start), search.first_new)


def _cell_pairs(cell: pa.Table, first_new: int) -> Iterator[dict[str, Any]]:
    """The pairs among a cell's rows, which are in order; the later row of each pair is a new one.

    Rows with equal signatures share all their cells and all their matches: each is paired with the
    first of them, in the first table, and only the first is compared with others.
    """
    rows, ids = cell["row"].to_pylist(), cell["id"]
    tables, checksums = cell["table"].to_pylist(), cell["sha256"].to_pylist()
    bits, colours = cell["bits"].to_pylist(), cell["colours"].to_pylist()

    def pair(later: int, earlier: int, *, twin: bool, bits: int, colour: int) -> dict[str, Any]:
        return {
            "row": rows[later],
            "of_row": rows[earlier],
            "of": ids[earlier].as_py(),
            "twin": twin,
            "same_bytes": checksums[later] == checksums[earlier],
            "bits": bits,
            "colour": colour,
        }

    firsts: dict[Any, int] = {}
    for place in range(len(rows)):
        # Pictures are identified by their signature, everything else by checksum.
        known_by = checksums[place] if bits[place] is None else (bits[place], colours[place])
        first = firsts.setdefault(known_by, place)
        if rows[first] != rows[place] >= first_new and tables[place] == 0:
            yield pair(place, first, twin=True, bits=0, colour=0)
    seen = [place for place in firsts.values() if bits[place] is not None]
    all_bits, all_colours = signatures.packed([bits[p] for p in seen], [colours[p] for p in seen])
    for i, place in enumerate(seen):
        if i and rows[place] >= first_new:
            own = Signature(bits[place], colours[place])
            likes = signatures.same_picture(
                own,
                all_bits[:, :i],
                all_colours[:i],
                most_bits=MOST_BITS,
                most_share=MOST_SHARE,
                most_colour=MOST_COLOUR,
            )
            for like, apart, colour in zip(*(a.tolist() for a in likes), strict=True):
                yield pair(place, seen[like], twin=False, bits=apart, colour=colour)


# -- judging --------------------------------------------------------------------------------------


def _judge(search: _Search, slab: int) -> pa.Table:
    """The rows of a slab to drop, each with its first match that stays; in order."""
    folder = search.pairs(slab)
    tables = [search.store.read_table(f"{folder}/{name}") for name in search.store.list(folder)]
    if not tables:
        return _PAIRS.empty_table()
    table = pa.concat_tables(tables).sort_by([("row", "ascending"), ("of_row", "ascending")])
    gone = _gone_before(search, slab, table)
    verdicts: list[dict[str, Any]] = []
    for batch in table.to_batches(max_chunksize=10_000):
        for pair in batch.to_pylist():
            if verdicts and verdicts[-1]["row"] == pair["row"]:
                continue  # judged already, by an earlier match; or found in several tables
            if pair["of_row"] not in gone:
                verdict = pair
            elif pair["twin"]:  # its twin was dropped: this row is, for the same reason
                verdict = {**gone[pair["of_row"]], "row": pair["row"]}
            else:
                continue
            verdicts.append(verdict)
            gone[pair["row"]] = verdict
    return pa.Table.from_pylist(verdicts, _PAIRS)


def _gone_before(search: _Search, slab: int, pairs: pa.Table) -> dict[int, dict[str, Any]]:
    """The dropped rows of earlier slabs that these pairs refer to."""
    named = np.unique(pairs["of_row"].to_numpy())
    named = named[named >= search.first_new]
    gone: dict[int, dict[str, Any]] = {}
    for earlier in sorted({search.slab(int(row)) for row in named} - {slab}):
        judged = search.store.read_table(search.judged(earlier))
        wanted = pc.is_in(judged["row"], value_set=pa.array(named))  # type: ignore[attr-defined]
        gone |= {row["row"]: row for row in judged.filter(wanted).to_pylist()}
    return gone


def _write_lists(
    search: _Search, folder: str, compared: Sequence[_File], own: Sequence[_File], rows: int
) -> Found:
    """Split the verdicts into a list for each file."""
    counts: Counter[str] = Counter()
    lists: dict[str, str] = {}
    starts = np.array([f.start for f in compared if f.rows])
    names = [f.dataset for f in compared if f.rows]
    judged, held = _PAIRS.empty_table(), -1
    for file in own:
        if not file.rows:
            continue
        slab = search.slab(file.start)
        if slab != held:
            judged, held = search.store.read_table(search.judged(slab)), slab
        numbers = judged["row"].to_numpy()
        first, end = np.searchsorted(numbers, [file.start, file.start + file.rows])
        if first == end:
            continue
        mine = judged.slice(first, end - first)
        of = np.searchsorted(starts, mine["of_row"].to_numpy(), side="right") - 1
        rows_to_drop = list_of(mine, start=file.start, datasets=[names[i] for i in of])
        counts.update(rows_to_drop["reason"].to_pylist())
        lists[file.path] = f"{folder}/{file.path}"
        search.store.write_table(lists[file.path], rows_to_drop)
    return Found(rows, dict(sorted(counts.items())), lists)


# -- steps ----------------------------------------------------------------------------------------


def _todo(search: _Search, step: str, units: list[dict[str, Any]]) -> list[dict[str, Any]]:
    done = set(search.store.list(f"{search.work}/{step}"))
    return [u for u in units if f"{u['number']:05d}.json" not in done]


def _step(
    work: Callable[[_Search, dict[str, Any]], None],
    search: _Search,
    step: str,
    unit: dict[str, Any],
) -> None:
    """Do one step of a search, then record that it is done."""
    work(search, unit)
    search.store.write_json(f"{search.work}/{step}/{unit['number']:05d}.json", {})


def _each(
    label: str,
    work: Callable[[dict[str, Any]], None],
    units: Sequence[dict[str, Any]],
    *,
    here: bool,
) -> None:
    for _ in each(label, work, units, here=here):
        pass


def _matrix(column: pa.ChunkedArray, width: int) -> NDArray[np.uint8]:
    """Fixed-width values as rows of bytes; rows of nulls are undefined."""
    array = column.combine_chunks()
    if not len(array):
        return np.zeros((0, width), np.uint8)
    start = array.offset * width
    return np.frombuffer(array.buffers()[1], np.uint8)[start:][: len(array) * width].reshape(
        -1, width
    )
