"""Where a trial begins, what it says again, and the way that its weights have come."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipelines import bundles, checkpoints, finetune, tracking
from pipelines.storage import Store, StoreError
from tuning import outcome, trials
from tuning.trials import HEARD, ORIGIN

CHOSEN = {"train.learning_rate": 2e-3, "drop_path": 0.1}


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "store")


def checkpoint(store: Store, run: str, step: int, text: str) -> None:
    """A bundle such as a run's checkpoint is."""
    local = Path(store.path("local"))
    local.mkdir(parents=True, exist_ok=True)
    (local / "model.safetensors").write_text(text)
    bundles.save(store, checkpoints.folder(run, step), local, {"step": step})


def content(store: Store, run: str, step: int) -> str:
    return store.read(f"{checkpoints.folder(run, step)}/model.safetensors").decode()


# -- checkpoints of another run -------------------------------------------------------------------


def test_a_run_inherits_the_newest_sound_checkpoint(store: Store) -> None:
    for step in (10, 20, 30, 40):
        checkpoint(store, "runs/donor", step, f"of step {step}")
    store.write(f"{checkpoints.folder('runs/donor', 30)}/model.safetensors", b"damaged")
    store.delete(f"{checkpoints.folder('runs/donor', 40)}/{bundles.MANIFEST}")  # half written
    assert checkpoints.newest(store, "runs/donor") == 30
    assert checkpoints.inherit(store, "runs/own", "runs/donor") == 20
    assert content(store, "runs/own", 20) == "of step 20"
    assert checkpoints.newest(store, "runs/own") == 20
    assert bundles.info(store, checkpoints.folder("runs/own", 20))["from"] == "runs/donor"


def test_a_run_that_has_begun_keeps_its_own(store: Store) -> None:
    checkpoint(store, "runs/donor", 30, "donor")
    checkpoint(store, "runs/own", 20, "own")
    assert checkpoints.inherit(store, "runs/own", "runs/donor") == 20
    assert checkpoints.newest(store, "runs/own") == 20 and content(store, "runs/own", 20) == "own"


def test_nothing_to_inherit_is_an_error(store: Store) -> None:
    with pytest.raises(StoreError, match="runs/donor: has no sound checkpoint that runs/own could"):
        checkpoints.inherit(store, "runs/own", "runs/donor")


# -- names ----------------------------------------------------------------------------------------


def test_a_name_follows_from_values_and_origin_alone() -> None:
    name = trials.run_name("s", CHOSEN)
    assert trials.run_name("s", {**dict(reversed(CHOSEN.items())), HEARD: 40}) == name
    origin = {"run": "s/0", "step": 10, "by": name}
    moved = {**CHOSEN, ORIGIN: origin}
    assert trials.run_name("s", moved) != name
    assert trials.run_name("s", {**CHOSEN, ORIGIN: {**origin, "by": "s/1"}}) != trials.run_name(
        "s", moved
    )
    assert trials.values({**moved, HEARD: 40}) == CHOSEN


# -- what Tune has lost ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("heard", "saved", "ended", "again"),
    [
        (0, 0, False, []),  # it begins at step 0, and comes by all of them
        (0, 20, False, [10, 20]),
        (10, 20, False, [20]),
        (20, 20, False, []),
        (30, 20, False, []),
        (10, 30, True, [20, 30]),  # the last one is reported with the model
    ],
)
def test_evaluations_that_were_lost_are_said_again(
    store: Store,
    monkeypatch: pytest.MonkeyPatch,
    heard: int,
    saved: int,
    ended: bool,
    again: list[int],
) -> None:
    base = finetune.preset("tiny", "retrieval")
    trial = replace(base, name="s/1", train=replace(base.train, steps=40, warmup=1))
    if saved:
        checkpoint(store, "runs/s/1", saved, "")
    if ended:
        bundles.save(store, "models/s/1", Path(store.path("local")), {})
    evaluated = [(10, 0.1), (20, 0.2), (30, 0.3)] + ([(40, 0.4)] if ended else [])
    monkeypatch.setattr(trials, "scores", lambda *_: evaluated)
    said: list[dict[str, Any]] = []
    monkeypatch.setattr(trials.tune, "report", said.append)
    trials._say_again(store, trial, heard, "mean_recall")
    assert said == [{"mean_recall": step / 100, "step": step} for step in again]


# -- the way of the weights -----------------------------------------------------------------------


def test_a_curve_is_of_the_weights_and_not_of_the_place(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A trial took another's weights at step 20, and that one a third's at 10."""
    for name, origin, step in (("c", None, 0), ("b", "c", 10), ("a", "b", 20)):
        note = {"values": {"x": name}, ORIGIN: {"run": f"s/{origin}", "step": step, "by": "s/z"}}
        store.write_json(f"runs/s/{name}/trial.json", note if origin else {**note, ORIGIN: None})
    runs = trials.lineage(store, "s/a")
    assert [(r["run"], r["step"], r["values"]["x"]) for r in runs] == [
        ("s/c", 0, "c"), ("s/b", 10, "b"), ("s/a", 20, "a"),
    ]  # fmt: skip
    scores = {
        "s/c": [(10, 0.31), (20, 0.32)], "s/b": [(20, 0.22), (30, 0.23)], "s/a": [(30, 0.13)],
    }  # fmt: skip
    monkeypatch.setattr(trials, "scores", lambda store, name, metric: scores[name])
    assert trials.learning_curve(store, runs, "m") == [[10, 0.31], [20, 0.22], [30, 0.13]]
    assert trials.lineage(store, "s/never-began") == []
    assert trials.learning_curve(store, [], "m") == []


def test_runs_that_tune_ended_are_closed(store: Store) -> None:
    Path(store.path("local")).mkdir(parents=True)
    handles = {}
    for name in ("stopped", "whole", "broken", "failed"):
        handles[name] = tracking.start_run(store, f"s/{name}", {}, key=f"runs/s/{name}")
    bundles.save(store, "models/s/whole", Path(store.path("local")), {})
    tracking.finish_run(handles["failed"], "FAILED")  # said so itself
    trials.close(store, "s", failed={"s/broken"})
    tracker = tracking.client(tracking.tracking_uri(store))
    found = {name: tracker.get_run(h.run_id).info.status for name, h in handles.items()}
    assert found == {
        "stopped": "KILLED", "whole": "FINISHED", "broken": "FAILED", "failed": "FAILED",
    }  # fmt: skip


def test_equals_are_ordered_by_their_drawn_values_alone() -> None:
    """And so a sweep that was killed has the table of one that was not."""
    low, high = {"rate": 0.1, "decay": 1.0}, {"rate": 0.2, "decay": 1.0}
    assert trials.among_equals(low) < trials.among_equals(high)
    resumed = {"decay": 1.0, "rate": 0.1, HEARD: 4, ORIGIN: {"run": "a/1", "step": 2}}
    assert trials.among_equals(resumed) == trials.among_equals(low)
    rows = [{"parameters": drawn, "status": "finished", "score": 0.5} for drawn in (high, low)]
    assert sorted(rows, key=outcome._place) == rows[::-1]
