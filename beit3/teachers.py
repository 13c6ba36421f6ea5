"""VQ-KD's teachers: they give the patch features that the tokenizer learns to reconstruct.

    CLIP            features of the last layer's patch tokens after the final norm, times the
                    projection into the joint space (BEiT v2's teacher is OpenAI's ViT-B/16)
    a dual encoder  the same from a model of this project (`beit3.objectives.DualEncoder`)
    pixels          the patches themselves, each normalised (the ablation without a teacher)

Every teacher gives one feature per patch of the tokenizer. Pictures are resized so that the
teacher's own patches form the same grid; its positions are interpolated if that is not the size it
was trained at.

`read_clip` reads a CLIP's files as written by Hugging Face's transformers or OpenCLIP; neither
package is needed. Sources: "Learning Transferable Visual Models From Natural Language Supervision"
(arXiv 2103.00020); the layouts of transformers' `CLIPVisionModelWithProjection` and of OpenCLIP's
`VisionTransformer`; "Masked Autoencoders" (arXiv 2111.06377) for normalised pixels.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from beit3 import weights
from beit3.model import interpolate_positions
from beit3.objectives import DualEncoder
from beit3.released import read_tensors

TEACHER_FILE = "teacher.json"
MOST_STRETCH = 1.5
"""Largest factor by which a position table is interpolated to a finer or coarser grid."""
Activation = Literal["gelu", "quick_gelu"]
_MEAN = (0.48145466, 0.4578275, 0.40821073)
_DEVIATION = (0.26862954, 0.26130258, 0.27577711)


class Teacher(nn.Module):
    """A frozen model that gives patch features.

    dim: width of the features.
    side: pixels that pictures are resized to.
    """

    def __init__(self, dim: int, side: int) -> None:
        super().__init__()
        self.dim, self.side = dim, side

    def train(self, mode: bool = True) -> Teacher:
        return super().train(False)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, height, width]` to features `[n, patches, dim]`, without gradients."""
        pixels = images.float()
        if images.shape[2:] != (self.side, self.side):
            size = (self.side, self.side)
            pixels = F.interpolate(pixels, size, mode="bicubic", antialias=True).clamp(0, 255)
        return self.features(pixels)

    def features(self, pixels: Tensor) -> Tensor:
        """Floats in 0..255, `[n, 3, side, side]`, to features `[n, patches, dim]`."""
        raise NotImplementedError


def side_for(image_size: int, patch_size: int, *, grid: int, teacher_patch: int, name: str) -> int:
    """Image side in pixels at which a teacher's patch grid is the tokenizer's.

    Args:
        image_size, patch_size: The tokenizer's.
        grid, teacher_patch: The teacher's patches along a side in training, and their size.
        name: The teacher's name in the error.

    Raises:
        ValueError: the grids are too different for the teacher's positions to be interpolated.
    """
    ours = image_size // patch_size
    if max(ours / grid, grid / ours) > MOST_STRETCH:
        raise ValueError(
            f"{name}: its patch grid is {grid}x{grid} at {grid * teacher_patch} pixels, the "
            f"tokenizer's {ours}x{ours} at {image_size}: too different to interpolate its "
            "positions; set tokenizer.image_size and tokenizer.patch_size nearer to the teacher's"
        )
    return ours * teacher_patch


class PixelTeacher(Teacher):
    """A patch's pixels, each patch with mean 0 and deviation 1: `[n, patches, 3 * patch ** 2]`."""

    def __init__(self, image_size: int, patch_size: int) -> None:
        super().__init__(3 * patch_size**2, image_size)
        self.patch_size = patch_size

    def features(self, pixels: Tensor) -> Tensor:
        patches = F.unfold(pixels / 255, self.patch_size, stride=self.patch_size).mT
        variance, mean = torch.var_mean(patches, -1, keepdim=True)
        return (patches - mean) / (variance + 1e-6).sqrt()


class DualEncoderTeacher(Teacher):
    """The projected patch features of a dual encoder."""

    def __init__(
        self, model: DualEncoder, image_size: int, patch_size: int, name: str = "teacher"
    ) -> None:
        config = model.backbone.config
        side = side_for(
            image_size, patch_size, grid=config.grid, teacher_patch=config.patch_size, name=name
        )
        super().__init__(config.hidden, side)
        self.model = model.requires_grad_(False).eval()

    def features(self, pixels: Tensor) -> Tensor:
        return self.model.encode_patches(pixels)


