"""The definition of a training run: its options, what it trains, and where it is stored."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol

from torch import nn

from beit3.config import Precision
from pipelines import run_logger, tracking
from pipelines.config import indifferent

if TYPE_CHECKING:
    from pipelines.budget import StepMemory


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
    precision: Precision = "fp32"
    zero_stage: Literal[0, 1, 2, 3] | None = indifferent(None, noted=0)
    """DeepSpeed ZeRO stage: 1 shards the optimizer's state, 2 also the gradients, 3 also the
    parameters. None: 1, but 0 for a single worker, which has no one to shard with and would copy
    everything for nothing."""
    offload: bool = indifferent(False, noted=False)
    """Keep the optimizer's state, and step, in CPU memory; needs ZeRO 1 or above."""
    compile: bool = indifferent(False, noted=False)
    """Fuse each step's operators (torch.compile). For GPUs: compiling takes minutes at each start.
    Results, also after a resume, are the same up to rounding."""
    ema: float = 0.0
    """Decay per step of a moving average of the weights (say 0.9999), which is evaluated and
    exported in their place; 0 keeps none. The decay is at most `(1 + step) / (10 + step)`."""
    accumulate: int = 1
    """Batches per optimizer step, one after the other."""
    seed: int = 0
    workers: int = indifferent(1, noted=0)
    """Ray Train workers; 0 trains in the job's own process, without starting another."""
    gpus_per_worker: float = indifferent(0.0, noted=0)
    """1 for a GPU of its own, 0 for none. Less than 1, for a single worker: its share of a GPU on
    which other trials also train."""
    cpus_per_worker: float = indifferent(1.0, noted=0)
    threads: int = indifferent(0, noted=0)
    """Torch threads of a worker on CPU; 0: the machine's CPUs divided among the workers."""
    loader_workers: int = indifferent(0, noted=0)
    """Processes, each on its own CPU, that make a worker's batches: decode pictures, crop and mask.
    On a cluster they are spread over the nodes. 0: a thread of the worker makes them."""
    max_failures: int = indifferent(3, noted=0)
    """How often Ray restarts the workers before the run fails; if they wrote a new checkpoint
    meanwhile, as often again."""
    checkpoint_every: int = indifferent(500, noted=0)
    """Steps between checkpoints; 0 writes none."""
    keep_checkpoints: int = indifferent(2, noted=0)
    """How many of the newest checkpoints are kept."""
    keep_every: int = indifferent(0, noted=0)
    """Checkpoints at multiples of this many steps are kept for ever; 0 for none."""
    on_bad_step: Literal["stop", "skip"] = indifferent("stop", noted="")
    """Reaction to a step whose loss or gradient is not finite, or whose loss is a spike: stop the
    run, or skip the step. Either way its samples are listed in the run's `bad-steps`."""
    spike_factor: float = indifferent(0.0, noted=0)
    """A loss above this factor times the median of the last 64 good steps is a spike; 0: none is.
    There are no spikes before the 17th good step."""
    max_bad_steps: int = indifferent(10, noted=0)
    """With skip: this many bad steps in a row end the run."""
    spot_notice: bool = indifferent(False, noted=False)
    """Ask the metadata service of EC2 or Google Compute Engine whether a worker's spot machine is
    about to be taken back; then write a checkpoint at once."""
    max_hours: float = indifferent(0.0, noted=0)
    """Hours after which the run writes a checkpoint and stops, counted from this start of the
    command, including the time to start workers; 0: no limit."""
    max_cost: float = indifferent(0.0, noted=0)
    """Like `max_hours`, but a limit on what all workers cost in that time; 0: no limit."""
    price_per_hour: float = indifferent(0.0, noted=0)
    """Price of one worker for one hour, in the currency of `max_cost`."""
    log_every: int = indifferent(10, noted=0)
    evaluate_every: int = indifferent(0, noted=0)
    """Steps between evaluations; 0 evaluates at the end only."""

    def __post_init__(self) -> None:
        for name in ("steps", "accumulate", "log_every", "max_bad_steps"):
            if getattr(self, name) < 1:
                raise ValueError(f"train.{name}: expected at least 1, got {getattr(self, name)}")
        for name in (
            *("warmup", "learning_rate", "min_learning_rate", "weight_decay", "clip", "workers"),
            *("cpus_per_worker", "threads", "loader_workers", "checkpoint_every", "keep_every"),
            *("evaluate_every", "max_hours", "max_cost", "price_per_hour"),
        ):
            if getattr(self, name) < 0:
                raise ValueError(f"train.{name}: expected 0 or more, got {getattr(self, name)}")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise ValueError(f"train.betas: expected decays from 0 to below 1, got {self.betas}")
        if self.warmup >= self.steps:
            raise ValueError(f"train.warmup {self.warmup} is not below train.steps {self.steps}")
        if self.spike_factor and self.spike_factor <= 1:
            raise ValueError(
                f"train.spike_factor: expected 0 or more than 1, got {self.spike_factor}"
            )
        if self.max_cost and not self.price_per_hour:
            raise ValueError("train.max_cost needs train.price_per_hour, the price of a worker")
        if self.offload and not self.stage:
            raise ValueError("train.offload needs train.zero_stage of at least 1")
        if self.compile and self.stage == 3:
            raise ValueError(
                "train.compile: not with train.zero_stage 3, which puts parameters together from "
                "module to module; set 0 to 2"
            )
        if not 0 <= self.ema < 1:
            raise ValueError(f"train.ema: expected a decay from 0 to below 1, got {self.ema}")
        if self.keep_checkpoints < 1:
            raise ValueError(
                f"train.keep_checkpoints: expected at least 1, got {self.keep_checkpoints}; "
                "train.checkpoint_every 0 writes none"
            )
        if self.keep_every and self.keep_every % (self.checkpoint_every or self.keep_every + 1):
            raise ValueError(
                f"train.keep_every {self.keep_every}: expected a multiple of "
                f"train.checkpoint_every {self.checkpoint_every}; of other steps there are none"
            )
        if self.gpus_per_worker and not self.workers:
            raise ValueError("train.gpus_per_worker needs train.workers of at least 1")
        if not 0 <= self.gpus_per_worker <= 1:
            raise ValueError(
                f"train.gpus_per_worker: a worker trains on one GPU, got {self.gpus_per_worker:g}: "
                "for more GPUs set train.workers to their number"
            )
        if self.workers > 1 and 0 < self.gpus_per_worker < 1:
            raise ValueError(
                f"train.gpus_per_worker {self.gpus_per_worker:g}: of several workers each needs a "
                "GPU of its own to reach the others (NCCL): set 1, or train.workers 1"
            )

    def check_shared(self, name: str, batch: int) -> None:
        """
        Raises:
            ValueError: the batch set by the option `name` can't be divided equally among workers.
        """
        if self.workers and batch % self.workers:
            raise ValueError(
                f"{name} {batch} is not divisible by train.workers {self.workers}: set a multiple"
            )

    @property
    def stage(self) -> int:
        """The effective ZeRO stage."""
        if self.zero_stage is not None:
            return self.zero_stage
        return 1 if self.workers > 1 or self.offload else 0


