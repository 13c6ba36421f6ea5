"""How busy the workers were, and what is left of trials that ended."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

import pytest
from ray.tune.experiment import Trial

from pipelines import placement
from pipelines.storage import Store
from tuning import watch
from tuning.trials import run_name
from tuning.watch import Watch


@dataclass
class One:
    """What a callback sees of a trial of Tune's."""

    config: dict[str, Any]
    status: str = Trial.RUNNING
    last_result: dict[str, Any] = field(default_factory=dict)
    error: str | None = None

    def get_error(self) -> str | None:
        return self.error


class Clock:
    now = 100.0

    def monotonic(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(watch, "time", clock)
    return clock


def watching(tmp_path: Path, *, workers: int = 2, total: int = 3) -> Watch:
    return Watch(Store(tmp_path), "sweeps/ray/s", "s", workers=workers, total=total, metric="score")


def pass_by(watcher: Watch, clock: Clock, seconds: float, *trials: One) -> None:
    clock.now += seconds
    watcher.on_step_end(0, cast(list[Trial], list(trials)))


def test_the_workers_time_adds_up(tmp_path: Path, clock: Clock) -> None:
    watcher = watching(tmp_path)
    watcher.setup()
    one, two, three = (One({"x": i}, Trial.PAUSED) for i in range(3))
    pass_by(watcher, clock, 4, one, two, three)  # both processes start
    one.status = Trial.RUNNING
    pass_by(watcher, clock, 3, one, two, three)  # one still does
    two.status = Trial.RUNNING
    pass_by(watcher, clock, 10, one, two, three)
    one.status, three.status = Trial.TERMINATED, Trial.PENDING
    pass_by(watcher, clock, 1, one, two, three)  # the third begins
    three.status = Trial.RUNNING
    pass_by(watcher, clock, 8, one, two, three)
    two.status = Trial.ERROR
    pass_by(watcher, clock, 5, one, two, three)  # nothing is left for the other worker
    assert watcher.seconds == {
        "busy": 3 + 20 + 1 + 16 + 5, "waiting": 8 + 3 + 1, "tail": 5,
    }  # fmt: skip
    assert sum(watcher.seconds.values()) == 2 * (clock.now - 100)
    assert watch.busy_share(watcher.seconds) == pytest.approx(45 / 62)
    # A sweep that was killed adds to it, but not the time in which it was dead.
    later = watching(tmp_path)
    clock.now += 1000
    later.setup()
    later.set_state(watcher.get_state())
    three.status = Trial.RUNNING
    pass_by(later, clock, 2, one, two, three)
    assert sum(later.seconds.values()) == 62 + 4


def test_what_became_of_the_trials(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    watcher = watching(tmp_path)
    good = One({"x": 0.5}, last_result={"score": 0.75, "step": 40, "config": {}, "date": "today"})
    poor = One({"x": 0.25}, Trial.ERROR, error="Traceback\n  ...\nMemoryError: no room\n")
    trials = cast(list[Trial], [good, poor])
    watcher.on_trial_complete(0, trials, trials[0])
    good.status = Trial.TERMINATED
    watcher.on_trial_error(0, trials, trials[1])
    said = capsys.readouterr().out
    assert "trial 2/3: 0.7500 after 40 steps, x 0.5" in said
    assert "trial 2/3: failed: MemoryError: no room after 0 steps" in said
    watcher.on_experiment_end(trials)
    assert watch.ended(Store(tmp_path), "sweeps/ray/s") == {
        "trials": [
            {"values": {"x": 0.5}, "result": {"score": 0.75, "step": 40}, "error": None},
            {"values": {"x": 0.25}, "result": {}, "error": "MemoryError: no room"},
        ],
        "workers": 2,
        "seconds": {"busy": 0.0, "waiting": 0.0, "tail": 0.0},
    }


def test_the_room_of_workers_is_given_back_once_they_are_dead(
    tmp_path: Path, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    dead: set[str] = set()
    given: list[str] = []

    def release(room: dict[str, str]) -> bool:
        if room["worker"] in dead:
            given.append(room["group"])
        return room["worker"] in dead

    monkeypatch.setattr(placement, "release", release)
    watcher, store = watching(tmp_path), Store(tmp_path)
    one, two = One({"x": 1}), One({"x": 2})
    for trial, mark in ((one, "a"), (two, "b")):
        room = {"group": mark, "worker": mark}
        store.write_json(f"runs/{run_name('s', trial.config)}/placement.json", room)
    watcher.setup()
    pass_by(watcher, clock, 1, one, two)
    one.status = Trial.PAUSED
    pass_by(watcher, clock, 1, one, two)
    # It begins again, in other room, before the first is given back.
    one.status = Trial.RUNNING
    store.write_json(
        f"runs/{run_name('s', one.config)}/placement.json", {"group": "c", "worker": "c"}
    )
    pass_by(watcher, clock, 1, one, two)
    assert given == []
    dead.add("a")
    pass_by(watcher, clock, 1, one, two)
    assert given == ["a"]
    one.status = two.status = Trial.TERMINATED
    dead |= {"b", "c"}
    watcher.on_experiment_end(cast(list[Trial], [one, two]))
    assert sorted(given) == ["a", "b", "c"]
