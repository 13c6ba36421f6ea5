"""Search spaces: field of FinetuneConfig -> values to try.

A task's own is `tuning/spaces/<task>.py`; tasks without one share `_default.py`. Its function
`space` gets the configuration to search around, such as a published recipe. A field has a range
(`rates`, `tune.loguniform`, `tune.uniform`, `tune.randint`) or a list in order (`choice`,
`tune.choice`): population based training moves along both.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from ray import tune
from ray.tune.search.sample import Categorical, Float, Integer, LogUniform, Uniform

from pipelines.finetune import FinetuneConfig


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


def rates(low: float, high: float, base: float) -> Any:
    """A logarithmic range from `low` to `high` times the base's value."""
    # Rounded: the noise of a product would show in tables, and shift what is drawn.
    return tune.loguniform(*(float(f"{factor * base:.12g}") for factor in (low, high)))


def choice(*values: float) -> Any:
    """The values in order, each once: the base's may be among the others."""
    return tune.choice(sorted(set(values)))


def load(base: FinetuneConfig) -> dict[str, Any]:
    """The search space of a configuration's task, around the configuration.

    Raises:
        ValueError: it can't be searched.
    """
    own = {module.name for module in pkgutil.iter_modules(__path__)}
    name = base.task if base.task in own else "_default"
    module = importlib.import_module(f"{__name__}.{name}")
    try:
        space = module.space(base)
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
