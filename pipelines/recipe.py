"""What a training run is made of: its options, what it trains, and where it lives."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

from torch import nn

from pipelines import tracking


@dataclass(frozen=True)
class TrainConfig:
    """How a run is optimised and where it runs."""

    steps: int = 1000
    """Optimizer steps."""
    learning_rate: float = 1e-3
    """Peak learning rate."""
    min_learning_rate: float = 0.0
    warmup: int = 100
    """Steps of linear warm-up."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    weight_decay: float = 0.05
    clip: float = 3.0
    """Largest norm of the gradient; 0 turns clipping off."""
    layer_decay: float = 1.0
    """Learning-rate factor from each layer to the one below it."""
    head_scale: float = 1.0
    """Learning-rate multiplier of everything outside the backbone."""
    precision: Literal["fp32", "bf16"] = "fp32"
    zero_stage: Literal[0, 1, 2] = 1
    """DeepSpeed ZeRO stage: 1 shards the optimizer's state, 2 the gradients too."""
    accumulate: int = 1
    """Forward passes per optimizer step."""
    seed: int = 0
    workers: int = 1
    """Ray Train workers; 0 trains in the job's own process, without starting another."""
    gpus_per_worker: float = 0.0
    cpus_per_worker: float = 1.0
    threads: int = 0
    """Torch threads of a worker on CPU; 0: the machine's CPUs shared by the workers."""
    max_failures: int = 3
    """How often Ray restarts the workers before the run fails."""
    checkpoint_every: int = 500
    """Steps between checkpoints; 0 writes none."""
    keep_checkpoints: int = 2
    log_every: int = 10
    evaluate_every: int = 0
    """Steps between evaluations; 0 evaluates at the end only."""

    def __post_init__(self) -> None:
        if self.steps < 1:
            raise ValueError(f"train.steps: expected at least 1, got {self.steps}")
        if self.warmup >= self.steps:
            raise ValueError(f"train.warmup {self.warmup} is not below train.steps {self.steps}")
        if self.gpus_per_worker and not self.workers:
            raise ValueError("train.gpus_per_worker needs train.workers of at least 1")


class Recipe(Protocol):
    """What a run trains. Must be picklable: it travels to the workers."""

    def build(self) -> nn.Module:
        """The module; its forward takes a batch and returns a dict with `loss` and other scalars.

        Parts that are not the model's own start from a backbone named `backbone`.
        """
        ...

    def batches(self, rank: int, world: int) -> Callable[[int], Any]:
        """A function from the number of a batch to this worker's share of it, on CPU."""
        ...

    def samples_per_batch(self) -> int:
        """Samples of a batch over all workers."""
        ...

    def layers(self) -> int:
        """Blocks of the backbone, for layer-wise decay."""
        ...

    def evaluate(self, module: nn.Module, step: int, logger: tracking.Logger) -> dict[str, float]:
        """Scores on held-out data and pictures; called on rank 0."""
        ...

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        """Write the model's files to a local folder; returns notes for its manifest."""
        ...


@dataclass(frozen=True)
class Run:
    """A training run: where it lives, what it trains, and what it leaves."""

    store_uri: str
    name: str
    """Folder of the run in the store, e.g. `runs/base`."""
    output: str
    """Name of the bundle with the trained model, e.g. `models/base`."""
    fingerprint: str
    recipe: Recipe
    config: TrainConfig
    tracking: tracking.RunHandle | None = None
    tuned: bool = False
    """Part of a Ray Tune trial: evaluations are reported to it, and it may stop the run."""
