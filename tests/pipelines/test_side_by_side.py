"""Trainings side by side in Ray workers: their order, their errors, and how far they are."""

from __future__ import annotations

import os
import signal
import time
from functools import partial
from pathlib import Path

import pytest
import ray

from pipelines import console
from pipelines.side_by_side import side_by_side
from pipelines.storage import Store, StoreError

pytestmark = pytest.mark.usefixtures("ray_session")


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(str(tmp_path))


def _say(store: Store, run: str, step: int) -> None:
    store.write(f"runs/{run}/progress.json", f'{{"step": {step}}}'.encode())


def test_results_come_in_the_order_of_the_runs_from_processes_of_their_own(
    tmp_path: Path, store: Store
) -> None:
    def meet(folder: Path, run: tuple[str, str]) -> tuple[str, int]:
        """Ends only when the run that it awaits has begun."""
        own, awaited = run
        (folder / own).touch()
        while awaited and not (folder / awaited).exists():
            time.sleep(0.01)
        return own, os.getpid()

    work = partial(meet, tmp_path)
    runs = {("a", "b"): {}, ("b", ""): {}, ("c", ""): {}}
    with side_by_side(work, runs, cpus=1, store=store) as found:
        results = list(found)
    assert [own for own, _ in results] == ["a", "b", "c"]
    assert os.getpid() not in {process for _, process in results}
    # More CPUs than there are, is as many as there are.
    with side_by_side(work, {("b", ""): {}, ("c", ""): {}}, cpus=999, store=store) as found:
        assert [own for own, _ in found] == ["b", "c"]
    with side_by_side(work, runs, cpus=0, store=store) as found:
        (tmp_path / "b").touch()
        assert list(found) == [(own, os.getpid()) for own in "abc"]


def test_what_a_run_raises_is_raised_as_it_was_and_ends_the_others(
    tmp_path: Path, store: Store
) -> None:
    def work(folder: Path, run: int) -> int:
        if run == 1:
            while not (folder / "2").exists():
                time.sleep(0.01)
            raise StoreError("models/x is missing")
        if run == 2:
            (folder / "2").write_text(str(os.getpid()))
            time.sleep(3600)
        return run

    work_there = partial(work, tmp_path)
    with (
        pytest.raises(StoreError, match=r"^models/x is missing$"),
        side_by_side(work_there, {0: {}, 1: {}, 2: {}}, cpus=1, store=store) as found,
    ):
        assert next(found) == 0
        next(found)
    _ended(int((tmp_path / "2").read_text()))


def test_a_run_whose_worker_is_lost_begins_again(tmp_path: Path, store: Store) -> None:
    def work(folder: Path, run: int) -> int:
        if run and not (folder / "lost").exists():
            (folder / "lost").touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return run

    runs: dict[int, dict[str, int]] = {0: {}, 1: {}, 2: {}}
    with side_by_side(partial(work, tmp_path), runs, cpus=1, store=store) as found:
        assert list(found) == [0, 1, 2]
    assert (tmp_path / "lost").exists()


def test_a_cluster_that_has_no_cpus_yet_is_waited_for(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its head has none; what waits makes the autoscaler add nodes."""
    monkeypatch.setattr(ray, "nodes", lambda: [{"Alive": True, "Resources": {"memory": 1.0}}])
    with side_by_side(str, {0: {}, 1: {}}, cpus=1, store=store) as found:
        assert list(found) == ["0", "1"]


def test_what_fails_outside_ends_the_runs_too(tmp_path: Path, store: Store) -> None:
    def work(folder: Path, run: int) -> int:
        if run:
            (folder / "pid").write_text(str(os.getpid()))
            time.sleep(3600)
        while not (folder / "pid").exists():
            time.sleep(0.01)
        return run

    with (
        pytest.raises(KeyError),
        side_by_side(partial(work, tmp_path), {0: {}, 1: {}}, cpus=1, store=store) as found,
    ):
        next(found)
        raise KeyError("the table")
    _ended(int((tmp_path / "pid").read_text()))


def _ended(process: int) -> None:
    """Wait for the end of a killed process; the test's timeout bounds it."""
    while Path(f"/proc/{process}/stat").exists() and _state(process) != "Z":
        time.sleep(0.05)


def _state(process: int) -> str:
    try:
        return Path(f"/proc/{process}/stat").read_text().rsplit(")", 1)[1].split()[0]
    except FileNotFoundError:
        return "Z"


def test_one_bar_has_the_steps_of_all(
    tmp_path: Path, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[int] = []

    class Bar:
        n = 0

        def __enter__(self) -> Bar:
            return self

        def __exit__(self, *_: object) -> None:
            return None

        def update(self, more: int) -> None:
            self.n += more
            shown.append(self.n)

    def bar(label: str, total: int, unit: str) -> Bar:
        assert (label, total, unit) == ("2 runs", 40, "step")
        return Bar()

    monkeypatch.setattr(console, "bar", bar)

    def work(folder: Path, run: str) -> str:
        while run == "b" and not (folder / "seen").exists():
            time.sleep(0.01)
        return run

    _say(store, "b", 7)
    trainings = {"a": {"runs/a": 10}, "b": {"runs/b": 20, "runs/b-task": 10}}
    with side_by_side(partial(work, tmp_path), trainings, cpus=1, store=store) as found:
        assert next(found) == "a"
        assert shown[-1] == 17  # a is done, and what b said
        (tmp_path / "seen").touch()
        assert list(found) == ["b"]
    assert shown[-1] == 40
