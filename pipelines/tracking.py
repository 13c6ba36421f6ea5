"""Tracks jobs in MLflow: parameters, curves, pictures; one run per job, reopened on resume.

The tracking URI is MLFLOW_TRACKING_URI, or a SQLite file in the (local) store. Metrics go through a
buffer and a background thread, so that a slow or absent server never holds up a step; metrics not
delivered by a checkpoint, or by the end, wait in the store. Artifacts, which may go elsewhere than
metrics, have their own thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
import re
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import console
from pipelines.storage import Store, StoreError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient
    from PIL.Image import Image

EXPERIMENT = "beit3-ray"
BATCH = 500  # metrics per request; the server refuses more than 1000
PARAM_CHARS = 6000  # maximum length of a parameter's value in MLflow
SAMPLING_SECONDS = 10.0  # between samples of the machine's use; MLflow's default
UNDELIVERED = "undelivered.json"  # in a run's folder: metrics that wait for the server
ARTIFACT_TRIES = 5  # artifacts are dropped after this many failures in a row with the server up
DROPPED = "dropped_artifacts"  # a run's tag: how many artifacts were dropped
CERTIFICATE = "MLFLOW_TRACKING_SERVER_CERT_PATH"

Value = tuple[str, float, int, int]  # a metric's name, value, time in ms and step
Artifact = tuple[str, str, Any]  # its kind; its path, or the file's; its content, or its folder


@dataclass(frozen=True)
class RunHandle:
    """A reference by which other processes find an MLflow run."""

    uri: str
    run_id: str
    experiment_id: str


def tracking_uri(store: Store) -> str:
    """Where runs are tracked: MLFLOW_TRACKING_URI, or a SQLite file beside the data.

    Raises:
        StoreError: on a cluster, the workers could not access that file.
    """
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    if configured:
        return _absolute(configured)
    local = store.uri.startswith("file:")
    if os.environ.get("RAY_ADDRESS") and not local:
        raise StoreError(
            "tracking: no server is named, and a file of this job's folder would be out of reach "
            "for workers on other nodes, and go with the cluster. Set MLFLOW_TRACKING_URI, among "
            "the job's env_vars, to a server that all nodes reach (docs/cluster.md)"
        )
    folder = Path(store.root) if local else Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def _absolute(uri: str) -> str:
    """The URI, for a SQLite file with an absolute path: workers run in other folders."""
    found = re.fullmatch(r"(sqlite(?:\+\w+)?:///)([^/:?][^?]*)(.*)", uri)
    return f"{found[1]}{Path(found[2]).absolute()}{found[3]}" if found else uri


def client(uri: str) -> MlflowClient:
    """A client for this URI; MLflow is imported here, since it takes seconds."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
    if os.environ.get(CERTIFICATE):  # read at each request, when the working folder may differ
        os.environ[CERTIFICATE] = str(Path(os.environ[CERTIFICATE]).absolute())
    for name in ("mlflow", "alembic"):
        logging.getLogger(name).setLevel(logging.ERROR)
    from mlflow.tracking import MlflowClient

    return MlflowClient(tracking_uri=uri)


def start_run(
    store: Store,
    name: str,
    parameters: Mapping[str, Any],
    *,
    key: str | None = None,
    parent: str | None = None,
) -> RunHandle:
    """Open a new run, or reopen that of an earlier, interrupted job with the same `key`.

    Args:
        key: Where in the store to remember the run, e.g. `runs/base`; None: always a new run.
        parent: Run id under which this one is nested.

    Raises:
        StoreError: the tracking server can't be reached, or artifacts can't be stored.
    """
    uri = tracking_uri(store)
    note = f"{key}/mlflow.json" if key else None
    try:
        tracker = client(uri)
        run = None
        if note and store.exists(note):
            handle = RunHandle(**store.read_json(note))
            run = _found(tracker, handle.run_id) if handle.uri == uri else None
        if run is not None:
            _store_parameters(tracker, run, parameters)
            tracker.set_terminated(run.info.run_id, status="RUNNING")
            return RunHandle(uri, run.info.run_id, run.info.experiment_id)
        run = _new(tracker, uri, store, name, parameters, parent)
    except StoreError:
        raise
    except Exception as error:
        raise StoreError(f"tracking {uri}: {error}. {_advice(error)}") from error
    handle = RunHandle(uri, run.info.run_id, run.info.experiment_id)
    if note:
        store.write_json(note, asdict(handle))
    return handle


def _found(tracker: MlflowClient, run_id: str) -> Run | None:
    """The run with this id; None only if the server says that it doesn't exist or is deleted."""
    from mlflow.exceptions import MlflowException

    try:
        run = tracker.get_run(run_id)
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        return None
    return run if run.info.lifecycle_stage == "active" else None


