"""The authors' checkpoints in and out: every kind of file, exact both ways, and what is refused."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from beit3 import released, tasks, weights
from beit3.config import PRESETS, ModelConfig
from beit3.model import BEiT3, interpolate_positions
from beit3.objectives import DualEncoder, MaskedDataModelling, normalise
from beit3.released import (
    Released,
    from_released,
    load_folder,
    load_released,
    save_released,
    to_released,
)
from beit3.tasks import captioning, imagenet, nlvr2, vqa

FIXTURE = Path(__file__).parent / "fixtures" / "released_tiny"
CONFIG = ModelConfig(
    layers=4,
    hidden=64,
    mlp=256,
    heads=4,
    patch_size=8,
    image_size=32,
    vocab_size=200,
    max_text_length=62,
)
ROWS = "beit3.encoder.embed_positions.A.weight"

# Shapes of the published heads, for a width of 64, 200 words, 48 visual words and 7 classes.
HEADS: dict[str, dict[str, list[int]]] = {
    "backbone": {},
    "pretrained": {
        "mlm_head.weight": [200, 64],
        "mlm_head.bias": [200],
        "mim_head.weight": [48, 64],
        "mim_head.bias": [48],
    },
    "captioning": {"mlm_head.weight": [200, 64], "mlm_head.bias": [200]},
    "dual_encoder": {
        "vision_head.weight": [64, 64],
        "language_head.weight": [64, 64],
        "logit_scale": [],
    },
    "vqa": {
        "pooler.norm.weight": [64],
        "pooler.norm.bias": [64],
        "pooler.dense.weight": [64, 64],
        "pooler.dense.bias": [64],
        "head.0.weight": [128, 64],
        "head.0.bias": [128],
        "head.1.weight": [128],
        "head.1.bias": [128],
        "head.3.weight": [7, 128],
        "head.3.bias": [7],
    },
    "nlvr2": {
        "head.norm1.weight": [256],
        "head.norm1.bias": [256],
        "head.dense1.weight": [128, 256],
        "head.dense1.bias": [128],
        "head.norm2.weight": [128],
        "head.norm2.bias": [128],
        "head.dense2.weight": [2, 128],
        "head.dense2.bias": [2],
    },
    "imagenet": {
        "fc_norm.weight": [64],
        "fc_norm.bias": [64],
        "head.weight": [7, 64],
        "head.bias": [7],
    },
}
NO_FINAL_NORM = ("vqa", "imagenet")


def checkpoint(kind: str) -> dict[str, Tensor]:
    """The fixture's encoder with random heads of a kind."""
    random = torch.Generator().manual_seed(0)
    tensors = load_file(FIXTURE / "weights.safetensors")
    if kind in NO_FINAL_NORM:
        tensors = {k: v for k, v in tensors.items() if "encoder.layer_norm" not in k}
    heads = {k: torch.randn(shape, generator=random) for k, shape in HEADS[kind].items()}
    return tensors | heads


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


MODELS: dict[str, Callable[[ModelConfig], nn.Module]] = {
    "pretrained": MaskedDataModelling,
    "captioning": lambda config: tasks.create("captioning").build(config),
    "dual_encoder": DualEncoder,
    "vqa": lambda config: vqa.Model(config, 7),
    "nlvr2": nlvr2.Model,
    "imagenet": lambda config: imagenet.Model(config, 7),
}


@pytest.mark.parametrize("kind", HEADS)
def test_the_configuration_is_told_by_the_shapes(kind: str) -> None:
    model = from_released(checkpoint(kind), heads=4)
    assert model.kind == kind
    assert model.config == replace(
        CONFIG,
        final_norm=kind not in NO_FINAL_NORM,
        codebook_size=48 if kind == "pretrained" else 8192,
    )


@pytest.mark.parametrize("preset", ["base", "large"])
@pytest.mark.parametrize("size", [224, 384, 480])
def test_published_sizes_are_recognised(preset: str, size: int) -> None:
    config = replace(PRESETS[preset], image_size=size)
    with torch.device("meta"):
        theirs = to_released(Released("backbone", config, BEiT3(config).state_dict(), {}))
        assert from_released(theirs).config == config
    if size == 224:
        count = sum(value.numel() for value in theirs.values())
        assert (len(theirs), count) == {
            "base": (491, 220_987_392),
            "large": (971, 672_702_464),
        }[preset]


@pytest.mark.parametrize("kind", MODELS)
def test_this_project_s_models_load_every_tensor(kind: str) -> None:
    model = from_released(checkpoint(kind), heads=4)
    module = MODELS[kind](model.config)
    weights.load_into(module, model.tensors)
    assert same(dict(module.state_dict()), model.tensors)


