"""FLOPs and memory by formula, against what PyTorch counts while a step runs."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.distributed._tools.mem_tracker import MemTracker

from beit3 import flops
from beit3.config import PRESETS, Checkpointing, ModelConfig, Precision
from beit3.flops import StepShape
from beit3.masking import Masking, token_mask
from beit3.memory import activation_bytes
from beit3.objectives import DualEncoder, MaskedBatch, MaskedDataModelling
from benchmarks._measure import counted_flops

PAPER = replace(PRESETS["tiny"], layers=3)
RELEASED = replace(PAPER, attention="per_modality", vl_layers=0, sub_ln=True)


def masked_batch(config: ModelConfig, images: int, pairs: int, lengths: list[int]) -> MaskedBatch:
    """Noise, masked as in pretraining."""
    rng, masking = np.random.default_rng(0), Masking(min_block=1)
    hidden = np.array([masking.of_image(config.grid, rng) for _ in range(images)], bool)
    shape = (images, config.patches)
    return MaskedBatch.collate(
        torch.randint(0, 256, (images, 3, config.image_size, config.image_size)).byte(),
        torch.from_numpy(hidden.reshape(shape)),
        torch.randint(config.codebook_size, shape),
        [rng.integers(4, config.vocab_size - 1, n).tolist() for n in lengths],
        [token_mask(n, 0.3, rng) for n in lengths],
        config.vocab_size - 1,
        pairs=pairs,
    )


def counted_again(config: ModelConfig, shape: StepShape) -> float:
    """Attention's backward pass multiplies queries by keys a second time: counted, not needed."""
    squares = sum(n * n for n in shape.sequences(config))
    return 2.0 * config.layers * config.hidden * squares


@pytest.mark.parametrize("config", [PAPER, RELEASED], ids=["paper", "released"])
@pytest.mark.parametrize(
    ("images", "pairs", "lengths"),
    [(5, 2, [9, 9, 30, 12, 7]), (3, 0, []), (0, 0, [20, 5]), (2, 2, [11, 11])],
    ids=["all kinds", "images", "texts", "pairs"],
)
def test_a_masked_step_costs_what_the_formula_says(
    config: ModelConfig, images: int, pairs: int, lengths: list[int]
) -> None:
    batch = masked_batch(config, images, pairs, lengths)  # of lengths that need no padding
    shape, module = StepShape.of(batch), MaskedDataModelling(config)
    counted = counted_flops(lambda: module(batch)["loss"].backward())
    assert counted == flops.masked_step(config, shape) + counted_again(config, shape)


def test_a_contrastive_step_costs_what_the_formula_says() -> None:
    lengths, module = [9, 14, 5], DualEncoder(PAPER)
    images = torch.randint(0, 256, (3, 3, PAPER.image_size, PAPER.image_size)).byte()
    text = torch.randint(4, 1000, (sum(lengths),))
    counted = counted_flops(lambda: module(images, text, lengths)["loss"].backward())
    each_with_all = 3 * 2 * (2 * 3 * 3 * PAPER.hidden)
    needed = flops.contrastive_step(PAPER, 3, lengths) + each_with_all
    assert counted == needed + counted_again(PAPER, StepShape(3, 0, tuple(lengths)))


def test_the_peak_is_of_the_machine() -> None:
    assert 1e8 < flops.matmul_peak(torch.device("cpu"), torch.float32, [256], repeats=2) < 1e14


def most_bytes(config: ModelConfig, batch: MaskedBatch, precision: Precision) -> int:
    """The most that tensors hold in a step beside parameters and gradients."""
    module, bf16 = MaskedDataModelling(config).train(), precision == "bf16"
    for parameter in module.parameters():
        parameter.grad = torch.zeros_like(parameter)
    tracker = MemTracker()
    tracker.track_external(module)
    with tracker:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = module(batch)["loss"]
        loss.backward()
    (peak,) = tracker.get_tracker_snapshot("peak").values()
    return peak["Total"] - 2 * sum(4 * p.numel() for p in module.parameters())


@pytest.mark.parametrize("checkpointing", ["none", "blocks", "selective"])
@pytest.mark.parametrize(
    ("config", "precision"),
    # In bf16 norms differ: on a GPU, which the formula is for, autocast has them in fp32.
    [
        (PAPER, "fp32"),
        pytest.param(PAPER, "bf16", marks=pytest.mark.slow),
        pytest.param(RELEASED, "fp32", marks=pytest.mark.slow),
    ],
    ids=["paper", "paper in bf16", "released"],
)
def test_activations_take_about_what_the_formula_says(
    config: ModelConfig, precision: Precision, checkpointing: Checkpointing
) -> None:
    config = replace(config, layers=5, hidden=128, mlp=512, checkpoint_activations=checkpointing)
    batch = masked_batch(config, 20, 8, [12] * 8 + [60, 80, 100, 40, 30, 20, 50, 70, 90, 110])
    found = most_bytes(config, batch, precision)
    assert activation_bytes(config, StepShape.of(batch), precision) == pytest.approx(
        found, rel=0.15
    )
