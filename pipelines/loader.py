"""Turns committed Parquet files into deterministic batches.

The order of samples is a function of (commits, seed, epoch), never of timing or of the number of
workers. An epoch's row groups are shuffled and concatenated; that sequence is cut into a fixed
number of *streams*, equal in length to within one row, each shuffled within windows; sample `p` of
the epoch is the next row of stream `p mod streams`, so an epoch has every row once. The streams are
divided among the workers, so each reads few row groups, each row group once, and a run resumed on
another number of workers sees the same batches.

Weighted sources have an order each, and `Mix` distributes the sample numbers among them.
"""

from __future__ import annotations

import bisect
import contextlib
import functools
import math
import os
import posixpath
import queue
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipelines.dataset import ROW_GROUP_ROWS, Dataset
from pipelines.storage import StoreError

STREAMS = 64
WINDOW = 4 * ROW_GROUP_ROWS  # rows among which a stream is shuffled
TURNS = 16  # turns of a mix's lane, among which its sources are shuffled
SPREAD = 37  # odd; of the values tried, this kept a mix's shares closest to its weights
LEAST_CACHED = 1 << 30  # bytes of row groups that any process may hold, however little memory
# A container's memory limit, in version 2 and version 1 of control groups.
MEMORY_LIMITS = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")

B = TypeVar("B")


@dataclass(frozen=True)
class RowGroup:
    """A row group of a dataset's file: the unit of reading."""

    dataset: int
    path: str
    index: int
    rows: int


def memory() -> int:
    """Bytes of the machine's memory, or of this container's if it is allowed less."""
    there = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    for limit in MEMORY_LIMITS:
        with contextlib.suppress(OSError, ValueError):  # it isn't there, or says "max"
            there = min(there, int(Path(limit).read_text()))
    return there