@pytest.mark.parametrize("wrap", ["model", "module", "bare", "safetensors"])
@pytest.mark.parametrize("kind", HEADS)
def test_a_file_passes_through_a_folder_unchanged(kind: str, wrap: str, tmp_path: Path) -> None:
    theirs = checkpoint(kind)
    if wrap == "safetensors":
        source, back = tmp_path / "in.safetensors", tmp_path / "out.safetensors"
        save_file(theirs, source)
    else:
        source, back = tmp_path / "in.pth", tmp_path / "out.pth"
        torch.save(theirs if wrap == "bare" else {wrap: theirs, "epoch": 3}, source)
    released.main([str(source), str(tmp_path / "folder"), "--heads", "4"])
    config, notes = weights.load_config(tmp_path / "folder")
    assert (notes, config.heads) == ({"kind": kind}, 4)
    released.main([str(tmp_path / "folder"), str(back)])
    if wrap == "safetensors":
        assert same(load_file(back), theirs)
    else:
        assert same(torch.load(back, weights_only=True)["model"], theirs)


def test_half_precision_stays_half(tmp_path: Path) -> None:
    theirs = {k: v.half() for k, v in checkpoint("pretrained").items()}
    save_released(tmp_path / "out.pth", from_released(theirs, heads=4))
    assert same(torch.load(tmp_path / "out.pth", weights_only=True)["model"], theirs)


@pytest.mark.parametrize("kind", MODELS)
def test_a_model_made_here_passes_through_the_released_layout(kind: str, tmp_path: Path) -> None:
    module = MODELS[kind](replace(CONFIG, codebook_size=48))
    folder = tmp_path / "folder"
    config = replace(CONFIG, codebook_size=48, final_norm=kind != "imagenet")
    weights.save(folder, module, config, kind="whatever it was for")
    save_released(tmp_path / "out.pth", load_folder(folder))
    theirs = torch.load(tmp_path / "out.pth", weights_only=True)["model"]
    assert {k: list(v.shape) for k, v in theirs.items() if not k.startswith("beit3.")} == HEADS[
        kind
    ]
    assert not theirs[ROWS][:2].any()  # rows that are never read, and that this model lacks
    back = load_released(tmp_path / "out.pth", heads=4)
    assert same(back.tensors, dict(module.state_dict()))


@torch.no_grad()
def test_without_a_final_norm_the_encoder_s_output_is_left_as_it_is() -> None:
    """The norm that was left out gives the released activations."""
    model = from_released(checkpoint("imagenet"), heads=4)
    backbone = BEiT3(model.config).eval()
    weights.load_into(backbone, model.backbone)
    cases, norms = load_file(FIXTURE / "cases.safetensors"), checkpoint("backbone")
    scale, shift = (norms[f"beit3.encoder.layer_norm.A.{kind}"] for kind in ("weight", "bias"))
    raw = backbone(images=cases["image"]).vision
    torch.testing.assert_close(
        F.layer_norm(raw, (64,), scale, shift), cases["expected.image_only"], atol=1e-5, rtol=0
    )
    assert not torch.allclose(raw, cases["expected.image_only"], atol=0.1)


@torch.no_grad()
def test_a_vqa_checkpoint_answers_as_the_released_head_does() -> None:
    theirs = checkpoint("vqa")
    model = from_released(theirs, heads=4)
    module = vqa.Model(model.config, 7).eval()
    weights.load_into(module, model.tensors)
    images = torch.arange(2 * 3 * 32 * 32).mul(97).view(2, 3, 32, 32).remainder(256).byte()
    text, lengths = torch.tensor([0, 9, 8, 2, 0, 7, 2]), [4, 3]
    batch = vqa.Batch(images, torch.tensor([0, 1]), text, lengths, torch.zeros(2, 7))

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, theirs[f"{name}.weight"], theirs[f"{name}.bias"])

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], theirs[f"{name}.weight"], theirs[f"{name}.bias"])

    # The encoder with the fixture's final norm is pinned to the released code; undo that norm's
    # affine part, and what is left differs from the raw output by scale and shift per token only,
    # which the pooler's norm removes.
    full = from_released(checkpoint("backbone"), heads=4)
    backbone = BEiT3(full.config).eval()
    weights.load_into(backbone, full.backbone)
    out = backbone(images=normalise(images), text=text, lengths=lengths, pairs=2)
    plain = (out.image_summary - full.backbone["encoder.norm.vision.bias"]) / full.backbone[
        "encoder.norm.vision.weight"
    ]
    x = torch.tanh(linear(norm(plain, "pooler.norm"), "pooler.dense"))
    expected = linear(F.gelu(norm(linear(x, "head.0"), "head.1")), "head.3")
    torch.testing.assert_close(module.logits(batch), expected, atol=1e-3, rtol=0)


