"""The plain formulation that benchmarks measure against computes what `beit3` computes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from beit3.config import ModelConfig
from beit3.masking import Masking
from beit3.objectives import MaskedDataModelling
from benchmarks._samples import draw
from benchmarks.plain import Heads, convert, from_ours, pad

RELEASED = ModelConfig(
    layers=2,
    hidden=32,
    mlp=48,
    heads=4,
    patch_size=8,
    image_size=32,
    vocab_size=60,
    max_text_length=40,
    codebook_size=20,
)
PAPER = replace(RELEASED, attention="shared", vl_layers=1, sub_ln=False)


def gradients(module: torch.nn.Module) -> dict[str, Tensor]:
    return {
        name: torch.zeros_like(p) if p.grad is None else p.grad
        for name, p in module.named_parameters()
    }


@pytest.mark.parametrize("config", [RELEASED, PAPER], ids=["released", "paper"])
@pytest.mark.parametrize("heads", ["all", "masked"])
@pytest.mark.parametrize(
    ("counts", "pairs"),
    [
        ((2, 3, 4), "separate"),
        ((1, 2, 3), "joint"),
        ((2, 0, 0), "separate"),
        ((0, 3, 0), "separate"),
        ((0, 0, 1), "separate"),
    ],
    ids=["all kinds", "all kinds, joint", "images", "texts", "one pair, its caption masked"],
)
def test_loss_and_gradients(
    config: ModelConfig, heads: Heads, counts: tuple[int, int, int], pairs: str
) -> None:
    torch.manual_seed(0)
    images, texts, both = counts
    masking = Masking(pairs="joint" if pairs == "joint" else "separate", min_block=1)
    samples = draw(config, images=images, texts=texts, pairs=both, seed=1, masking=masking)
    ours = MaskedDataModelling(config)
    plain = from_ours(ours, heads)

    expected = ours(samples.packed())
    found = plain(pad(samples))

    losses = {name for name in expected if name.startswith("loss")}
    assert found.keys() == losses
    for name in losses:
        torch.testing.assert_close(found[name], expected[name], rtol=1e-5, atol=1e-5)
    expected["loss"].backward()
    found["loss"].backward()
    wanted, got = convert(gradients(ours)), gradients(plain)
    assert got.keys() == wanted.keys()
    for name in wanted:
        torch.testing.assert_close(
            got[name], wanted[name], rtol=1e-4, atol=1e-5, msg=lambda m, name=name: f"{name}: {m}"
        )
    assert any(grad.abs().max() > 1e-3 for grad in got.values())


def test_padding_is_to_the_longest_text_of_the_batch() -> None:
    samples = draw(RELEASED, images=0, texts=4, pairs=2, seed=3)
    batch = pad(samples)
    assert batch.texts is not None and batch.texts.text is not None
    assert batch.pairs is not None and batch.pairs.text is not None
    assert batch.texts.text.shape[1] == max(map(len, samples.documents))
    assert batch.pairs.text.shape[1] == max(map(len, samples.captions))
