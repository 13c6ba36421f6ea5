"""The order of samples: a function of commits, seed and epoch, whoever reads them."""

from __future__ import annotations

import itertools
import os
import threading
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_corpus import picture, publish

from beit3.transforms import sample_view
from pipelines import samples as sampling
from pipelines.dataset import ROW_GROUP_ROWS
from pipelines.loader import (
    LEAST_CACHED,
    STREAMS,
    TURNS,
    WINDOW,
    CacheBudget,
    Mix,
    Order,
    ParquetRows,
    Prefetcher,
    RowGroup,
    memory,
    rows_at_hand,
    share,
)
from pipelines.samples import Pictures, Samples, ViewConfig
from pipelines.storage import Store, StoreError

SCHEMA = pa.schema([("id", pa.string()), ("words", pa.list_(pa.int32()))])


def rows(name: str, count: int) -> list[dict[str, object]]:
    return [{"id": f"{name}/{i}", "words": [i]} for i in range(count)]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """Two datasets, 1,100 rows in four files; a file of three row groups, and an empty one."""
    store = Store(tmp_path_factory.mktemp("store"))
    publish(store, "one", SCHEMA, rows("a", 2 * ROW_GROUP_ROWS + 88), [], rows("b", 130))
    publish(store, "two", SCHEMA, rows("c", 370))
    publish(store, "empty", SCHEMA, [])
    return store


def drawn(
    store: Store,
    *,
    seed: int = 0,
    batch: int = 20,
    rank: int = 0,
    world: int = 1,
    names: Sequence[str] = ("one", "two"),
    weights: Sequence[float] = (),
) -> Samples:
    datasets = [store.dataset(name) for name in names]
    return Samples(
        datasets, columns=["id"], seed=seed, batch=batch, rank=rank, world=world, weights=weights
    )


def ids(samples: Samples, steps: range) -> list[list[str]]:
    return [[s.row["id"] for s in samples(step)] for step in steps]


# -- order ----------------------------------------------------------------------------------------


def test_order_is_a_function_of_commit_seed_and_epoch(store: Store) -> None:
    first, again = ids(drawn(store), range(60)), drawn(store)
    assert first == ids(again, range(60))
    # A batch does not depend on those before it: a resumed run asks for the middle at once.
    assert ids(drawn(store), range(41, 44)) == first[41:44]
    assert [ids(again, range(n, n + 1))[0] for n in (50, 3, 50)] == [first[50], first[3], first[50]]
    assert ids(drawn(store, seed=1), range(60)) != first
    second = [s.row["id"] for s in map(again.sample, range(1100, 2200))]
    assert [i for batch in first[:55] for i in batch] != second  # 55 batches are 1,100 rows


def test_random_numbers_of_a_seed_stay_what_they_are(store: Store) -> None:
    """Where they don't, `pipelines.samples.SEEDING` is raised."""
    rng = drawn(store, seed=3).sample(17).rng
    assert rng.integers(0, 1 << 32, 3).tolist() == [2036617645, 1323923532, 1948417186]


def test_another_commit_is_another_order(store: Store, tmp_path: Path) -> None:
    other = Store(tmp_path)
    publish(other, "one", SCHEMA, rows("b", 130), rows("a", 2 * ROW_GROUP_ROWS + 88))
    publish(other, "two", SCHEMA, rows("c", 370))
    assert ids(drawn(other), range(3)) != ids(drawn(store), range(3))