@torch.no_grad()
def test_an_imagenet_checkpoint_answers_as_the_released_head_does() -> None:
    theirs = checkpoint("imagenet")
    model = from_released(theirs, heads=4)
    module = imagenet.Model(model.config, 7).eval()
    weights.load_into(module, model.tensors)
    images = torch.arange(2 * 3 * 32 * 32).mul(97).view(2, 3, 32, 32).remainder(256).byte()
    mean, deviation = (torch.tensor(v).view(3, 1, 1) for v in (imagenet.MEAN, imagenet.DEVIATION))
    vision = module.backbone(images=(images / 255 - mean) / deviation).vision
    x = vision[:, 1:].mean(1)
    x = F.layer_norm(x, (64,), theirs["fc_norm.weight"], theirs["fc_norm.bias"])
    expected = F.linear(x, theirs["head.weight"], theirs["head.bias"])
    torch.testing.assert_close(module.logits(images), expected, atol=1e-4, rtol=0)


@torch.no_grad()
def test_an_nlvr2_checkpoint_answers_as_the_released_head_does() -> None:
    theirs = checkpoint("nlvr2")
    model = from_released(theirs, heads=4)
    module = nlvr2.Model(model.config).eval()
    weights.load_into(module, model.tensors)
    images = torch.arange(2 * 3 * 32 * 32).mul(97).view(1, 2, 3, 32, 32).remainder(256).byte()
    text, lengths = torch.tensor([0, 9, 8, 2]), [4]
    batch = nlvr2.Batch(images, torch.tensor([0]), text, lengths, torch.tensor([1]))
    parts = []
    for side in (0, 1):
        image = normalise(images[:, side])
        out = module.backbone(images=image, text=text, lengths=lengths, pairs=1)
        parts += [out.image_summary, out.text_summary]
    x = torch.cat(parts, -1)

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], theirs[f"{name}.weight"], theirs[f"{name}.bias"])

    def linear(x: Tensor, name: str) -> Tensor:
        return F.linear(x, theirs[f"{name}.weight"], theirs[f"{name}.bias"])

    x = linear(norm(x, "head.norm1"), "head.dense1")
    expected = linear(F.gelu(norm(x, "head.norm2")), "head.dense2")
    torch.testing.assert_close(module.logits(batch), expected, atol=1e-3, rtol=0)


def test_positions_are_interpolated_to_the_size_asked_for(tmp_path: Path) -> None:
    theirs = checkpoint("pretrained")
    torch.save({"model": theirs}, tmp_path / "in.pth")
    released.main(
        [str(tmp_path / "in.pth"), str(tmp_path / "folder"), "--heads", "4", "--image-size", "64"]
    )
    model = load_folder(tmp_path / "folder")
    assert model.config.image_size == 64
    table = model.backbone["vision_embedding.positions"]
    assert torch.equal(table, interpolate_positions(theirs[ROWS][2:], 8, 8))
    other = {k: v for k, v in to_released(model).items() if k != ROWS}
    assert same(other, {k: v for k, v in theirs.items() if k != ROWS})
    with pytest.raises(ValueError, match="image_size 60 is not divisible by patch_size 8"):
        from_released(theirs, heads=4, image_size=60)


def test_each_key_that_does_not_fit_is_named(tmp_path: Path) -> None:
    theirs = checkpoint("pretrained")
    theirs["beit3.encoder.layers.1.ffn.C.fc1.weight"] = theirs.pop("mim_head.bias")
    del theirs["beit3.encoder.layers.2.ffn.B.fc2.bias"]
    theirs["mlm_head.weight"] = torch.zeros(200, 32)
    theirs["beit3.vision_embed.cls_token"] = torch.zeros(64)
    torch.save(theirs, tmp_path / "in.pth")
    with pytest.raises(ValueError) as error:
        load_released(tmp_path / "in.pth", heads=4)
    assert str(error.value).splitlines() == [
        f"{tmp_path / 'in.pth'}: read as pretrained, does not fit:",
        "  beit3.encoder.layers.2.ffn.B.fc2.bias: missing",
        "  mim_head.bias: missing",
        "  beit3.encoder.layers.1.ffn.C.fc1.weight: unexpected",
        "  beit3.vision_embed.cls_token: has shape [64], expected [1, 1, 64]",
        "  mlm_head.weight: has shape [200, 32], expected [200, 64]",
    ]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"beit3.text_embed.weight": None}, r"beit3\.text_embed\.weight: missing"),
        ({ROWS: torch.zeros(3)}, r"has shape \[3\], expected 2 dimensions"),
        ({ROWS: torch.zeros(20, 64)}, "20 rows are not 2 unused ones"),
        ({"beit3.encoder.layers.9.x": torch.zeros(1)}, r"layers\.9\.x: unexpected"),
    ],
)
def test_shapes_that_tell_nothing_are_named(change: dict, message: str) -> None:
    tensors = checkpoint("backbone") | change
    with pytest.raises(ValueError, match=message):
        from_released({k: v for k, v in tensors.items() if v is not None}, heads=4)


