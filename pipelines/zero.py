"""Gathers and sets whole parameters and optimizer state that DeepSpeed's ZeRO shards over workers.

Stages 1 and 2 shard the optimizer's state of each parameter, stage 3 also the parameters. Here
parameters are gathered, or sharded again, one after another, so that no more than one is whole at a
time. Unless stated otherwise, every worker must call a function at the same time.
"""

from __future__ import annotations

import contextlib
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

MOMENTS = ("exp_avg", "exp_avg_sq")
AVERAGE = "average"
"""The weights' moving average, kept as part of the optimizer's state of each parameter."""


def trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in module.named_parameters() if p.requires_grad]


# -- a worker's own part --------------------------------------------------------------------------


def parts(engine: Any) -> list[Tensor]:
    """The fp32 tensors this worker's optimizer updates: with ZeRO flat pieces, else parameters."""
    stage = engine.zero_optimization_stage()
    if stage == 0:
        return [p for group in engine.optimizer.param_groups for p in group["params"]]
    zero = engine.optimizer
    return zero.fp32_partitioned_groups_flat if stage == 3 else zero.single_partition_of_fp32_groups


def states(engine: Any) -> Any:
    """The optimizer's state of each of `parts`: tensors by name."""
    own = engine.optimizer if engine.zero_optimization_stage() == 0 else engine.optimizer.optimizer
    return own.state


@torch.no_grad()
def update_average(engine: Any, decay: float, step: int) -> None:
    """Move the weights' average towards the weights after optimizer step `step`, counted from 1.

    The decay grows with the steps, as `(1 + step) / (10 + step)`, up to `decay`, so that the
    average forgets the initial weights. Each worker averages its own part and calls this by itself.
    """
    kept = min(decay, (1 + step) / (10 + step))
    for part in parts(engine):
        state = states(engine).get(part)
        if not state:  # not optimised yet: with an average, its state would seem to exist already
            continue
        if AVERAGE not in state:
            state[AVERAGE] = part.detach().clone()
        state[AVERAGE].lerp_(part, 1.0 - kept)


def has_average(engine: Any) -> bool:
    """Whether the weights are averaged; the same on every worker, and each may ask by itself."""
    return all(AVERAGE in states(engine).get(part, {}) for part in parts(engine))


def create_state(engine: Any, step: int, names: tuple[str, ...]) -> None:
    """Create the all-zero state that the optimizer itself creates at its first step."""
    for part in parts(engine):
        zeros = {name: torch.zeros_like(part, requires_grad=False) for name in names}
        states(engine)[part] = {"step": torch.tensor(float(step), device=part.device), **zeros}
    link_state(engine)


def link_state(engine: Any) -> None:
    """Tell each parameter where its state is in the flat parts of stages 1 and 2.

    DeepSpeed does so after the first parameter group has stepped, when the others have no state.
    """
    if engine.zero_optimization_stage() not in (1, 2):
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    for parameters, part in zip(engine.optimizer.bit16_groups, parts(engine), strict=True):
        lazy_init_hp_params_optimizer_state(parameters, part, states(engine))


# -- whole parameters -----------------------------------------------------------------------------


def whole_weight(parameter: Tensor) -> Tensor:
    """A whole parameter or buffer, as stored; the tensor itself if it isn't sharded."""
    if _is_split(parameter):
        return _joined(parameter, parameter.ds_tensor)  # type: ignore[attr-defined]
    return parameter.detach()


def whole_state(engine: Any, parameter: nn.Parameter, name: str) -> Tensor:
    """A parameter's whole optimizer state of that name; call `link_state` first."""
    from deepspeed.utils import safe_get_full_optimizer_state, safe_get_local_optimizer_state

    if engine.zero_optimization_stage() == 0:
        return states(engine)[parameter][name]
    if _is_split(parameter):
        return _joined(parameter, safe_get_local_optimizer_state(parameter, name))
    found = safe_get_full_optimizer_state(parameter, name)
    assert found is not None
    return found


@torch.no_grad()
def set_weight(parameter: Tensor, value: Tensor) -> None:
    """Set a parameter or buffer to a whole value; call `refresh` when all are set."""
    if _is_split(parameter):
        parameter.ds_tensor.copy_(_own_piece(parameter, value))  # type: ignore[attr-defined]
    else:
        parameter.copy_(value)


def refresh(engine: Any) -> None:
    """Copy weights that were set to the optimizer, which with ZeRO has its own copy."""
    if engine.zero_optimization_stage() != 0:
        engine.optimizer.refresh_fp32_params()


@torch.no_grad()
def set_state(engine: Any, parameter: nn.Parameter, name: str, value: Tensor) -> None:
    """Set a parameter's state, created by `create_state`, to a whole value."""
    from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

    if engine.zero_optimization_stage() == 0:
        states(engine)[parameter][name].copy_(value)
    elif _is_split(parameter):
        safe_set_local_optimizer_state(parameter, _own_piece(parameter, value), name)
    else:
        safe_set_full_optimizer_state(parameter, value, name)


def shape(parameter: Tensor) -> torch.Size:
    """The whole shape of a parameter or buffer; any worker may call this by itself."""
    return parameter.ds_shape if _is_split(parameter) else parameter.shape  # type: ignore[attr-defined]


@contextlib.contextmanager
def whole(engine: Any) -> Iterator[nn.Module]:
    """The module with all of its parameters on rank 0, where it can be evaluated and exported.

    Trained parameters are replaced by their averages, if there are any. Nothing may train
    meanwhile; on the other workers the module stays as it is.
    """
    own: list[tuple[nn.Parameter, Tensor]] = []
    averaged = has_average(engine)
    link_state(engine)
    for parameter in engine.module.parameters():
        if averaged and parameter.requires_grad:
            value = whole_state(engine, parameter, AVERAGE)
        elif _is_split(parameter):
            value = whole_weight(parameter)
        else:
            continue
        if dist.get_rank() == 0:
            own.append((parameter, parameter.data))
            parameter.data = value.to(parameter.device)
    try:
        with _without_hooks(engine.module):
            yield engine.module
    finally:
        for parameter, data in own:
            parameter.data = data


@contextlib.contextmanager
def _without_hooks(module: nn.Module) -> Iterator[None]:
    """Remove stage 3's hooks, which need all workers to gather a parameter that rank 0 reads."""
    names = ("_forward_pre_hooks", "_forward_hooks")
    saved = [(part, name, getattr(part, name)) for part in module.modules() for name in names]
    for part, name, _ in saved:
        setattr(part, name, OrderedDict())
    try:
        yield
    finally:
        for part, name, hooks in saved:
            setattr(part, name, hooks)


def _is_split(parameter: Tensor) -> bool:
    return hasattr(parameter, "ds_tensor")


def _joined(parameter: Any, piece: Tensor) -> Tensor:
    """A whole parameter from every worker's piece; the last pieces are padded."""
    flat = piece.new_empty(piece.numel() * dist.get_world_size())
    dist.all_gather_into_tensor(flat, piece.contiguous())
    return flat[: parameter.ds_numel].view(parameter.ds_shape)


def _own_piece(parameter: Any, value: Tensor) -> Tensor:
    """This worker's piece of a whole value, padded as DeepSpeed pads it."""
    length = parameter.ds_tensor.numel()
    piece = value.new_zeros(length)
    own = value.flatten()[length * dist.get_rank() :][:length]
    piece[: len(own)] = own
    return piece
