"""Small models in the three layouts of experts, batches for them, and a step of both."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from beit3.config import ModelConfig
from beit3.masking import Masking, token_mask
from beit3.objectives import MaskedBatch, MaskedDataModelling

PAPER = ModelConfig(
    layers=2,
    hidden=32,
    mlp=64,
    heads=4,
    patch_size=8,
    image_size=32,
    vocab_size=90,
    max_text_length=40,
    codebook_size=30,
    attention="shared",
    vl_layers=1,
    sub_ln=False,
)
RELEASED = replace(PAPER, attention="per_modality", vl_layers=0, sub_ln=True)
STANDARD = replace(PAPER, multiway=False, vl_layers=0)
VARIANTS = pytest.mark.parametrize(
    "config", [PAPER, RELEASED, STANDARD], ids=["paper", "released", "standard"]
)


def draw(config: ModelConfig, seed: int, images: int = 3, texts: int = 4, pairs: int = 3) -> Any:
    """A batch whose lengths and numbers of masked positions depend on the seed."""
    rng = np.random.default_rng(seed)
    masking = Masking(min_block=2)
    lengths = rng.integers(4, 30, pairs + texts).tolist()
    patch_masks = [masking.of_image(config.grid, rng) for _ in range(images)]
    token_masks = []
    for length in lengths[:pairs]:
        of_image, of_text = masking.of_pair(config.grid, length, rng)
        patch_masks.append(of_image)
        token_masks.append(of_text)
    # Every objective is there, whatever side of each pair was drawn. Twice: sizes of 1 are special.
    patch_masks[images][:2], token_masks[0][1:3] = True, True
    token_masks += [token_mask(length, masking.text, rng) for length in lengths[pairs:]]
    side, n = config.image_size, images + pairs
    return MaskedBatch.collate(
        torch.from_numpy(rng.integers(0, 256, (n, 3, side, side), dtype=np.uint8)),
        torch.from_numpy(np.stack(patch_masks)),
        torch.from_numpy(rng.integers(0, config.codebook_size, (n, config.patches))),
        [rng.integers(4, config.vocab_size - 1, length).tolist() for length in lengths],
        token_masks,
        config.vocab_size - 1,
        pairs=pairs,
    )


def build(config: ModelConfig) -> MaskedDataModelling:
    torch.manual_seed(0)
    return MaskedDataModelling(config)


def step(model: Any, batch: MaskedBatch, seed: int = 0) -> dict[str, Tensor]:
    """Loss and gradients of a step, by name."""
    torch.manual_seed(seed)
    model.zero_grad(set_to_none=True)
    loss = model(batch)["loss"]
    loss.backward()
    gradients = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"loss": loss.detach(), **gradients}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor], **tolerance: Any) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(
            found[name], value, msg=lambda m, n=name: f"{n}: {m}", **tolerance
        )
