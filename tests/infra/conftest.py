"""What the tests of infra/ share."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="session")
def aws_apply() -> ModuleType:
    """infra/iam/apply.py, which is a script and belongs to no package."""
    spec = importlib.util.spec_from_file_location("aws_apply", ROOT / "infra" / "iam" / "apply.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module