class Recipe(Protocol):
    """Defines what a run trains; to be subclassed. Must be picklable: it is sent to the workers."""

    def build(self) -> nn.Module:
        """The module; its forward takes a batch and returns a dict with `loss` and other scalars.

        The backbone, which may start from another model, is named `backbone`.
        """
        ...

    def batches(self, rank: int, world: int) -> Callable[[int], Any]:
        """A function from a batch's number to this worker's share of it, on CPU."""
        ...

    def samples_per_batch(self) -> int:
        """Samples per batch, over all workers."""
        ...

    def flops(self, batch: Any) -> float:
        """FLOPs that a worker's batch needs, forward and backward; 0 if they are not counted."""
        return 0.0

    def of_one_step(self, batches: Sequence[Any]) -> Sequence[Any]:
        """A worker's batches of one optimizer step, on CPU, told what they must know of each other
        so that the mean of their losses is the step's."""
        return batches

    def layers(self) -> int:
        """Blocks of the backbone, for layer-wise decay."""
        ...

    def evaluate(self, module: nn.Module, step: int, logger: run_logger.Logger) -> dict[str, float]:
        """Scores on held-out data; may log pictures. Called on rank 0."""
        ...

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        """Write the model's files to a local folder; returns notes for its manifest."""
        ...


@dataclass(frozen=True)
class Run:
    """A training run: where it is stored, what it trains, and what it produces."""

    store_uri: str
    name: str
    """Folder of the run in the store, e.g. `runs/base`."""
    output: str
    """Name of the bundle with the trained model, e.g. `models/base`."""
    fingerprint: str
    recipe: Recipe
    config: TrainConfig
    tracking: tracking.RunHandle | None = None
    parameters: Mapping[str, Any] = field(default_factory=dict)
    """The flattened configuration, as noted in checkpoints."""
    step_memory: StepMemory | None = None
    """Memory that a step takes on a GPU on top of the state, if it was estimated."""
    start: str = ""
    """Names this start of the job: if a later one is noted in the store, this one gives way."""
    tuned: bool = False
    """Part of a Ray Tune trial: evaluations are reported to it, and it may stop the run."""
