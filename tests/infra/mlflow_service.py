"""MLflow as infra/mlflow/start.sh starts it, on a PostgreSQL and an S3 endpoint."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import psutil

FOLDER = Path(__file__).parents[2] / "infra" / "mlflow"
_USER = "mlflow"


def documented() -> str:
    """The commands of docs/operations.md that run in the server's container."""
    text = (FOLDER.parents[1] / "docs" / "operations.md").read_text()
    blocks = re.findall(r"^```sh\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return "".join(block for block in blocks if '"$admin"' in block)


def postgres() -> Path | None:
    """The folder of PostgreSQL's programs: Debian's newest, or that of the PATH."""
    debian = sorted(Path("/usr/lib/postgresql").glob("*/bin"), key=lambda p: float(p.parent.name))
    found = shutil.which("initdb")
    folders = [*reversed(debian), *([Path(found).parent] if found else [])]
    return next((f for f in folders if (f / "initdb").exists()), None)


@dataclass
class Service:
    """A running server, with its first administrator."""

    url: str
    certificate: Path
    admin: str
    password: str
    started: list[subprocess.Popen[bytes]] = field(default_factory=list)

    def environment(self, user: str | None = None, password: str | None = None) -> dict[str, str]:
        """What a job needs to track here."""
        return {
            "MLFLOW_TRACKING_URI": self.url,
            "MLFLOW_TRACKING_SERVER_CERT_PATH": str(self.certificate),
            "MLFLOW_TRACKING_USERNAME": user or self.admin,
            "MLFLOW_TRACKING_PASSWORD": password or self.password,
        }

    def trusted(self) -> ssl.SSLContext:
        """Trusts this server alone."""
        return ssl.create_default_context(cafile=self.certificate)

    def processes(self) -> list[psutil.Process]:
        roots = [psutil.Process(one.pid) for one in self.started]
        return [p for root in roots for p in (root, *root.children(recursive=True))]


@contextlib.contextmanager
def served(folder: Path, programs: Path, artifacts: str) -> Iterator[Service]:
    """Start PostgreSQL and MLflow on loopback, and end both.

    Args:
        folder: For logs.
        programs: `postgres()`.
        artifacts: URI of a folder in a bucket; the AWS_* environment says where it is.
    """
    port, tls = _free_port(), folder / "tls"
    service = Service(f"https://127.0.0.1:{port}", tls / "tls.crt", "admin", secrets.token_hex(16))
    subprocess.run(
        [str(FOLDER / "certificate.sh")], env=os.environ | {"MLFLOW_TLS": str(tls)}, check=True
    )
    with _database(folder, programs) as (database, password, process):
        service.started.append(process)
        environment = os.environ | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "POSTGRES_HOST": database,
            "POSTGRES_USER": _USER,
            "POSTGRES_PASSWORD": password,
            "MLFLOW_ARTIFACTS": artifacts,
            "MLFLOW_ALLOWED_HOSTS": f"127.0.0.1:{port}",
            "MLFLOW_AUTH_ADMIN_USERNAME": service.admin,
            "MLFLOW_AUTH_ADMIN_PASSWORD": service.password,
            "MLFLOW_FLASK_SERVER_SECRET_KEY": secrets.token_hex(16),
            "MLFLOW_TLS": str(tls),
            "MLFLOW_HOST": "127.0.0.1",
            "MLFLOW_PORT": str(port),
            "TMPDIR": str(folder),
        }
        environment.pop("MLFLOW_TRACKING_URI", None)
        with _running([str(FOLDER / "start.sh")], folder / "mlflow.log", environment) as server:
            service.started.append(server)
            _wait(lambda: _healthy(service), server, folder / "mlflow.log", 120)
            yield service


@contextlib.contextmanager
def _database(folder: Path, programs: Path) -> Iterator[tuple[str, str, subprocess.Popen[bytes]]]:
    """A new PostgreSQL with MLflow's databases; yields its address, password and process."""
    password, port = secrets.token_hex(16), _free_port()
    # PostgreSQL doesn't run as root, and its sockets' paths must be short.
    place = Path(tempfile.mkdtemp(prefix="b3-pg-", dir="/tmp"))
    secret = place / "password"
    secret.write_text(password)
    user = "postgres" if os.geteuid() == 0 else None
    if user:
        for path in (place, secret):
            shutil.chown(path, user)
    environment = os.environ | {"PGPASSWORD": password, "LC_ALL": "C.UTF-8"}

    def call(program: str, *options: str) -> None:
        command = [str(programs / program), *options]
        done = subprocess.run(
            command, env=environment, cwd="/", capture_output=True, text=True, user=user
        )
        assert done.returncode == 0, f"{command}: {done.stderr}"

    try:
        cluster = str(place / "data")
        call("initdb", f"--pgdata={cluster}", f"--username={_USER}", "--auth=scram-sha-256",
             f"--pwfile={secret}", "--no-sync")  # fmt: skip
        server = [str(programs / "postgres"), "-D", cluster, "-h", "127.0.0.1", "-p", str(port)]
        server += ["-k", str(place), "-c", "fsync=off"]
        log = folder / "postgres.log"
        with _running(server, log, environment, user) as process:
            _wait(lambda: _open(port), process, log, 60)
            there = ["-h", "127.0.0.1", "-p", str(port), "-U", _USER]
            call("createdb", *there, "mlflow")
            statements = (FOLDER / "databases.sql").read_text()
            lines = [line for line in statements.splitlines() if not line.startswith("--")]
            call("psql", *there, "-d", "mlflow", "-v", "ON_ERROR_STOP=1", "-c", "\n".join(lines))
            yield f"127.0.0.1:{port}", password, process
    finally:
        shutil.rmtree(place, ignore_errors=True)


@contextlib.contextmanager
def _running(
    command: Sequence[str], log: Path, environment: dict[str, str], user: str | None = None
) -> Iterator[subprocess.Popen[bytes]]:
    with log.open("wb") as sink:
        process = subprocess.Popen(
            command, env=environment, cwd="/", stdout=sink, stderr=sink, user=user
        )
    try:
        yield process
    finally:
        with_it = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(10)
        for one in with_it:
            with contextlib.suppress(psutil.NoSuchProcess):
                one.kill()
        process.kill()
        process.wait()


def _wait(
    ready: Callable[[], bool], process: subprocess.Popen[bytes], log: Path, seconds: float
) -> None:
    deadline = time.monotonic() + seconds
    while not ready():
        said = log.read_text(errors="replace")[-3000:]
        assert process.poll() is None, said
        assert time.monotonic() < deadline, said
        time.sleep(0.2)


def _open(port: int) -> bool:
    with contextlib.suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=1).close()
        return True
    return False


def _healthy(service: Service) -> bool:
    url, trusted = f"{service.url}/health", service.trusted()
    with contextlib.suppress(OSError), urllib.request.urlopen(url, timeout=2, context=trusted) as r:
        return r.status == 200
    return False


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]