class CacheBudget:
    """Bytes of row groups that all `ParquetRows` of a process may hold together: a safeguard if
    the rows they should keep don't fit into memory.

    A `ParquetRows` that holds more than an equal share evicts its oldest row groups. So pictures
    don't evict the tokens, which take little of the memory but as many reads.
    """

    def __init__(self) -> None:
        self.bytes = 0
        self._held: weakref.WeakKeyDictionary[ParquetRows, int] = weakref.WeakKeyDictionary()
        self._lock = threading.Lock()
        self.share(1)

    def share(self, processes: int) -> None:
        """Let `processes` processes on this machine share a quarter of its memory."""
        self.bytes = max(LEAST_CACHED, memory() // 4 // processes)

    def exceeded(self, rows: ParquetRows, held: int) -> bool:
        """Record that `rows` now holds `held` bytes; returns whether it must hold less."""
        with self._lock:
            self._held[rows] = held
            return sum(self._held.values()) > self.bytes and held > self.bytes / len(self._held)


CACHES = CacheBudget()


def rows_at_hand(world: int, orders: int = 1) -> int:
    """Rows, in whole row groups, that one of `world` workers should cache for `orders` orders.

    Twice the rows of its streams' windows: the row group in which one window ends and the next
    begins may be needed early in one and late in the other, after all others of both were read in
    between. Measured, for one order and for several weighted ones: with twice the windows' rows,
    almost no row group was read again for lack of room; with one and a half times 5% were, with
    once up to 80%, and with four fifths each was read some thirty times.
    """
    streams = STREAMS // math.gcd(STREAMS, world)
    return 2 * orders * streams * (WINDOW + ROW_GROUP_ROWS)


class ParquetRows:
    """Random access to the rows of committed datasets, one row group at a time, with a cache."""

    def __init__(
        self,
        datasets: Sequence[Dataset],
        columns: Sequence[str] | None = None,
        *,
        readers: Mapping[str, Callable[[pa.Array], Any]] | None = None,
        kept: int = WINDOW,
    ) -> None:
        """
        Args:
            readers: For columns whose values are not converted to Python's: a function that turns
                the column of a row group into an object indexed by row.
            kept: Maximum rows in the cached row groups, the most recently used ones. The default
                suffices to read them in order.
        """
        self.datasets = list(datasets)
        self.columns = list(columns) if columns else None
        self.readers = dict(readers or {})
        self.groups: list[RowGroup] = []
        for number, dataset in enumerate(self.datasets):
            for file in dataset.commit().files:
                full = divmod(file.rows, ROW_GROUP_ROWS)
                sizes = [ROW_GROUP_ROWS] * full[0] + ([full[1]] if full[1] else [])
                self.groups += [RowGroup(number, file.path, i, n) for i, n in enumerate(sizes)]
        if not self.groups:
            names = ", ".join(d.uri for d in self.datasets) or "none given"
            raise StoreError(f"no rows to train on: the datasets are empty ({names})")
        self.rows = sum(group.rows for group in self.groups)
        self._cache: OrderedDict[tuple[int, str, int], _Held] = OrderedDict()
        self._kept, self._cached_rows, self._cached_bytes = kept, 0, 0
        self._lock = threading.Lock()

    def row(self, group: RowGroup, index: int) -> dict[str, Any]:
        columns = self.values(group.dataset, group.path, group.index)
        return {name: values[index] for name, values in columns.items()}

    def table(self, dataset: int, path: str, index: int) -> pa.Table:
        return self._read(dataset, path, index).table

    def values(self, dataset: int, path: str, index: int) -> Mapping[str, Any]:
        """The columns of a row group, each indexed by row."""
        return self._read(dataset, path, index).values

    def _read(self, dataset: int, path: str, index: int) -> _Held:
        key = (dataset, path, index)
        with self._lock:
            if key in self._cache:
                self._cache.move_to_end(key)
                return self._cache[key]
            source = self.datasets[dataset]
            full = posixpath.join(source.store.path(source.name), path)
            file = pq.ParquetFile(full, filesystem=source.store.fs)
            columns = self.columns and [c for c in self.columns if c in file.schema_arrow.names]
            table = file.read_row_group(index, columns=columns)
            values = {
                name: self.readers.get(name, _values)(_whole(column))
                for name, column in zip(table.column_names, table.columns, strict=True)
            }
            held = self._cache[key] = _Held(table, values)
            self._cached_rows += table.num_rows
            self._cached_bytes += table.nbytes
            while self._full() and len(self._cache) > 1:
                _, oldest = self._cache.popitem(last=False)
                self._cached_rows -= oldest.table.num_rows
                self._cached_bytes -= oldest.table.nbytes
            return held

    def _full(self) -> bool:
        return CACHES.exceeded(self, self._cached_bytes) or self._cached_rows > self._kept


@dataclass(frozen=True)
class _Held:
    """A row group in memory."""

    table: pa.Table
    values: dict[str, Any]


def _values(column: pa.Array) -> Any:
    """A column as Python values; all but integers are converted on demand, to save memory."""
    return column.to_pylist() if pa.types.is_integer(column.type) else _OnDemand(column)


class _OnDemand:
    def __init__(self, column: pa.Array) -> None:
        self._column = column

    def __getitem__(self, row: int) -> Any:
        return self._column[row].as_py()


def _whole(column: pa.ChunkedArray) -> pa.Array:
    return column.chunk(0) if column.num_chunks == 1 else column.combine_chunks()


class Order:
    """The row at each position of a run: `locate(g)` for sample number `g`."""

    def __init__(self, groups: Sequence[RowGroup], seed: int) -> None:
        self.groups = list(groups)
        self.seed = seed
        self.rows = sum(group.rows for group in self.groups)
        # Rows per stream, and how many streams have one more.
        self.least, self.longer = divmod(self.rows, STREAMS)
        self._epoch = functools.lru_cache(maxsize=2)(self._plan)
        self._window = functools.lru_cache(maxsize=4 * STREAMS)(self._shuffle)

    def locate(self, sample: int) -> tuple[RowGroup, int]:
        """The row group of the run's sample number `sample`, and the row within it."""
        epoch, place = divmod(sample, self.rows)
        place, stream = divmod(place, STREAMS)
        window, inside = divmod(place, WINDOW)
        place = window * WINDOW + int(self._window(epoch, stream, window)[inside])
        permutation, ends = self._epoch(epoch)
        position = stream * self.least + min(stream, self.longer) + place
        slot = bisect.bisect_right(ends, position)
        group = self.groups[permutation[slot]]
        return group, position - (ends[slot] - group.rows)

    def epoch_of(self, sample: int) -> int:
        return sample // self.rows

    def _plan(self, epoch: int) -> tuple[list[int], list[int]]:
        rng = np.random.default_rng((self.seed, epoch))
        permutation = rng.permutation(len(self.groups)).tolist()
        ends = np.cumsum([self.groups[i].rows for i in permutation]).tolist()
        return permutation, ends

    def _shuffle(self, epoch: int, stream: int, window: int) -> np.ndarray:
        rng = np.random.default_rng((self.seed, epoch, stream, window))
        rows = self.least + (stream < self.longer)
        return rng.permutation(min(WINDOW, rows - window * WINDOW))


class Mix:
    """Sources drawn by weight, with `locate(g)` and `epoch_of(g)` like an `Order`.

    Sample numbers are dealt to `STREAMS` lanes in turn. In `TURNS` turns of a lane, each source
    occurs as often as its weight says, rounded, in shuffled order. Rounding remainders carry over
    and start differently in each lane: `STREAMS * TURNS` samples match the weights to within a few
    samples, and so does a run of any length. The n-th time that a lane draws a source it takes
    sample `n * STREAMS + lane` of the source's own order, so a worker still reads only its streams
    of each source.
    """

    def __init__(self, orders: Sequence[Order], weights: Sequence[float], seed: int) -> None:
        self.orders, self.seed = list(orders), seed
        exact = [Fraction(str(weight)) for weight in weights]
        # Each source's share of the turns that the sources before it leave.
        self.shares = [own / sum(exact[i:]) for i, own in enumerate(exact)]
        self._block = functools.lru_cache(maxsize=2 * STREAMS)(self._deal)

    def locate(self, sample: int) -> tuple[RowGroup, int]:
        source, number = self.draw(sample)
        return self.orders[source].locate(number)

    def epoch_of(self, sample: int) -> int:
        """How many epochs of the sample's own source were completed before it."""
        source, number = self.draw(sample)
        return self.orders[source].epoch_of(number)

    def draw(self, sample: int) -> tuple[int, int]:
        """The source of a sample number, and the sample's number in that source's order."""
        turn, lane = divmod(sample, STREAMS)
        block, inside = divmod(turn, TURNS)
        source, times = self._block(lane, block)[inside]
        return source, times * STREAMS + lane

    def times(self, lane: int, turns: int) -> list[int]:
        """How often each source is drawn in the first `turns` turns of a lane.

        A lane splits its turns between the first source and the others, the others' turns between
        the second and the rest, and so on. Each count grows by 0 or 1 a turn, whatever the weights.
        """
        counts, left = [], turns
        for number, share in enumerate(self.shares):
            place = lane * SPREAD**number % STREAMS  # different lanes are early for each source
            counts.append(math.floor(left * share + Fraction(2 * place + 1, 2 * STREAMS)))
            left -= counts[-1]
        return counts

    def _deal(self, lane: int, block: int) -> list[tuple[int, int]]:
        """For each turn of a block, its source and how often the lane drew that source before."""
        start, end = self.times(lane, block * TURNS), self.times(lane, (block + 1) * TURNS)
        sources = np.repeat(np.arange(len(start)), np.subtract(end, start))
        np.random.default_rng((self.seed, lane, block)).shuffle(sources)
        dealt = []
        for source in sources.tolist():
            dealt.append((source, start[source]))
            start[source] += 1
        return dealt


def share(step: int, batch: int, rank: int, world: int) -> list[int]:
    """The sample numbers of a global batch that one worker gets.

    Raises:
        ValueError: the batch can't be divided equally.
    """
    if batch % world:
        raise ValueError(f"batch {batch} is not divisible by the number of workers {world}")
    return [g for g in range(step * batch, (step + 1) * batch) if g % world == rank]


class Prefetcher(Generic[B]):
    """Makes the batches of upcoming steps in the background, in order."""

    def __init__(
        self,
        make: Callable[[int], B],
        steps: range,
        depth: int = 2,
        close: Callable[[], None] | None = None,
    ) -> None:
        """`close` is called when no further batch will be made."""
        self._close = close
        self._queue: queue.Queue[tuple[B | None, BaseException | None]] = queue.Queue(depth)
        self._closed = threading.Event()
        self._end: BaseException | None = None
        self._thread = threading.Thread(target=self._run, args=(make, steps), daemon=True)
        self._thread.start()

    def _run(self, make: Callable[[int], B], steps: range) -> None:
        try:
            for step in steps:
                if self._closed.is_set():
                    return
                self._put((make(step), None))
            self._put((None, StopIteration()))
        except BaseException as error:  # passed to the consumer, which raises it
            self._put((None, error))

    def _put(self, item: tuple[B | None, BaseException | None]) -> None:
        while not self._closed.is_set():
            try:
                self._queue.put(item, timeout=0.2)
                return
            except queue.Full:
                continue

    def __iter__(self) -> Iterator[B]:
        return self

    def __next__(self) -> B:
        batch = None
        if self._end is None:
            batch, self._end = self._queue.get()
        if self._end is not None:
            raise self._end
        assert batch is not None
        return batch

    def close(self) -> None:
        self._closed.set()
        if self._close:
            self._close()
        self._thread.join(timeout=10)
