"""Writes a run's metrics and pictures to MLflow, beside the steps.

Metrics go through a buffer and a background thread, so that a slow or absent server never holds up
a step; metrics not delivered by a checkpoint, or by the end, wait in the store. Artifacts, which
may go elsewhere than metrics, have their own thread.
"""

from __future__ import annotations

import contextlib
import json
import logging
import queue
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines import console, tracking
from pipelines.storage import Store
from pipelines.tracking import RunHandle

if TYPE_CHECKING:
    from mlflow.tracking import MlflowClient
    from PIL.Image import Image

BATCH = 500  # metrics per request; the server refuses more than 1000
SAMPLING_SECONDS = 10.0  # between samples of the machine's use; MLflow's default
UNDELIVERED = "undelivered.json"  # in a run's folder: metrics that wait for the server
ARTIFACT_TRIES = 5  # artifacts are dropped after this many failures in a row with the server up
DROPPED = "dropped_artifacts"  # a run's tag: how many artifacts were dropped

Value = tuple[str, float, int, int]  # a metric's name, value, time in ms and step
Artifact = tuple[str, str, Any]  # its kind; its path, or the file's; its content, or its folder


def settle(store: Store, key: str) -> None:
    """Finish the run of `key` once its job is done, delivering what its `Logger` left in the store.

    The job stays done even if the server doesn't answer: this is printed, and the metrics wait.
    """
    left = f"{key}/{UNDELIVERED}"
    try:
        handle = tracking.handle_of(store, key)
        assert handle is not None
        tracking.finish_run(handle)
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
            self._tracker = self._tracker or tracking.client(self.handle.uri)

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
