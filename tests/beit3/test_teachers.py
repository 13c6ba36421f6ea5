"""Teachers: CLIP's features are transformers' own; others by their definition."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit3 import weights
from beit3.config import PRESETS, ModelConfig
from beit3.objectives import DualEncoder
from beit3.teachers import (
    ClipTeacher,
    ClipTower,
    DualEncoderTeacher,
    PixelTeacher,
    load_clip,
    load_teacher,
    read_clip,
    save_clip,
    side_for,
)

MEAN, DEVIATION = (0.5, 0.4, 0.3), (0.2, 0.25, 0.3)


def pictures(side: int = 32, count: int = 3) -> Tensor:
    random = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (count, 3, side, side), generator=random, dtype=torch.uint8)


def normalised(images: Tensor) -> Tensor:
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (MEAN, DEVIATION))
    return (images / 255 - mean) / deviation


@pytest.fixture(scope="module", params=["quick_gelu", "gelu"])
def hugging_face(request: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """A small CLIP of random weights, as transformers makes and saves it."""
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    vision = transformers.CLIPVisionConfig(
        hidden_size=48, intermediate_size=80, num_hidden_layers=3, num_attention_heads=4,
        image_size=32, patch_size=8, projection_dim=20, hidden_act=request.param,
    )  # fmt: skip
    model = transformers.CLIPVisionModelWithProjection(vision).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    folder = tmp_path_factory.mktemp("clip")
    model.save_pretrained(folder)
    content = {"image_mean": MEAN, "image_std": DEVIATION}
    (folder / "preprocessor_config.json").write_text(json.dumps(content))
    return model, folder


def their_features(model: Any, images: Tensor) -> tuple[Tensor, Tensor]:
    """Projected patch features, and the projected summary, by transformers."""
    with torch.no_grad():
        out = model(pixel_values=normalised(images), interpolate_pos_encoding=True)
        vision = model.vision_model if hasattr(model, "vision_model") else model
        hidden = vision.post_layernorm(out.last_hidden_state)
        return model.visual_projection(hidden)[:, 1:], out.image_embeds


def teacher_of(folder: Path, image_size: int = 32, patch_size: int = 8) -> ClipTeacher:
    config, tensors = read_clip(folder)
    tower = ClipTower(config)
    weights.load_into(tower, tensors)
    return ClipTeacher(tower, image_size, patch_size)


def open_clip_layout(model: Any) -> dict[str, Tensor]:
    """The same weights as OpenCLIP names and joins them."""
    theirs = {k: v.detach() for k, v in model.state_dict().items()}
    names = {
        "vision_model.embeddings.patch_embedding": "conv1",
        "vision_model.pre_layrnorm": "ln_pre",
        "vision_model.post_layernorm": "ln_post",
    }
    found = {
        "visual.class_embedding": theirs["vision_model.embeddings.class_embedding"],
        "visual.positional_embedding": theirs["vision_model.embeddings.position_embedding.weight"],
        "visual.proj": theirs["visual_projection.weight"].T,
        "text.token_embedding.weight": torch.zeros(3, 3),
        "logit_scale": torch.zeros(()),
    }
    inside = {
        "layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj",
        "mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj",
    }  # fmt: skip
    for i in range(3):
        source, target = f"vision_model.encoder.layers.{i}", f"transformer.resblocks.{i}"
        names |= {f"{source}.{a}": f"{target}.{b}" for a, b in inside.items()}
        for kind in ("weight", "bias"):
            parts = [theirs[f"{source}.self_attn.{p}_proj.{kind}"] for p in "qkv"]
            found[f"visual.{target}.attn.in_proj_{kind}"] = torch.cat(parts)
    for source, target in names.items():
        for kind in ("weight", "bias"):
            if f"{source}.{kind}" in theirs:
                found[f"visual.{target}.{kind}"] = theirs[f"{source}.{kind}"]
    return {k: v.contiguous() for k, v in found.items()}


# -- CLIP ------------------------------------------------------------------------------------------


def test_clips_features_are_those_of_transformers(hugging_face: tuple[Any, Path]) -> None:
    model, folder = hugging_face
    teacher, images = teacher_of(folder), pictures()
    patches, summary = their_features(model, images)
    assert (teacher.dim, teacher.side) == (20, 32)
    torch.testing.assert_close(teacher(images), patches, rtol=1e-4, atol=1e-5)
    whole = teacher.tower(normalised(images))
    torch.testing.assert_close(whole[:, 0], summary, rtol=1e-4, atol=1e-5)


def test_positions_are_interpolated_to_the_tokenizers_grid(
    hugging_face: tuple[Any, Path],
) -> None:
    """A tokenizer of 5x5 patches: the teacher, of 4x4 at 32 pixels, looks at 40."""
    model, folder = hugging_face
    teacher = teacher_of(folder, image_size=40)
    assert teacher.side == 40
    patches, _ = their_features(model, pictures(40))
    torch.testing.assert_close(teacher(pictures(40)), patches, rtol=1e-3, atol=1e-4)
    finer = teacher_of(folder, image_size=20, patch_size=4)  # 5x5 too
    assert finer.side == 40 and finer(pictures(20)).shape == (3, 25, 20)


def test_pictures_of_another_size_are_resized(hugging_face: tuple[Any, Path]) -> None:
    """A tokenizer of the teacher's grid, but of larger patches."""
    _, folder = hugging_face
    teacher, images = teacher_of(folder, image_size=64, patch_size=16), pictures(64)
    small = F.interpolate(images.float(), (32, 32), mode="bicubic", antialias=True).clamp(0, 255)
    with torch.no_grad():
        torch.testing.assert_close(teacher(images), teacher.tower(normalised(small))[:, 1:])


