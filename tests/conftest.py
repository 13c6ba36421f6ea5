"""What several tests share: an S3 endpoint on loopback, and one local Ray session."""

from __future__ import annotations

import gc
import os
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

# Before torch loads: threads that spin while they wait starve a small machine's processes.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

_BUCKET = "beit3-tests"


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") and not _has_gpu():
        pytest.skip("needs a CUDA device; BEIT3_DEVICE=cpu rehearses it without one")


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available() or os.environ.get("BEIT3_DEVICE") == "cpu"


@pytest.fixture(scope="session")
def gpu() -> Any:
    """The GPU as a `torch.device`; in a rehearsal the CPU."""
    import torch

    from pipelines import cluster

    return torch.device(cluster.device(1.0))


@pytest.fixture(scope="module", autouse=True)
def few_to_collect() -> None:
    """Spare every collection of garbage, DeepSpeed makes one per run, what libraries brought."""
    gc.freeze()


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """A moto server's URL; the AWS_* environment points there, for child processes too."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    url = f"http://127.0.0.1:{port}"
    log = tmp_path_factory.mktemp("moto") / "log"
    with log.open("wb") as sink:
        command = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
        process = subprocess.Popen(command, stdout=sink, stderr=sink)
    environment = {
        "AWS_ENDPOINT_URL": url,
        "AWS_ACCESS_KEY_ID": "testing",
        "AWS_SECRET_ACCESS_KEY": "testing",
        "AWS_DEFAULT_REGION": "us-east-1",
        "AWS_REGION": "us-east-1",
        "AWS_EC2_METADATA_DISABLED": "true",
        "AWS_CONFIG_FILE": os.devnull,
        "AWS_SHARED_CREDENTIALS_FILE": os.devnull,
    }
    with pytest.MonkeyPatch.context() as patch:
        for name, value in environment.items():
            patch.setenv(name, value)
        for name in ("AWS_ENDPOINT_URL_S3", "AWS_PROFILE", "AWS_SESSION_TOKEN"):
            patch.delenv(name, raising=False)
        try:
            _wait(port, process, log)
            import boto3

            boto3.client("s3").create_bucket(Bucket=_BUCKET)
            yield url
        finally:
            process.kill()  # it may hold gigabytes of objects, and nothing that it must end well
            process.wait()


def _wait(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    for _ in range(300):
        if process.poll() is not None:
            break
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
            return
        except OSError:
            time.sleep(0.1)
    pytest.fail(f"moto's server didn't start: {log.read_text()[-1000:]}")


@pytest.fixture
def s3_store(s3_server: str) -> str:
    """The URI of a new, empty store in a bucket."""
    return f"s3://{_BUCKET}/{uuid.uuid4().hex}"


@pytest.fixture(scope="session")
def ray_session(s3_server: str) -> Iterator[None]:
    """A local Ray cluster of two CPUs, whose workers know the S3 endpoint."""
    import ray

    from pipelines import cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("RAY_ADDRESS", raising=False)
        if os.environ.get("BEIT3_DEVICE") == "cpu":
            patch.setenv("RAY_OVERRIDE_RESOURCES", '{"GPU": 2}')
        cluster.start(cpus=2)
    yield
    ray.shutdown()
