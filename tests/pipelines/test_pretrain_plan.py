"""What a pretraining run would take, before anything is spent."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import small_corpus
import torch
from torch import nn

from beit3.config import PRESETS as MODELS
from beit3.flops import StepShape
from beit3.objectives import MaskedDataModelling
from pipelines import budget, cluster, pretrain, pretrain_plan, token_checks
from pipelines.budget import GIB, Assumptions
from pipelines.pretrain import PretrainRecipe
from pipelines.pretrain_config import PRESETS, PretrainConfig
from pipelines.recipe import TrainConfig
from pipelines.storage import Store, StoreError


def test_it_needs_neither_data_nor_gpus(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tiny = PRESETS["tiny"]
    cfg = replace(
        tiny,
        store=str(tmp_path),
        train=replace(tiny.train, steps=1000, price_per_hour=2.0, gpus_per_worker=1),
        assume=Assumptions(gpu_tflops=1e-3, mfu=0.5),
    )
    found = pretrain.plan(cfg)
    module = MaskedDataModelling(MODELS["tiny"])
    assert found["parameters"] == sum(p.numel() for p in module.parameters())
    assert found["memory"]["parameters"] == 4 * found["parameters"]
    assert found["missing"] == [f"tokens/{n}" for n in (*cfg.images, *cfg.texts, *cfg.pairs)]
    # Two workers of 1 GFLOP/s, half used, for 2 an hour each.
    assert found["hours"] == pytest.approx(1000 * found["flops_per_step"] / 2 / 0.5e9 / 3600)
    assert found["cost"] == pytest.approx(found["hours"] * 2 * 2.0)
    assert not found["problem"]
    pretrain_plan.show(found)
    said = capsys.readouterr().out
    assert "not checked, since not all tokens are there: tokens/imagenet21k" in said
    with pytest.raises(ValueError, match="dry_run is set"):
        pretrain.run(replace(cfg, dry_run=True))


def test_tokens_that_are_there_are_counted_and_checked(
    corpus: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "start", None)
    cfg = small_corpus.pretraining(corpus, train={"steps": 17})
    found = pretrain.plan(cfg)
    rows = {row["name"]: row for row in found["datasets"]}
    assert not found["missing"]
    assert rows["tokens/pairs"] == {"name": "tokens/pairs", "rows": 34, "samples": 17 * 8}
    # The lengths are those of the tokens: a real batch costs about as much.
    tokenizer = token_checks.check_data(corpus, cfg)[1]
    recipe = PretrainRecipe(cfg, tokenizer)
    batches = recipe.batches(0, 1)
    mean = sum(recipe.flops(batches(step)) for step in range(17)) / 17
    assert found["flops_per_step"] == pytest.approx(mean, rel=0.1)
    with pytest.raises(StoreError, match="codebook_size 99 is not the tokenizer's"):
        pretrain.plan(replace(cfg, model=replace(cfg.model, codebook_size=99)))


def test_too_little_memory_is_a_problem_with_ways_out(tmp_path: Path) -> None:
    giant = PRESETS["giant"]
    model = replace(giant.model, checkpoint_activations="none")
    train = replace(giant.train, zero_stage=2)
    cfg = replace(giant, store=str(tmp_path), model=model, train=train)
    problem = pretrain.plan(replace(cfg, assume=Assumptions(gpu_gib=24)))["problem"]
    assert "its GPU has 24.0 (assume.gpu_gib)" in problem
    for way in ("train.zero_stage 3: ", "train.offload: ", "checkpoint_activations blocks: "):
        assert way in problem
    assert not pretrain.plan(replace(cfg, assume=Assumptions(gpu_gib=640)))["problem"]


@pytest.mark.parametrize(
    ("options", "shares"),  # of parameters, gradients, optimizer and host, in parameters of 4 bytes
    [
        ({"zero_stage": 0}, (1, 1, 2, 0)),
        ({"zero_stage": 1}, (1, 1, 3 / 4, 0)),
        ({"zero_stage": 2}, (1, 1 / 4, 3 / 4, 0)),
        ({"zero_stage": 3}, (1 / 4, 1 / 4, 3 / 4, 0)),
        ({"zero_stage": 2, "offload": True}, (1, 0, 0, 1)),
    ],
)
def test_zero_splits_the_state(options: dict[str, Any], shares: tuple[float, ...]) -> None:
    found = budget.states(1000, TrainConfig(workers=4, **options))
    parts = (found.parameters, found.gradients, found.optimizer, found.host)
    assert parts == tuple(4000 * share for share in shares)


def test_a_gpu_too_small_for_the_state_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    with torch.device("meta"):
        module = nn.Linear(1 << 14, 1 << 16, bias=False)  # 4 GiB
    config, gpu = TrainConfig(workers=2, zero_stage=0), torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (20 * GIB, 24 * GIB))
    budget.check_device(module, config, gpu)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (15 * GIB, 24 * GIB))
    with pytest.raises(ValueError, match=r"take 16.0 GiB of each GPU, and a GPU has 15.0 GiB"):
        budget.check_device(module, config, gpu)
    budget.check_device(module, config, torch.device("cpu"))


def test_presets_fit_the_gpus_that_are_assumed() -> None:
    for name in ("base", "large", "giant"):
        assert not pretrain.plan(replace(PRESETS[name], store="/nowhere"))["problem"], name


def test_the_batch_of_a_worker_has_its_share() -> None:
    cfg = PretrainConfig(train=TrainConfig(workers=16))
    shape = pretrain_plan.worker_shape(cfg, [10], [100, 300])
    assert isinstance(shape, StepShape)
    assert (shape.images, shape.pairs, len(shape.lengths)) == (256, 128, 256)
    assert shape.lengths[:128] == (10,) * 128
    assert shape.lengths[128:].count(100) == shape.lengths[128:].count(300) == 64
    assert shape.masked_patches == 78 * (128 + 64)  # of every other pair the picture is masked
    assert shape.masked_tokens == round(128 * 8 * 0.5 * 0.5 + 64 * (98 + 298) * 0.15)