@pytest.mark.parametrize("form", ["folder", "file", "pickle"])
def test_open_clips_files_give_the_same(
    form: str, hugging_face: tuple[Any, Path], tmp_path: Path
) -> None:
    model, folder = hugging_face
    activation = model.config.hidden_act
    config, tensors = read_clip(folder)
    layout = open_clip_layout(model)
    if form == "folder":
        vision = {"layers": 3, "width": 48, "head_width": 12, "patch_size": 8, "image_size": 32}
        content = {
            "model_cfg": {"vision_cfg": vision, "quick_gelu": activation == "quick_gelu"},
            "preprocess_cfg": {"mean": MEAN, "std": DEVIATION},
        }
        (tmp_path / "open_clip_config.json").write_text(json.dumps(content))
        save_file(layout, tmp_path / "open_clip_model.safetensors")
        found, read = read_clip(tmp_path)
        assert found == config
    else:
        path = tmp_path / ("weights.safetensors" if form == "file" else "weights.pt")
        if form == "file":
            save_file(layout, path)
        else:
            torch.save({"state_dict": layout, "epoch": 3}, path)
        with pytest.raises(ValueError, match="doesn't tell its activation: say quick_gelu"):
            read_clip(path)
        found, read = read_clip(path, activation=activation, heads=4)
        assert replace(found, mean=MEAN, deviation=DEVIATION) == config
        assert read_clip(path, activation=activation)[0].heads == 1  # not 64 wide
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], value) for key, value in tensors.items())


