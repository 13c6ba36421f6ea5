"""Checkpoints that any number of workers and any ZeRO stage can resume.

DeepSpeed's own files are pickles cut to one world size. Here each parameter's fp32 value and its
two Adam moments are gathered whole and written as safetensors, so a checkpoint does not know how
many workers wrote it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines import bundles
from pipelines.storage import Store, StoreError

MOMENTS = ("exp_avg", "exp_avg_sq")


def folder(run: str, step: int) -> str:
    return f"{run}/checkpoints/step-{step:08d}"


def save(store: Store, run: str, step: int, engine: Any, *, rank: int, keep: int) -> None:
    """Write the state after `step` steps; every worker must call this, rank 0 writes.

    Older checkpoints than the newest `keep` are deleted.
    """
    module: nn.Module = engine.module
    _link_moments(engine)
    optimizer: dict[str, Tensor] = {}
    for name, parameter in _trainable(module):
        for part, value in _full_state(engine, parameter).items():
            if rank == 0:
                optimizer[f"{name}:{part}"] = value.detach().cpu().clone().contiguous()
    if rank != 0:
        return
    weights = {k: v.detach().cpu().clone().contiguous() for k, v in module.state_dict().items()}
    with tempfile.TemporaryDirectory() as temporary:
        save_file(weights, Path(temporary) / "model.safetensors")
        save_file(optimizer, Path(temporary) / "optimizer.safetensors")
        bundles.save(store, folder(run, step), Path(temporary), {"step": step})
    for old in _steps(store, run)[:-keep]:
        store.delete(folder(run, old))


def restore(store: Store, run: str, engine: Any, say: Callable[[str], None]) -> int:
    """Load the newest sound checkpoint into the engine; returns its step, 0 if there is none.

    A damaged checkpoint is named to `say` and the one before it is taken.
    """
    for step in reversed(_steps(store, run)):
        with tempfile.TemporaryDirectory() as temporary:
            try:
                bundles.load(store, folder(run, step), Path(temporary))
            except StoreError as error:
                say(f"checkpoint of step {step} is damaged, trying an older: {error}")
                continue
            engine.module.load_state_dict(load_file(Path(temporary) / "model.safetensors"))
            optimizer = load_file(Path(temporary) / "optimizer.safetensors")
        _create_moments(engine, step)
        _link_moments(engine)
        for name, parameter in _trainable(engine.module):
            state = {k: optimizer[f"{name}:{k}"] for k in ("value", *MOMENTS)}
            _set_full_state(engine, parameter, state, step)
        return step
    return 0


def _trainable(module: nn.Module) -> list[tuple[str, nn.Parameter]]:
    return [(n, p) for n, p in module.named_parameters() if p.requires_grad]


def _steps(store: Store, run: str) -> list[int]:
    """Steps of the complete checkpoints, ascending."""
    names = [n for n in store.list(f"{run}/checkpoints") if n.startswith("step-")]
    steps = sorted(int(n.removeprefix("step-")) for n in names)
    return [s for s in steps if bundles.exists(store, folder(run, s))]


def _full_state(engine: Any, parameter: nn.Parameter) -> dict[str, Tensor]:
    """A parameter's fp32 value and moments, gathered from the workers that hold their parts."""
    if engine.zero_optimization_stage() == 0:
        state = engine.optimizer.state[parameter]
        return {"value": parameter, **{k: state[k] for k in MOMENTS}}
    from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

    full = {"value": safe_get_full_fp32_param(parameter)}
    return full | {k: safe_get_full_optimizer_state(parameter, k) for k in MOMENTS}  # type: ignore[return-value]


def _set_full_state(
    engine: Any, parameter: nn.Parameter, state: dict[str, Tensor], step: int
) -> None:
    device = parameter.device
    if engine.zero_optimization_stage() == 0:
        with torch.no_grad():
            parameter.copy_(state["value"])
        engine.optimizer.state[parameter] = {
            "step": torch.tensor(float(step)),
            **{k: state[k].to(device) for k in MOMENTS},
        }
        return
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_full_optimizer_state

    safe_set_full_fp32_param(parameter, state["value"].to(device))
    for k in MOMENTS:
        safe_set_full_optimizer_state(parameter, state[k].to(device), k)


def _create_moments(engine: Any, step: int) -> None:
    """Give the flat partitions that ZeRO optimises the moments that a first step would create."""
    if engine.zero_optimization_stage() == 0:
        return
    base = engine.optimizer.optimizer
    for group in base.param_groups:
        for flat in group["params"]:
            zeros = {k: torch.zeros_like(flat) for k in MOMENTS}
            base.state[flat] = {"step": torch.tensor(float(step)), **zeros}


def _link_moments(engine: Any) -> None:
    """Tell each parameter where its moments lie in the flat partitions.

    DeepSpeed links them after the first parameter group has stepped, when the others have none yet.
    """
    if engine.zero_optimization_stage() == 0:
        return
    from deepspeed.utils import lazy_init_hp_params_optimizer_state

    zero = engine.optimizer
    for parameters, flat in zip(
        zero.bit16_groups, zero.single_partition_of_fp32_groups, strict=True
    ):
        lazy_init_hp_params_optimizer_state(parameters, flat, zero.optimizer.state)
