"""MLflow: parameters, curves, pictures; one run per job, resumed by the job that resumes.

The tracking URI is MLFLOW_TRACKING_URI, or a SQLite file in the (local) store. Metrics go through a
buffer and a background thread, so that a slow or absent server never holds up a step; those that it
has not taken by a checkpoint, or by the end, wait in the store.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import queue
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
    from mlflow.tracking import MlflowClient
    from PIL.Image import Image

EXPERIMENT = "beit3-ray"
BATCH = 500  # metrics per request; the server refuses more than 1000
PARAM_CHARS = 6000  # longest value of a parameter that MLflow keeps
SAMPLING_SECONDS = 10.0  # between samples of the machine's use, as MLflow's default is
UNDELIVERED = "undelivered.json"  # of a run's folder: metrics that wait for the server

Value = tuple[str, float, int, int]  # a metric's name, value, time in ms and step


@dataclass(frozen=True)
class RunHandle:
    """An MLflow run, as other processes can find it again."""

    uri: str
    run_id: str
    experiment_id: str


def tracking_uri(store: Store) -> str:
    """Where runs are tracked: MLFLOW_TRACKING_URI, or a SQLite file beside the data."""
    configured = os.environ.get("MLFLOW_TRACKING_URI")
    if configured:
        return configured
    folder = Path(store.root) if store.uri.startswith("file:") else Path.cwd()
    folder.mkdir(parents=True, exist_ok=True)
    return f"sqlite:///{folder / 'mlflow.db'}"


def client(uri: str) -> MlflowClient:
    """A client for this URI; MLflow is imported here, since it takes seconds."""
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "15")
    os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
    os.environ.setdefault("GIT_PYTHON_REFRESH", "quiet")
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
    """Open a run, or the one that an earlier, interrupted job of the same `key` opened.

    Args:
        key: Where in the store to remember the run, e.g. `runs/base`; None: always a new run.
        parent: Run id under which this one is nested.

    Raises:
        StoreError: the tracking server can't be reached.
    """
    uri = tracking_uri(store)
    note = f"{key}/mlflow.json" if key else None
    try:
        tracker = client(uri)
        if note and store.exists(note):
            handle = RunHandle(**store.read_json(note))
            if handle.uri == uri:
                with contextlib.suppress(Exception):  # deleted meanwhile: open a new one
                    if tracker.get_run(handle.run_id).info.lifecycle_stage == "active":
                        tracker.set_terminated(handle.run_id, status="RUNNING")
                        return handle
        experiment = tracker.get_experiment_by_name(EXPERIMENT)
        if experiment is None:
            location = f"{store.uri}/mlflow-artifacts" if uri.startswith("sqlite:") else None
            experiment_id = tracker.create_experiment(EXPERIMENT, artifact_location=location)
        else:
            experiment_id = experiment.experiment_id
        tags = {"mlflow.runName": name} | ({"mlflow.parentRunId": parent} if parent else {})
        run = tracker.create_run(experiment_id, tags=tags, run_name=name)
        from mlflow.entities import Param

        values = [Param(k, str(v)[:PARAM_CHARS]) for k, v in parameters.items()]
        for start in range(0, len(values), 100):
            tracker.log_batch(run.info.run_id, params=values[start : start + 100])
    except Exception as error:
        raise StoreError(f"tracking {uri}: {error}. {_advice(error)}") from error
    handle = RunHandle(uri, run.info.run_id, experiment_id)
    if note:
        store.write_json(note, asdict(handle))
    return handle


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
    """Finish the run of `key`, of which all is logged, with what its `Logger` left in the store.

    The work is done and stays so: a server that doesn't answer is said, and the metrics wait.
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
    """Another logger will deliver what is left."""


