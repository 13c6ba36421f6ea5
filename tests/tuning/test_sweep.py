"""Sweeps: trials of finetuning on Ray Tune, compared in a table and in MLflow."""

from __future__ import annotations

import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from beit3 import weights
from beit3.config import PRESETS as MODELS
from beit3.objectives import MaskedDataModelling
from beit3.text import TextTokenizer
from pipelines import (
    bundles,
    evaluate,
    finetune,
    models,
    prepare_task,
    tracking,
    train_text_tokenizer,
)
from pipelines.sample_world import WorldSize, generate
from pipelines.storage import Store, StoreError
from pipelines.train_text_tokenizer import TextTokenizerConfig
from tuning import spaces, sweep
from tuning.sweep import SweepConfig, run, trial_config

SHAPE = replace(MODELS["tiny"], layers=2, hidden=32, mlp=64, heads=2, image_size=24, vocab_size=64)
STEPS, EVERY = 4, 2


def config(store: Store, **changes: Any) -> SweepConfig:
    base = finetune.preset("tiny", "retrieval")
    tuned = replace(
        base, store=store.uri, batch_size=8, eval_records=6, eval_batch_size=6,
        train=replace(
            base.train, steps=STEPS, warmup=1, evaluate_every=EVERY, log_every=1, threads=1
        ),
    )  # fmt: skip
    return replace(
        SweepConfig(name="small", finetune=tuned, samples=2, cpus_per_trial=1.0), **changes
    )


@pytest.fixture(scope="module")
def store(ray_session: None, tmp_path_factory: pytest.TempPathFactory) -> Store:
    """A store with a pretrained model and data for retrieval."""
    store = Store(tmp_path_factory.mktemp("store"))
    world = generate(
        tmp_path_factory.mktemp("world"), size=WorldSize.tiny(), base_url="http://127.0.0.1:1"
    )
    prepare_task.run(
        replace(
            prepare_task.PRESETS["retrieval"], store=store.uri, in_process=True,
            annotations=str(world.annotations("coco")), images=str(world.images("coco")),
            splits=("train", "val"), short_side=48,
        )
    )  # fmt: skip
    rows = store.dataset("tasks/retrieval/train").read_table().to_pylist()
    sentences = [e["text"] for row in rows for e in row["examples"]]
    learned = TextTokenizerConfig(images=("x",), vocab_size=60, character_coverage=1.0, threads=1)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights.save(Path(folder), MaskedDataModelling(SHAPE), SHAPE, kind="pretrained")
        models.add_tokenizer(
            Path(folder), TextTokenizer(train_text_tokenizer.train(sentences, learned))
        )
        bundles.save(store, "models/pretrained", Path(folder), {"kind": "pretrained"})
    return store


@pytest.fixture(scope="module")
def swept(store: Store) -> dict[str, Any]:
    return run(config(store))


def trials(store: Store, parent: str) -> list[Any]:
    """MLflow runs nested under a sweep's."""
    tracker = tracking.client(tracking.tracking_uri(store))
    experiment = tracker.get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    return tracker.search_runs(
        [experiment.experiment_id], f"tags.`mlflow.parentRunId` = '{parent}'"
    )


def name_of(store: Store, row: dict[str, Any]) -> str:
    return trial_config(config(store), row["parameters"]).name


# -- a sweep --------------------------------------------------------------------------------------


def test_the_table_names_the_best(store: Store, swept: dict[str, Any]) -> None:
    assert store.read_json("sweeps/small.json") == swept
    rows = swept["trials"]
    assert len(rows) == 2 and swept["metric"] == "mean_recall"
    assert swept["best"] == rows[0] and rows[0]["score"] >= rows[1]["score"]
    space, _ = spaces.load("retrieval")
    for row in rows:
        assert row["parameters"].keys() == space.keys()
        assert row["status"] == "finished" and row["error"] is None
        assert 0 <= row["score"] <= 1 and row["steps"] in (EVERY, STEPS)
    assert rows[0]["parameters"] != rows[1]["parameters"]
    assert STEPS in {row["steps"] for row in rows}


def test_trials_that_went_to_the_end_leave_their_models(
    store: Store, swept: dict[str, Any]
) -> None:
    ended = [row for row in swept["trials"] if row["steps"] == STEPS]
    for row in ended:
        model = evaluate.load(store, f"models/{name_of(store, row)}")
        assert (model.task_name, model.info["steps"]) == ("retrieval", STEPS)
        assert model.info["metrics"]["mean_recall"] == row["score"]
    left = {f"small/{name}" for name in store.list("models/small")}
    assert left == {name_of(store, row) for row in ended}


