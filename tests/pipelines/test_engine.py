"""The settings that reach DeepSpeed: sizes of the model, not DeepSpeed's own."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import PRESETS as MODELS
from beit3.memory import hollow
from pipelines import budget
from pipelines import engine as engines
from pipelines.recipe import Run, TrainConfig

Build = Callable[..., Any]


class Net(nn.Module):
    """Linear layers, whose gradients travel in bf16 under autocast, and a norm, whose don't."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 40)
        self.norm = nn.LayerNorm(40)
        self.last = nn.Linear(40, 30)
        self.frozen = nn.Parameter(torch.ones(30), requires_grad=False)

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        out = self.last(self.norm(self.first(batch))) + self.frozen
        return {"loss": out.pow(2).mean()}


TRAINED = sum(p.numel() for p in Net().parameters() if p.requires_grad)
FROZEN = 30


@dataclass(frozen=True)
class Layers:
    """All that an engine asks of a recipe."""

    def layers(self) -> int:
        return 1


@pytest.fixture
def build(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Build]:
    """Makes an engine of one process, which is told how many workers there are."""
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    monkeypatch.setenv("LOCAL_RANK", "0")
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/group", rank=0, world_size=1)
    made: list[Any] = []
    linear = F.linear

    def build(**changes: Any) -> Any:
        recipe: Any = Layers()
        run = Run("", "runs/run", "models/run", "", recipe, TrainConfig(**changes))
        made.append(engines.build(run, Net()))
        return made[-1]

    yield build
    import deepspeed.comm

    for engine in made:
        engines.close(engine)
    deepspeed.comm.destroy_process_group()
    assert F.linear is linear, "ZeRO 3 has left its own behind"


@pytest.mark.parametrize("bucket", [TRAINED + 1, 100])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("gpus", [0.0, 1.0])
@pytest.mark.parametrize("stage", [1, 2])
def test_buffers_are_as_large_as_the_budget_says(
    stage: int,
    gpus: float,
    precision: str,
    bucket: int,
    build: Build,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(budget, "_BUCKET", bucket)
    options = {"zero_stage": stage, "precision": precision, "gpus_per_worker": gpus, "workers": 2}
    engine = build(**options)
    found: list[Tensor] = []
    release = engine.optimizer._release_ipg_buffers

    def note_and_release() -> None:  # as the backward pass ends
        found.extend(buffer for b in engine.optimizer.ipg_buckets.values() for buffer in b.buffer)
        release()

    monkeypatch.setattr(engine.optimizer, "_release_ipg_buffers", note_and_release)
    engine.backward(engine(torch.randn(3, 6))["loss"])
    assert {len(buffer) for buffer in found} == {min(bucket, TRAINED)}
    said = budget.states(TRAINED, TrainConfig(**options), frozen=FROZEN).buffers
    assert sum(buffer.nbytes for buffer in found) == said
    assert engine.zero_overlap_comm() == (gpus > 0)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_zero_3_holds_whole_what_the_budget_says(precision: str, build: Build) -> None:
    options = {"zero_stage": 3, "precision": precision, "workers": 2}
    engine = build(**options)
    assert not engine.zero_overlap_comm()
    found = [bucket.buffer for bucket in engine.optimizer.ipg_buckets.values()]
    live = (TRAINED + FROZEN) // 4
    said = budget.states(TRAINED, TrainConfig(**options), frozen=FROZEN).buffers
    assert sum(buffer.nbytes for buffer in found) + 4 * live == said
    assert engine.zero_max_live_parameters() == engine.zero_max_reuse_distance() == live
    assert engine.zero_prefetch_bucket_size() == live
    kept = {name for name, p in engine.module.named_parameters() if p.ds_persist}
    assert kept == {n for n, p in Net().named_parameters() if p.ndim == 1}  # matrices are split


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_only_zero_clips_by_itself(stage: int, build: Build) -> None:
    """Else `guards.Guard` does, by the norm that it computes anyhow."""
    engine = build(zero_stage=stage, clip=2.5)
    assert engine.gradient_clipping() == (2.5 if stage else 0.0)


def test_sizes_of_the_large_models() -> None:
    """Buckets and what is held whole stop growing with the model."""
    counts = [sum(p.numel() for p in hollow(MODELS[n]).parameters()) for n in ("tiny", "giant")]
    assert [budget.bucket(n) for n in counts] == [counts[0], 50_000_000]
    assert [budget.gathered(n) for n in counts] == [counts[0] // 4, 200_000_000]
    one = TrainConfig(workers=1, gpus_per_worker=1.0)
    assert not budget.overlaps(one) and budget.overlaps(replace(one, workers=2))
