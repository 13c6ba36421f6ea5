"""Converts the authors' checkpoints (microsoft/unilm, `beit3_{base,large}_*.pth`), both ways.

    python -m beit3.released beit3_base_patch16_224.pth folder --image-size 384
    python -m beit3.released folder exported.pth

The first makes a model folder (`beit3.weights`) from a checkpoint, the second the reverse. Tensors
stay bit-identical, unless the position table is interpolated. Pickles are only ever read with
`weights_only=True`.

The released files name and split tensors differently, and their position tables start at row 2 (a
fairseq habit). `released.safetensors` in the folder keeps the two unused rows; without it they are
written as zeros.
"""

from __future__ import annotations

import argparse
import math
import pickle
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from beit3 import weights
from beit3.config import ModelConfig
from beit3.model import BEiT3, interpolate_positions

UNUSED_POSITIONS = 2
UNUSED = "released.safetensors"
HEAD_WIDTH = 64
"""Head width of the published models; shapes don't tell the number of heads."""

_MODALITY = {"A": "vision", "B": "language"}
_PATCHES = "beit3.vision_embed.proj.weight"
_WORDS = "beit3.text_embed.weight"
_POSITIONS = {
    "vision_embedding.positions": "beit3.encoder.embed_positions.A.weight",
    "text_positions": "beit3.encoder.embed_positions.B.weight",
}
_FC1 = "beit3.encoder.layers.0.ffn.A.fc1.weight"
# Prefixes of the heads' names, theirs and ours; other names are the same.
_HEADS = {
    "mlm_head.": "text_head.",
    "mim_head.": "image_head.",
    "pooler.norm.": "pooler_norm.",
    "pooler.dense.": "pooler.",
}
_CLASSES = {"vqa": "head.3.weight", "imagenet": "head.weight"}
_PASSES = "passes"  # the captioning model's count of its training steps; theirs have none


@dataclass(frozen=True)
class Released:
    """A released model under this project's names.

    kind: `backbone`, `pretrained`, `dual_encoder` (contrastive stage, retrieval), `captioning`,
        `vqa`, `nlvr2` or `imagenet`.
    backbone: tensors that `BEiT3(config)` loads.
    heads: named as in the model of that kind; `imagenet` and `nlvr2` keep the released names.
    unused: the unused rows of the position tables, by released name; may be empty.
    """

    kind: str
    config: ModelConfig
    backbone: dict[str, Tensor]
    heads: dict[str, Tensor]
    unused: dict[str, Tensor] = field(default_factory=dict)

    @property
    def tensors(self) -> dict[str, Tensor]:
        """Backbone and heads, as the model of this kind loads them."""
        return {f"backbone.{key}": value for key, value in self.backbone.items()} | self.heads

    @property
    def classes(self) -> int:
        """Classes of the head, if the kind leaves their number open; else 0."""
        return len(self.heads[_CLASSES[self.kind]]) if self.kind in _CLASSES else 0


def load_released(
    path: Path, *, image_size: int | None = None, heads: int | None = None
) -> Released:
    """Read a checkpoint: `.safetensors`, or else a pickle of tensors.

    Args:
        image_size: Side of the pictures that the position table is interpolated for.
        heads: Attention heads, if they are not 64 wide.

    Raises:
        ValueError: the file holds anything but tensors, or another model's; each key that is
            missing, unexpected or of the wrong shape is named.
    """
    try:
        return from_released(read_tensors(path), image_size=image_size, heads=heads)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def save_released(path: Path, released: Released) -> None:
    """Write a checkpoint in the released layout: `.safetensors`, or else a pickle under "model".

    Raises:
        ValueError: the released layout cannot hold this model.
    """
    tensors = to_released(released)
    if path.suffix == ".safetensors":
        save_file(tensors, path)
    else:
        torch.save({"model": tensors}, path)


def load_folder(folder: Path) -> Released:
    """Read a model folder, to convert it to the released layout.

    Raises:
        FileNotFoundError: the folder holds no model.
        ValueError: no released model has its heads.
    """
    config, _ = weights.load_config(folder)
    backbone: dict[str, Tensor] = {}
    heads: dict[str, Tensor] = {}
    for key, value in weights.load_tensors(folder).items():
        if key.startswith("backbone."):
            backbone[key.removeprefix("backbone.")] = value
        else:
            heads[key] = value
    names = {_their_name(key) for key in heads if key != _PASSES}
    kind = _kind(names)
    if names != set(_head_shapes(kind, config, 0)):
        raise ValueError(f"{folder}: no released model has the heads {', '.join(sorted(names))}")
    unused = load_file(folder / UNUSED) if (folder / UNUSED).exists() else {}
    return Released(kind, config, backbone, heads, unused)


