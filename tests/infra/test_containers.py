"""Dockerfiles, compose file and lock files, by what stands in them. Needs no Docker."""

from __future__ import annotations

import fnmatch
import os
import re
import shutil
import subprocess
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
INFRA = ROOT / "infra"
DOCKERFILES = [
    INFRA / "docker" / "Dockerfile.cpu",
    INFRA / "docker" / "Dockerfile.cuda",
    INFRA / "mlflow" / "Dockerfile",
]
LOCKS = [
    INFRA / "requirements-cpu.lock",
    INFRA / "requirements-cuda.lock",
    INFRA / "mlflow" / "requirements.lock",
]


def _instructions(file: Path) -> list[tuple[str, str]]:
    text = re.sub(r"\\\n", " ", file.read_text())
    lines = [line.split(None, 1) for line in text.splitlines()]
    return [(line[0], line[1]) for line in lines if line and not line[0].startswith("#")]


def _locked(file: Path) -> dict[str, str]:
    """Names and versions; every one must have a hash."""
    found = {}
    for entry in re.split(r"\n(?=[a-zA-Z0-9])", re.sub(r"(?m)^#.*\n", "", file.read_text())):
        name, version = re.match(r"([\w.-]+(?:\[[\w,-]+\])?)==([^\s;]+)", entry.strip()).groups()  # type: ignore[union-attr]
        assert "--hash=sha256:" in entry, f"{file.name}: {name} has no hash"
        found[canonicalize_name(name.partition("[")[0])] = version
    return found


@pytest.mark.parametrize("file", DOCKERFILES, ids=lambda f: f.parent.name + "-" + f.name)
def test_images_are_pinned_locked_and_not_roots(file: Path) -> None:
    steps = _instructions(file)
    (base,) = [value for name, value in steps if name == "FROM"]
    assert re.fullmatch(r"python:3\.11\.\d+-slim-bookworm", base)
    assert [value for name, value in steps if name == "USER"] == ["10001"]
    assert [name for name, _ in steps][-1] == "CMD"
    names = [name for name, _ in steps]
    assert "RUN" not in names[names.index("USER") :]
    installs = [v for n, v in steps if n == "RUN" and "pip install" in v]
    assert all("--require-hashes" in v or "--no-deps --editable ." in v for v in installs)
    assert not re.search(r"(?i)password|secret_key|ADD http", file.read_text())


def test_images_get_what_they_copy_and_nothing_else() -> None:
    rules = (ROOT / ".dockerignore").read_text().splitlines()
    rules = [rule for rule in rules if rule and not rule.startswith("#")]
    assert rules[0] == "*" and "**/.env" in rules
    let_in = {rule[1:] for rule in rules if rule.startswith("!")}
    copied = set()
    for file in DOCKERFILES:
        for name, value in _instructions(file):
            if name == "COPY":
                copied |= {w for w in value.split()[:-1] if not w.startswith("--")}
    assert copied == let_in
    assert all((ROOT / name).exists() for name in copied)


@pytest.mark.parametrize("file", LOCKS[:2], ids=lambda f: f.name)
def test_a_lock_satisfies_the_project(file: Path) -> None:
    locked = _locked(file)
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    for wanted in map(Requirement, project["dependencies"]):
        version = locked[canonicalize_name(wanted.name)]
        assert wanted.specifier.contains(version), f"{wanted}: {file.name} has {version}"


def test_the_locks_differ_in_cuda_alone() -> None:
    cpu, cuda = map(_locked, LOCKS[:2])
    assert cpu.pop("torch") == f"{cuda.pop('torch')}+cpu"
    assert cpu.items() <= cuda.items()
    further = set(cuda) - set(cpu)
    assert further and all(n.startswith(("nvidia-", "cuda-")) or n == "triton" for n in further)


def test_the_server_is_as_old_as_the_clients() -> None:
    server, ours = _locked(LOCKS[2]), _locked(LOCKS[0])
    assert server["mlflow"] == ours["mlflow"]
    assert {"psycopg2-binary", "boto3", "flask-wtf"} <= set(server)


@pytest.fixture(scope="module")
def compose() -> dict[str, Any]:
    return yaml.safe_load((INFRA / "mlflow" / "compose.yaml").read_text())


