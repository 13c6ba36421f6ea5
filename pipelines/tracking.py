"""Tracks jobs in MLflow: parameters, curves, pictures; one run per job, reopened on resume.

The tracking URI is MLFLOW_TRACKING_URI, or a SQLite file in the (local) store.
`pipelines/run_logger.py` writes a run's metrics and pictures.
"""

from __future__ import annotations

import contextlib
import json
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipelines.storage import Store, StoreError

if TYPE_CHECKING:
    from mlflow.entities import Run
    from mlflow.tracking import MlflowClient

EXPERIMENT = "beit3-ray"
PARAM_CHARS = 6000  # maximum length of a parameter's value in MLflow
CERTIFICATE = "MLFLOW_TRACKING_SERVER_CERT_PATH"


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


def handle_of(store: Store, key: str) -> RunHandle | None:
    """The MLflow run that a job of this `key`, e.g. `runs/base`, opened last; None if none did."""
    note = f"{key}/mlflow.json"
    return RunHandle(**store.read_json(note)) if store.exists(note) else None


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
    try:
        tracker = client(uri)
        before = handle_of(store, key) if key else None
        run = _found(tracker, before.run_id) if before and before.uri == uri else None
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
    if key:
        store.write_json(f"{key}/mlflow.json", asdict(handle))
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
