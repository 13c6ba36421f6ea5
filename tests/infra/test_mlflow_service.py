"""MLflow with users, PostgreSQL and a bucket, as infra/mlflow has it, tracks a training."""

from __future__ import annotations

import http.client
import os
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

import pytest
from mlflow.exceptions import MlflowException
from mlflow_service import Service, documented
from ports import listening

from pipelines import pretrain, tracking
from pipelines.storage import Store, StoreError

pytestmark = pytest.mark.slow


PASSWORD = "a long enough password"


@pytest.fixture
def admin(mlflow_service: Service, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A client with which to make users and grants; the environment is the administrator's."""
    from mlflow.server import get_app_client

    be(mlflow_service, monkeypatch)
    return get_app_client("basic-auth", mlflow_service.url)


def be(service: Service, monkeypatch: pytest.MonkeyPatch, user: str | None = None) -> None:
    """Go on as this user, or as the administrator."""
    for name, value in service.environment(user, PASSWORD if user else None).items():
        monkeypatch.setenv(name, value)


def share(service: Service, admin: Any, user: str) -> None:
    """Grant what docs/operations.md has, in the administrator's environment."""
    experiment = tracking.client(service.url).get_experiment_by_name(tracking.EXPERIMENT)
    if experiment:
        admin.grant_user_permission(user, "experiment", experiment.experiment_id, "EDIT")


def test_what_one_user_began_another_tracks_in_once_it_is_shared(
    mlflow_service: Service, admin: Any, small_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracking.start_run(small_store, "the administrator's", {})
    admin.create_user("colleague", PASSWORD)
    be(mlflow_service, monkeypatch, "colleague")
    with pytest.raises(StoreError, match=r"is another user's: .* can grant you EDIT"):
        tracking.start_run(small_store, "the colleague's", {})
    be(mlflow_service, monkeypatch)
    share(mlflow_service, admin, "colleague")
    be(mlflow_service, monkeypatch, "colleague")
    handle = tracking.start_run(small_store, "the colleague's", {})
    tracking.finish_run(handle)
    run = tracking.client(handle.uri).get_run(handle.run_id)
    assert run.info.status == "FINISHED"


def test_the_commands_for_users_and_grants_do_what_they_say(
    mlflow_service: Service, admin: Any, small_store: Store, tmp_path: Path
) -> None:
    """Those of docs/operations.md, in a shell like the container's."""
    tracking.start_run(small_store, "the administrator's", {})
    commands = documented()
    for old, new in {
        "/tls/tls.crt": str(mlflow_service.certificate),
        "https://localhost:5000": mlflow_service.url,
        '"trainer", "..."': f'"reader", "{PASSWORD}"',
        '"colleague"': '"reader"',
    }.items():
        assert old in commands
        commands = commands.replace(old, new)
    container = {
        "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
        "HOME": str(tmp_path),
        "MLFLOW_AUTH_ADMIN_USERNAME": mlflow_service.admin,
        "MLFLOW_AUTH_ADMIN_PASSWORD": mlflow_service.password,
    }
    here = 'docker() { until [ "$1" = sh ]; do shift; done; "$@"; }\n'
    subprocess.run(["bash", "-euc", here + commands], env=container, cwd=tmp_path, check=True)
    experiment = tracking.client(mlflow_service.url).get_experiment_by_name(tracking.EXPERIMENT)
    assert experiment is not None
    found = admin.get_user_permission("reader", "experiment", experiment.experiment_id)
    assert found.permission == "READ"


def test_a_pretraining_is_tracked(
    mlflow_service: Service,
    admin: Any,
    small_corpus: Any,
    small_store: Store,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import boto3

    admin.create_user("trainer", PASSWORD)
    share(mlflow_service, admin, "trainer")  # where another test was the first to track
    be(mlflow_service, monkeypatch, "trainer")
    monkeypatch.setenv("BEIT3_PRICES", "machine=3600")
    cfg = small_corpus.pretraining(small_store, name="tracked")
    result = pretrain.run(cfg)
    handle = tracking.RunHandle(**small_store.read_json("runs/tracked/mlflow.json"))
    assert handle.uri == mlflow_service.url and handle.run_id == result["mlflow_run"]
    client = tracking.client(handle.uri)
    run = client.get_run(handle.run_id)
    assert run.info.status == "FINISHED"
    assert run.data.params["train.steps"] == str(cfg.train.steps)
    losses = client.get_metric_history(handle.run_id, "train/loss")
    assert [m.step for m in losses] == list(range(1, cfg.train.steps + 1))
    assert result["metrics"]
    assert run.data.metrics["final/loss"] == pytest.approx(result["metrics"]["loss"])
    assert run.data.metrics["bill/cost"] == pytest.approx(
        run.data.metrics["bill/node_hours_machine"] * 3600
    )
    (picture,) = client.list_artifacts(handle.run_id, "masked")
    local = client.download_artifacts(handle.run_id, picture.path)
    # It went through the server into the bucket: this process has no key of it to use.
    assert str(run.info.artifact_uri).startswith("mlflow-artifacts:")
    bucket: Any = boto3.client("s3")
    kept = bucket.list_objects_v2(Bucket="beit3-tests", Prefix="mlflow/")["Contents"]
    assert [o["Size"] for o in kept if o["Key"].endswith(picture.path)] == [
        Path(local).stat().st_size
    ]


def test_a_stranger_sees_nothing(mlflow_service: Service) -> None:
    url = f"{mlflow_service.url}/api/2.0/mlflow/experiments/search?max_results=1"
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(url, timeout=10, context=mlflow_service.trusted())
    assert error.value.code == 401


def test_a_host_that_is_not_named_is_refused(mlflow_service: Service) -> None:
    asked = urllib.request.Request(f"{mlflow_service.url}/", headers={"Host": "evil.example"})
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(asked, timeout=10, context=mlflow_service.trusted())
    assert error.value.code == 403


def test_it_speaks_tls_alone_and_is_trusted_by_its_certificate_alone(
    mlflow_service: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in mlflow_service.environment().items():
        monkeypatch.setenv(name, value)
    plain = mlflow_service.url.replace("https:", "http:")
    with pytest.raises((OSError, http.client.HTTPException)):
        urllib.request.urlopen(f"{plain}/health", timeout=10)
    client = tracking.client(mlflow_service.url)
    assert client.get_experiment_by_name("none of this name") is None
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    monkeypatch.delenv("MLFLOW_TRACKING_SERVER_CERT_PATH")
    with pytest.raises(MlflowException, match="CERTIFICATE_VERIFY_FAILED"):
        client.get_experiment_by_name("none of this name")


def test_it_listens_on_loopback_alone(mlflow_service: Service) -> None:
    sockets = listening(mlflow_service.processes())
    assert {"postgres", "mlflow"} <= {
        name for name in ("postgres", "mlflow") for s in sockets if name in s.program
    }
    assert [s for s in sockets if not s.on_loopback] == []
