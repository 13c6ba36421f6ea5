"""A run of a tiny network that comes to harm at chosen batches: a recipe, and a program.

    python small_run.py FOLDER WORKERS HELD NAME...

trains the named runs in the store `FOLDER/store`, one after the other. At the batch number HELD
(-1: none) the network touches `FOLDER/held` and waits until its worker was asked to stop, or the
run was taken over.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines import cluster, stops
from pipelines import recipe as recipes
from pipelines.recipe import TrainConfig
from pipelines.run_logger import Logger
from pipelines.storage import Store
from pipelines.trainer import fit


@dataclass
class Batch:
    number: int
    data: Tensor
    ids: list[str] = field(default_factory=list)


class Net(nn.Module):
    """Two groups of parameters, dropout, and a buffer that every forward pass changes."""

    def __init__(self, recipe: Recipe) -> None:
        super().__init__()
        self.recipe = recipe
        self.first = nn.Linear(6, 16)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(16, 3)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        self.recipe.before(batch.number)
        self.seen += len(batch.data)
        out = self.last(self.drop(self.first(batch.data).relu()))
        loss = (out - batch.data[:, :3]).pow(2).mean()
        harm = dict(self.recipe.harm).get(batch.number)
        if harm and dist.get_rank() == dist.get_world_size() - 1:
            if harm == "gradient":  # the loss stays what it was
                loss = loss + (out.sum() * 0).sqrt()
            else:
                loss = loss * {"nan": float("nan"), "inf": float("inf"), "spike": 1000.0}[harm]
        return {"loss": loss}


@dataclass(frozen=True)
class Recipe(recipes.Recipe):
    harm: tuple[tuple[int, str], ...] = ()
    """Numbers of batches, and what is wrong with them, for the last worker."""
    held: int = -1
    folder: str = ""

    def build(self) -> nn.Module:
        keep_watches()
        return Net(self)

    def before(self, number: int) -> None:
        if number == self.held and dist.get_rank() == 0:
            (Path(self.folder) / "held").touch()
            for _ in range(2400):
                if watch().stop.is_set() or watch().lost.is_set():
                    return
                time.sleep(0.05)
            raise AssertionError("nothing came")

    def layers(self) -> int:
        return 1

    def samples_per_batch(self) -> int:
        return 8

    def batches(self, rank: int, world: int) -> Callable[[int], Batch]:
        def batch(number: int) -> Batch:
            whole = torch.randn(8, 6, generator=torch.Generator().manual_seed(number))
            ids = [f"{number}/{row}" for row in range(8)]
            return Batch(number, whole[rank::world], ids[rank::world])

        return batch

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        return {}

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        tensors = {k: v.clone() for k, v in module.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        return {}


def keep_watches() -> None:
    """Have `watch` return what looks out for this process's run."""

    def enter(self: stops.Watch) -> stops.Watch:
        stops.__dict__["latest"] = self
        return self

    stops.Watch.__enter__ = enter


def watch() -> stops.Watch:
    return stops.__dict__["latest"]


def config(**changes: Any) -> TrainConfig:
    start = TrainConfig(
        steps=8, warmup=2, learning_rate=1e-2, workers=0, checkpoint_every=0, log_every=1,
        threads=1, max_failures=0,
    )  # fmt: skip
    return replace(start, **changes)


def train(
    store: Store, name: str, recipe: Any, *, track: bool = False, **changes: Any
) -> dict[str, Any]:
    return fit(
        store, name=name, output=f"models/{name}", fingerprint="same", recipe=recipe,
        config=config(**changes), parameters={}, track=track,
    )  # fmt: skip


def trained(store: Store, name: str) -> dict[str, Tensor]:
    return load_file(store.path("models", name, "model.safetensors"))


def main(folder: str, workers: int, held: int, names: list[str]) -> None:
    if workers:
        cluster.start(cpus=workers)
    for name in names:
        train(Store(f"{folder}/store"), name, Recipe((), held, folder), workers=workers)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), sys.argv[4:])