def _new(
    tracker: MlflowClient,
    uri: str,
    store: Store,
    name: str,
    parameters: Mapping[str, Any],
    parent: str | None,
) -> Run:
    from mlflow.entities import Param

    experiment = tracker.get_experiment_by_name(EXPERIMENT)
    if experiment is None:
        location = store.uri_of("mlflow-artifacts") if uri.startswith("sqlite:") else None
        experiment_id = tracker.create_experiment(EXPERIMENT, artifact_location=location)
    else:
        experiment_id = experiment.experiment_id
    tags = {"mlflow.runName": name} | ({"mlflow.parentRunId": parent} if parent else {})
    run = tracker.create_run(experiment_id, tags=tags, run_name=name)
    try:
        values = [Param(k, str(v)[:PARAM_CHARS]) for k, v in parameters.items()]
        for start in range(0, len(values), 100):
            tracker.log_batch(run.info.run_id, params=values[start : start + 100])
        _store_parameters(tracker, run, parameters)
    except Exception:
        with contextlib.suppress(Exception):
            tracker.set_terminated(run.info.run_id, status="FAILED")
        raise
    return run


def _store_parameters(tracker: MlflowClient, run: Run, parameters: Mapping[str, Any]) -> None:
    """Log this start's full parameters as an artifact; fails if pictures could not be stored."""
    from mlflow.exceptions import MlflowException

    text = json.dumps(dict(parameters), indent=1, default=str)
    try:
        tracker.log_text(run.info.run_id, text, "parameters.json")
    except Exception as error:
        if isinstance(error, MlflowException) and error.error_code == "PERMISSION_DENIED":
            raise
        raise StoreError(
            f"tracking: can't store artifacts in {run.info.artifact_uri}: {error}. Let all nodes "
            "write there, or have the server store them (mlflow server --artifacts-destination, as "
            f"infra/mlflow/start.sh); the experiment {EXPERIMENT} keeps the place that it was made "
            "with, so rename it then"
        ) from error


def _advice(error: Exception) -> str:
    from mlflow.exceptions import MlflowException

    if isinstance(error, MlflowException) and error.error_code == "PERMISSION_DENIED":
        return (
            f"If it is there, the experiment {EXPERIMENT} is another user's: who made it, or an "
            "administrator, can grant you EDIT (docs/operations.md)"
        )
    return "Start that server, or unset MLFLOW_TRACKING_URI to track in a local file."


def finish_run(handle: RunHandle, status: str = "FINISHED") -> None:
    client(handle.uri).set_terminated(handle.run_id, status=status)


def settle(store: Store, key: str) -> None:
    """Finish the run of `key` once its job is done, delivering what its `Logger` left in the store.

    The job stays done even if the server doesn't answer: this is printed, and the metrics wait.
    """
    left = f"{key}/{UNDELIVERED}"
    try:
        handle = RunHandle(**store.read_json(f"{key}/mlflow.json"))
        finish_run(handle)
        if store.exists(left):
            Logger(handle, store, key).close()
    except Exception as error:
        if not store.exists(left):
            store.write_json(left, [])
        logging.getLogger(__name__).warning("tracking: %s", error)
    if store.exists(left):
        console.say(
            f"tracking: the server does not answer; {len(store.read_json(left))} values wait in "
            f"{store.uri}/{left}: run the same command again when it does"
        )


class _LeftToStore(Exception):
    """Delivery ended: another logger will deliver the rest."""


