"""The Multiway Transformer against the released code's activations, and its own invariants."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from beit3.config import ModelConfig
from beit3.model import BEiT3, interpolate_positions, pack_texts
from beit3.multiway import Layout, Streams
from beit3.released import from_released
from beit3.weights import load_into

FIXTURE = Path(__file__).parent / "fixtures" / "released_tiny"
RELEASED = ModelConfig(
    layers=4,
    hidden=64,
    mlp=256,
    heads=4,
    patch_size=8,
    image_size=32,
    vocab_size=200,
    max_text_length=62,
)
PAPER = ModelConfig(
    layers=3,
    hidden=32,
    mlp=64,
    heads=4,
    patch_size=8,
    image_size=32,
    vocab_size=50,
    max_text_length=20,
    attention="shared",
    vl_layers=1,
    sub_ln=False,
)


STANDARD = replace(PAPER, multiway=False, vl_layers=0)
VARIANTS = pytest.mark.parametrize(
    "config", [RELEASED, PAPER, STANDARD], ids=["released", "paper", "standard"]
)


@pytest.fixture(scope="module")
def released() -> BEiT3:
    model = BEiT3(RELEASED).eval()
    load_into(model, from_released(load_file(FIXTURE / "weights.safetensors"), heads=4).backbone)
    return model


@pytest.fixture(scope="module")
def cases() -> dict[str, torch.Tensor]:
    return load_file(FIXTURE / "cases.safetensors")


def packed(text: torch.Tensor, padding: torch.Tensor) -> tuple[torch.Tensor, list[int]]:
    keep = ~padding.bool()
    return text[keep], keep.sum(1).tolist()


@torch.no_grad()
def test_image_only_matches_released_code(released: BEiT3, cases: dict[str, torch.Tensor]) -> None:
    out = released(images=cases["image"])
    torch.testing.assert_close(out.vision, cases["expected.image_only"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_masked_image_matches_released_code(released: BEiT3, cases: dict) -> None:
    out = released(images=cases["image"], hidden_patches=cases["image_masked_positions"])
    torch.testing.assert_close(out.vision, cases["expected.image_masked"], atol=1e-5, rtol=0)


@torch.no_grad()
def test_text_only_matches_released_code(released: BEiT3, cases: dict) -> None:
    text, lengths = packed(cases["text"], cases["text_padding"])
    out = released(text=text, lengths=lengths)
    expected = cases["expected.text_only"][~cases["text_padding"].bool()]
    torch.testing.assert_close(out.text, expected, atol=1e-5, rtol=0)


@torch.no_grad()
def test_pair_matches_released_code(released: BEiT3, cases: dict) -> None:
    text, lengths = packed(cases["text"], cases["text_padding"])
    out = released(images=cases["image"], text=text, lengths=lengths, pairs=3)
    expected = cases["expected.pair"]
    torch.testing.assert_close(out.vision, expected[:, :17], atol=1e-5, rtol=0)
    expected_text = expected[:, 17:][~cases["text_padding"].bool()]
    torch.testing.assert_close(out.text, expected_text, atol=1e-5, rtol=0)


@torch.no_grad()
def test_captioning_matches_released_code(released: BEiT3, cases: dict) -> None:
    text = cases["text"]
    out = released(
        images=cases["image"], text=text.flatten(), lengths=[12] * 3, pairs=3, causal_text=True
    )
    expected = cases["expected.captioning"]
    torch.testing.assert_close(out.vision, expected[:, :17], atol=1e-5, rtol=0)
    torch.testing.assert_close(out.text.view(3, 12, -1), expected[:, 17:], atol=1e-5, rtol=0)


def test_load_names_each_key_that_does_not_fit(released: BEiT3) -> None:
    tensors = dict(released.state_dict())
    tensors["extra.weight"] = tensors.pop("text_positions")
    tensors["encoder.norm.vision.bias"] = torch.zeros(3)
    with pytest.raises(ValueError) as error:
        load_into(BEiT3(RELEASED), tensors)
    text = str(error.value)
    assert "text_positions: missing" in text
    assert "extra.weight: unexpected" in text
    assert "encoder.norm.vision.bias: has shape [3], expected [64]" in text


@pytest.mark.parametrize("seed", range(10))
@pytest.mark.parametrize(
    "config", [RELEASED, PAPER, STANDARD], ids=["released", "paper", "standard"]
)
@torch.no_grad()
def test_packed_batch_gives_each_sample_what_it_gives_alone(config: ModelConfig, seed: int) -> None:
    """Whatever the numbers of images, pairs and texts, their lengths and sizes, and the mask."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)
    model = BEiT3(config).eval()
    singles, pairs, alone = rng.integers(0, [4, 4, 12])
    if singles + pairs + alone == 0:
        alone = 1
    causal = bool(rng.random() < 0.3)
    side = int(rng.choice([24, 32, 40]))
    images = torch.randn(singles + pairs, 3, side, side)
    hidden = torch.rand(len(images), (side // 8) ** 2) < 0.3
    lengths = rng.integers(1, 15, pairs + alone).tolist()
    text = torch.randint(0, config.vocab_size, (sum(lengths),))
    out = model(
        images=images if len(images) else None,
        text=text if len(text) else None,
        lengths=lengths,
        pairs=int(pairs),
        hidden_patches=hidden if len(images) else None,
        causal_text=causal,
    )
    texts = text.split(lengths)
    found = out.text.split(lengths) if lengths else ()
    for i in range(singles):
        own = model(images=images[i : i + 1], hidden_patches=hidden[i : i + 1])
        torch.testing.assert_close(out.vision[i], own.vision[0], atol=2e-5, rtol=1e-5)
    for i in range(pairs):
        j = singles + i
        own = model(
            images=images[j : j + 1],
            text=texts[i],
            lengths=[lengths[i]],
            pairs=1,
            hidden_patches=hidden[j : j + 1],
            causal_text=causal,
        )
        torch.testing.assert_close(out.vision[j], own.vision[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(found[i], own.text, atol=2e-5, rtol=1e-5)
    for i in range(pairs, len(lengths)):
        own = model(text=texts[i], lengths=[lengths[i]], causal_text=causal)
        torch.testing.assert_close(found[i], own.text, atol=2e-5, rtol=1e-5)
    starts = [sum(lengths[:i]) for i in range(len(lengths))]
    assert out.text_starts.tolist() == starts


@pytest.mark.parametrize(
    "config", [RELEASED, PAPER, STANDARD], ids=["released", "paper", "standard"]
)
def test_what_is_read_is_what_the_whole_output_has_there(config: ModelConfig) -> None:
    """Of tokens in any of the streams' parts, also where a part or a whole stream is not read."""
    torch.manual_seed(0)
    model = BEiT3(replace(config, drop_path=0.5))  # evaluated: nothing is dropped
    model.eval()
    images, lengths = torch.randn(4, 3, 32, 32), [5, 3, 9, 2]
    text = torch.randint(0, config.vocab_size, (sum(lengths),))
    layout = Layout.build(4, 17, lengths, 2)
    whole = model.hidden(images, text, layout)
    for vision, language in (
        ([0, 16, 17, 40, 67], [0, 4, 8, 18]),
        ([3, 20], [8, 9]),  # nothing of pairs
        ([34, 66], [1, 7]),  # nothing but pairs
        (None, [1, 10]),
        ([5, 50], None),
        ([50], None),
    ):
        at = Streams(*(None if p is None else torch.tensor(p) for p in (vision, language)))
        read = model.hidden(images, text, layout, read=layout.reading(*at))
        for places, some, everything in zip(at, read, whole, strict=True):
            assert (some is None) == (places is None)
            if places is not None and everything is not None:
                torch.testing.assert_close(some, everything[places], atol=1e-5, rtol=1e-5)


def test_padded_texts_are_packed() -> None:
    padded = torch.tensor([[5, 6, 7, 1], [8, 1, 1, 1], [9, 10, 11, 12]])
    packed, lengths = pack_texts(padded, padded == 1)
    assert (packed.tolist(), lengths) == ([5, 6, 7, 8, 9, 10, 11, 12], [3, 1, 4])
    with pytest.raises(ValueError, match="padding: text 1 is all padding"):
        pack_texts(padded, torch.tensor([[0, 0, 0, 1], [1, 1, 1, 1], [0, 0, 0, 0]]).bool())
    with pytest.raises(ValueError, match="padding: text 2 has padding before a token"):
        pack_texts(padded, torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [0, 1, 0, 0]]).bool())
    with pytest.raises(ValueError, match=r"expected the shape of padded, \[3, 4\], got \[3, 3\]"):
        pack_texts(padded, torch.zeros(3, 3).bool())


def test_each_expert_learns_from_its_own_modality_only() -> None:
    model = BEiT3(PAPER)
    images, text = torch.randn(2, 3, 32, 32), torch.randint(0, 50, (6,))

    def experts_with_gradient(**inputs: object) -> set[str]:
        model.zero_grad()
        out = model(**inputs)
        parts = [part.square().sum() for part in (out.vision, out.text) if part is not None]
        torch.stack(parts).sum().backward()
        return {
            name.split("experts.")[1].split(".")[0]
            for name, p in model.named_parameters()
            if "experts." in name and p.grad is not None and p.grad.abs().sum() > 0
        }

    assert experts_with_gradient(images=images) == {"vision_expert"}
    assert experts_with_gradient(text=text, lengths=[2, 4]) == {"language_expert"}
    assert experts_with_gradient(images=images, text=text, lengths=[2, 4], pairs=2) == {
        "vision_expert",
        "language_expert",
        "fusion_expert",
    }


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ({}, "empty batch"),
        ({"images": torch.zeros(1, 3, 30, 32)}, "not divisible by the patch 8"),
        ({"images": torch.zeros(1, 1, 32, 32)}, r"expected \[n, 3, height, width\]"),
        ({"text": torch.tensor([1, 50]), "lengths": [2]}, r"ids span 1\.\.50"),
        ({"text": torch.tensor([1, 2, 3]), "lengths": [2]}, r"expected \[2\] packed ids"),
        ({"text": torch.tensor([1, 2]), "lengths": [2, 0]}, "a text has no tokens"),
        ({"text": torch.zeros(2), "lengths": [2]}, "expected integer ids, got torch.float32"),
        ({"lengths": [2]}, "1 texts are announced, but text is empty"),
        ({"text": torch.zeros(21, dtype=torch.long), "lengths": [21]}, "position table ends at 20"),
        ({"images": torch.zeros(1, 3, 32, 32), "pairs": 1}, "pairs: got 1 with 1 images, 0 texts"),
    ],
)
def test_bad_input_is_named(inputs: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        BEiT3(PAPER)(**inputs)


def test_wrong_mask_shape_is_named() -> None:
    with pytest.raises(ValueError, match=r"hidden_patches: expected \[1, 16\], got \[1, 9\]"):
        BEiT3(PAPER)(
            images=torch.zeros(1, 3, 32, 32), hidden_patches=torch.zeros(1, 9, dtype=torch.bool)
        )


@torch.no_grad()
def test_other_image_sizes_work_with_interpolated_positions() -> None:
    model = BEiT3(PAPER).eval()
    assert model(images=torch.randn(1, 3, 48, 64)).vision.shape == (1, 1 + 6 * 8, 32)
    table = torch.randn(17, 32)
    torch.testing.assert_close(interpolate_positions(table, 4, 4), table)