class ClipTeacher(Teacher):
    """The projected patch features of a CLIP's vision tower."""

    mean: Tensor
    deviation: Tensor

    def __init__(
        self, tower: ClipTower, image_size: int, patch_size: int, name: str = "teacher"
    ) -> None:
        config = tower.config
        side = side_for(
            image_size,
            patch_size,
            grid=config.image_size // config.patch_size,
            teacher_patch=config.patch_size,
            name=name,
        )
        super().__init__(config.dim, side)
        self.tower = tower.requires_grad_(False).eval()
        for key, value in (("mean", config.mean), ("deviation", config.deviation)):
            self.register_buffer(key, torch.tensor(value).view(3, 1, 1), persistent=False)

    def features(self, pixels: Tensor) -> Tensor:
        return self.tower((pixels / 255 - self.mean) / self.deviation)[:, 1:]


def load_teacher(folder: Path, image_size: int, patch_size: int, name: str = "teacher") -> Teacher:
    """Read a teacher's folder: a CLIP tower (`save_clip`) or a dual encoder.

    Raises:
        ValueError: the folder holds something else, or its grid can't match the tokenizer's.
    """
    if (folder / TEACHER_FILE).exists():
        return ClipTeacher(load_clip(folder), image_size, patch_size, name)
    if not (folder / weights.CONFIG).exists():
        raise ValueError(f"{name}: neither a dual encoder nor an imported CLIP")
    config, notes = weights.load_config(folder)
    if notes.get("kind") != "dual_encoder":
        raise ValueError(f"{name}: a {notes.get('kind')} model, not a dual encoder")
    model = DualEncoder(config)
    weights.load_into(model, weights.load_tensors(folder))
    return DualEncoderTeacher(model, image_size, patch_size, name)


# -- CLIP's vision tower ---------------------------------------------------------------------------


@dataclass(frozen=True)
class ClipConfig:
    """Shape of a CLIP's vision tower, and how its pictures are normalised."""

    layers: int
    hidden: int
    mlp: int
    heads: int
    patch_size: int
    image_size: int
    dim: int
    """Width of the joint space."""
    activation: Activation
    """OpenAI's models have quick_gelu, x * sigmoid(1.702 x); most of OpenCLIP's have gelu."""
    norm_eps: float = 1e-5
    mean: tuple[float, float, float] = _MEAN
    deviation: tuple[float, float, float] = _DEVIATION


