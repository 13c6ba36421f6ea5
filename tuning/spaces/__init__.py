"""Search spaces: field of FinetuneConfig -> values to try.

A task's own is `tuning/spaces/<task>.py`; tasks without one share `_default.py`. A field has a
range (`tune.loguniform(3e-4, 6e-3)`, `tune.uniform`, `tune.randint`) or a list in order
(`tune.choice([0.7, 0.85, 1.0])`): population based training moves along both.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray.tune.search.sample import Categorical, Float, Integer, LogUniform, Uniform


@dataclass(frozen=True)
class Range:
    """Numbers from `low` to `high`, both included."""

    low: float
    high: float
    log: bool = False
    whole: bool = False


@dataclass(frozen=True)
class Choice:
    """Values in an order in which neighbours are alike."""

    values: tuple[Any, ...]


def load(task: str) -> dict[str, Any]:
    """A task's search space.

    Raises:
        ValueError: it can't be searched.
    """
    own = {module.name for module in pkgutil.iter_modules(__path__)}
    name = task if task in own else "_default"
    space = importlib.import_module(f"{__name__}.{name}").SPACE
    try:
        fields = read(space)
    except ValueError as error:
        raise ValueError(f"tuning/spaces/{name}.py: {error}") from error
    if not any(isinstance(field, Range) and not field.whole for field in fields.values()):
        # A trial's folder follows from its values.
        raise ValueError(
            f"tuning/spaces/{name}.py: give a field a continuous range, or two trials could be the "
            "same"
        )
    return space


def read(space: Mapping[str, Any]) -> dict[str, Range | Choice]:
    """The possible values of each field of a space.

    Raises:
        ValueError: a field is neither a uniform or log-uniform range nor a choice.
    """
    return {name: _field(name, domain) for name, domain in space.items()}


def _field(name: str, domain: Any) -> Range | Choice:
    if isinstance(domain, Categorical) and isinstance(domain.get_sampler(), Uniform):
        return Choice(tuple(domain.categories))
    if isinstance(domain, Float | Integer):
        sampler, whole = domain.get_sampler(), isinstance(domain, Integer)
        if isinstance(sampler, LogUniform | Uniform):
            return Range(domain.lower, domain.upper - whole, isinstance(sampler, LogUniform), whole)
    raise ValueError(
        f"{name}: expected tune.uniform, loguniform, randint, lograndint or choice, got {domain!r}"
    )
