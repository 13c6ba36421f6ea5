"""The authors' VQ-KD checkpoints: a small one of their layout, and their forward written plainly.

The reference below follows the equations of microsoft/unilm beit2 (`modeling_vqkd.py`,
`modeling_finetune.py`, `norm_ema_quantizer.py`) on the checkpoint's own tensors. It shares nothing
with `beit3`.
"""

from __future__ import annotations

import math
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from beit3 import vqkd, vqkd_released
from beit3.vqkd import VQKD
from beit3.vqkd_released import from_released, load_released

WIDTH, HEADS, MLP, PATCH, GRID, CODES, CODE_DIM, FEATURES = 128, 2, 160, 8, 3, 40, 8, 12


def checkpoint(encoder: int = 2, decoder: int = 3, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors under every key that a released tokenizer has, and those of its training."""
    random = torch.Generator().manual_seed(seed)

    def draw(*shape: int, scale: float = 1.0, about: float = 0.0) -> Tensor:
        return about + scale * torch.randn(*shape, generator=random)

    tensors: dict[str, Tensor] = {}

    def linear(name: str, rows: int, columns: int, bias: bool = True) -> None:
        tensors[f"{name}.weight"] = draw(rows, columns, scale=1.5 * columns**-0.5)
        if bias:
            tensors[f"{name}.bias"] = draw(rows, scale=0.5)

    def norm(name: str) -> None:
        tensors[f"{name}.weight"] = draw(WIDTH, scale=0.2, about=1.0)
        tensors[f"{name}.bias"] = draw(WIDTH, scale=0.2)

    for side, depth, channels, patch in (
        ("encoder", encoder, 3, PATCH),
        ("decoder", decoder, CODE_DIM, 1),
    ):
        tensors[f"{side}.cls_token"] = draw(1, 1, WIDTH)
        tensors[f"{side}.pos_embed"] = draw(1, 1 + GRID**2, WIDTH)
        fan = channels * patch**2
        tensors[f"{side}.patch_embed.proj.weight"] = draw(
            WIDTH, channels, patch, patch, scale=fan**-0.5
        )
        tensors[f"{side}.patch_embed.proj.bias"] = draw(WIDTH, scale=0.5)
        for i in range(depth):
            block = f"{side}.blocks.{i}"
            norm(f"{block}.norm1")
            tensors[f"{block}.attn.q_bias"] = draw(WIDTH)
            tensors[f"{block}.attn.v_bias"] = draw(WIDTH)
            linear(f"{block}.attn.qkv", 3 * WIDTH, WIDTH, bias=False)
            linear(f"{block}.attn.proj", WIDTH, WIDTH)
            norm(f"{block}.norm2")
            linear(f"{block}.mlp.fc1", MLP, WIDTH)
            linear(f"{block}.mlp.fc2", WIDTH, MLP)
        norm(f"{side}.fc_norm")
    linear("encode_task_layer.0", WIDTH, WIDTH)
    linear("encode_task_layer.2", CODE_DIM, WIDTH)
    tensors["encode_task_layer.2.bias"] *= 0.0  # so that patches have many different codes
    linear("decode_task_layer.0", WIDTH, WIDTH)
    linear("decode_task_layer.2", FEATURES, WIDTH)
    codes = draw(CODES, CODE_DIM)
    tensors["quantize.embedding.weight"] = codes / codes.norm(dim=-1, keepdim=True)
    tensors["quantize.embedding.cluster_size"] = draw(CODES).abs()
    tensors["quantize.embedding.embed_avg"] = torch.zeros(CODES, CODE_DIM)
    tensors["quantize.embedding.initted"] = torch.ones(1)
    tensors["quantize.cluster_size"] = draw(CODES).abs()
    tensors["teacher_model.visual.proj"] = draw(4, 4)
    tensors["scaling_layer.shift"] = draw(1, 3, 1, 1)
    return tensors


# -- their forward ---------------------------------------------------------------------------------


def vit(tensors: dict[str, Tensor], side: str, images: Tensor) -> Tensor:
    """Features of patches, after the final norm: `[n, patches, width]`."""

    def norm(x: Tensor, name: str) -> Tensor:
        mean = x.mean(-1, keepdim=True)
        variance = ((x - mean) ** 2).mean(-1, keepdim=True)
        scaled = (x - mean) / torch.sqrt(variance + 1e-6)
        return scaled * tensors[f"{name}.weight"] + tensors[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ tensors[f"{name}.weight"].T + tensors[f"{name}.bias"]

    kernel = tensors[f"{side}.patch_embed.proj.weight"]
    size = kernel.shape[-1]
    n, channels, side_length, _ = images.shape
    grid = side_length // size
    cut = images.reshape(n, channels, grid, size, grid, size).permute(0, 2, 4, 1, 3, 5)
    x = cut.reshape(n, grid * grid, -1) @ kernel.reshape(WIDTH, -1).T
    x = x + tensors[f"{side}.patch_embed.proj.bias"]
    x = torch.cat([tensors[f"{side}.cls_token"].expand(n, 1, WIDTH), x], 1)
    x = x + tensors[f"{side}.pos_embed"]
    depth = len({key.split(".")[2] for key in tensors if key.startswith(f"{side}.blocks.")})
    for i in range(depth):
        block = f"{side}.blocks.{i}"
        q_bias, v_bias = (tensors[f"{block}.attn.{kind}_bias"] for kind in "qv")
        y = norm(x, f"{block}.norm1") @ tensors[f"{block}.attn.qkv.weight"].T
        q, k, v = y.chunk(3, -1)
        heads = []
        width = WIDTH // HEADS
        for h in range(HEADS):
            part = slice(h * width, (h + 1) * width)
            one, other = (q + q_bias)[..., part], k[..., part]
            scores = one @ other.transpose(1, 2) / math.sqrt(width)
            heads.append(scores.softmax(-1) @ (v + v_bias)[..., part])
        x = x + linear(torch.cat(heads, -1), f"{block}.attn.proj")
        inner = linear(norm(x, f"{block}.norm2"), f"{block}.mlp.fc1")
        inner = 0.5 * inner * (1 + torch.erf(inner / math.sqrt(2)))
        x = x + linear(inner, f"{block}.mlp.fc2")
    return norm(x[:, 1:], f"{side}.fc_norm")


def reference(tensors: dict[str, Tensor], images: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of images in [0, 1]: unit features, codes, and the reconstruction of the teacher."""

    def task(x: Tensor, name: str) -> Tensor:
        first, second = (
            (tensors[f"{name}.{i}.weight"], tensors[f"{name}.{i}.bias"]) for i in (0, 2)
        )
        return torch.tanh(x @ first[0].T + first[1]) @ second[0].T + second[1]

    scaled = images * 255 / 127.5 - 1
    z = task(vit(tensors, "encoder", scaled), "encode_task_layer")
    z = z / z.norm(dim=-1, keepdim=True)
    codebook = tensors["quantize.embedding.weight"]
    codes = ((z[:, :, None] - codebook) ** 2).sum(-1).argmin(-1)
    n = len(images)
    quantised = codebook[codes].transpose(1, 2).reshape(n, CODE_DIM, GRID, GRID)
    return z, codes, task(vit(tensors, "decoder", quantised), "decode_task_layer")


def pictures(count: int = 5) -> Tensor:
    random = torch.Generator().manual_seed(7)
    side = GRID * PATCH
    return torch.randint(0, 256, (count, 3, side, side), generator=random, dtype=torch.uint8)


def built(tensors: dict[str, Tensor], **options: Any) -> VQKD:
    config, ours = from_released(tensors, **options)
    model = VQKD(config)
    model.load_state_dict(ours)
    return model.eval()


# -- agreement -------------------------------------------------------------------------------------


@pytest.mark.parametrize("depth", [1, 3])
def test_features_codes_and_reconstruction_are_theirs(depth: int) -> None:
    tensors = checkpoint(decoder=depth)
    model, images = built(tensors), pictures()
    assert (model.config.encoder_layers, model.config.decoder_layers) == (2, depth)
    features, codes, made = reference(tensors, images / 255)
    with torch.no_grad():
        torch.testing.assert_close(model.features(images), features, rtol=1e-4, atol=1e-5)
        assert torch.equal(model.encode(images), codes)
        torch.testing.assert_close(model.decode(codes), made, rtol=1e-4, atol=1e-4)
    assert len(codes.unique()) > 5


def test_a_black_picture_is_black() -> None:
    """Bytes of 0 and 1 are no picture in [0, 1]: their own code would take them for one."""
    tensors = checkpoint()
    images = pictures(1) % 2
    _, codes, _ = reference(tensors, images / 255)
    _, brightened, _ = reference(tensors, images.float())
    assert torch.equal(built(tensors).encode(images), codes)
    assert not torch.equal(codes, brightened)
    with pytest.raises(ValueError, match="expected uint8"):
        built(tensors).encode(images / 255)


def test_the_shape_is_told_by_the_tensors() -> None:
    config, ours = from_released(checkpoint())
    assert (config.image_size, config.patch_size, config.hidden) == (24, 8, WIDTH)
    assert (config.mlp, config.heads, config.codebook_size) == (MLP, 2, CODES)
    assert (config.code_dim, config.teacher_dim, config.revive_below) == (CODE_DIM, FEATURES, 0)
    assert bool(ours["codebook.ready"])
    assert not any("teacher_model" in key or "scaling" in key for key in ours)
    assert from_released(checkpoint(), heads=4)[0].heads == 4


@pytest.mark.parametrize("size", ["base"])
def test_the_published_sizes_have_the_published_keys(size: str) -> None:
    """As many tensors as the layout of `vqkd_encoder_base_decoder_3x768x12_clip` gives."""
    shapes = vqkd_released._shapes(vqkd.PRESETS[size])
    per_block = 4 + 3 + 2 + 4  # norms; qkv and its biases; projection; feed-forward
    assert len(shapes) == 15 * per_block + 2 * 6 + 8 + 5
    assert shapes["encoder.pos_embed"] == [1, 197, 768]
    assert shapes["decoder.patch_embed.proj.weight"] == [768, 32, 1, 1]
    assert shapes["decode_task_layer.2.weight"] == [512, 768]
    assert shapes["quantize.embedding.weight"] == [8192, 32]


def test_positions_are_interpolated_to_the_size_asked_for() -> None:
    model = built(checkpoint(), image_size=32)
    assert model.config.image_size == 32 and model.grid == 4
    side = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert model.encode(side).shape == (2, 16) and model.decode(model.encode(side)).shape[1] == 16
    with pytest.raises(ValueError, match="image_size 30 is not divisible by the patch 8"):
        from_released(checkpoint(), image_size=30)


# -- files -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["model", "state_dict", "bare", "safetensors"])
def test_the_command_makes_a_tokenizer_folder(
    wrap: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    tensors = checkpoint()
    source = tmp_path / f"file.{'safetensors' if wrap == 'safetensors' else 'pth'}"
    if wrap == "safetensors":
        save_file(tensors, source)
    else:
        torch.save(tensors if wrap == "bare" else {wrap: tensors, "epoch": 99}, source)
    vqkd_released.main([str(source), str(tmp_path / "folder")])
    assert "40 codes, 3x3 patches at 24 px, decoder of 3 layers" in capsys.readouterr().out
    model = vqkd.load(tmp_path / "folder")
    assert torch.equal(model.encode(pictures()), reference(tensors, pictures() / 255)[1])
    with pytest.raises(SystemExit):
        vqkd_released.main([str(source), str(tmp_path / "folder")])
    assert "folder exists" in capsys.readouterr().err


def test_each_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    tensors = checkpoint()
    del tensors["encoder.blocks.1.attn.q_bias"]
    tensors["encoder.rel_pos_bias.table"] = torch.zeros(3)
    tensors["decoder.pos_embed"] = torch.zeros(1, 5, WIDTH)
    torch.save({"model": tensors}, tmp_path / "odd.pth")
    with pytest.raises(ValueError) as error:
        load_released(tmp_path / "odd.pth")
    for said in (
        "odd.pth: read as VQ-KD",
        "encoder.blocks.1.attn.q_bias: missing",
        "encoder.rel_pos_bias.table: unexpected",
        f"decoder.pos_embed: has shape [1, 5, {WIDTH}], expected [1, 10, {WIDTH}]",
    ):
        assert said in str(error.value)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("encoder.pos_embed"), "no released VQ-KD:\n  encoder.pos_embed: missing"),
        (lambda t: t.update({"encoder.pos_embed": torch.zeros(1, 9, WIDTH)}), "square of patches"),
        (lambda t: t["quantize.embedding.initted"].zero_(), "never started"),
        (lambda t: t["quantize.embedding.weight"].mul_(2), "not of length 1"),
        (lambda t: t.update({"quantize.embedding.weight": torch.zeros(3)}), "2 dimensions"),
    ],
)
def test_what_can_t_be_a_tokenizer_is_refused(
    change: Callable[[dict[str, Tensor]], object], said: str
) -> None:
    tensors = checkpoint()
    change(tensors)
    with pytest.raises(ValueError, match=said):
        from_released(tensors)
    with pytest.raises(ValueError, match="heads: hidden 128 can't be shared by 3"):
        from_released(checkpoint(), heads=3)


class Trap:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_anything_but_tensors_is_refused_unopened(tmp_path: Path) -> None:
    touched, file = tmp_path / "touched", tmp_path / "file.pth"
    torch.save({"model": checkpoint(), "args": Trap(touched)}, file)
    with pytest.raises(ValueError, match="holds more than tensors"):
        load_released(file)
    file.write_bytes(pickle.dumps(Trap(touched)))
    with pytest.raises(ValueError, match=r"file\.pth"):
        load_released(file)
    assert not touched.exists()
    torch.save({"model": checkpoint() | {"name": "vqkd"}}, file)
    with pytest.raises(ValueError, match="expected tensors by name, found 'name': str"):
        load_released(file)