class Logger:
    """Writes a run's metrics and pictures in the background. Use as a context manager.

    Metrics of steps that the run already holds are not written again, so that a run resumed from an
    older checkpoint has no duplicate steps. All metrics are delivered, however long it takes; an
    artifact is dropped if it can't be stored although the server answers.
    """

    def __init__(
        self,
        handle: RunHandle | None,
        store: Store | None = None,
        key: str = "",
        say: Callable[[str], None] = console.say,
    ) -> None:
        """With a store, `keep` and `close` save undelivered metrics in the run's folder `key`; a
        new logger delivers those first."""
        self.handle = handle
        self.dropped = 0
        """Number of artifacts that were dropped."""
        self._say = say
        self._store, self._left = (store if handle else None), f"{key}/{UNDELIVERED}"
        self._values: queue.Queue[Value | threading.Event | None] = queue.Queue()
        self._artifacts: queue.Queue[Artifact | threading.Event | None] = queue.Queue()
        self._waiting: deque[Value] = deque()  # metrics in the queue or being sent
        self._lock = threading.Lock()  # keeps both in the same order
        self._logged: dict[str, int] = {}
        self._failing = {"metrics": threading.Event(), "artifacts": threading.Event()}
        self._refused = 0  # failed tries of artifacts in a row
        self._left_to_store = threading.Event()
        self._tracker: MlflowClient | None = None
        self._connecting = threading.Lock()
        self._threads: list[threading.Thread] = []
        self._machine: Machine | None = None
        if self._store is not None and self._store.exists(self._left):
            for name, value, when, step in self._store.read_json(self._left):
                self._put(name, value, when, step)
        delivering = {"metrics": self._deliver_metrics, "artifacts": self._deliver_artifacts}
        for kind, deliver in delivering.items() if handle else ():
            thread = threading.Thread(target=self._run, args=(kind, deliver), daemon=True)
            thread.start()
            self._threads.append(thread)

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log a step's scalars."""
        now = int(time.time() * 1000)
        for name, value in values.items():
            self._put(name, float(value), now, step)

    def _put(self, *value: Any) -> None:
        with self._lock:
            if self.handle is not None:
                self._waiting.append(value)
                self._values.put(value)

    def machine(self, step: int) -> None:
        """Log this machine's resource use since the last call (`system/*`)."""
        if self._threads:
            self._machine = self._machine or Machine()
            self.metrics(step, {f"system/{k}": v for k, v in self._machine.taken().items()})

    def picture(self, path: str, image: Image) -> None:
        """Log a picture as an artifact, e.g. `masked/step-000100.png`."""
        self._put_artifact("picture", path, image)

    def json(self, path: str, value: Any) -> None:
        """Log a JSON artifact."""
        self._put_artifact("text", path, json.dumps(value, indent=1, default=str))

    def file(self, path: Path, folder: str | None = None) -> None:
        """Log a local file as an artifact."""
        self._put_artifact("file", str(path), folder)

    def _put_artifact(self, *artifact: Any) -> None:
        if self.handle is not None:
            self._artifacts.put(artifact)

    @property
    def failing(self) -> bool:
        """Whether the last delivery failed; it is being retried."""
        return any(event.is_set() for event in self._failing.values())

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until everything logged so far is delivered, at most `timeout` seconds."""
        if self._threads:
            deadline = time.monotonic() + timeout
            metrics, artifacts = threading.Event(), threading.Event()
            self._values.put(metrics)
            self._artifacts.put(artifacts)
            for delivered in (metrics, artifacts):
                delivered.wait(max(0.0, deadline - time.monotonic()))

    def keep(self) -> None:
        """Save undelivered metrics in the store, so that they outlive this process: a run resumed
        from a checkpoint written after this does not log earlier steps again."""
        if self._store is not None:
            with self._lock:
                waiting = list(self._waiting)
            if waiting:
                self._store.write_json(self._left, waiting)
            else:
                self._store.delete(self._left)

    def close(self, timeout: float = 60.0) -> None:
        """Wait until everything is delivered, at most `timeout` seconds."""
        if self._machine is not None:
            self._machine.close()
        if self._threads:
            deadline = time.monotonic() + timeout
            self._values.put(None)
            self._artifacts.put(None)
            for thread in self._threads:
                thread.join(max(0.0, deadline - time.monotonic()))
            self._threads = []
            if self._store is not None:
                self._left_to_store.set()
                self.keep()

    def _run(self, kind: str, deliver: Callable[[MlflowClient], None]) -> None:
        with contextlib.suppress(_LeftToStore):
            self._retry(kind, self._connect, lambda _: False)
            assert self._tracker is not None
            deliver(self._tracker)

    def _connect(self) -> None:
        assert self.handle is not None
        with self._connecting:  # only one thread imports MLflow
            self._tracker = self._tracker or client(self.handle.uri)

    def _deliver_metrics(self, tracker: MlflowClient) -> None:
        def failed(_: Exception) -> bool:
            self._logged.clear()  # the server may have stored them without confirming it
            return False

        closing = False
        while not closing:
            items = [self._values.get()]
            time.sleep(0.2)  # let a batch gather
            while not self._values.empty():
                items.append(self._values.get())
            closing = None in items
            metrics = [item for item in items if isinstance(item, tuple)]
            for start in range(0, len(metrics), BATCH):
                batch = metrics[start : start + BATCH]
                self._retry("metrics", partial(self._metrics, tracker, batch), failed)
            for item in items:
                if isinstance(item, threading.Event):
                    item.set()

    def _deliver_artifacts(self, tracker: MlflowClient) -> None:
        while (item := self._artifacts.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
            else:
                send = partial(self._artifact, tracker, *item)
                self._retry("artifacts", send, partial(self._given_up, tracker, item[1]))

    def _metrics(self, tracker: MlflowClient, metrics: list[Value]) -> None:
        assert self.handle is not None
        from mlflow.entities import Metric

        fresh: list[Metric] = []
        newest: dict[str, int] = {}
        for name, value, when, step in metrics:
            if name not in self._logged:
                history = tracker.get_metric_history(self.handle.run_id, name)
                self._logged[name] = max((m.step for m in history), default=-1)
            if step > newest.get(name, self._logged[name]):
                fresh.append(Metric(name, value, when, step))
                newest[name] = step
        if fresh:
            tracker.log_batch(self.handle.run_id, metrics=fresh)
            self._logged |= newest
        with self._lock:
            for _ in metrics:
                self._waiting.popleft()

    def _artifact(self, tracker: MlflowClient, kind: str, path: str, content: Any) -> None:
        assert self.handle is not None
        if kind == "file":
            tracker.log_artifact(self.handle.run_id, path, artifact_path=content)
        else:
            with tempfile.TemporaryDirectory() as folder:
                local = Path(folder) / Path(path).name
                if kind == "picture":
                    content.save(local)
                else:
                    local.write_text(content)
                parent = str(Path(path).parent)
                tracker.log_artifact(
                    self.handle.run_id, str(local), artifact_path=None if parent == "." else parent
                )
        self._refused = 0

    def _given_up(self, tracker: MlflowClient, path: str, error: Exception) -> bool:
        """Whether to drop an artifact: it, or earlier ones, failed while the server answers."""
        assert self.handle is not None
        try:
            run = tracker.get_run(self.handle.run_id)
        except Exception:  # the server is away: artifacts wait for it, as metrics do
            return False
        self._refused += 1
        if self._refused < ARTIFACT_TRIES:
            return False
        if not self.dropped:
            self._say(
                f"tracking: {path} can't be stored in {run.info.artifact_uri}: {error}. It is left "
                f"out, and so is what follows until that works; the run's tag {DROPPED} counts them"
            )
        self.dropped += 1
        with contextlib.suppress(Exception):
            before = int(run.data.tags.get(DROPPED, 0))
            tracker.set_tag(self.handle.run_id, DROPPED, before + 1)
        return True

    def _retry(
        self, kind: str, send: Callable[[], None], given_up: Callable[[Exception], bool]
    ) -> None:
        """Try until it is delivered or given up, with growing pauses, in the background."""
        pause = 1.0
        while True:
            try:
                send()
                self._failing[kind].clear()
                return
            except Exception as error:
                self._failing[kind].set()
                if given_up(error):
                    self._failing[kind].clear()
                    return
                logging.getLogger(__name__).warning("tracking: %s; trying again", error)
                if self._left_to_store.wait(pause):
                    raise _LeftToStore from error
                pause = min(30.0, pause * 2)


class Machine:
    """Samples the use of CPUs, memory, disk, network and GPUs with MLflow's own monitors.

    MLflow would also send the samples, but stop at the first failed request; here they go through a
    `Logger`.
    """

    def __init__(self) -> None:
        self._monitors: list[Any] = []
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def taken(self) -> dict[str, float]:
        """Means of the samples since the last call; empty if there are none yet."""
        found: dict[str, float] = {}
        with self._lock:
            for monitor in self._monitors:
                if monitor.metrics:
                    found |= monitor.aggregate_metrics()
                    monitor.clear_metrics()
        return found

    def close(self) -> None:
        self._closed.set()
        self._thread.join(timeout=10)

    def _run(self) -> None:
        from mlflow.environment_variables import MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL
        from mlflow.system_metrics.metrics.cpu_monitor import CPUMonitor
        from mlflow.system_metrics.metrics.disk_monitor import DiskMonitor
        from mlflow.system_metrics.metrics.gpu_monitor import GPUMonitor
        from mlflow.system_metrics.metrics.network_monitor import NetworkMonitor

        interval = MLFLOW_SYSTEM_METRICS_SAMPLING_INTERVAL.get() or SAMPLING_SECONDS
        monitors: list[Any] = [CPUMonitor(), DiskMonitor(), NetworkMonitor()]
        with contextlib.suppress(RuntimeError):  # no GPU
            monitors.append(GPUMonitor())
        for monitor in monitors:  # CPU use is measured since the previous sample
            monitor.collect_metrics()
            monitor.clear_metrics()
        self._monitors = monitors
        while not self._closed.wait(interval):
            with self._lock:
                for monitor in monitors:
                    monitor.collect_metrics()
