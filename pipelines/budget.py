"""Computes how much GPU memory a training run's state takes, and checks that it fits."""

from __future__ import annotations

import os
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from pipelines.loader import memory
from pipelines.recipe import TrainConfig

GIB = 1 << 30
_BUCKET = 50_000_000
"""Maximum elements of a buffer that gradients are reduced in: 200 MB keep any network busy."""
_GATHERED = 200_000_000
"""Maximum elements that ZeRO 3 holds whole: four blocks of the giant model."""


@dataclass(frozen=True)
class Assumptions:
    """Assumptions of `--dry-run`. None of them is measured here: put in what you know."""

    gpu_gib: float = 44.0
    """GPU memory available to a process, in GiB (2**30 bytes): L40S 44, A100 and H100 with 80 GB
    79."""
    gpu_tflops: float = 362.0
    """A GPU's peak in the run's precision, in 10**12 FLOP/s: in bf16, dense, L40S 362, A100 312,
    H100 SXM 989."""
    mfu: float = 0.35
    """Share of that peak that the training reaches; runs log theirs as train/mfu."""
    decoded_per_second: float = 300.0
    """Pictures that one process reads, decodes and crops in a second (`benchmarks/loader.py`)."""
    text_tokens: int = 300
    """Tokens of a text without an image, where the corpus is not tokenized yet."""
    caption_tokens: int = 16
    """Tokens of a caption, where the corpus is not tokenized yet."""

    def __post_init__(self) -> None:
        for name in ("gpu_gib", "gpu_tflops", "mfu", "decoded_per_second"):
            if getattr(self, name) <= 0:
                raise ValueError(f"assume.{name}: expected more than 0, got {getattr(self, name)}")
        for name in ("text_tokens", "caption_tokens"):
            if getattr(self, name) < 3:
                raise ValueError(
                    f"assume.{name}: expected at least 3, <s>, a token and </s>, "
                    f"got {getattr(self, name)}"
                )


@dataclass(frozen=True)
class States:
    """Bytes that a worker holds from its first step to its last.

    parameters, gradients, optimizer, average: on its GPU; the optimizer holds two moments and, with
        ZeRO, another copy of the parameters.
    buffers: DeepSpeed's, for communication.
    host: in the machine's memory, if the optimizer's state is offloaded.
    """

    parameters: int
    gradients: int
    optimizer: int
    average: int
    buffers: int
    host: int

    @property
    def total(self) -> int:
        """On the GPU."""
        return self.parameters + self.gradients + self.optimizer + self.average + self.buffers


@dataclass(frozen=True)
class StepMemory:
    """Estimated bytes that a step takes on a worker's GPU, on top of the state.

    checkpointed: the same with `model.checkpoint_activations` blocks.
    """

    configured: int
    checkpointed: int


def bucket(count: int) -> int:
    """Elements of a buffer that the gradients of `count` parameters are reduced in."""
    return max(1, min(_BUCKET, count))