class ClipTower(nn.Module):
    """A pre-norm ViT with another norm before its first block, and no patch-embedding bias."""

    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        self.config = config
        width, patch = config.hidden, config.patch_size
        self.conv = nn.Conv2d(3, width, patch, patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        positions = 1 + (config.image_size // patch) ** 2
        self.positions = nn.Parameter(torch.zeros(positions, width))
        self.ln_pre = nn.LayerNorm(width, config.norm_eps)
        self.blocks = nn.ModuleList(_ClipBlock(config) for _ in range(config.layers))
        self.ln_post = nn.LayerNorm(width, config.norm_eps)
        self.projection = nn.Linear(width, config.dim, bias=False)

    def forward(self, images: Tensor) -> Tensor:
        """Normalised `[n, 3, height, width]` to `[n, 1 + patches, dim]`, the summary first."""
        x = self.conv(images.to(self.conv.weight.dtype))
        rows, columns = x.shape[2:]
        x = torch.cat([self.class_embedding.expand(len(x), 1, -1), x.flatten(2).mT], 1)
        positions = self.positions
        if rows * columns != len(positions) - 1 or rows != columns:
            positions = interpolate_positions(positions, rows, columns)
        x = self.ln_pre(x + positions)
        for block in self.blocks:
            x = block(x)
        return self.projection(self.ln_post(x))


class _ClipBlock(nn.Module):
    def __init__(self, config: ClipConfig) -> None:
        super().__init__()
        width = config.hidden
        self.heads, self.activation = config.heads, config.activation
        self.ln_1 = nn.LayerNorm(width, config.norm_eps)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.ln_2 = nn.LayerNorm(width, config.norm_eps)
        self.fc1 = nn.Linear(width, config.mlp)
        self.fc2 = nn.Linear(config.mlp, width)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.ln_1(x)).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        inner = self.fc1(self.ln_2(x))
        quick = self.activation == "quick_gelu"
        return x + self.fc2(inner * torch.sigmoid(1.702 * inner) if quick else F.gelu(inner))


def save_clip(folder: Path, config: ClipConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a tower's folder: `teacher.json` and `model.safetensors`."""
    folder.mkdir(parents=True, exist_ok=True)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / weights.WEIGHTS)
    text = json.dumps({"kind": "clip", **asdict(config)}, indent=1)
    (folder / TEACHER_FILE).write_text(text + "\n")


def load_clip(folder: Path) -> ClipTower:
    """Read what `save_clip` wrote.

    Raises:
        ValueError: its tensors don't fit its configuration.
    """
    raw = json.loads((folder / TEACHER_FILE).read_text())
    raw |= {key: tuple(raw[key]) for key in ("mean", "deviation")}
    tower = ClipTower(ClipConfig(**{k: v for k, v in raw.items() if k != "kind"}))
    weights.load_into(tower, weights.load_tensors(folder))
    return tower.eval()


# -- CLIP's files ----------------------------------------------------------------------------------

# Our names of a block's tensors and those in a file, without `weight` or `bias`.
_HUGGING_FACE = {
    "ln_1": ["layer_norm1"],
    "qkv": ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"],
    "out": ["self_attn.out_proj"],
    "ln_2": ["layer_norm2"],
    "fc1": ["mlp.fc1"],
    "fc2": ["mlp.fc2"],
}
_OPEN_CLIP = {
    "ln_1": ["ln_1"],
    "qkv": ["attn.in_proj_"],
    "out": ["attn.out_proj"],
    "ln_2": ["ln_2"],
    "fc1": ["mlp.c_fc"],
    "fc2": ["mlp.c_proj"],
}


def read_clip(
    path: Path, *, activation: Activation | None = None, heads: int | None = None
) -> tuple[ClipConfig, dict[str, Tensor]]:
    """Read a CLIP's vision tower from local files; its text tower is left out.

    Args:
        path: A folder that transformers' `save_pretrained` wrote (`config.json`), a folder of
            OpenCLIP's (`open_clip_config.json`), or an OpenCLIP weights file alone.
        activation: Needed for a weights file alone, which doesn't tell it.
        heads: For a weights file alone, if its heads are not 64 wide.

    Raises:
        ValueError: the files hold something else, or more than tensors; keys that are missing,
            unexpected or of the wrong shape are named.
        FileNotFoundError: the folder has no configuration or no weights.
    """
    if not path.is_dir():
        if activation is None:
            raise ValueError(
                f"{path}: a weights file doesn't tell its activation: say quick_gelu (OpenAI's "
                "models, and those whose name ends with -quickgelu) or gelu (most others)"
            )
        return _open_clip(read_tensors(path), {"activation": activation, "heads": heads}, path)
    if (path / "open_clip_config.json").exists():
        raw = json.loads((path / "open_clip_config.json").read_text())
        model, pre = raw["model_cfg"], raw.get("preprocess_cfg", {})
        facts: dict[str, Any] = {
            "activation": "quick_gelu" if model.get("quick_gelu") else "gelu",
            "head_width": model["vision_cfg"].get("head_width", 64),
            "mean": pre.get("mean"),
            "deviation": pre.get("std"),
        }
        names = ("open_clip_model.safetensors", "open_clip_pytorch_model.bin")
        return _open_clip(_weights_of(path, names), facts, path)
    raw = json.loads((path / "config.json").read_text())
    return _hugging_face(path, raw)


def _weights_of(folder: Path, names: tuple[str, ...]) -> dict[str, Tensor]:
    for name in names:
        if (folder / name).exists():
            return read_tensors(folder / name)
        parts = sorted(folder.glob(f"{Path(name).stem}-*-of-*{Path(name).suffix}"))
        if parts:
            return {key: value for part in parts for key, value in read_tensors(part).items()}
    raise FileNotFoundError(f"{folder}: none of {', '.join(names)}")


def _hugging_face(folder: Path, raw: dict[str, Any]) -> tuple[ClipConfig, dict[str, Tensor]]:
    if raw.get("model_type") not in ("clip", "clip_vision_model"):
        raise ValueError(f"{folder}: a model of type {raw.get('model_type')!r}, not a CLIP")
    vision = raw.get("vision_config", raw)
    facts: dict[str, Any] = {
        "activation": vision.get("hidden_act", "quick_gelu"),
        "heads": vision.get("num_attention_heads", 12),
        "norm_eps": vision.get("layer_norm_eps", 1e-5),
    }
    preprocessing = folder / "preprocessor_config.json"
    if preprocessing.exists():
        read = json.loads(preprocessing.read_text())
        facts |= {"mean": read.get("image_mean"), "deviation": read.get("image_std")}
    found = _weights_of(folder, ("model.safetensors", "pytorch_model.bin"))
    theirs = {
        key: value
        for key, value in found.items()
        if key.startswith(("vision_model.", "visual_projection."))
        and not key.endswith("position_ids")
    }
    names = {
        "conv.weight": "vision_model.embeddings.patch_embedding.weight",
        "class_embedding": "vision_model.embeddings.class_embedding",
        "positions": "vision_model.embeddings.position_embedding.weight",
        "projection.weight": "visual_projection.weight",
        "ln_pre.{}": "vision_model.pre_layrnorm.{}",  # so it is spelled
        "ln_post.{}": "vision_model.post_layernorm.{}",
    }
    return _converted(theirs, names, "vision_model.encoder.layers.", _HUGGING_FACE, facts, folder)


def _open_clip(
    found: Mapping[str, Tensor], facts: dict[str, Any], path: Path
) -> tuple[ClipConfig, dict[str, Tensor]]:
    theirs = {key: value for key, value in found.items() if key.startswith("visual.")}
    if "visual.proj" in theirs:  # [hidden, dim], multiplied from the right
        theirs["visual.proj"] = theirs["visual.proj"].T
    names = {
        "conv.weight": "visual.conv1.weight",
        "class_embedding": "visual.class_embedding",
        "positions": "visual.positional_embedding",
        "projection.weight": "visual.proj",
        "ln_pre.{}": "visual.ln_pre.{}",
        "ln_post.{}": "visual.ln_post.{}",
    }
    return _converted(theirs, names, "visual.transformer.resblocks.", _OPEN_CLIP, facts, path)


def _converted(
    theirs: Mapping[str, Tensor],
    names: Mapping[str, str],
    block: str,
    inside: Mapping[str, list[str]],
    facts: Mapping[str, Any],
    path: Path,
) -> tuple[ClipConfig, dict[str, Tensor]]:
    """The configuration, from shapes and `facts`, and the tensors under our names, in fp32."""
    needed = (names["conv.weight"], names["positions"], names["projection.weight"])
    absent = [name for name in needed if name not in theirs]
    if absent:
        raise ValueError(f"{path}: no vision tower of a CLIP; missing {', '.join(absent)}")
    conv, positions, projection = (theirs[name] for name in needed)
    layers = 1 + max(
        (int(m[1]) for key in theirs if (m := re.match(re.escape(block) + r"(\d+)\.", key))),
        default=-1,
    )
    hidden, patch, grid = len(conv), conv.shape[-1], math.isqrt(max(0, len(positions) - 1))
    first = theirs.get(f"{block}0.{inside['fc1'][0]}.weight")
    if facts["activation"] not in ("gelu", "quick_gelu"):
        raise ValueError(f"{path}: activation {facts['activation']!r} is not known")
    means = {key: tuple(facts[key]) for key in ("mean", "deviation") if facts.get(key)}
    config = ClipConfig(
        layers=layers,
        hidden=hidden,
        mlp=4 * hidden if first is None else len(first),
        heads=facts.get("heads") or max(1, hidden // facts.get("head_width", 64)),
        patch_size=patch,
        image_size=grid * patch,
        dim=len(projection),
        activation=facts["activation"],
        norm_eps=facts.get("norm_eps", 1e-5),
        **means,  # type: ignore[arg-type]
    )
    if hidden % config.heads:
        raise ValueError(f"{path}: hidden {hidden} is not divisible by heads {config.heads}")
    pairs = dict[str, list[str]]()
    kinds = ("weight", "bias")
    for ours, name in names.items():
        pairs |= {ours.format(k): [name.format(k)] for k in (kinds if "{}" in ours else ("",))}
    for i in range(layers):
        for ours, others in inside.items():
            for kind in kinds:
                joint = [f"{block}{i}.{o}{'' if o.endswith('_') else '.'}{kind}" for o in others]
                pairs[f"blocks.{i}.{ours}.{kind}"] = joint
    with torch.device("meta"):
        shapes = {key: value.shape for key, value in ClipTower(config).state_dict().items()}
    expected = {
        name: [shapes[ours][0] // len(joint), *shapes[ours][1:]]
        for ours, joint in pairs.items()
        for name in joint
    }
    problems = [f"{key}: missing" for key in expected if key not in theirs]
    problems += [f"{key}: unexpected" for key in theirs if key not in expected]
    problems += [
        f"{key}: has shape {list(theirs[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in theirs and list(theirs[key].shape) != shape
    ]
    if problems:
        raise ValueError(f"{path}: does not fit a CLIP vision tower:\n  " + "\n  ".join(problems))
    return config, {
        ours: torch.cat([theirs[name].float() for name in joint]) for ours, joint in pairs.items()
    }
