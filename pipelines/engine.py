"""Builds a run's DeepSpeed engine: optimizer, ZeRO, precision, accumulation and clipping."""

from __future__ import annotations

import contextlib
import logging
import os
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from beit3.optimisation import cosine_schedule, parameter_groups
from pipelines import budget
from pipelines.recipe import Run, TrainConfig

_LINEAR = F.linear
_COMPILER = "inductor"


def build(run: Run, module: nn.Module) -> Any:
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    with open(os.devnull, "w") as sink, contextlib.redirect_stdout(sink):  # noqa: PTH123
        import deepspeed

        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        # On CPU DeepSpeed would compile its own all-reduce. gloo's suffices: it needs no compiler,
        # and a killed build would leave a lock file that hangs every later run.
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
        deepspeed.init_distributed(dist_init_required=False)
        config = run.config
        groups = parameter_groups(
            module,
            weight_decay=config.weight_decay,
            layers=run.recipe.layers(),
            layer_decay=config.layer_decay,
            head_scale=config.head_scale,
        )
        optimizer = torch.optim.AdamW(
            groups,
            lr=config.learning_rate,
            betas=config.betas,
            eps=config.eps,
            fused=True,  # one pass over memory; DeepSpeed's own needs a compiler
        )
        settings: dict[str, Any] = {
            "train_micro_batch_size_per_gpu": 1,  # a packed batch is one object per step
            "gradient_accumulation_steps": config.accumulate,
            # Without ZeRO `guards.Guard` clips, using the norm by which it detects bad steps.
            "gradient_clipping": config.clip if config.stage else 0.0,
            "zero_optimization": _zero(config, module),
            "zero_allow_untested_optimizer": True,
            "steps_per_print": 10**9,
        }
        if config.offload:
            settings["zero_force_ds_cpu_optimizer"] = False
        if config.precision == "bf16":
            settings["torch_autocast"] = {"enabled": True, "dtype": "bfloat16"}
        if config.compile:
            module.compile(backend=_COMPILER)
        engine, *_ = deepspeed.initialize(model=module, optimizer=optimizer, config=settings)
        if dist.get_world_size() < 2 and not config.stage:
            engine.enable_backward_allreduce = False  # it would copy every gradient needlessly
    return engine


def close(engine: Any) -> None:
    """Shut down an engine, and restore the PyTorch function that ZeRO 3 replaces."""
    engine.destroy()
    F.linear = _LINEAR


def _zero(config: TrainConfig, module: nn.Module) -> dict[str, Any]:
    """ZeRO's settings; DeepSpeed's defaults suit models of many billions of parameters."""
    parameters = list(module.parameters())
    trained = sum(p.numel() for p in parameters if p.requires_grad)
    settings: dict[str, Any] = {
        "stage": config.stage,
        "reduce_bucket_size": budget.bucket(trained),
        "overlap_comm": budget.overlaps(config),
    }
    if config.offload:
        pin = config.gpus_per_worker > 0
        settings["offload_optimizer"] = {"device": "cpu", "pin_memory": pin}
    if config.stage == 3:
        live = budget.gathered(sum(p.numel() for p in parameters))
        settings |= {
            "stage3_max_live_parameters": live,
            "stage3_max_reuse_distance": live,
            "stage3_prefetch_bucket_size": budget.bucket(live),
            # Vectors stay whole, whatever the model's width; matrices are split.
            "stage3_param_persistence_threshold": max(
                (p.numel() for p in parameters if p.ndim <= 1), default=0
            ),
        }
    return settings


def set_learning_rate(engine: Any, config: TrainConfig, step: int) -> None:
    rate = cosine_schedule(
        step,
        peak=config.learning_rate,
        warmup=config.warmup,
        steps=config.steps,
        floor=config.min_learning_rate,
    )
    for group in engine.optimizer.param_groups:
        group["lr"] = rate * group.get("lr_scale", 1.0)
