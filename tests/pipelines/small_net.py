"""A small network, and runs of it on one worker, in this process, that stop and are compared."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines import bundles, checkpoints
from pipelines import recipe as recipes
from pipelines.recipe import TrainConfig
from pipelines.run_logger import Logger
from pipelines.storage import Store
from pipelines.trainer import fit

STEPS = 7
STAGES = (0, 1, 2, 3)
DECAY = 0.3


class Net(nn.Module):
    """Two groups of parameters, of odd sizes and one too large for ZeRO 3 to keep whole, a frozen
    one, a buffer, and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(6, 17)
        self.norm = nn.LayerNorm(17)
        self.wide = nn.Linear(17, 6001)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(6001, 3)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen += len(batch)
        hidden = self.drop(self.wide(self.norm(self.first(batch))))
        out = self.last(hidden) + self.frozen
        return {"loss": (out - batch[:, :3]).pow(2).mean()}


@dataclass(frozen=True)
class Recipe(recipes.Recipe):
    stop_at: int | None = None
    """The number of the batch at which the run is interrupted."""
    dropout: float = 0.3

    def build(self) -> nn.Module:
        return Net(self.dropout)

    def layers(self) -> int:
        return 1

    def samples_per_batch(self) -> int:
        return 8

    def batches(self, rank: int, world: int) -> Callable[[int], Tensor]:
        def batch(step: int) -> Tensor:
            if step == self.stop_at:
                raise KeyboardInterrupt
            return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))[rank::world]

        return batch

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(1_000))
        return {"loss": float(module(batch)["loss"])}

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        tensors = {k: v.clone() for k, v in module.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        return {}


def train(
    store: Store, stop_at: int | None = None, *, name: str = "run", **changes: Any
) -> dict[str, Tensor]:
    """Train to the end, or until it is interrupted; the trained weights."""
    recipe = changes.pop("recipe", None) or Recipe(stop_at, changes.pop("dropout", 0.3))
    fit(
        store, name=name, output=f"models/{name}", fingerprint="same", recipe=recipe,
        config=train_config(**changes), parameters={}, track=False,
    )  # fmt: skip
    return state(store, f"models/{name}")["model"]


def train_config(**changes: Any) -> TrainConfig:
    start = TrainConfig(
        steps=STEPS, warmup=2, learning_rate=1e-2, workers=0, checkpoint_every=1,
        keep_checkpoints=2, log_every=1, threads=1, zero_stage=1,
    )  # fmt: skip
    return replace(start, **changes)


def evaluated(store: Store, bundle: str = "models/run") -> float:
    """The loss of an exported model, as the recipe's evaluation computes it."""
    net = Net(0.0).eval().requires_grad_(False)
    net.load_state_dict(state(store, bundle)["model"])
    return Recipe().evaluate(net, 0, Logger(None))["loss"]


def interrupted(store: Store, stop_at: int, **changes: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(store, stop_at, **changes)


def state(store: Store, bundle: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a bundle, by file."""
    found = store.read_json(f"{bundle}/{bundles.MANIFEST}")["files"]
    return {
        name.removesuffix(".safetensors"): load_file(store.path(bundle, name)) for name in found
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5, msg=name)


def agree(found: Store, wanted: Store, step: int) -> None:
    """The checkpoints of that step are the same to rounding."""
    where = checkpoints.folder("runs/run", step)
    own, other = state(found, where), state(wanted, where)
    assert own.keys() == other.keys()
    for file, tensors in own.items():
        close(tensors, other[file])


def begun(unbroken: Store, folder: Path, step: int) -> Store:
    """A store with a run of that many steps, of which only the last checkpoint is there."""
    name = checkpoints.folder("runs/run", step)
    shutil.copytree(unbroken.path(name), folder / name)
    return Store(folder)
