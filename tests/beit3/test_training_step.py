"""A training step in all the ways it may run: checkpointed, compiled, in bf16."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from masked_steps import PAPER, RELEASED, STANDARD, VARIANTS, assert_same, build, draw, step
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from beit3.config import Checkpointing, ModelConfig
from beit3.objectives import MaskedBatch, MaskedDataModelling


@pytest.mark.parametrize("mode", ["blocks", "selective"])
@VARIANTS
def test_checkpointing_changes_nothing_but_memory(config: ModelConfig, mode: Checkpointing) -> None:
    config = replace(config, drop_path=0.4)  # what is drawn forward must be drawn again
    batch = draw(config, seed=1)
    plain = step(build(config), batch)
    assert_same(step(build(replace(config, checkpoint_activations=mode)), batch), plain)


def test_checkpointing_repeats_what_it_says() -> None:
    batch = draw(RELEASED, seed=1)

    def flops(mode: Checkpointing) -> int:
        model = build(replace(RELEASED, checkpoint_activations=mode))
        with FlopCounterMode(display=False) as counter:
            step(model, batch)
        return counter.get_total_flops()

    # Forward is a third of a step, and nearly all of it is in the blocks.
    assert flops("selective") == flops("none")
    assert 1.25 < flops("blocks") / flops("none") < 1.34


def test_stored_activations_shrink() -> None:
    batch = draw(RELEASED, seed=1)

    def stored(mode: Checkpointing) -> int:
        """Bytes that the forward pass keeps for the backward pass."""
        kept: dict[int, int] = {}
        model = build(replace(RELEASED, checkpoint_activations=mode))
        own = {p.untyped_storage().data_ptr() for p in model.parameters()}

        def keep(x: Tensor) -> Tensor:
            storage = x.untyped_storage()
            if storage.data_ptr() not in own:
                kept[storage.data_ptr()] = storage.nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
            loss = model(batch)["loss"]
        assert loss.requires_grad
        return sum(kept.values())

    assert stored("blocks") < stored("none") / 2


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [RELEASED, PAPER, STANDARD], ids=["released", "paper", "standard"]
)
def test_the_whole_step_compiles_without_a_break(config: ModelConfig) -> None:
    """One graph, and a second one once sizes are known to vary; both give what eager gives."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    model, eager = build(config), build(config)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for seed in range(4):
        batch = draw(config, seed)
        torch.manual_seed(seed)
        model.zero_grad(set_to_none=True)
        loss = compiled(batch)["loss"]
        loss.backward()
        found = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        expected = step(eager, batch, seed)
        assert_same({"loss": loss.detach(), **found}, expected, atol=1e-5, rtol=1e-4)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 2


@pytest.mark.parametrize("mode", ["blocks", pytest.param("selective", marks=pytest.mark.slow)])
def test_checkpointed_steps_compile_too(mode: Checkpointing) -> None:
    torch._dynamo.reset()
    config = replace(RELEASED, checkpoint_activations=mode)
    model = torch.compile(build(config), fullgraph=True, backend="aot_eager")
    batch = draw(config, seed=0)
    loss = model(batch)["loss"]
    torch.testing.assert_close(loss, build(config)(batch)["loss"], atol=1e-5, rtol=1e-5)
    loss.backward()


@pytest.mark.slow
@VARIANTS
def test_inductor_gives_what_eager_gives(config: ModelConfig) -> None:
    torch._dynamo.reset()
    model, eager = build(config), build(config)
    compiled = torch.compile(model, fullgraph=True)
    for seed in range(3):
        batch = draw(config, seed)
        loss = compiled(batch)["loss"]
        torch.testing.assert_close(loss, eager(batch)["loss"], atol=1e-4, rtol=1e-4)
        loss.backward()
    assert all(p.grad is not None and p.grad.isfinite().all() for p in model.parameters())


@VARIANTS
def test_bf16_is_close_to_fp32(config: ModelConfig) -> None:
    batch = draw(config, seed=2)
    exact = step(build(config), batch)
    for found in (_autocast(build(config), batch), step(build(config).bfloat16(), batch)):
        assert abs(float(found["loss"]) - float(exact["loss"])) < 0.05
        for name, gradient in exact.items():
            error = (found[name].float() - gradient).norm() / gradient.norm().clamp_min(1e-3)
            assert math.isfinite(float(error)) and float(error) < 0.15, name


def _autocast(model: MaskedDataModelling, batch: MaskedBatch) -> dict[str, Tensor]:
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(batch)["loss"]
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}
