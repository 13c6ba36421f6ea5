"""Schedule, layer-wise decay and parameter groups against the recipes' rules."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from beit3.config import ModelConfig
from beit3.multiway import Encoder
from beit3.objectives import DualEncoder, MaskedDataModelling
from beit3.optimisation import cosine_schedule, decays, layer_scale, parameter_groups

CONFIG = ModelConfig(
    layers=3,
    hidden=16,
    mlp=24,
    heads=2,
    patch_size=8,
    image_size=16,
    vocab_size=20,
    max_text_length=8,
    codebook_size=12,
)


def test_the_schedule_warms_up_linearly_then_falls_as_a_half_cosine() -> None:
    def rate(step: int) -> float:
        return cosine_schedule(step, peak=1e-3, warmup=10, steps=110, floor=1e-5)

    assert [rate(step) for step in range(10)] == pytest.approx([1e-4 * (s + 1) for s in range(10)])
    assert rate(10) == pytest.approx(1e-3)
    assert rate(60) == pytest.approx((1e-3 + 1e-5) / 2)
    assert rate(35) == pytest.approx(1e-5 + (1e-3 - 1e-5) * (1 + math.cos(math.pi / 4)) / 2)
    assert rate(110) == pytest.approx(1e-5)
    assert rate(10_000) == pytest.approx(1e-5)
    falling = [rate(step) for step in range(10, 111)]
    assert falling == sorted(falling, reverse=True)


def test_the_schedule_without_warmup_starts_at_the_peak() -> None:
    assert cosine_schedule(0, peak=2.0, warmup=0, steps=10) == pytest.approx(2.0)
    assert cosine_schedule(10, peak=2.0, warmup=0, steps=10) == pytest.approx(0.0)


def test_a_schedule_that_is_all_warmup_ends_at_the_peak() -> None:
    assert cosine_schedule(9, peak=2.0, warmup=10, steps=10) == pytest.approx(2.0)


@pytest.mark.parametrize("prefix", ["", "backbone.", "model.backbone."])
def test_every_layer_has_its_scale(prefix: str) -> None:
    scales = {
        name: layer_scale(f"{prefix}{name}", 12, 0.5)
        for name in (
            "vision_embedding.projection.weight",
            "vision_embedding.cls_token",
            "vision_embedding.positions",
            "text_embedding.weight",
            "text_positions",
        )
    }
    assert set(scales.values()) == {0.5**13}
    for block in (0, 1, 10, 11):
        name = f"{prefix}encoder.blocks.{block}.attention.norm.weight"
        assert layer_scale(name, 12, 0.5) == 0.5 ** (12 - block)
    assert layer_scale(f"{prefix}encoder.norm.vision.weight", 12, 0.5) == 1.0
    assert layer_scale("head.weight", 12, 0.5) == 1.0


def test_the_layers_of_a_real_model_are_recognised() -> None:
    """The names that the scale goes by are those that the model has."""
    model = MaskedDataModelling(CONFIG)
    found: dict[float, set[str]] = {}
    for name, _ in model.named_parameters():
        found.setdefault(layer_scale(name, 3, 0.5), set()).add(name)
    assert sorted(found) == [0.5**4, 0.5**3, 0.5**2, 0.5, 1.0]
    assert all("embedding" in n or "positions" in n for n in found[0.5**4])
    for block in range(3):
        assert all(f".blocks.{block}." in n for n in found[0.5 ** (3 - block)])
    assert {n.split(".")[0] for n in found[1.0]} == {"backbone", "image_head", "text_head"}
    final = {n for n, _ in model.backbone.encoder.named_parameters() if not n.startswith("blocks.")}
    assert {f"backbone.encoder.{n}" for n in final} < found[1.0]


def test_what_decays() -> None:
    model = nn.Module()
    model.backbone = MaskedDataModelling(CONFIG).backbone
    model.scale = DualEncoder(CONFIG).logit_scale
    spared = {n for n, p in model.named_parameters() if not decays(n, p)}
    for name, parameter in model.named_parameters():
        if name.endswith("bias") or parameter.ndim == 1:
            assert name in spared, name
    assert "scale" in spared
    for name in ("vision_embedding.cls_token", "vision_embedding.positions"):
        assert f"backbone.{name}" in spared
    for name in ("text_embedding.weight", "text_positions", "vision_embedding.projection.weight"):
        assert f"backbone.{name}" not in spared


def by_parameter(module: nn.Module, **options: float) -> dict[str, tuple[float, float]]:
    """Name to (lr_scale, weight_decay); every trainable parameter must stand in one group."""
    groups = parameter_groups(module, **options)  # type: ignore[arg-type]
    names = {id(p): n for n, p in module.named_parameters()}
    placed = [
        (names[id(p)], (group["lr_scale"], group["weight_decay"]))
        for group in groups
        for p in group["params"]
    ]
    trainable = [n for n, p in module.named_parameters() if p.requires_grad]
    assert sorted(n for n, _ in placed) == sorted(trainable)
    return dict(placed)


def test_groups_without_layer_decay() -> None:
    groups = parameter_groups(MaskedDataModelling(CONFIG), weight_decay=0.05, layers=3)
    assert {(g["lr_scale"], g["weight_decay"]) for g in groups} == {(1.0, 0.05), (1.0, 0.0)}


def test_groups_with_layer_decay() -> None:
    placed = by_parameter(MaskedDataModelling(CONFIG), weight_decay=0.05, layers=3, layer_decay=0.5)
    assert placed["backbone.text_embedding.weight"] == (0.5**4, 0.05)
    assert placed["backbone.vision_embedding.positions"] == (0.5**4, 0.0)
    assert placed["image_head.weight"] == (1.0, 0.05)
    assert placed["image_head.bias"] == (1.0, 0.0)
    assert {s for s, _ in placed.values()} == {1.0, 0.5, 0.25, 0.125, 0.0625}


@pytest.mark.parametrize("layer_decay", [1.0, 0.5])
def test_head_scale_reaches_what_lies_outside_the_backbone(layer_decay: float) -> None:
    module = nn.Module()
    module.model = MaskedDataModelling(CONFIG)  # the backbone may lie deeper
    options = {"weight_decay": 0.05, "layers": 3, "layer_decay": layer_decay}
    plain = by_parameter(module, **options)
    scaled = by_parameter(module, **options, head_scale=20.0)
    for name, (scale, decay) in scaled.items():
        factor = 1.0 if ".backbone." in name else 20.0
        assert (scale, decay) == (plain[name][0] * factor, plain[name][1]), name


def test_frozen_parameters_are_in_no_group() -> None:
    model = MaskedDataModelling(CONFIG)
    model.backbone.requires_grad_(False)
    assert all(name.split(".")[0] != "backbone" for name in by_parameter(model, weight_decay=0.05))


def test_groups_are_in_a_fixed_order() -> None:
    """A resumed optimizer pairs its states with groups by their place."""
    build = [
        parameter_groups(
            Encoder(replace(CONFIG)), weight_decay=0.05, layers=3, layer_decay=0.9, head_scale=2.0
        )
        for _ in range(2)
    ]
    shapes = [[[p.shape for p in group["params"]] for group in groups] for groups in build]
    assert shapes[0] == shapes[1]
    optimizer = torch.optim.AdamW(build[0])
    assert len(optimizer.param_groups) == len(build[1])
