"""Sweeps: trials of finetuning on Ray Tune, compared in a table and in MLflow."""

from __future__ import annotations

import math
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from beit3 import tasks, weights
from beit3.config import PRESETS as MODELS
from beit3.objectives import MaskedDataModelling
from beit3.text import TextTokenizer
from pipelines import (
    bundles,
    checkpoints,
    export,
    finetune,
    finetuned,
    models,
    prepare_task,
    tracking,
    train_text_tokenizer,
)
from pipelines import config as job_config
from pipelines.export import ExportConfig
from pipelines.sample_world import WorldSize, generate
from pipelines.storage import Store, StoreError
from pipelines.train_text_tokenizer import TextTokenizerConfig
from tuning import outcome, spaces, sweep
from tuning.sweep import SweepConfig, run, trial_config

SHAPE = replace(MODELS["tiny"], layers=2, hidden=32, mlp=64, heads=2, image_size=24, vocab_size=64)
STEPS, EVERY = 4, 2


def config(store: Store, **changes: Any) -> SweepConfig:
    """Two trials by Optuna under ASHA."""
    base = finetune.preset("tiny", "retrieval")
    tuned = replace(
        base, store=store.uri, batch_size=8, eval_records=6, eval_batch_size=6,
        train=replace(
            base.train, steps=STEPS, warmup=1, evaluate_every=EVERY, log_every=1, threads=1
        ),
    )  # fmt: skip
    return replace(
        SweepConfig(
            name="small", finetune=tuned, search="optuna", samples=2, cpus_per_trial=1.0
        ),
        **changes,
    )  # fmt: skip


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


def bundle(store: Store, name: str, to: Path) -> Path:
    bundles.load(store, name, to)
    return to


def name_of(store: Store, row: dict[str, Any]) -> str:
    return trial_config(config(store), row["parameters"]).name


# -- a sweep --------------------------------------------------------------------------------------


def test_the_table_names_the_best(store: Store, swept: dict[str, Any]) -> None:
    assert store.read_json("sweeps/small.json") == swept
    rows = swept["trials"]
    assert len(rows) == 2 and swept["metric"] == "mean_recall"
    to_the_end = [row for row in rows if row["status"] == "finished"]
    assert swept["best"] == rows[0] == max(to_the_end, key=lambda row: row["score"])
    space = spaces.load(config(store).finetune)
    for row in rows:
        assert row["parameters"].keys() == space.keys()
        assert row["error"] is None and row["name"] == name_of(store, row)
        assert row["status"] == ("finished" if row["steps"] == STEPS else "stopped early")
        assert 0 <= row["score"] <= 1 and row["steps"] in (EVERY, STEPS)
        assert [step for step, _ in row["curve"]] == list(range(EVERY, row["steps"] + 1, EVERY))
        assert row["curve"][-1][1] == row["score"]
    assert rows[0]["parameters"] != rows[1]["parameters"]
    assert rows[0]["steps"] == STEPS  # a trial that was stopped early has no model


def test_optuna_draws_from_the_task_s_space(store: Store, swept: dict[str, Any]) -> None:
    _all_drawn_from_the_space(store, swept["trials"])


def _all_drawn_from_the_space(store: Store, rows: list[dict[str, Any]]) -> None:
    fields = spaces.read(spaces.load(config(store).finetune))
    for row in rows:
        assert row["parameters"].keys() == fields.keys()
        rate = fields["train.learning_rate"]
        assert isinstance(rate, spaces.Range)
        assert rate.low <= row["parameters"]["train.learning_rate"] <= rate.high


def test_trials_that_went_to_the_end_leave_their_models(
    store: Store, swept: dict[str, Any]
) -> None:
    ended = [row for row in swept["trials"] if row["steps"] == STEPS]
    for row in ended:
        model = finetuned.load(store, f"models/{name_of(store, row)}")
        assert (model.task_name, model.info["steps"]) == ("retrieval", STEPS)
        assert model.info["metrics"]["mean_recall"] == row["score"]
    left = {f"small/{name}" for name in store.list("models/small")}
    assert left == {"small/best", *(name_of(store, row) for row in ended)}


