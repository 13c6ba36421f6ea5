"""Tracking with MLflow: one run per job, no doubled step, and a clear word where it can't be."""

from __future__ import annotations

import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import small_run
from mlflow.exceptions import MlflowException
from mlflow.protos.databricks_pb2 import ENDPOINT_NOT_FOUND, TEMPORARILY_UNAVAILABLE
from mlflow.tracking import MlflowClient
from PIL import Image

from pipelines import recipe, run_logger, tracking, trainer
from pipelines.run_logger import Logger
from pipelines.storage import Store, StoreError
from pipelines.tracking import RunHandle, finish_run, start_run


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    """One store, so one MLflow file, for all: making it takes seconds."""
    return Store(tmp_path_factory.mktemp("store"))


@pytest.fixture(autouse=True)
def unconfigured(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MLFLOW_TRACKING_URI", "RAY_ADDRESS", tracking.CERTIFICATE):
        monkeypatch.delenv(name, raising=False)


def run_of(handle: RunHandle) -> Any:
    return tracking.client(handle.uri).get_run(handle.run_id)


def history(handle: RunHandle, key: str) -> list[tuple[int, float]]:
    found = tracking.client(handle.uri).get_metric_history(handle.run_id, key)
    return [(m.step, m.value) for m in found]


@pytest.fixture
def down() -> str:
    """The address of a server that isn't there."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return f"http://127.0.0.1:{probe.getsockname()[1]}"


# -- where ----------------------------------------------------------------------------------------


def test_runs_are_tracked_in_a_file_beside_the_data(store: Store, tmp_path: Path) -> None:
    assert tracking.tracking_uri(store) == f"sqlite:///{store.root}/mlflow.db"
    elsewhere = Store(tmp_path / "not" / "yet")
    assert tracking.tracking_uri(elsewhere) == f"sqlite:///{elsewhere.root}/mlflow.db"
    assert Path(elsewhere.root).is_dir()


def test_the_environment_decides(
    store: Store, s3_store: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)  # where the file of a store in a bucket goes
    assert tracking.tracking_uri(Store(s3_store)) == f"sqlite:///{tmp_path}/mlflow.db"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    assert tracking.tracking_uri(store) == "http://mlflow.example"


def test_a_cluster_without_a_server_is_said_before_work_starts(
    store: Store, s3_store: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr(trainer, "_launch", None)  # not called
    bucket = Store(s3_store)
    with pytest.raises(StoreError, match="Set MLFLOW_TRACKING_URI, among the job's env_vars"):
        trainer.fit(
            bucket, name="lost", output="models/lost", fingerprint="x", recipe=None,  # type: ignore[arg-type]
            config=recipe.TrainConfig(workers=0), parameters={},
        )  # fmt: skip
    assert not bucket.exists("runs/lost/mlflow.json")
    assert tracking.tracking_uri(store).startswith("sqlite:///")  # a folder that nodes may share
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow.example")
    assert tracking.tracking_uri(bucket) == "http://mlflow.example"


@pytest.mark.parametrize(
    ("given", "meant"),
    [
        ("sqlite:///mlflow.db", "sqlite:///{here}/mlflow.db"),
        ("sqlite:///./deep/mlflow.db?timeout=5", "sqlite:///{here}/deep/mlflow.db?timeout=5"),
        ("sqlite+pysqlite:///mlflow.db", "sqlite+pysqlite:///{here}/mlflow.db"),
        ("sqlite:////data/mlflow.db", "sqlite:////data/mlflow.db"),
        ("sqlite:///:memory:", "sqlite:///:memory:"),
        ("postgresql://user@host/mlflow", "postgresql://user@host/mlflow"),
    ],
)
def test_a_relative_file_is_this_folders(
    given: str, meant: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ray's workers may be in another folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", given)
    assert tracking.tracking_uri(store) == meant.format(here=tmp_path)


def test_a_relative_certificate_is_this_folders(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(tracking.CERTIFICATE, "tls/tls.crt")
    tracking.client("http://mlflow.example")
    monkeypatch.chdir("/")
    tracking.client("http://mlflow.example")
    assert os.environ[tracking.CERTIFICATE] == f"{tmp_path}/tls/tls.crt"


def test_a_server_that_is_down_is_said_before_work_starts(
    store: Store, down: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", down)
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.setattr(trainer, "_launch", None)  # not called
    with pytest.raises(StoreError, match="unset MLFLOW_TRACKING_URI to track in a local") as error:
        trainer.fit(
            store, name="down", output="models/down", fingerprint="x", recipe=None,  # type: ignore[arg-type]
            config=recipe.TrainConfig(workers=0), parameters={},
        )  # fmt: skip
    assert down in str(error.value)
    assert not store.exists("models/down") and not store.exists("runs/down/mlflow.json")


@pytest.mark.parametrize("uri", ["sqlite:///{file}/deep/mlflow.db", "nowhere://tracker"])
def test_a_tracker_that_cant_be_written_is_said_before_work_starts(
    uri: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("")  # no folder can be made below it, whoever asks
    uri = uri.format(file=tmp_path / "file")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(StoreError, match="unset MLFLOW_TRACKING_URI to track in a local") as error:
        start_run(store, "unwritable", {}, key="runs/unwritable")
    assert f"tracking {uri}: " in str(error.value)
    assert not store.exists("runs/unwritable")


# -- runs -----------------------------------------------------------------------------------------


def test_a_run_has_its_parameters(store: Store) -> None:
    many: dict[str, Any] = {f"p{i:03d}": i for i in range(250)}
    handle = start_run(store, "many", {**many, "long": "x" * 9000, "none": None})
    finish_run(handle)
    run = run_of(handle)
    assert (run.info.run_name, run.info.status) == ("many", "FINISHED")
    assert {k: v for k, v in run.data.params.items() if k[0] == "p"} == {
        k: str(v) for k, v in many.items()
    }
    assert run.data.params["long"] == "x" * tracking.PARAM_CHARS
    assert run.data.params["none"] == "None"


def test_runs_are_nested_under_their_parent(store: Store) -> None:
    parent = start_run(store, "sweep/a", {})
    children = [start_run(store, f"a/{n}", {"n": n}, parent=parent.run_id) for n in range(2)]
    tracker = tracking.client(parent.uri)
    found = tracker.search_runs(
        [parent.experiment_id], f"tags.`mlflow.parentRunId` = '{parent.run_id}'"
    )
    assert {r.info.run_id for r in found} == {c.run_id for c in children}
    assert "mlflow.parentRunId" not in run_of(parent).data.tags


def test_a_job_that_resumes_continues_its_run(store: Store) -> None:
    first = start_run(store, "job", {"a": 1}, key="runs/job")
    assert store.read_json("runs/job/mlflow.json")["run_id"] == first.run_id
    finish_run(first, "FAILED")
    again = start_run(store, "job", {"a": 1}, key="runs/job")
    assert again == first and run_of(first).info.status == "RUNNING"
    finish_run(again)
    assert run_of(first).info.status == "FINISHED"
    assert start_run(store, "job", {}) != first  # without a key, a new run
    assert start_run(store, "job", {}, key="runs/other").run_id != first.run_id


def test_a_run_that_was_deleted_meanwhile_is_replaced(store: Store) -> None:
    first = start_run(store, "gone", {}, key="runs/gone")
    tracking.client(first.uri).delete_run(first.run_id)
    second = start_run(store, "gone", {}, key="runs/gone")
    assert second.run_id != first.run_id and run_of(second).info.lifecycle_stage == "active"
    third = start_run(store, "gone", {}, key="runs/gone")
    assert third == second


def test_a_run_that_the_server_does_not_know_is_replaced(store: Store) -> None:
    """As when its database was made anew."""
    known = start_run(store, "unknown", {})
    store.write_json("runs/unknown/mlflow.json", {**asdict(known), "run_id": "0" * 32})
    found = start_run(store, "unknown", {}, key="runs/unknown")
    assert run_of(found).info.status == "RUNNING"
    assert RunHandle(**store.read_json("runs/unknown/mlflow.json")) == found


@pytest.mark.parametrize(
    "error",
    [
        MlflowException("Service Unavailable", TEMPORARILY_UNAVAILABLE),
        MlflowException("the proxy's page", ENDPOINT_NOT_FOUND),
        MlflowException("too many retries"),
        TimeoutError("it took too long"),
    ],
    ids=lambda error: getattr(error, "error_code", "timeout"),
)
def test_a_server_that_fails_at_a_restart_costs_no_run(
    error: Exception, store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start_run(store, "busy", {}, key="runs/busy")

    def fails(*_: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(MlflowClient, "get_run", fails)
        with pytest.raises(StoreError, match=f"{error}. Start that server, or"):
            start_run(store, "busy", {}, key="runs/busy")
    assert RunHandle(**store.read_json("runs/busy/mlflow.json")) == first
    assert start_run(store, "busy", {}, key="runs/busy") == first


def test_a_place_that_takes_no_artifacts_is_said_before_work_starts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = Store(tmp_path / "store")
    uri = tracking.tracking_uri(store)
    place = tmp_path / "place"
    tracking.client(uri).create_experiment(tracking.EXPERIMENT, artifact_location=place.as_uri())
    first = start_run(store, "run", {"a": 1}, key="runs/run")
    (kept,) = place.glob("*/artifacts/parameters.json")
    assert json.loads(kept.read_text()) == {"a": 1}
    start_run(store, "run", {"a": 2}, key="runs/run")  # it keeps its parameters; this has the new
    assert json.loads(kept.read_text()) == {"a": 2} and run_of(first).data.params == {"a": "1"}
    finish_run(first, "KILLED")
    shutil.rmtree(place)
    place.write_text("")  # no folder can be made below it, whoever asks
    for key in ("runs/run", "runs/new"):
        with pytest.raises(
            StoreError, match=rf"can't store artifacts in {place.as_uri()}/.*rename"
        ):
            start_run(store, "run", {}, key=key)
    assert run_of(first).info.status == "KILLED" and not store.exists("runs/new/mlflow.json")
    runs = tracking.client(uri).search_runs([first.experiment_id])
    assert sorted(run.info.status for run in runs) == ["FAILED", "KILLED"]


def test_a_run_of_another_server_is_not_continued(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = start_run(store, "moved", {}, key="runs/moved")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/other.db")
    second = start_run(store, "moved", {}, key="runs/moved")
    assert second.uri != first.uri and second.run_id != first.run_id
    assert RunHandle(**store.read_json("runs/moved/mlflow.json")) == second


# -- the logger -----------------------------------------------------------------------------------


def test_metrics_pictures_and_values_arrive(store: Store, tmp_path: Path) -> None:
    handle = start_run(store, "all", {})
    (tmp_path / "notes.txt").write_text("notes")
    with Logger(handle) as logger:
        for step in range(1200):  # more than a request takes
            logger.metrics(step, {"loss": 1 / (step + 1), "accuracy": step})
        logger.picture("pictures/a/red.png", Image.new("RGB", (5, 4), "red"))
        logger.picture("top.png", Image.new("RGB", (2, 2)))
        logger.json("tables/t.json", {"a": [1, 2]})
        logger.file(tmp_path / "notes.txt", "files")
        logger.file(tmp_path / "notes.txt")
    assert history(handle, "loss") == [(step, 1 / (step + 1)) for step in range(1200)]
    assert len(history(handle, "accuracy")) == 1200
    tracker = tracking.client(handle.uri)

    def fetched(path: str) -> Path:
        return Path(tracker.download_artifacts(handle.run_id, path, str(tmp_path)))

    with Image.open(fetched("pictures/a/red.png")) as image:
        assert image.size == (5, 4) and image.getpixel((0, 0)) == (255, 0, 0)
    assert json.loads(fetched("tables/t.json").read_text()) == {"a": [1, 2]}
    assert fetched("files/notes.txt").read_text() == "notes"
    names = {file.path for file in tracker.list_artifacts(handle.run_id)}
    assert names == {"parameters.json", "pictures", "top.png", "tables", "files", "notes.txt"}
    # They lie in the store, beside the data.
    assert any(handle.run_id in name for name in store.list("mlflow-artifacts"))


def test_a_resumed_run_has_no_doubled_step(store: Store) -> None:
    handle = start_run(store, "resumed", {})
    with Logger(handle) as logger:
        for step in range(1, 6):
            logger.metrics(step, {"loss": float(step)})
    with Logger(handle) as logger:  # from the checkpoint of step 3
        for step in range(4, 8):
            logger.metrics(step, {"loss": float(step), "new": 0.0})
    assert history(handle, "loss") == [(n, float(n)) for n in range(1, 8)]
    assert history(handle, "new") == [(n, 0.0) for n in range(4, 8)]


def test_flush_waits_for_what_was_logged(store: Store) -> None:
    handle = start_run(store, "flushed", {})
    with Logger(handle) as logger:
        for step in range(3):
            logger.metrics(step, {"loss": float(step)})
            logger.json(f"{step}.json", step)
            logger.flush()
            assert history(handle, "loss")[-1] == (step, float(step))
            found = tracking.client(handle.uri).list_artifacts(handle.run_id)
            assert f"{step}.json" in [file.path for file in found]


def test_a_server_that_fails_for_a_while_loses_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = start_run(store, "patient", {})
    failures: list[bool] = []
    real: Callable[..., None] = Logger._metrics

    def fails_twice(self: Logger, *arguments: Any) -> None:
        if len(failures) < 2:
            failures.append(self.failing)
            raise ConnectionError("the server restarts")
        real(self, *arguments)

    monkeypatch.setattr(Logger, "_metrics", fails_twice)
    with Logger(handle) as logger:
        logger.metrics(1, {"loss": 0.5})
    assert failures == [False, True] and not logger.failing
    assert history(handle, "loss") == [(1, 0.5)]


def test_artifacts_that_nobody_takes_hold_up_no_metrics(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are left out after some tries, which is said once and counted."""
    handle, said = start_run(store, "refused", {}), []
    monkeypatch.setattr(run_logger, "ARTIFACT_TRIES", 2)
    with Logger(handle, say=said.append) as logger:
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_artifact", away)
            for step in range(3):
                logger.metrics(step, {"loss": float(step)})
                logger.json(f"{step}.json", step)
            eventually(lambda: history(handle, "loss") == [(n, float(n)) for n in range(3)])
            logger.flush()
        assert logger.dropped == 3 and not logger.failing
        logger.json("3.json", 3)
    (line,) = said
    assert line.startswith("tracking: 0.json can't be stored in ") and "nobody answers" in line
    assert run_of(handle).data.tags[run_logger.DROPPED] == "3"
    names = {file.path for file in tracking.client(handle.uri).list_artifacts(handle.run_id)}
    assert names == {"parameters.json", "3.json"}


def test_artifacts_wait_for_a_server_that_is_away(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle, asked = start_run(store, "waiting", {}), threading.Event()

    def gone(*_: Any) -> None:
        asked.set()
        away()

    monkeypatch.setattr(run_logger, "ARTIFACT_TRIES", 1)
    with Logger(handle) as logger:
        with monkeypatch.context() as patch:
            patch.setattr(MlflowClient, "log_artifact", away)
            patch.setattr(MlflowClient, "get_run", gone)
            logger.picture("red.png", Image.new("RGB", (5, 4), "red"))
            assert asked.wait(60) and logger.failing
        logger.flush()
        names = {file.path for file in tracking.client(handle.uri).list_artifacts(handle.run_id)}
        assert "red.png" in names and logger.dropped == 0 and not logger.failing


def eventually(true: Callable[[], bool], seconds: float = 60.0) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_what_the_server_has_not_taken_outlives_the_process(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that ends while the server is away leaves it in the store; the next delivers it."""
    key = "runs/outlived"
    handle = start_run(store, "outlived", {}, key=key)
    with Logger(handle, store, key) as logger:
        logger.metrics(1, {"loss": 1.0})
    assert not store.exists(f"{key}/undelivered.json")
    real = Logger._metrics
    monkeypatch.setattr(Logger, "_metrics", away)
    logger = Logger(handle, store, key)
    logger.metrics(2, {"loss": 2.0})
    logger.keep()  # beside the checkpoint of step 2
    logger.metrics(3, {"loss": 3.0, "accuracy": 0.5})
    kept = store.read_json(f"{key}/undelivered.json")
    assert [(name, value, step) for name, value, _, step in kept] == [("loss", 2.0, 2)]
    logger.close(timeout=0.5)
    assert len(store.read_json(f"{key}/undelivered.json")) == 3
    monkeypatch.setattr(Logger, "_metrics", real)
    with Logger(handle, store, key) as logger:
        logger.metrics(3, {"loss": 3.0, "accuracy": 0.5})  # from the checkpoint of step 2
        logger.metrics(4, {"loss": 4.0, "accuracy": 0.6})
    assert history(handle, "loss") == [(n, float(n)) for n in range(1, 5)]
    assert history(handle, "accuracy") == [(3, 0.5), (4, 0.6)]
    assert not store.exists(f"{key}/undelivered.json")


def away(*_: Any, **__: Any) -> None:
    raise ConnectionError("nobody answers")


def test_an_answer_that_was_lost_doubles_nothing(
    store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    handle = start_run(store, "unheard", {})
    real: Callable[..., None] = Logger._metrics
    times: list[int] = []

    def unheard(self: Logger, tracker: Any, metrics: list[Any]) -> None:
        times.append(len(metrics))
        if len(times) == 1:
            from mlflow.entities import Metric

            taken = [Metric(name, value, when, step) for name, value, when, step in metrics]
            tracker.log_batch(handle.run_id, metrics=taken)
            raise ConnectionError("the connection was cut before the answer came")
        real(self, tracker, metrics)

    monkeypatch.setattr(Logger, "_metrics", unheard)
    with Logger(handle) as logger:
        logger.metrics(1, {"loss": 1.0})
        logger.flush()
        logger.metrics(2, {"loss": 2.0})
    assert times == [1, 1, 1]
    assert history(handle, "loss") == [(1, 1.0), (2, 2.0)]


def test_a_server_that_is_away_at_the_end_costs_nothing_but_its_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The model is there; the same command, when the server is back, only delivers."""
    store, real = Store(tmp_path), (Logger._metrics, tracking.finish_run, Logger.close)
    monkeypatch.setattr(Logger, "_metrics", away)
    monkeypatch.setattr(tracking, "finish_run", away)
    monkeypatch.setattr(Logger, "close", lambda self: real[2](self, timeout=0.5))
    small_run.train(store, "run", small_run.Recipe(), steps=3, track=True)
    assert store.exists("models/run")
    assert "values wait in" in capsys.readouterr().out
    handle = RunHandle(**store.read_json("runs/run/mlflow.json"))
    assert history(handle, "train/loss") == [] and run_of(handle).info.status == "RUNNING"
    monkeypatch.undo()
    small_run.train(store, "run", small_run.Recipe(), steps=3, track=True)
    said = capsys.readouterr().out
    assert "skipped" in said and "values wait" not in said
    assert [step for step, _ in history(handle, "train/loss")] == [1, 2, 3]
    assert run_of(handle).info.status == "FINISHED"
    assert not store.exists("runs/run/undelivered.json")


def test_logging_never_waits_for_the_server(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    handle = start_run(store, "slow", {})
    asked, answer = threading.Event(), threading.Event()
    real: Callable[..., None] = Logger._metrics

    def hangs(self: Logger, *arguments: Any) -> None:
        asked.set()
        assert answer.wait(60)
        real(self, *arguments)

    monkeypatch.setattr(Logger, "_metrics", hangs)
    with Logger(handle) as logger:
        logger.metrics(1, {"loss": 0.5})
        assert asked.wait(60)
        logger.metrics(2, {"loss": 0.4})  # returns, though nobody takes it
        assert history(handle, "loss") == []
        answer.set()
    assert history(handle, "loss") == [(1, 0.5), (2, 0.4)]


def test_without_a_run_nothing_is_logged(tmp_path: Path) -> None:
    before = threading.active_count()
    with Logger(None) as logger:
        logger.metrics(1, {"loss": 0.5})
        logger.picture("a.png", Image.new("RGB", (2, 2)))
        logger.flush()
        assert threading.active_count() == before
