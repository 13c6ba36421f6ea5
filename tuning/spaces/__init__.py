"""Search spaces, one readable file per task: field of FinetuneConfig -> values to try."""

from __future__ import annotations

import importlib
import pkgutil
from typing import Any


def load(task: str) -> tuple[dict[str, Any], str]:
    """A task's search space and the metric to maximise.

    Raises:
        ValueError: there is no space for that task.
    """
    known = sorted(m.name for m in pkgutil.iter_modules(__path__))
    if task not in known:
        raise ValueError(f"task: no search space for {task!r}; there are {', '.join(known)}")
    module = importlib.import_module(f"{__name__}.{task}")
    return module.SPACE, module.METRIC
