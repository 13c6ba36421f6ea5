"""The Multiway Transformer against the released code's activations, and its own invariants."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from beit3.config import ModelConfig
from beit3.model import BEiT3, interpolate_positions
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


@pytest.mark.parametrize("config", [RELEASED, PAPER], ids=["released", "paper"])
@torch.no_grad()
def test_packed_batch_gives_each_sample_what_it_gives_alone(config: ModelConfig) -> None:
    torch.manual_seed(0)
    model = BEiT3(config).eval()
    images = torch.randn(5, 3, 32, 32)
    lengths = [4, 9, 2, 7, 12]
    text = torch.randint(0, config.vocab_size, (sum(lengths),))
    out = model(images=images, text=text, lengths=lengths, pairs=2)
    texts = text.split(lengths)
    outs = out.text.split(lengths)
    for i in range(3):
        alone = model(images=images[i : i + 1])
        torch.testing.assert_close(out.vision[i], alone.vision[0], atol=2e-5, rtol=1e-5)
    for i in range(2):
        j = 3 + i
        alone = model(images=images[j : j + 1], text=texts[i], lengths=[lengths[i]], pairs=1)
        torch.testing.assert_close(out.vision[j], alone.vision[0], atol=2e-5, rtol=1e-5)
        torch.testing.assert_close(outs[i], alone.text, atol=2e-5, rtol=1e-5)
    for i in range(2, 5):
        alone = model(text=texts[i], lengths=[lengths[i]])
        torch.testing.assert_close(outs[i], alone.text, atol=2e-5, rtol=1e-5)


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