def test_the_number_of_heads_is_checked() -> None:
    assert from_released(checkpoint("backbone")).config.heads == 1  # 64 wide
    with pytest.raises(ValueError, match="hidden 64 is not divisible by heads 5"):
        from_released(checkpoint("backbone"), heads=5)
    with pytest.raises(ValueError, match="heads: expected at least 1, got 0"):
        from_released(checkpoint("backbone"), heads=0)


class _Trap:
    """Runs when unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


def test_a_pickle_of_anything_but_tensors_is_refused_unopened(tmp_path: Path) -> None:
    torch.save({"model": checkpoint("backbone"), "x": _Trap(tmp_path / "ran")}, tmp_path / "a.pth")
    with pytest.raises(ValueError, match=r"a\.pth: holds more than tensors"):
        load_released(tmp_path / "a.pth")
    assert not (tmp_path / "ran").exists()
    torch.save({"model": {}, "args": argparse.Namespace(lr=1)}, tmp_path / "b.pth")
    with pytest.raises(ValueError, match=r"b\.pth: holds more than tensors"):
        load_released(tmp_path / "b.pth")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.zeros(1)], "expected tensors by name, found a list"),
        ({"model": {"a": 1, "b": torch.zeros(1)}}, "found 'a': int$"),
        ({"model": {3: torch.zeros(1)}}, "found 3: Tensor"),
        ({}, r"beit3\.vision_embed\.proj\.weight: missing"),
    ],
)
def test_files_of_other_things_are_refused(content: object, message: str, tmp_path: Path) -> None:
    torch.save(content, tmp_path / "in.pth")
    with pytest.raises(ValueError, match=message):
        load_released(tmp_path / "in.pth")


@pytest.mark.parametrize("name", ["in.pth", "in.safetensors"])
@pytest.mark.parametrize("part", [0, 100, 50_000])
def test_damaged_files_are_refused(name: str, part: int, tmp_path: Path) -> None:
    save_released(tmp_path / name, from_released(checkpoint("backbone"), heads=4))
    whole = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(whole[:part])
    with pytest.raises(ValueError, match=name):
        load_released(tmp_path / name, heads=4)


@pytest.mark.parametrize(
    "change", [{"attention": "shared"}, {"vl_layers": 1}, {"sub_ln": False}, {"multiway": False}]
)
def test_other_variants_are_not_written(change: dict, tmp_path: Path) -> None:
    config = replace(CONFIG, **change)
    weights.save(tmp_path / "folder", nn.ModuleDict({"backbone": BEiT3(config)}), config)
    with pytest.raises(ValueError, match=f"this model has {next(iter(change))}="):
        save_released(tmp_path / "out.pth", load_folder(tmp_path / "folder"))


def test_unknown_heads_are_not_written(tmp_path: Path) -> None:
    module = captioning.Model(CONFIG, captioning.Task())
    module.extra = nn.Linear(2, 2)
    weights.save(tmp_path / "folder", module, CONFIG)
    with pytest.raises(ValueError, match=r"no released model has the heads extra\.bias"):
        load_folder(tmp_path / "folder")


def test_the_command_overwrites_nothing_and_says_what_is_wrong(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    save_file(checkpoint("backbone"), tmp_path / "in.safetensors")
    (tmp_path / "there").mkdir()
    for arguments, message in (
        ([tmp_path / "in.safetensors", tmp_path / "there"], "there exists"),
        ([tmp_path / "none.pth", tmp_path / "new"], "No such file"),
        ([tmp_path / "there", tmp_path / "new.pth"], "No such file"),
        ([tmp_path / "there", tmp_path / "new.pth", "--heads", "4"], "belong to a released file"),
        ([tmp_path / "in.safetensors", tmp_path / "new", "--heads", "5"], "divisible by heads 5"),
    ):
        with pytest.raises(SystemExit):
            released.main([str(argument) for argument in arguments])
        assert message in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.safetensors", "there"]
