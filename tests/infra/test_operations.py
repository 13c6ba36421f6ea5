"""docs/operations.md: the commands in it are commands of this repository."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml
from mlflow_service import documented

ROOT = Path(__file__).parents[2]
TEXT = (ROOT / "docs" / "operations.md").read_text()


def _jobs() -> list[list[str]]:
    joined = TEXT.replace("\\\n", " ")
    return [shlex.split(found) for found in re.findall(r"job python (pipelines/.*)", joined)]


def test_every_job_takes_its_options() -> None:
    from pipelines import config

    jobs = _jobs()
    assert len(jobs) == 7
    for script, *options in jobs:
        assert (ROOT / script).is_file()
        module: Any = importlib.import_module(script.removesuffix(".py").replace("/", "."))
        presets = getattr(module, "PRESETS", None) or pytest.fail(f"{script} has no PRESETS")
        config.cli(presets, description="", args=[*options, "--store", "s3://my-bucket/beit3"])


def test_options_named_in_passing_are_there() -> None:
    from pipelines.recipe import TrainConfig

    fields = set(TrainConfig.__dataclass_fields__)
    named = set(re.findall(r"--train\.([a-z-]+)", TEXT))
    assert named and {name.replace("-", "_") for name in named} <= fields


def test_mlflows_users_are_made_in_its_container() -> None:
    compose = yaml.safe_load((ROOT / "infra" / "mlflow" / "compose.yaml").read_text())
    service = compose["services"]["mlflow"]
    said = subprocess.run(
        ["bash", "-euc", "docker() { printf '%s\\0' \"$@\"; }\n" + documented()],
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    words = said.split("\0")[:-1]
    start = shlex.split("compose -f infra/mlflow/compose.yaml exec -T mlflow sh -c")
    size = len(start) + 2
    calls = [words[i : i + size] for i in range(0, len(words), size)]
    assert len(calls) == 2
    for *before, admin, program in calls:
        assert before == start
        compile(program, "operations.md", "exec")
        (folder,) = (v.split(":")[1] for v in service["volumes"] if v.startswith("./tls:"))
        assert f"MLFLOW_TRACKING_SERVER_CERT_PATH={folder}/tls.crt" in admin
        given = (ROOT / "infra" / "mlflow" / service["env_file"]).with_name(".env.example")
        named = set(re.findall(r"\$(\w{2,})", admin))
        assert named and named <= set(re.findall(r"^(\w+)=", given.read_text(), re.M))


def test_ingestion_fits_the_cpu_nodes() -> None:
    """More would start GPU nodes, for their CPUs."""
    cluster = yaml.safe_load((ROOT / "infra" / "ray_cluster.yaml").read_text())
    cpu = cluster["available_node_types"]["cpu"]
    assert cpu["node_config"]["InstanceType"] == "m7i.4xlarge"  # 16 CPUs
    (ingest,) = (job for job in _jobs() if job[0] == "pipelines/ingest.py")
    processes = int(ingest[ingest.index("--processes") + 1])
    assert processes == 16 * cpu["max_workers"]


def test_the_backup_is_of_users_and_grants_too() -> None:
    others = (ROOT / "infra" / "mlflow" / "databases.sql").read_text()
    assert "CREATE DATABASE mlflow_auth" in others  # beside the database mlflow
    assert re.findall(r"exec -T postgres (.*) > ", TEXT) == ["pg_dumpall -U mlflow"]


def test_git_leaves_out_what_the_kubernetes_steps_write() -> None:
    steps = TEXT[TEXT.index("### Kubernetes") : TEXT.index("## Day two")]
    assert "MLFLOW_TLS=tls " in steps
    assert "/tls/" in (ROOT / ".gitignore").read_text().split()
    assert steps.index("cp infra/mlflow/.env.example") < steps.index("--from-env-file")


def test_files_named_are_there() -> None:
    for doc in ("operations.md", "security.md"):
        text = (ROOT / "docs" / doc).read_text().replace("$kind", "cpu")
        for name in re.findall(r"(?:tests/)?infra/[\w./-]*\w", text):
            if not name.endswith(".env") and "/tls" not in name:  # the user's own
                assert (ROOT / name).exists(), f"{doc}: {name}"
