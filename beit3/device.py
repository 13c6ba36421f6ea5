"""Moves batches to a device, sets the precision it computes in, and waits for it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

from beit3.config import Precision

T = TypeVar("T")
DTYPES: dict[Precision, torch.dtype] = {"fp32": torch.float32, "bf16": torch.bfloat16}


def computing_in(precision: Precision, device: torch.device) -> torch.autocast:
    """A context that computes in `precision`, whatever it is outside."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def to_device(batch: T, device: torch.device | str) -> T:
    """The same batch with its tensors on a device, however nested in dataclasses and dicts."""
    return _each(batch, lambda tensor: tensor.to(device, non_blocking=True))


def pinned(batch: T, device: torch.device) -> T:
    """The same batch in page-locked memory, from which a GPU copies while the CPU goes on.

    Any thread may call it: it selects the GPU, or a thread would take memory on the first one.
    """
    with torch.cuda.device(device):
        return _each(batch, Tensor.pin_memory)


def _each(value: Any, change: Callable[[Tensor], Tensor]) -> Any:
    if isinstance(value, Tensor):
        return change(value)
    if isinstance(value, tuple):
        parts = [_each(part, change) for part in value]
        return type(value)(*parts) if hasattr(value, "_fields") else tuple(parts)
    if isinstance(value, dict):
        return {key: _each(part, change) for key, part in value.items()}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {f.name: getattr(value, f.name) for f in dataclasses.fields(value) if f.init}
        return dataclasses.replace(value, **{k: _each(v, change) for k, v in own.items()})
    return value


def synchronise(device: torch.device) -> None:
    """Wait until the device has finished its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