def test_the_best_is_a_model_with_its_card(
    store: Store, swept: dict[str, Any], tmp_path: Path
) -> None:
    assert swept["model"] == "models/small/best"
    model = finetuned.load(store, "models/small/best")
    assert model.info["metrics"]["mean_recall"] == swept["best"]["score"]
    own, trial = (weights.load_tensors(bundle(store, f"models/{n}", tmp_path / n))
                  for n in ("small/best", swept["best"]["name"]))  # fmt: skip
    assert own.keys() == trial.keys() and all(torch.equal(own[k], trial[k]) for k in own)
    card = (tmp_path / "small/best/README.md").read_text()
    assert card.startswith("# small/best") and "## Sweep" in card
    for row in swept["trials"]:
        assert f"| {row['name']} |" in card and f"| {row['score']:.4f} |" in card
    # Exported, it still has it.
    again = export.run(
        ExportConfig(model="models/small/best", to=str(tmp_path / "out"), store=store.uri)
    )
    assert "## Sweep" in (again / "README.md").read_text()


def test_the_page_shows_every_trial(store: Store, swept: dict[str, Any]) -> None:
    page = store.read("sweeps/small.html").decode()
    assert all(row["name"] in page for row in swept["trials"])
    assert "<script" not in page and "http" not in page.replace("http-equiv", "")
    tracker = tracking.client(tracking.tracking_uri(store))
    assert "sweep.html" in [f.path for f in tracker.list_artifacts(swept["mlflow_run"])]


def test_the_workers_were_busy_most_of_the_time(swept: dict[str, Any]) -> None:
    assert swept["workers"] == 2
    assert swept["seconds"]["busy"] > 0 and 0 < swept["busy"] <= 1


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
    monkeypatch.setattr(sweep, "_tune", None)  # not called
    assert run(config(store)) == run(config(store, concurrent=1)) == swept
    assert capsys.readouterr().out.count("sweeps/small.json: already there (2 trials)") == 2
    for other in (config(store, samples=3), config(store, seed=1)):
        with pytest.raises(StoreError, match=r"another sweep's.*: choose another --name"):
            run(other)


@pytest.mark.parametrize(
    ("file", "path", "value"),
    [
        ("tasks/retrieval/train/_commits/00000000.json", ("files", 0, "sha256"), "0"),
        ("tasks/retrieval/val/_commits/00000000.json", ("files", 0, "sha256"), "0"),
        ("tasks/retrieval/train/_commits/00000000.json", ("stats", "labels"), ["a"]),
        ("models/pretrained/_bundle.json", ("files", weights.WEIGHTS, "sha256"), "0"),
    ],
)
def test_a_sweep_of_other_data_or_another_start_is_refused(
    store: Store,
    swept: dict[str, Any],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    file: str,
    path: tuple[Any, ...],
    value: Any,
) -> None:
    monkeypatch.setattr(sweep, "_tune", None)  # not called
    other = Store(tmp_path)
    for name in (
        "sweeps/small.json",
        "models/pretrained/_bundle.json",
        "tasks/retrieval/train/_commits/00000000.json",
        "tasks/retrieval/val/_commits/00000000.json",
    ):
        other.write(name, store.read(name))
    assert run(config(other)) == swept
    manifest = other.read_json(file)
    inner = manifest
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    other.write_json(file, manifest)
    with pytest.raises(StoreError, match="of other data or another start: choose another --name"):
        run(config(other))


def test_a_start_or_split_that_is_missing_is_named_before_anything_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep.cluster, "start", None)  # not called
    store = Store(tmp_path)
    with pytest.raises(StoreError, match="models/pretrained: missing or half written"):
        run(config(store))
    scratch = replace(config(store).finetune, init="random", like="models/shape")
    with pytest.raises(StoreError, match="models/shape: missing or half written"):
        run(config(store, finetune=scratch))
    store.write_json("models/pretrained/_bundle.json", {"files": {}, "info": {}})
    with pytest.raises(StoreError, match="tasks/retrieval/train does not exist"):
        run(config(store))


