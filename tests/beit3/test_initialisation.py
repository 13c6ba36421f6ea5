"""Random weights begin as the paper (plain) and Magneto (sub-LN) have them."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from torch import nn

from beit3.config import ModelConfig
from beit3.model import BEiT3

PAPER = ModelConfig(
    layers=3,
    hidden=352,
    mlp=704,
    heads=4,
    patch_size=8,
    image_size=16,
    vocab_size=50,
    max_text_length=8,
    attention="shared",
    vl_layers=1,
    sub_ln=False,
)
RELEASED = replace(PAPER, attention="per_modality", vl_layers=0, sub_ln=True)


def linears(config: ModelConfig) -> dict[str, nn.Linear]:
    torch.manual_seed(0)
    modules = BEiT3(config).encoder.named_modules()
    return {name: module for name, module in modules if isinstance(module, nn.Linear)}


def test_the_paper_s_range_shrinks_with_depth_in_output_matrices() -> None:
    found = linears(PAPER)
    assert len(found) == 3 * 2 + 3 * 4 + 2  # attention, two experts a layer, the fusion expert
    for name, module in found.items():
        layer = int(name.split(".")[1]) + 1
        bound = 0.02 * math.sqrt(1408 / 352)
        if name.endswith("fc2") or ".out" in name:
            bound /= math.sqrt(2 * layer)
        assert 0.99 * bound < float(module.weight.detach().abs().max()) <= bound, name
        assert float(module.weight.detach().std()) == pytest.approx(bound / math.sqrt(3), rel=0.02)
        assert not module.bias.detach().any()


def test_magneto_scales_values_and_outputs() -> None:
    gain = math.sqrt(math.log(2 * 3))
    for name, module in linears(RELEASED).items():
        weight = module.weight.detach()
        xavier = math.sqrt(2.0 / sum(weight.shape))
        if ".qkv" in name:
            assert float(weight[: 2 * 352].std()) == pytest.approx(xavier, rel=0.02), name
            weight = weight[2 * 352 :]
        assert float(weight.std()) == pytest.approx(gain * xavier, rel=0.02), name
        assert not module.bias.detach().any()


def test_tables_begin_small() -> None:
    torch.manual_seed(0)
    model = BEiT3(replace(PAPER, vocab_size=2000, max_text_length=500))
    assert float(model.text_positions.detach().std()) == pytest.approx(0.02, rel=0.02)
    words = model.text_embedding.weight.detach()
    assert float(words.std()) == pytest.approx(352**-0.5, rel=0.02)