def test_trials_are_mlflow_runs_nested_under_the_sweep(store: Store, swept: dict[str, Any]) -> None:
    tracker = tracking.client(tracking.tracking_uri(store))
    whole = tracker.get_run(swept["mlflow_run"])
    assert (whole.info.run_name, whole.info.status) == ("sweep/small", "FINISHED")
    assert whole.data.metrics["best/mean_recall"] == swept["best"]["score"]
    assert "trials.json" in [f.path for f in tracker.list_artifacts(swept["mlflow_run"])]
    nested = {r.info.run_name: r for r in trials(store, swept["mlflow_run"])}
    assert nested.keys() == {name_of(store, row) for row in swept["trials"]}
    for row in swept["trials"]:
        found = nested[name_of(store, row)]
        rate = float(found.data.params["train.learning_rate"])
        assert rate == pytest.approx(row["parameters"]["train.learning_rate"])
        # Its curves are whole, though Tune ends a trial's process as it reports.
        history = tracker.get_metric_history(found.info.run_id, "train/loss")
        assert sorted(m.step for m in history) == list(range(1, row["steps"] + 1))
        last = tracker.get_metric_history(found.info.run_id, "eval/mean_recall")[-1]
        assert (last.step, last.value) == (row["steps"], row["score"])
        assert found.info.status == ("FINISHED" if row["steps"] == STEPS else "KILLED")


def test_a_finished_sweep_is_skipped_and_another_refused(
    store: Store,
    swept: dict[str, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(sweep, "_tuner", None)  # not called
    assert run(config(store)) == run(config(store, concurrent=1)) == swept
    assert capsys.readouterr().out.count("sweeps/small.json: already there (2 trials)") == 2
    for other in (config(store, samples=3), config(store, seed=1)):
        with pytest.raises(StoreError, match="another sweep's: choose another --name"):
            run(other)


def test_a_sweep_that_was_killed_goes_on(
    store: Store, swept: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After its last trial, before its table: no trial is made again."""
    models_before = {
        path: path.stat().st_mtime_ns for path in Path(store.path("models")).rglob("*")
    }
    table = store.path("sweeps/small.json")
    shutil.move(table, tmp_path / "table")
    again = run(config(store))
    assert "sweep small: goes on where it was" in capsys.readouterr().out
    assert again == swept  # in the same MLflow run
    assert models_before == {p: p.stat().st_mtime_ns for p in models_before}
    assert len(trials(store, swept["mlflow_run"])) == 2


# -- trials ---------------------------------------------------------------------------------------


def test_drawn_values_lie_over_the_common_ones(tmp_path: Path) -> None:
    base = config(Store(tmp_path))
    chosen = {"train.learning_rate": 0.5, "drop_path": 0.1, "train.layer_decay": 1.0}
    trial = trial_config(base, chosen)
    assert (trial.train.learning_rate, trial.drop_path) == (0.5, 0.1)
    expected = replace(
        base.finetune, drop_path=0.1, name=trial.name,
        train=replace(base.finetune.train, learning_rate=0.5, layer_decay=1.0),
    )  # fmt: skip
    assert trial == expected
    # Its folder follows from its values, in whatever order they come.
    assert trial_config(base, dict(reversed(chosen.items()))).name == trial.name
    assert trial_config(base, {**chosen, "drop_path": 0.0}).name != trial.name
    assert trial.name.startswith("small/")


@pytest.mark.parametrize("task", ["captioning", "imagenet", "nlvr2", "retrieval", "vqa"])
def test_spaces_name_fields_that_there_are(task: str, tmp_path: Path) -> None:
    space, metric = spaces.load(task)
    base = finetune.preset("tiny", task)
    base = replace(base, train=replace(base.train, evaluate_every=10))
    drawn = {key: domain.sample() for key, domain in space.items()}
    trial = trial_config(SweepConfig(finetune=base), drawn)
    assert trial.train.learning_rate == drawn["train.learning_rate"]
    assert metric in {"cider", "mean_recall", "accuracy", "top_1"}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 0}, "samples: expected at least 1"),
        ({"reduction": 1}, "reduction: expected at least 2"),
        ({"finetune": finetune.preset("tiny", "vqa")}, "evaluate_every is 0"),
    ],
)
def test_impossible_options_are_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        config(Store(tmp_path), **changes)


def test_an_unknown_task_has_no_space() -> None:
    with pytest.raises(ValueError, match=r"no search space for 'segment'; there are captioning"):
        spaces.load("segment")


def test_a_sweep_without_a_score_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is tried again the next time: it leaves no table."""

    class Failed:
        config: dict[str, float] = {"drop_path": 0.1}  # noqa: RUF012
        metrics = None
        error = RuntimeError("no room")

    class Tuner:
        def fit(self) -> list[Failed]:
            return [Failed()]

    monkeypatch.setattr(sweep, "_tuner", lambda *_: Tuner())
    with pytest.raises(RuntimeError, match=r"no trial of sweep hopeless gave a score.*no room"):
        run(config(store, name="hopeless"))
    assert not store.exists("sweeps/hopeless.json")