def gathered(count: int) -> int:
    """Elements of `count` parameters that ZeRO 3 holds whole before it releases some."""
    return max(1, min(_GATHERED, count // 4))


def overlaps(config: TrainConfig) -> bool:
    """Whether gradients are reduced while others are computed, which needs each buffer twice."""
    return config.workers > 1 and config.gpus_per_worker > 0


def states(count: int, config: TrainConfig, *, frozen: int = 0) -> States:
    """Memory that `count` trained and `frozen` further parameters take on each worker.

    Everything is kept in fp32, whatever precision a step computes in. ZeRO's stages 1, 2 and 3
    split the optimizer's state, then also the gradients, then also the parameters over the workers.
    """
    whole, stage = 4 * count, config.stage
    piece = whole // max(1, config.workers)
    average = (piece if stage else whole) if config.ema else 0
    if stage == 0:
        return States(whole + 4 * frozen, whole, 2 * whole, average, 0, 0)
    gradients = piece if stage > 1 else whole
    optimizer = 3 * piece
    parameters = whole + 4 * frozen
    if stage == 3:
        parameters = piece + 4 * frozen // max(1, config.workers)
        buffers = bucket(count) * (4 if config.precision == "fp32" else 4 + 2)
        buffers += 4 * gathered(count + frozen)
    else:  # one in fp32 for each precision that gradients are communicated in
        copies = (1 if config.precision == "fp32" else 2) * (2 if overlaps(config) else 1)
        buffers = 4 * bucket(count) * copies
    if not config.offload:
        return States(parameters, gradients, optimizer, average, buffers, 0)
    host = optimizer + average + piece
    return States(parameters, whole if stage == 1 else 0, 0, 0, buffers, host)


def check_device(
    module: nn.Module, config: TrainConfig, device: torch.device, step: StepMemory | None = None
) -> None:
    """Check that a run fits into the GPU before it is moved there.

    Args:
        step: Memory that a step takes on top of the state, if it was estimated.

    Raises:
        ValueError: the state alone, or (by estimate) with a step, exceeds the whole GPU.
        RuntimeError: the state doesn't fit into the memory that is currently free.
    """
    if device.type != "cuda":
        return
    frozen, trained = _counts(module)
    needed = states(trained, config, frozen=frozen).total
    free, there = torch.cuda.mem_get_info(device)
    name = torch.cuda.get_device_name(device)
    if needed > free:
        ways = ", ".join(way for way, _ in lighter(config))
        raise (ValueError if needed > there else RuntimeError)(
            f"{frozen + trained:,} parameters with gradients and optimizer state take "
            f"{needed / GIB:.1f} GiB of each GPU, and {name} has {free / GIB:.1f} GiB free: "
            f"{ways or 'train on more workers, or a smaller model'}"
        )
    problem = step and too_much(trained, config, step, there, name, frozen=frozen)
    if problem:
        raise ValueError(problem)


def too_much(
    count: int, config: TrainConfig, step: StepMemory, there: int, gpu: str, *, frozen: int = 0
) -> str:
    """Why a worker needs more than its GPU's `there` bytes, and what would need less; empty if it
    fits.

    Args:
        count, frozen: As `states` takes them.
        gpu: The GPU's name.
    """
    needed = states(count, config, frozen=frozen).total + step.configured
    if needed <= there:
        return ""
    others = [
        (way, states(count, other, frozen=frozen).total + step.configured)
        for way, other in lighter(config)
    ]
    if step.checkpointed < step.configured:
        saved = step.configured - step.checkpointed
        others.append(("model.checkpoint_activations blocks", needed - saved))
    ways = [f"{way}: {taken / GIB:.1f}" for way, taken in others]
    ways.append("or smaller batches, with as much larger train.accumulate")
    return (
        f"a worker needs {needed / GIB:.1f} GiB, by estimate, and its GPU has {there / GIB:.1f} "
        f"({gpu}). In GiB it would need with {'; '.join(ways)}"
    )


def limit(config: TrainConfig) -> tuple[float, str] | None:
    """Hours after which a run stops, and the option (with its value) that stops it; None if it runs
    to its end."""
    limits = []
    if config.max_hours:
        limits.append((config.max_hours, f"train.max_hours {config.max_hours:g}"))
    if config.max_cost:
        hours = config.max_cost / (config.price_per_hour * max(1, config.workers))
        limits.append((hours, f"train.max_cost {config.max_cost:g}"))
    return min(limits, default=None)


def check_machine(module: nn.Module, config: TrainConfig) -> None:
    """Check that the state of a run on CPUs fits into this machine, before anything is built.

    With RAY_ADDRESS set nothing is checked: a cluster's other machines are unknown here.

    Args:
        module: The run's module, which may be on PyTorch's meta device.

    Raises:
        ValueError: it does not fit, even without any activations.
    """
    if config.gpus_per_worker or os.environ.get("RAY_ADDRESS"):
        return
    counts, workers = _counts(module), max(1, config.workers)
    found = states(counts[1], config, frozen=counts[0])
    needed = workers * (found.total + found.host)
    there = memory()
    if needed > there:
        raise ValueError(
            f"train.workers {config.workers}: {sum(counts):,} parameters with gradients and "
            f"optimizer state take {needed / GIB:.1f} GiB in all, and this machine has "
            f"{there / GIB:.1f} GiB: train a smaller model (model.layers, model.hidden), with "
            "fewer workers, or on a cluster"
        )


def _counts(module: nn.Module) -> tuple[int, int]:
    """Numbers of frozen and of trained parameters."""
    counts = [0, 0]
    for parameter in module.parameters():
        counts[parameter.requires_grad] += parameter.numel()
    return counts[0], counts[1]


def lighter(config: TrainConfig) -> list[tuple[str, TrainConfig]]:
    """Ways to train with less state on each GPU: what to set, and the resulting configuration."""
    found: list[tuple[str, dict[str, Any]]] = []
    if config.workers > 1:
        found = [
            (f"train.zero_stage {stage}", {"zero_stage": stage})
            for stage in range(config.stage + 1, 4)
        ]
    if not config.offload:
        stage = max(1, config.stage)
        also = "" if config.stage else f" and train.zero_stage {stage}"
        found.append((f"train.offload{also}", {"offload": True, "zero_stage": stage}))
    return [(name, replace(config, **changes)) for name, changes in found]