def save_folder(folder: Path, released: Released) -> None:
    """Write a model folder."""
    weights.save_tensors(folder, released.tensors, released.config, kind=released.kind)
    if released.unused:
        save_file(released.unused, folder / UNUSED)


def from_released(
    tensors: Mapping[str, Tensor], *, image_size: int | None = None, heads: int | None = None
) -> Released:
    """`load_released` for tensors in memory.

    Raises:
        ValueError: as `load_released`.
    """
    config = _infer(tensors, heads)
    names = {key for key in tensors if not key.startswith("beit3.")}
    kind = _kind(names)
    _check(tensors, kind, config)

    backbone: dict[str, Tensor] = {}
    for ours, theirs in _pairs(config):
        parts = [tensors[name] for name in theirs]
        backbone[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    for ours in ("vision_embedding.cls_token", "vision_embedding.mask_token"):
        backbone[ours] = backbone[ours].reshape(-1)
    unused = {}
    for ours, theirs in _POSITIONS.items():
        unused[theirs] = backbone[ours][:UNUSED_POSITIONS].clone()
        backbone[ours] = backbone[ours][UNUSED_POSITIONS:].clone()
    if image_size is not None and image_size != config.image_size:
        config = replace(config, image_size=image_size)
        table = backbone["vision_embedding.positions"]
        table = interpolate_positions(table, config.grid, config.grid)
        backbone["vision_embedding.positions"] = table

    own = {_our_name(name): tensors[name] for name in names}
    if "logit_scale" in own:
        own["logit_scale"] = own["logit_scale"].reshape(1)
    if kind == "captioning":
        own[_PASSES] = torch.zeros((), dtype=torch.long)
    return Released(kind, config, backbone, own, unused)


def to_released(released: Released) -> dict[str, Tensor]:
    """All tensors under the released names, backbone and heads.

    Raises:
        ValueError: the released layout cannot hold this model.
    """
    converted: dict[str, Tensor] = {}
    for ours, theirs in _pairs(released.config):
        value = released.backbone[ours]
        if ours in _POSITIONS:
            rows = value.new_zeros(UNUSED_POSITIONS, value.shape[1])
            value = torch.cat([released.unused.get(theirs[0], rows), value])
        elif ours in ("vision_embedding.cls_token", "vision_embedding.mask_token"):
            value = value.reshape(1, 1, -1)
        for name, part in zip(theirs, value.chunk(len(theirs)), strict=True):
            converted[name] = part.clone()
    for key, value in released.heads.items():
        if key != _PASSES:
            converted[_their_name(key)] = value.reshape(()) if key == "logit_scale" else value
    return converted


def read_tensors(
    path: Path, inside: Sequence[str] = ("model", "module", "state_dict")
) -> dict[str, Tensor]:
    """A file of tensors by name: `.safetensors`, or else a pickle, read with `weights_only=True`.

    Args:
        inside: Keys under which a pickle may hold them; the first one found counts.

    Raises:
        ValueError: the file holds anything but tensors, or is damaged.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except SafetensorError as error:
            raise ValueError(f"not a safetensors file ({error})") from error
    with path.open("rb") as file:
        try:
            content = torch.load(file, map_location="cpu", weights_only=True)
        except pickle.UnpicklingError as error:
            raise ValueError(
                "holds more than tensors, or is damaged; it was not opened, since unpickling can "
                "run any program. If it comes from a training run, save its tensors alone: "
                'torch.save({"model": model.state_dict()}, path). '
                f"{str(error).splitlines()[0]}"
            ) from error
        except (RuntimeError, EOFError, OSError) as error:  # OSError: a zip file cut short
            raise ValueError(f"not a PyTorch file, or damaged ({error})") from error
    for name in inside:
        if isinstance(content, dict) and isinstance(content.get(name), dict):
            content = content[name]
            break
    if not isinstance(content, dict):
        raise ValueError(f"expected tensors by name, found a {type(content).__name__}")
    others = [
        f"{key!r}: {type(value).__name__}"
        for key, value in content.items()
        if not (isinstance(key, str) and isinstance(value, Tensor))
    ]
    if others:
        raise ValueError(f"expected tensors by name, found {', '.join(others)}")
    return dict(content)


def _infer(tensors: Mapping[str, Tensor], heads: int | None) -> ModelConfig:
    """The configuration, inferred from a checkpoint's shapes."""
    dimensions = {_PATCHES: 4, _WORDS: 2, _FC1: 2, **dict.fromkeys(_POSITIONS.values(), 2)}
    problems = [
        f"{key}: missing"
        if key not in tensors
        else f"{key}: has shape {list(tensors[key].shape)}, expected {count} dimensions"
        for key, count in dimensions.items()
        if key not in tensors or tensors[key].ndim != count
    ]
    if problems:
        raise ValueError("no released BEiT-3:\n  " + "\n  ".join(problems))
    hidden, _, patch, _ = tensors[_PATCHES].shape
    vision, text = (len(tensors[key]) - UNUSED_POSITIONS for key in _POSITIONS.values())
    grid = math.isqrt(max(0, vision - 1))
    if grid < 1 or grid**2 != vision - 1:
        raise ValueError(
            f"{_POSITIONS['vision_embedding.positions']}: {vision + UNUSED_POSITIONS} rows are not "
            f"{UNUSED_POSITIONS} unused ones, [CLS] and a square of patches"
        )
    if heads is None:
        heads, rest = divmod(hidden, HEAD_WIDTH)
        if rest:
            raise ValueError(f"heads: hidden {hidden} is no multiple of {HEAD_WIDTH}; say how many")
    if heads < 1:
        raise ValueError(f"heads: expected at least 1, got {heads}")
    numbers = [re.match(r"beit3\.encoder\.layers\.(\d+)\.", key) for key in tensors]
    mim = tensors.get("mim_head.weight")
    return ModelConfig(
        layers=len({match[1] for match in numbers if match}),
        hidden=hidden,
        mlp=len(tensors[_FC1]),
        heads=heads,
        patch_size=patch,
        image_size=grid * patch,
        vocab_size=len(tensors[_WORDS]),
        max_text_length=text,
        codebook_size=ModelConfig.codebook_size if mim is None else len(mim),
        final_norm=any(key.startswith("beit3.encoder.layer_norm.") for key in tensors),
    )


def _check(tensors: Mapping[str, Tensor], kind: str, config: ModelConfig) -> None:
    with torch.device("meta"):
        empty = Released(kind, config, BEiT3(config).state_dict(), {})
        expected = {key: list(value.shape) for key, value in to_released(empty).items()}
    last = tensors.get(_CLASSES.get(kind, ""))
    classes = 0 if last is None or not last.ndim else len(last)
    expected |= _head_shapes(kind, config, classes)
    problems = [f"{key}: missing" for key in expected if key not in tensors]
    problems += [f"{key}: unexpected" for key in tensors if key not in expected]
    problems += [
        f"{key}: has shape {list(tensors[key].shape)}, expected {shape}"
        for key, shape in expected.items()
        if key in tensors and list(tensors[key].shape) != shape
    ]
    if problems:
        raise ValueError(f"read as {kind}, does not fit:\n  " + "\n  ".join(problems))


KINDS = ("backbone", "pretrained", "captioning", "dual_encoder", "vqa", "nlvr2", "imagenet")


def _kind(names: set[str]) -> str:
    """The kind whose heads are most like these, by released name."""
    return min(KINDS, key=lambda kind: len(names ^ set(_head_shapes(kind, ModelConfig(), 0))))


def _head_shapes(kind: str, config: ModelConfig, classes: int) -> dict[str, list[int]]:
    """Released names and shapes of a kind's heads."""

    def linear(name: str, rows: int, columns: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [rows, columns], f"{name}.bias": [rows]}

    def norm(name: str, width: int) -> dict[str, list[int]]:
        return {f"{name}.weight": [width], f"{name}.bias": [width]}

    d = config.hidden
    if kind == "backbone":
        return {}
    if kind == "pretrained":
        words = linear("mlm_head", config.vocab_size, d)
        return words | linear("mim_head", config.codebook_size, d)
    if kind == "captioning":
        return linear("mlm_head", config.vocab_size, d)
    if kind == "dual_encoder":
        return {"vision_head.weight": [d, d], "language_head.weight": [d, d], "logit_scale": []}
    if kind == "vqa":
        pooler = norm("pooler.norm", d) | linear("pooler.dense", d, d)
        first = linear("head.0", 2 * d, d) | norm("head.1", 2 * d)
        return pooler | first | linear("head.3", classes, 2 * d)
    if kind == "nlvr2":
        first = norm("head.norm1", 4 * d) | linear("head.dense1", 2 * d, 4 * d)
        return first | norm("head.norm2", 2 * d) | linear("head.dense2", 2, 2 * d)
    assert kind == "imagenet"
    return norm("fc_norm", d) | linear("head", classes, d)


def _our_name(name: str) -> str:
    for theirs, ours in _HEADS.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    return name


def _their_name(name: str) -> str:
    for theirs, ours in _HEADS.items():
        if name.startswith(ours):
            return theirs + name.removeprefix(ours)
    return name


def _pairs(config: ModelConfig) -> list[tuple[str, list[str]]]:
    """Each of our backbone's keys with the released keys it is made of, in order."""
    layout = {"attention": "per_modality", "multiway": True, "vl_layers": 0, "sub_ln": True}
    other = [f"{k}={getattr(config, k)!r}" for k, v in layout.items() if getattr(config, k) != v]
    if other:
        wanted = ", ".join(f"{k}={v!r}" for k, v in layout.items())
        raise ValueError(f"the released layout has {wanted}; this model has {', '.join(other)}")
    pairs = [
        ("vision_embedding.cls_token", ["beit3.vision_embed.cls_token"]),
        ("vision_embedding.mask_token", ["beit3.vision_embed.mask_token"]),
        ("vision_embedding.projection.weight", [_PATCHES]),
        ("vision_embedding.projection.bias", ["beit3.vision_embed.proj.bias"]),
        ("text_embedding.weight", [_WORDS]),
        *((ours, [theirs]) for ours, theirs in _POSITIONS.items()),
    ]
    if config.final_norm:
        for x, modality in _MODALITY.items():
            pairs += [
                (f"encoder.norm.{modality}.{kind}", [f"beit3.encoder.layer_norm.{x}.{kind}"])
                for kind in ("weight", "bias")
            ]
    templates = {
        "attention.qkv.{m}": [f"self_attn.{p}_proj.{{x}}" for p in "qkv"],
        "attention.out.{m}": ["self_attn.out_proj.{x}"],
        "attention.norm.{m}": ["self_attn.inner_attn_ln.{x}"],
        "norm1.{m}": ["self_attn_layer_norm.{x}"],
        "norm2.{m}": ["final_layer_norm.{x}"],
        "experts.{m}_expert.fc1": ["ffn.{x}.fc1"],
        "experts.{m}_expert.norm": ["ffn.{x}.ffn_layernorm"],
        "experts.{m}_expert.fc2": ["ffn.{x}.fc2"],
    }
    for layer in range(config.layers):
        for ours, theirs in templates.items():
            for x, m in _MODALITY.items():
                for kind in ("weight", "bias"):
                    key = f"encoder.blocks.{layer}.{ours.format(m=m)}.{kind}"
                    names = [f"beit3.encoder.layers.{layer}.{t.format(x=x)}.{kind}" for t in theirs]
                    pairs.append((key, names))
    return pairs


def read_arguments(
    module: str, description: str, source: str, target: str, arguments: Sequence[str] | None
) -> tuple[argparse.ArgumentParser, argparse.Namespace]:
    """Parse a converter's command line; `source` and `target` explain its two paths.

    Ends the program if the target exists.
    """
    parser = argparse.ArgumentParser(prog=f"python -m {module}", description=description)
    parser.add_argument("source", type=Path, help=source)
    parser.add_argument("target", type=Path, help=target)
    parser.add_argument("--image-size", type=int, help="interpolate the positions to this")
    parser.add_argument("--heads", type=int, help="attention heads, where they are not 64 wide")
    options = parser.parse_args(arguments)
    if options.target.exists():
        parser.error(f"{options.target} exists")
    return parser, options


def main(arguments: Sequence[str] | None = None) -> None:
    parser, options = read_arguments(
        "beit3.released",
        "Convert a released checkpoint to a model folder, or a folder back.",
        "a .pth or .safetensors file, or a model folder",
        "the folder or file to write",
        arguments,
    )
    try:
        if options.source.is_dir():
            if options.image_size or options.heads:
                parser.error("--image-size and --heads belong to a released file")
            model = load_folder(options.source)
            save_released(options.target, model)
        else:
            model = load_released(
                options.source, image_size=options.image_size, heads=options.heads
            )
            save_folder(options.target, model)
    except (ValueError, OSError) as error:
        parser.error(str(error))
    count = sum(value.numel() for value in model.tensors.values())
    shape = f"{model.config.layers} layers of {model.config.hidden}, {model.config.image_size} px"
    print(f"{options.target}: {model.kind}, {shape}, {count / 1e6:.1f}M parameters")


if __name__ == "__main__":
    main()