def test_mlflow_listens_on_loopback_and_its_database_nowhere(compose: dict[str, Any]) -> None:
    services = compose["services"]
    assert services["mlflow"]["ports"] == ["${MLFLOW_BIND:-127.0.0.1}:5000:5000"]
    assert "ports" not in services["postgres"]
    assert services["postgres"]["networks"] == ["inside"]
    assert compose["networks"]["inside"]["internal"] is True
    for service in services.values():
        assert re.search(r":\d+\.\d+", service["image"])
        assert "no-new-privileges:true" in service["security_opt"]
        assert not {"privileged", "network_mode"} & set(service)


def test_secrets_come_from_a_file_that_git_ignores(compose: dict[str, Any]) -> None:
    assert compose["services"]["mlflow"]["env_file"] == ".env"
    assert ".env" in (INFRA / "mlflow" / ".gitignore").read_text().split()
    pattern = re.compile(r"^(?:# )?(\w*(?:PASSWORD|SECRET_KEY|ACCESS_KEY)\w*)=(.*)$", re.M)
    example = pattern.findall((INFRA / "mlflow" / ".env.example").read_text())
    assert len(example) >= 3 and not any(value for _, value in example)
    password = compose["services"]["postgres"]["environment"]["POSTGRES_PASSWORD"]
    assert password.startswith("${POSTGRES_PASSWORD:?")


def test_logs_are_shipped_but_those_with_the_jobs_environment() -> None:
    config = yaml.safe_load((INFRA / "logs" / "fluent-bit.yaml").read_text())
    (tail,) = config["pipeline"]["inputs"]

    def shipped(name: str) -> bool:
        path = f"/tmp/ray/session_2026-01-31_12-30-00_000000_1/logs/{name}"
        taken, left = (
            any(fnmatch.fnmatchcase(path, pattern) for pattern in tail[field].split(","))
            for field in ("path", "exclude_path")
        )
        return taken and not left

    assert all(map(shipped, ("raylet.out", "monitor.log", "job-driver-raysubmit_1.log")))
    for name in (
        "runtime_env_agent.log",
        "runtime_env_agent.err",
        "runtime_env_setup-01000000.log",
    ):
        assert not shipped(name)


def test_the_server_does_not_start_without_its_secrets(tmp_path: Path) -> None:
    script = INFRA / "mlflow" / "start.sh"
    needed = re.findall(r"[A-Z_]+", script.read_text().split("for name in")[1].split("; do")[0])
    names = [line.partition("=")[0] for line in _example() if not line.startswith("#")]
    assert set(needed) <= {*names, "POSTGRES_HOST"}, "the example names them all"
    settings = dict.fromkeys(needed, "x") | {"PATH": "/usr/bin:/bin"}
    for name in needed:
        got = _start(script, {k: v for k, v in settings.items() if k != name})
        assert (got.returncode, got.stderr) == (2, f"error: {name} is not set\n")
    got = _start(script, settings | {"POSTGRES_PASSWORD": "a@b"})
    assert got.returncode == 2 and "letters, digits" in got.stderr
    got = _start(script, settings | {"MLFLOW_TLS": str(tmp_path)})
    assert got.returncode == 2 and f"{tmp_path}/tls.crt: not there" in got.stderr


def test_the_servers_certificate_is_for_its_addresses(tmp_path: Path) -> None:
    command = [str(INFRA / "mlflow" / "certificate.sh"), "10.0.0.7", "mlflow.internal"]
    environment = os.environ | {"MLFLOW_TLS": str(tmp_path / "tls")}
    subprocess.run(command, env=environment, check=True, capture_output=True)
    assert (tmp_path / "tls" / "tls.key").stat().st_mode & 0o77 == 0
    shown = subprocess.run(
        ["openssl", "x509", "-in", str(tmp_path / "tls" / "tls.crt"), "-noout", "-text"],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    for name in ("DNS:localhost", "IP Address:127.0.0.1", "IP Address:10.0.0.7"):
        assert name in shown
    assert "DNS:mlflow.internal" in shown
    again = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert again.returncode == 2 and "is there already" in again.stderr  # it keeps the key
    assert "tls/tls.key" in (INFRA / "mlflow" / ".gitignore").read_text().split()


def _example() -> list[str]:
    return (INFRA / "mlflow" / ".env.example").read_text().splitlines()


def _start(script: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    shell = shutil.which("sh") or "/bin/sh"
    return subprocess.run(
        [shell, str(script)], env=environment, capture_output=True, text=True, timeout=20
    )