def test_a_tower_passes_through_a_folder(hugging_face: tuple[Any, Path], tmp_path: Path) -> None:
    _, folder = hugging_face
    config, tensors = read_clip(folder)
    save_clip(tmp_path, config, tensors)
    tower = load_clip(tmp_path)
    assert tower.config == config
    teacher = load_teacher(tmp_path, 32, 8)
    assert torch.equal(teacher(pictures()), teacher_of(folder)(pictures()))
    assert not any(p.requires_grad for p in teacher.parameters())
    assert not teacher.train().training and not any(m.training for m in teacher.modules())


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda t: t.pop("visual_projection.weight"), "missing visual_projection.weight"),
        (
            lambda t: t.pop("vision_model.encoder.layers.1.mlp.fc1.bias"),
            "vision_model.encoder.layers.1.mlp.fc1.bias: missing",
        ),
        (
            lambda t: t.update({"vision_model.odd": torch.zeros(2)}),
            "vision_model.odd: unexpected",
        ),
        (
            lambda t: t.update({"vision_model.post_layernorm.weight": torch.zeros(2)}),
            r"post_layernorm.weight: has shape \[2\], expected \[48\]",
        ),
    ],
)
def test_weights_that_do_not_fit_are_named(
    change: Callable[[dict[str, Tensor]], object],
    said: str,
    hugging_face: tuple[Any, Path],
    tmp_path: Path,
) -> None:
    _, folder = hugging_face
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text((folder / "config.json").read_text())
    with pytest.raises(ValueError, match=said):
        read_clip(tmp_path)


def test_other_models_are_no_clip(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "bert"}))
    with pytest.raises(ValueError, match="a model of type 'bert', not a CLIP"):
        read_clip(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip"}))
    with pytest.raises(FileNotFoundError, match=r"none of model\.safetensors"):
        read_clip(tmp_path)


# -- the others ------------------------------------------------------------------------------------


def test_normalised_pixels_by_hand() -> None:
    images = pictures(16)
    teacher = PixelTeacher(16, 8)
    found = teacher(images)
    assert teacher.dim == 192 and found.shape == (3, 4, 192)
    patch = images[1, :, 8:, :8].double() / 255  # the third, row by row
    wanted = (patch - patch.mean()) / (patch.var() + 1e-6).sqrt()
    torch.testing.assert_close(found[1, 2].double(), wanted.flatten(), rtol=1e-4, atol=1e-5)
    flat = PixelTeacher(16, 8)(torch.full((1, 3, 16, 16), 7, dtype=torch.uint8))
    assert not flat.any()  # no division by zero


def dual_encoder(**changes: Any) -> tuple[DualEncoder, ModelConfig]:
    config = replace(PRESETS["tiny"], image_size=32, patch_size=8, vocab_size=20, **changes)
    torch.manual_seed(0)
    return DualEncoder(config), config


def test_a_dual_encoder_s_patches(tmp_path: Path) -> None:
    model, config = dual_encoder()
    weights.save(tmp_path, model, config, kind="dual_encoder")
    teacher = load_teacher(tmp_path, 32, 8)
    assert isinstance(teacher, DualEncoderTeacher) and teacher.dim == 64
    with torch.no_grad():
        torch.testing.assert_close(teacher(pictures()), model.eval().encode_patches(pictures()))
    assert load_teacher(tmp_path, 40, 8)(pictures(40)).shape == (3, 25, 64)
    weights.save(tmp_path, model, config, kind="vqa")
    with pytest.raises(ValueError, match="teacher: a vqa model, not a dual encoder"):
        load_teacher(tmp_path, 32, 8)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ValueError, match="neither a dual encoder nor an imported CLIP"):
        load_teacher(tmp_path, 32, 8)


def test_grids_that_are_too_different_are_refused() -> None:
    # CLIP B/16 at 224 for a tokenizer of patch 16, one of patch 14, and one at 384.
    assert side_for(224, 16, grid=14, teacher_patch=16, name="clip") == 224
    assert side_for(224, 14, grid=14, teacher_patch=16, name="clip") == 256
    assert side_for(224, 16, grid=16, teacher_patch=14, name="clip") == 196
    with pytest.raises(ValueError, match=r"clip: its patch grid is 14x14 at 224 pixels, the token"):
        side_for(384, 16, grid=14, teacher_patch=16, name="clip")
    with pytest.raises(ValueError, match=r"7x7 at 224 .*14x14 at 224: too different"):
        side_for(224, 16, grid=7, teacher_patch=32, name="clip")
