"""Batches made by other processes: the same to the bit, whatever happens to those processes."""

from __future__ import annotations

import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil
import pytest
import small_corpus
import torch
from ray import cloudpickle
from torch import Tensor, nn

from beit3 import weights
from pipelines import loader, loader_workers, models, pretrain
from pipelines.loader_workers import LoaderWorkers, check_room, prefetch
from pipelines.pretrain import PretrainRecipe
from pipelines.recipe import Recipe, TrainConfig
from pipelines.run_logger import Logger
from pipelines.storage import Store
from pipelines.tokenizers import load_text_tokenizer

pytestmark = pytest.mark.usefixtures("ray_session")
cloudpickle.register_pickle_by_value(sys.modules[__name__])  # no actor can import a test


@dataclass(frozen=True)
class Numbers(Recipe):
    """Batches that say who made them; `harm` comes at batch `at`."""

    harm: str = ""
    at: int = -1

    def batches(self, rank: int, world: int) -> Callable[[int], dict[str, Any]]:
        def make(step: int) -> dict[str, Any]:
            if step == self.at and self.harm == "raise":
                raise OSError("the bucket is gone")
            if step == self.at and self.harm == "die":
                os.kill(os.getpid(), signal.SIGKILL)
            if self.harm == "slow":
                time.sleep(3600)
            random = torch.Generator().manual_seed(step)
            data = torch.randn(4, 3, generator=random)
            who = {"rank": (rank, world), "pid": os.getpid(), "cached": loader.CACHES.bytes}
            return {"step": step, "data": data, **who}

        return make

    def build(self) -> nn.Module:
        raise NotImplementedError

    def layers(self) -> int:
        raise NotImplementedError

    def samples_per_batch(self) -> int:
        raise NotImplementedError

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        raise NotImplementedError

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        raise NotImplementedError


def flat(value: Any) -> list[Any]:
    """The leaves of a batch, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        return [leaf for key in sorted(value) for leaf in (key, *flat(value[key]))]
    if isinstance(value, tuple):
        return [leaf for part in value for leaf in flat(part)]
    if hasattr(value, "__dataclass_fields__"):
        return [leaf for name in value.__dataclass_fields__ for leaf in flat(getattr(value, name))]
    return [value]


def same(one: Any, other: Any) -> bool:
    ours, theirs = flat(one), flat(other)
    return len(ours) == len(theirs) and all(
        (a.dtype == b.dtype and torch.equal(a, b)) if isinstance(a, Tensor) else a == b
        for a, b in zip(ours, theirs, strict=True)
    )


def test_processes_make_the_batches_that_a_thread_makes(corpus: Store) -> None:
    tokenizer = load_text_tokenizer(corpus, "sentencepiece")
    recipe = PretrainRecipe(small_corpus.pretraining(corpus), tokenizer)
    steps = range(3, 10)
    threads, processes = prefetch(recipe, 1, 2, steps, 0), prefetch(recipe, 1, 2, steps, 2)
    try:
        number = 0
        for number, (one, other) in enumerate(zip(threads, processes, strict=True), start=1):
            assert same(one, other), number
            assert all(t.is_contiguous() for t in flat(other) if isinstance(t, Tensor))
        assert number == len(steps)
        other.images.add_(1)  # ours to write to, not the object store's
    finally:
        threads.close()
        processes.close()


def test_a_run_with_loader_workers_makes_the_same_model(corpus: Store) -> None:
    """`loader_workers` is not part of what decides a result."""
    found = []
    for count in (0, 1):
        name = f"loaded-by-{count}"
        train = {"steps": 2, "loader_workers": count}
        pretrain.run(small_corpus.pretraining(corpus, name=name, train=train))
        with models.opened(corpus, f"models/{name}") as folder:
            found.append(weights.load_tensors(folder))
    assert all(torch.equal(found[0][key], found[1][key]) for key in found[0])


def test_a_killed_process_is_replaced_and_nothing_is_lost() -> None:
    batches = prefetch(Numbers(), 0, 1, range(12), 1)
    try:
        found = [next(batches)]
        os.kill(found[0]["pid"], signal.SIGKILL)
        found += list(batches)
    finally:
        batches.close()
    assert [batch["step"] for batch in found] == list(range(12))
    wanted = Numbers().batches(0, 1)
    assert all(torch.equal(batch["data"], wanted(batch["step"])["data"]) for batch in found)
    assert len({batch["pid"] for batch in found}) == 2


def test_an_error_of_a_batch_comes_at_its_place() -> None:
    batches = prefetch(Numbers("raise", at=3), 0, 1, range(9), 1)
    try:
        assert [next(batches)["step"] for _ in range(3)] == [0, 1, 2]
        with pytest.raises(OSError, match="the bucket is gone"):
            next(batches)
    finally:
        batches.close()


@pytest.mark.slow
def test_a_batch_that_kills_its_process_again_and_again_is_an_error() -> None:
    # The first: of one before it, made by the same process, the answer may die with it.
    batches = prefetch(Numbers("die", at=0), 0, 1, range(9), 1)
    try:
        with pytest.raises(RuntimeError, match=r"batch 0: the process that makes it died 3 times"):
            next(batches)
    finally:
        batches.close()


def test_no_more_is_made_than_may_wait_and_closing_ends_the_processes() -> None:
    makers = LoaderWorkers(Numbers(), 0, 1, range(1000), 1)
    batch = makers(0)
    makers(1)
    assert len(makers._pending) <= loader_workers.AHEAD
    process = psutil.Process(batch["pid"])
    makers.close()
    process.wait(30)


@pytest.mark.parametrize("workers", [0, 1])
def test_who_makes_batches_on_a_machine_shares_its_memory(
    workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loader.CACHES, "bytes", loader.CACHES.bytes)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    batches = prefetch(Numbers(), 0, 2, range(1), workers)
    try:
        assert next(batches)["cached"] == max(loader.LEAST_CACHED, loader.memory() // 8)
    finally:
        batches.close()


def test_closing_frees_who_waits_for_a_batch() -> None:
    batches = prefetch(Numbers("slow"), 0, 1, range(5), 1)
    before = threading.active_count()
    batches.close()
    assert threading.active_count() < before


def test_a_batch_that_never_comes_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loader_workers, "PATIENCE", 0.5)
    batches = prefetch(Numbers("slow"), 0, 1, range(5), 3)  # the session has two CPUs
    try:
        with pytest.raises(RuntimeError, match=r"not made within 0.5 s.*loader_workers 3 wants a"):
            next(batches)
    finally:
        batches.close()


def test_more_loader_workers_than_cpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    config = TrainConfig(workers=1, loader_workers=2)
    with pytest.raises(
        ValueError, match=r"want 1 CPUs, and train\.loader_workers 2 in all 2 more; there"
    ):
        check_room(config)
    check_room(TrainConfig(workers=1, loader_workers=1))
    monkeypatch.setenv("RAY_ADDRESS", "auto")  # a cluster may grow
    check_room(config)
    with pytest.raises(ValueError, match=r"train\.loader_workers: expected 0 or more"):
        TrainConfig(loader_workers=-1)