def test_a_sweep_that_was_killed_goes_on(
    store: Store, swept: dict[str, Any], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """After its last trial, before its table: no trial is made again."""
    models_before = {
        path: path.stat().st_mtime_ns
        for path in Path(store.path("models")).rglob("*")
        if "best" not in path.parts
    }
    table = store.path("sweeps/small.json")
    shutil.move(table, tmp_path / "table")
    again = run(config(store))
    assert "sweep small: goes on where it was, 2 trials at once" in capsys.readouterr().out
    # In the same MLflow run; of the time it says what it took in all.
    assert {k: v for k, v in again.items() if k not in ("busy", "seconds")} == {
        k: v for k, v in swept.items() if k not in ("busy", "seconds")
    }
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
    base = finetune.preset("tiny", task)
    space = spaces.load(base)
    base = replace(base, train=replace(base.train, evaluate_every=10))
    drawn = {key: domain.sample() for key, domain in space.items()}
    cfg = SweepConfig(finetune=base)
    assert trial_config(cfg, drawn).train.learning_rate == drawn["train.learning_rate"]
    assert cfg.metric in {"cider", "mean_recall", "accuracy", "top_1"}


def test_presets_are_the_task_s_recipes() -> None:
    assert list(sweep.PRESETS)[:2] == ["tiny", "gpu"]
    assert sweep.PRESETS["tiny"] == sweep.PRESETS["tiny-vqa"]
    assert sweep.PRESETS["gpu"] == sweep.PRESETS["gpu-vqa"]
    for task in tasks.names():
        for name, size in (("tiny", "tiny"), ("gpu", "base")):
            found, recipe = sweep.PRESETS[f"{name}-{task}"].finetune, finetune.preset(size, task)
            changed = {
                key: value
                for key, value in job_config.flatten(found).items()
                if value != job_config.flatten(recipe)[key]
            }
            assert changed.keys() <= {
                "train.steps", "train.warmup", "train.evaluate_every", "train.workers",
            }  # fmt: skip
            assert not {"train.steps", "train.warmup"} & changed.keys() or size == "tiny"
    on_gpus = {t: sweep.PRESETS[f"gpu-{t}"].finetune.train.workers for t in tasks.names()}
    assert on_gpus == {"captioning": 2, "imagenet": 8, "nlvr2": 2, "retrieval": 8, "vqa": 1}


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"samples": 0}, "samples: expected at least 1"),
        ({"reduction": 1}, "reduction: expected at least 2"),
        ({"finetune": finetune.preset("tiny", "vqa")}, "evaluate_every is 0"),
        ({"exploit_evaluations": 0}, "exploit_evaluations: expected at least 1"),
        ({"exploit_share": 0.6}, "exploit_share: expected more than 0 and at most 0.5"),
        ({"concurrent": -1}, "concurrent and cpus_per_trial can't be negative"),
        ({"autoscaling": True}, "autoscaling needs concurrent"),
        ({"scheduler": "pbt", "search": "optuna"}, "take search random"),
        (
            {"search": "random", "scheduler": "pbt", "samples": 1},
            "population based training needs at least 2",
        ),
    ],
)
def test_impossible_options_are_named(changes: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=said):
        config(Store(tmp_path), **changes)