class Logger:
    """Writes a run's metrics and pictures in the background. Use as a context manager.

    Metrics of steps that the run already holds are not written again, so that a run resumed from an
    older checkpoint has no doubled step.
    """

    def __init__(self, handle: RunHandle | None, store: Store | None = None, key: str = "") -> None:
        """With a store, `keep` and the end leave there, in the run's folder `key`, the metrics that
        the server hasn't taken; a logger begins with those."""
        self.handle = handle
        self._store, self._left = (store if handle else None), f"{key}/{UNDELIVERED}"
        self._queue: queue.Queue[tuple[str, Any] | None] = queue.Queue()
        self._waiting: deque[Value] = deque()  # metrics in the queue or on their way
        self._lock = threading.Lock()  # both are in one order
        self._logged: dict[str, int] = {}
        self._failing, self._left_to_store = threading.Event(), threading.Event()
        self._thread: threading.Thread | None = None
        self._machine: Machine | None = None
        if self._store is not None and self._store.exists(self._left):
            for name, value, when, step in self._store.read_json(self._left):
                self._put(name, value, when, step)
        if handle is not None:
            self._thread = threading.Thread(target=self._run, daemon=True)
            self._thread.start()

    def __enter__(self) -> Logger:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        """Log scalars of a step."""
        now = int(time.time() * 1000)
        for name, value in values.items():
            self._put(name, float(value), now, step)

    def _put(self, *value: Any) -> None:
        with self._lock:
            if self.handle is not None:
                self._waiting.append(value)
                self._queue.put(("metric", value))

    def machine(self, step: int) -> None:
        """Log at a step what this machine was busy with since this was last called (`system/*`)."""
        if self._thread is not None:
            self._machine = self._machine or Machine()
            self.metrics(step, {f"system/{k}": v for k, v in self._machine.taken().items()})

    def picture(self, path: str, image: Image) -> None:
        """Log a picture as an artifact, e.g. `masked/step-000100.png`."""
        self._queue.put(("picture", (path, image)))

    def json(self, path: str, value: Any) -> None:
        """Log a JSON artifact."""
        self._queue.put(("text", (path, json.dumps(value, indent=1, default=str))))

    def file(self, path: Path, folder: str | None = None) -> None:
        """Log a local file as an artifact."""
        self._queue.put(("file", (str(path), folder)))

    @property
    def failing(self) -> bool:
        """The tracker does not take what it was sent last; it is sent again and again."""
        return self._failing.is_set()

    def flush(self, timeout: float = 60.0) -> None:
        """Wait until what was logged so far is delivered, at most `timeout` seconds."""
        if self._thread is not None:
            delivered = threading.Event()
            self._queue.put(("flush", delivered))
            delivered.wait(timeout)

    def keep(self) -> None:
        """Leave in the store the metrics that the server hasn't taken, so that they outlive this
        process: a run that goes on from a checkpoint written after this logs no step before it."""
        if self._store is not None:
            with self._lock:
                waiting = list(self._waiting)
            if waiting:
                self._store.write_json(self._left, waiting)
            else:
                self._store.delete(self._left)

    def close(self, timeout: float = 60.0) -> None:
        """Wait until all is delivered, at most `timeout` seconds."""
        if self._machine is not None:
            self._machine.close()
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join(timeout)
            self._thread = None
            if self._store is not None:
                self._left_to_store.set()
                self.keep()

    def _run(self) -> None:
        with contextlib.suppress(_LeftToStore):
            self._deliver()

    def _deliver(self) -> None:
        assert self.handle is not None
        tracker = client(self.handle.uri)
        closing = False
        while not closing:
            items = [self._queue.get()]
            time.sleep(0.2)  # let a batch gather
            while not self._queue.empty():
                items.append(self._queue.get())
            closing = None in items
            metrics = [item[1] for item in items if item and item[0] == "metric"]
            for start in range(0, len(metrics), BATCH):
                self._retry(partial(self._metrics, tracker, metrics[start : start + BATCH]))
            for item in items:
                if item and item[0] == "flush":
                    item[1].set()
                elif item and item[0] != "metric":
                    self._retry(partial(self._artifact, tracker, *item))

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

    def _artifact(self, tracker: MlflowClient, kind: str, content: tuple[Any, Any]) -> None:
        assert self.handle is not None
        if kind == "file":
            tracker.log_artifact(self.handle.run_id, content[0], artifact_path=content[1])
            return
        path, value = content
        with tempfile.TemporaryDirectory() as folder:
            local = Path(folder) / Path(path).name
            if kind == "picture":
                value.save(local)
            else:
                local.write_text(value)
            parent = str(Path(path).parent)
            tracker.log_artifact(
                self.handle.run_id, str(local), artifact_path=None if parent == "." else parent
            )

    def _retry(self, send: Callable[[], None]) -> None:
        """Try until it is delivered, with growing pauses; training goes on meanwhile."""
        pause = 1.0
        while True:
            try:
                send()
                self._failing.clear()
                return
            except Exception as error:
                self._failing.set()
                self._logged.clear()  # it may have taken them, and failed to say so
                logging.getLogger(__name__).warning("tracking: %s; trying again", error)
                if self._left_to_store.wait(pause):
                    raise _LeftToStore from error
                pause = min(30.0, pause * 2)


class Machine:
    """Samples the use of CPUs, memory, disk, network and GPUs with MLflow's own monitors.

    MLflow would also send what they find, and end with the first request that fails; here it goes
    through a `Logger`.
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
        for monitor in monitors:  # the use of CPUs is told since the last time one asked
            monitor.collect_metrics()
            monitor.clear_metrics()
        self._monitors = monitors
        while not self._closed.wait(interval):
            with self._lock:
                for monitor in monitors:
                    monitor.collect_metrics()