@pytest.mark.parametrize("count", [1, 2, 63, 64, 127, 255, 300, 1100, 2 * STREAMS * 300 + 5])
def test_an_epoch_has_every_row_once(count: int) -> None:
    sizes = [ROW_GROUP_ROWS] * (count // ROW_GROUP_ROWS) + [count % ROW_GROUP_ROWS]
    groups = [RowGroup(0, "file", i, n) for i, n in enumerate(sizes) if n]
    order = Order(groups, seed=7)
    everything = {(g.index, row) for g in groups for row in range(g.rows)}
    for epoch in range(2):
        places = range(epoch * count, (epoch + 1) * count)
        assert {order.epoch_of(g) for g in places} == {epoch}
        found = [(group.index, row) for group, row in map(order.locate, places)]
        assert len(found) == count and set(found) == everything


def test_rows_are_shuffled_far(store: Store) -> None:
    """Neighbours of a file don't stay neighbours, and each batch mixes the datasets."""
    order = [place for batch in ids(drawn(store), range(55)) for place in batch]
    assert order != sorted(order)
    places = [int(place.split("/")[1]) for place in order]
    near = [abs(b - a) <= 1 for a, b in itertools.pairwise(places)]
    assert np.mean(near) < 0.05
    assert len({p.split("/")[0] for p in order[:20]}) > 1


@pytest.mark.parametrize("world", [2, 4])
def test_workers_share_the_same_batches(store: Store, world: int) -> None:
    whole = drawn(store, batch=24)
    shares = [drawn(store, batch=24, rank=rank, world=world) for rank in range(world)]
    for step in (0, 1, 7, 45, 46, 91, 92):  # epochs end within batches 45 and 91
        wanted = {s.number: (s.row["id"], s.epoch, s.rng.random()) for s in whole(step)}
        found = [
            {s.number: (s.row["id"], s.epoch, s.rng.random()) for s in one(step)} for one in shares
        ]
        assert [len(f) for f in found] == [24 // world] * world
        assert {k: v for one in found for k, v in one.items()} == wanted


def test_a_worker_reads_only_its_streams_of_an_epoch() -> None:
    """So that a row group is fetched by few workers."""
    count = 4 * STREAMS * ROW_GROUP_ROWS
    groups = [RowGroup(0, "file", i, ROW_GROUP_ROWS) for i in range(count // ROW_GROUP_ROWS)]
    order = Order(groups, seed=0)
    read = [{order.locate(g)[0].index for g in range(rank, count, 4)} for rank in range(4)]
    assert sum(len(r) for r in read) == len(groups) == len(set().union(*read))
    first = {order.locate(g)[0].index for g in range(STREAMS * WINDOW)}
    assert len(first) == len(groups)  # a window's worth of every stream


def test_a_batch_that_cant_be_shared_is_an_error() -> None:
    assert share(3, 6, 1, 3) == [19, 22]
    with pytest.raises(ValueError, match="batch 6 is not divisible by the number of workers 4"):
        share(0, 6, 0, 4)


def test_nothing_to_train_on_is_an_error(store: Store) -> None:
    with pytest.raises(StoreError, match=r"no rows to train on.*empty"):
        ParquetRows([store.dataset("empty")])
    with pytest.raises(StoreError, match="none given"):
        ParquetRows([])
    with pytest.raises(StoreError, match="does not exist"):
        ParquetRows([store.dataset("three")])


def test_rows_are_read_as_committed(store: Store) -> None:
    source = ParquetRows([store.dataset("one"), store.dataset("two")], ["words", "missing"])
    assert source.rows == 1100
    sizes = [(g.dataset, g.index, g.rows) for g in source.groups]
    assert sizes == [(0, 0, 256), (0, 1, 256), (0, 2, 88), (0, 0, 130), (1, 0, 256), (1, 1, 114)]
    assert source.row(source.groups[2], 3) == {"words": [515]}
    assert source.row(source.groups[5], 113) == {"words": [369]}


def test_columns_can_be_read_in_another_way(store: Store) -> None:
    """A reader sees a row group's part of its column, once, as one array."""
    seen: list[pa.Array] = []

    def lengths(column: pa.Array) -> list[str]:
        seen.append(column)
        return [f"{len(words)} words" for words in column]

    source = ParquetRows([store.dataset("one")], readers={"words": lengths})
    for index in (3, 4):
        row = source.row(source.groups[2], index)
        assert row == {"id": f"a/{512 + index}", "words": "1 words"}
    assert [type(column) for column in seen] == [pa.ListArray]
    assert len(seen[0]) == 88


@pytest.fixture
def read(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The row groups' numbers in their files, as they are read."""
    indices: list[int] = []
    real = pq.ParquetFile.read_row_group

    def counted(file: pq.ParquetFile, index: int, **options: Any) -> pa.Table:
        indices.append(index)
        return real(file, index, **options)

    monkeypatch.setattr(pq.ParquetFile, "read_row_group", counted)
    return indices


@pytest.fixture
def budget(monkeypatch: pytest.MonkeyPatch) -> CacheBudget:
    budget = CacheBudget()
    monkeypatch.setattr("pipelines.loader.CACHES", budget)
    return budget


def test_a_container_may_use_its_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    machine = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    paths = [tmp_path / "memory.max", tmp_path / "limit_in_bytes"]
    monkeypatch.setattr("pipelines.loader.MEMORY_LIMITS", [str(path) for path in paths])
    assert memory() == machine
    paths[0].write_text("max\n")
    paths[1].write_text(f"{(1 << 63) - 4096}\n")  # none, as version 1 says it
    assert memory() == machine
    for path, limit in zip(paths, (machine // 2, machine // 3), strict=True):
        path.write_text(f"{limit}\n")
        assert memory() == limit
    budget = CacheBudget()
    budget.share(1 << 40)
    assert budget.bytes == LEAST_CACHED


def test_row_groups_are_kept_up_to_their_rows(store: Store, read: list[int]) -> None:
    source = ParquetRows([store.dataset("one")], kept=400)
    for index in (0, 2, 0, 2, 1, 2, 0):  # 256, 88 and 256 rows; 2 and one of the others fit
        source.row(source.groups[index], 3)
    assert read == [0, 2, 1, 0]


def test_row_groups_are_kept_up_to_their_bytes(
    store: Store, read: list[int], budget: CacheBudget
) -> None:
    source = ParquetRows([store.dataset("one")])
    size = source.table(0, source.groups[0].path, 0).nbytes
    read.clear()
    budget.bytes = int(1.9 * size)
    source = ParquetRows([store.dataset("one")])
    for index in (0, 2, 0, 2, 1, 2, 0):
        source.row(source.groups[index], 3)
    assert read == [0, 2, 1, 0]


def test_row_groups_of_all_kinds_share_a_budget(
    store: Store, read: list[int], budget: CacheBudget
) -> None:
    """What holds more than its share makes room, be it for what holds less."""
    large, small = ParquetRows([store.dataset("one")]), ParquetRows([store.dataset("two")], ["id"])

    def look(source: ParquetRows, *indices: int) -> int:
        read.clear()
        for index in indices:
            source.row(source.groups[index], 0)
        return len(read)

    assert look(large, 0, 1, 2) + look(small, 0, 1) == 5
    assert look(large, 0, 1, 2) + look(small, 0, 1) == 0
    budget.bytes = large.table(0, large.groups[0].path, 0).nbytes * 2
    assert look(large, 3) == 1  # in the place of others
    assert look(small, 0, 1) == 0
    assert look(large, 3) == 0 and look(large, 0, 1) == 2
    del large, small  # who is gone holds nothing
    alone = ParquetRows([store.dataset("one")])
    assert look(alone, 0, 2) == 2 and look(alone, 0, 2) == 0


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("weights", [(), (9, 1)], ids=["plain", "weighted"])
def test_a_row_group_is_read_about_once_in_an_epoch(
    weights: Sequence[float], world: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At a 32nd of the size, in windows that begin anywhere in a row group."""
    for name in ("loader", "dataset"):
        monkeypatch.setattr(f"pipelines.{name}.ROW_GROUP_ROWS", ROW_GROUP_ROWS // 32)
    monkeypatch.setattr("pipelines.loader.WINDOW", WINDOW // 32)
    store = Store(tmp_path)
    publish(store, "large", SCHEMA, *(rows(f"{i}", 509) for i in range(28)))
    publish(store, "small", SCHEMA, *(rows(f"{i}", 509) for i in range(3)))
    samples = drawn(store, batch=64, world=world, names=("large", "small"), weights=weights)
    wanted, most = len(samples.rows.groups) / world, rows_at_hand(world, len(weights) or 1)
    read: list[tuple[Any, ...]] = []
    real, held = samples.rows._read, samples.rows._cache

    def counted(*key: Any) -> Any:
        if key not in held:
            read.append(key)
        return real(*key)

    monkeypatch.setattr(samples.rows, "_read", counted)
    epoch = samples.rows.rows // 64
    # A row group in which one stream ends and the next begins is read by both.
    ends = STREAMS / world * (len(weights) or 1)
    for steps in (range(epoch), range(epoch, 2 * epoch)):
        read.clear()
        rows_held = []
        for step in steps:
            samples(step)
            rows_held.append(sum(one.table.num_rows for one in held.values()))
        assert len(read) <= 1.05 * wanted + ends
        assert 0.9 * most < max(rows_held) <= most
        assert steps.start or len(set(read)) >= 0.9 * wanted


# -- a mix by weight -------------------------------------------------------------------------------

SIZES = [1000, 300, 90]
UNEVEN = [1.0, 2.5, 0.007]


def mix(weights: Sequence[float], seed: int = 0) -> Mix:
    orders = [
        Order([RowGroup(number, "file", 0, rows)], seed)
        for number, rows in enumerate(SIZES[: len(weights)])
    ]
    return Mix(orders, weights, seed)


@pytest.mark.parametrize("weights", [[1, 2], [2, 2, 2], UNEVEN, [1e-6, 1, 1e6], [0.1, 0.2, 0.7]])
def test_sources_are_drawn_by_their_weights(weights: Sequence[float]) -> None:
    whole = mix(weights)
    block, shares = STREAMS * TURNS, np.array(weights) / sum(weights)
    total = np.zeros(len(weights))
    for number in range(40):
        drawn = [whole.draw(g)[0] for g in range(number * block, (number + 1) * block)]
        counts = np.bincount(drawn, minlength=len(weights))
        assert np.abs(counts - shares * block).max() <= 8
        total += counts
        assert np.abs(total - shares * (number + 1) * block).max() <= 6  # it doesn't grow
    # Within a block a source does not come in a row, nor at the same places of each block.
    first = [whole.draw(g)[0] for g in range(block)]
    second = [whole.draw(g)[0] for g in range(block, 2 * block)]
    if min(shares) > 0.1:
        assert max(len(list(run)) for _, run in itertools.groupby(first)) < 40
        assert first != second


def test_far_along_a_mix_is_still_exact_and_at_hand_at_once() -> None:
    far = 10**12
    whole = mix(UNEVEN)
    drawn = [whole.draw(g) for g in range(far, far + STREAMS)]
    for number, share_of in enumerate(np.array(UNEVEN) / sum(UNEVEN)):
        of_source = [times for source, times in drawn if source == number]
        assert all(abs(times - share_of * far) < 10 * STREAMS for times in of_source)


def test_a_mix_goes_through_each_source_in_its_own_order() -> None:
    """Every sample number of a source comes once, about in turn; epochs are the source's own."""
    whole, count = mix([1, 2.5, 0.4]), 20_000
    drawn = [whole.draw(g) for g in range(count)]
    for number in range(3):
        taken = [n for source, n in drawn if source == number]
        assert len(set(taken)) == len(taken)
        surely = max(taken) - STREAMS * (TURNS + 2)  # lanes are not equally far
        assert surely > 0 and set(range(surely)) <= set(taken)
        for place in range(0, count, 97):
            source, n = drawn[place]
            assert whole.epoch_of(place) == whole.orders[source].epoch_of(n)
            assert whole.locate(place) == whole.orders[source].locate(n)
        # A lane takes from the streams of the same number: workers share the reading out.
        for place, (source, n) in enumerate(drawn):
            assert source != number or place % STREAMS == n % STREAMS


def test_another_seed_shuffles_a_mix_otherwise() -> None:
    sequences = [[mix([1, 2], seed).draw(g)[0] for g in range(4096)] for seed in (0, 0, 1)]
    assert sequences[0] == sequences[1] != sequences[2]


def test_weighted_batches_are_a_function_of_their_number(store: Store) -> None:
    weights = (1, 3)
    first = ids(drawn(store, weights=weights), range(60))
    assert ids(drawn(store, weights=weights), range(41, 44)) == first[41:44]
    assert first != ids(drawn(store), range(60))
    of_two = sum(name.startswith("c") for batch in first[:51] for name in batch)
    assert abs(of_two - 0.75 * 1020) <= 12  # 1,024 samples have the shares to a few samples


def test_workers_share_the_same_weighted_batches(store: Store) -> None:
    whole = drawn(store, batch=24, weights=(2, 1))
    shares = [drawn(store, batch=24, rank=rank, world=4, weights=(2, 1)) for rank in range(4)]
    for step in (0, 1, 45, 92):
        wanted = {s.number: (s.row["id"], s.epoch, s.rng.random()) for s in whole(step)}
        found = {
            s.number: (s.row["id"], s.epoch, s.rng.random()) for one in shares for s in one(step)
        }
        assert found == wanted


# -- the prefetcher --------------------------------------------------------------------------------


def test_batches_come_in_order_and_end() -> None:
    assert list(Prefetcher(lambda step: step * step, range(3, 40))) == [n * n for n in range(3, 40)]
    assert list(Prefetcher(lambda step: step, range(0))) == []


def test_an_error_comes_at_its_batch_and_stays() -> None:
    def make(step: int) -> int:
        if step == 2:
            raise OSError("the bucket is gone")
        return step

    batches = Prefetcher(make, range(5))
    assert [next(batches), next(batches)] == [0, 1]
    for _ in range(2):
        with pytest.raises(OSError, match="the bucket is gone"):
            next(batches)
    batches.close()


def test_it_works_ahead_by_its_depth_and_closes() -> None:
    made: list[int] = []
    third = threading.Event()

    def make(step: int) -> int:
        made.append(step)
        if step == 2:
            third.set()
        return step

    before = threading.active_count()
    batches = Prefetcher(make, range(1000), depth=2)
    assert third.wait(30)  # two wait in the queue, the third is in its hands
    assert next(batches) == 0
    batches.close()
    assert threading.active_count() == before
    assert len(made) <= 4


# -- pictures --------------------------------------------------------------------------------------


def test_pictures_are_decoded_once_while_they_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    decoded: list[bytes] = []
    real = sampling.decode

    def counted(data: bytes) -> object:
        decoded.append(data)
        return real(data)

    monkeypatch.setattr(sampling, "decode", counted)
    first, second = picture(1), picture(2)
    size = np.prod(real(first).size) * 3
    monkeypatch.setattr(sampling, "PICTURE_CACHE_BYTES", int(size))
    pictures = Pictures()
    for _ in range(2):
        assert pictures("one", first).size == real(first).size
        assert pictures("two", second).size == real(second).size
    assert decoded == [first, second, second]  # there was no room for the second


def test_views_are_drawn_from_the_samples_own_numbers() -> None:
    image = Pictures()("one", picture(1))
    views = ViewConfig(scale=(0.3, 0.6), flip=0.5)
    one, same, other = (views.pixels(image, np.random.default_rng(n), 16) for n in (0, 0, 1))
    assert one.shape == (3, 16, 16) and np.array_equal(one, same)
    assert not np.array_equal(one, other)
    with pytest.raises(ValueError, match=r"view\.scale"):
        ViewConfig(scale=(0.5, 1.5))
    with pytest.raises(ValueError, match=r"view\.flip"):
        ViewConfig(flip=2.0)
    for jitter in (-0.1, 1.0):
        with pytest.raises(ValueError, match=rf"view\.jitter: .* got {jitter}"):
            ViewConfig(jitter=jitter)


def test_without_jitter_views_are_drawn_as_ever() -> None:
    image, views = Pictures()("one", picture(1)), ViewConfig(scale=(0.3, 0.6))
    drawing, again = np.random.default_rng(0), np.random.default_rng(0)
    for _ in range(20):
        view = views.draw(image, drawing)
        assert view == sample_view(again, *image.size, scale=(0.3, 0.6), flip=0.5)
        assert view.jitter is None


def test_jitter_is_drawn_after_the_crop() -> None:
    image, plain = Pictures()("one", picture(1)), ViewConfig()
    views = ViewConfig(jitter=0.4)
    drawn = [views.draw(image, np.random.default_rng(n)) for n in range(200)]
    for number, view in enumerate(drawn):
        assert replace(view, jitter=None) == plain.draw(image, np.random.default_rng(number))
    factors = np.array([view.jitter for view in drawn])
    assert np.array_equal(factors, factors.astype(np.float32))  # so tokens store the very factors
    assert (factors.min(0) < 0.62).all() and (factors.max(0) > 1.38).all()
    assert factors.min() > 0.6 - 1e-6 and factors.max() < 1.4 + 1e-6
    assert np.abs(factors.mean(0) - 1).max() < 0.06
    assert np.abs(np.corrcoef(factors.T) - np.eye(3)).max() < 0.2
    one, other = (v.pixels(image, np.random.default_rng(0), 16) for v in (plain, views))
    assert not np.array_equal(one, other)