def test_a_sweep_without_a_score_is_an_error(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    """And is tried again the next time: it leaves no table."""
    values = {"train.learning_rate": 1e-3, "train.layer_decay": 1.0, "drop_path": 0.1}

    def tune(cfg: SweepConfig, store: Store, folder: str, *_: Any) -> None:
        failed = {"values": values, "result": {}, "error": "MemoryError: no room"}
        seen = {"trials": [failed], "workers": 1, "seconds": {"busy": 1.0}}
        store.write_json(f"{folder}/ended.json", seen)

    monkeypatch.setattr(sweep, "_tune", tune)
    with pytest.raises(RuntimeError, match=r"no trial of sweep hopeless .*MemoryError: no room"):
        run(config(store, name="hopeless"))
    assert not store.exists("sweeps/hopeless.json")


@pytest.mark.parametrize(
    "scores",
    [
        (math.nan, 0.3, 0.5, math.nan, 0.1, 0.2),
        (0.3, math.nan, 0.5, 0.1, 0.2, math.nan),
        (0.1, 0.2, math.nan, 0.3, math.nan, 0.5),
    ],
)
def test_a_score_that_is_no_number_is_the_worst(tmp_path: Path, scores: tuple[float, ...]) -> None:
    store = Store(tmp_path)
    cfg = config(store)
    common = {"train.layer_decay": 1.0, "drop_path": 0.0}
    seen = [
        {
            "values": {"train.learning_rate": 1e-3 + place * 1e-4, **common},
            "result": {"step": STEPS, cfg.metric: score},
            "error": None,
        }
        for place, score in enumerate(scores)
    ]
    store.write_json("f/ended.json", {"trials": seen, "workers": 1, "seconds": {"busy": 1.0}})
    found = outcome.gather(cfg, store, "f")
    assert found["best"]["score"] == 0.5
    assert [row["score"] for row in found["trials"][:4]] == [0.5, 0.3, 0.2, 0.1]
    assert found["importance"]["train.learning_rate"] > 0


# -- population based training, Ray Train workers -------------------------------------------------


@pytest.mark.slow
def test_a_poor_trial_goes_on_from_a_good_ones_checkpoint(store: Store) -> None:
    """Two trials take turns on one worker; the worse one takes the other's weights."""
    bred = {"name": "bred", "search": "random", "scheduler": "pbt", "exploit_share": 0.5}
    # Of this seed's trials the second is far worse: it, and not the first, finds whom to follow.
    outcome = run(config(store, **bred, concurrent=1, seed=4))
    moved = [row for row in outcome["trials"] if len(row["runs"]) > 1]
    assert len(moved) == 1, outcome["trials"]
    donor, own = moved[0]["runs"]
    assert (donor["step"], own["step"]) == (0, EVERY) and own["run"] == moved[0]["name"]
    assert donor["values"] != own["values"] == moved[0]["parameters"]
    other = next(row for row in outcome["trials"] if row is not moved[0])
    assert [run["run"] for run in other["runs"]] == [donor["run"]]
    # What it began with are the donor's files: weights and moments.
    begun, given = (checkpoints.folder(f"runs/{r['run']}", EVERY) for r in (own, donor))
    assert bundles.identity(store, begun) == bundles.identity(store, given)
    # And it trained on from there, with values of its own.
    tracker = tracking.client(tracking.tracking_uri(store))
    nested = {r.info.run_name: r for r in trials(store, outcome["mlflow_run"])}
    assert len(nested) == 3  # the two first ones, and the one that took over
    mlflow_run = nested[own["run"]].info.run_id
    losses = tracker.get_metric_history(mlflow_run, "train/loss")
    assert sorted(m.step for m in losses) == list(range(EVERY + 1, STEPS + 1))
    rate = float(nested[own["run"]].data.params["train.learning_rate"])
    assert rate == pytest.approx(own["values"]["train.learning_rate"])
    assert moved[0]["curve"][0] == other["curve"][0]  # the weights' way up to the copy
    gave_up = [r for name, r in nested.items() if name not in (own["run"], donor["run"])]
    assert [r.info.status for r in gave_up] == ["KILLED"]
    assert all(row["status"] == "finished" for row in outcome["trials"])
    assert "How the best came about" in store.read("sweeps/bred.html").decode() or (
        outcome["best"]["name"] == other["name"]
    )


@pytest.mark.slow
def test_without_a_scheduler_all_go_to_the_end(store: Store) -> None:
    rows = run(config(store, name="suggested", scheduler="none"))["trials"]
    assert [row["status"] for row in rows] == ["finished"] * 2
    _all_drawn_from_the_space(store, rows)


@pytest.mark.slow
def test_trials_may_have_ray_train_workers_of_their_own(store: Store) -> None:
    """Two CPUs: room for one trial with one worker, so that the two don't wait for each other."""
    base = config(store, name="workers", samples=2)
    outcome = run(
        replace(
            base,
            finetune=replace(base.finetune, train=replace(base.finetune.train, workers=1)),
        )
    )
    assert outcome["workers"] == 1 and outcome["best"]["steps"] == STEPS
    assert len(outcome["trials"]) == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("search", "scheduler"), [("random", "asha"), ("random", "pbt"), ("optuna", "asha")]
)
def test_a_killed_sweep_ends_with_the_same_best(
    store: Store, tmp_path: Path, search: str, scheduler: str
) -> None:
    """SIGKILL while the second trial trains; the same command goes on."""
    options = {
        "search": search, "scheduler": scheduler, "samples": 3, "concurrent": 1,
        "exploit_share": 0.5,
    }  # fmt: skip
    whole = run(config(store, name=f"whole-{search}-{scheduler}", **options))
    name = f"killed-{search}-{scheduler}"
    cfg = config(store, name=name, **options)
    file = tmp_path / "sweep.yaml"
    file.write_text(yaml.safe_dump(job_config.to_dict(cfg)))
    command = [sys.executable, str(Path(sweep.__file__)), "--config", str(file)]
    with (tmp_path / "log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=tmp_path, start_new_session=True, stdout=log, stderr=log
        )
        try:
            until = time.monotonic() + 200
            while len(begun := store.list(f"runs/{name}")) < 2 and time.monotonic() < until:
                assert process.poll() is None, (tmp_path / "log").read_text()
                time.sleep(0.2)
            assert len(begun) >= 2
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
    assert not store.exists(f"sweeps/{name}.json")
    resumed = subprocess.run(
        command, cwd=tmp_path, capture_output=True, text=True, timeout=250, check=True
    )
    assert "best: models/" in resumed.stdout
    found = store.read_json(f"sweeps/{name}.json")
    shown = ("parameters", "score", "steps", "status", "curve")
    assert [{k: r[k] for k in shown} for r in found["trials"]] == [
        {k: r[k] for k in shown} for r in whole["trials"]
    ]
