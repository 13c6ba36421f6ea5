"""A result's provenance: a hash of its job, options and inputs, and the version of the code."""

from __future__ import annotations

import contextlib
import functools
import hashlib
import importlib.metadata
import json
import subprocess
from collections.abc import Iterable
from pathlib import Path
from typing import Any

FORMAT_VERSION = 1


def fingerprint(job: str, config: Any, inputs: Iterable[str] = ()) -> str:
    """Hash of everything that decides a job's output: its name, configuration and inputs."""
    payload = {"format": FORMAT_VERSION, "job": job, "config": config, "inputs": list(inputs)}
    text = json.dumps(payload, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:16]


@functools.cache
def code_version() -> dict[str, str]:
    """Package version and, in a checkout, the git revision; recorded in every commit."""
    version = {"beit3-ray": "unknown"}
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        version["beit3-ray"] = importlib.metadata.version("beit3-ray")
    here = Path(__file__).resolve().parent
    try:
        revision = subprocess.run(
            ["git", "-C", str(here), "rev-parse", "HEAD"], capture_output=True, text=True, timeout=5
        )
        if revision.returncode == 0:
            version["git"] = revision.stdout.strip()
    except (OSError, subprocess.TimeoutExpired):
        pass
    return version
