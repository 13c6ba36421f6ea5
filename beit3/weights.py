"""Weights on disk: safetensors with their configuration beside them, and the released layout.

A model is a folder: `model.safetensors`, `config.json`, and whatever the caller adds (tokenizer,
card). The released checkpoints (microsoft/unilm `beit3_{base,large}_*.pth`) name and split tensors
otherwise; `from_released` and `to_released` convert the backbone's both ways.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from beit3.config import ModelConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"

# The released position tables start at row 2 (a fairseq habit); rows 0 and 1 are never used.
UNUSED_POSITIONS = 2
_MODALITY = {"A": "vision", "B": "language"}


def save(folder: Path, module: nn.Module, config: ModelConfig, **notes: object) -> None:
    """Write a module's tensors and its configuration; `notes` go into `config.json` too."""
    folder.mkdir(parents=True, exist_ok=True)
    tensors = {k: v.detach().cpu().contiguous() for k, v in module.state_dict().items()}
    save_file(tensors, folder / WEIGHTS)
    text = json.dumps({"model": asdict(config), **notes}, indent=1)
    (folder / CONFIG).write_text(text + "\n")


def load_config(folder: Path) -> tuple[ModelConfig, dict[str, object]]:
    """The model's configuration, and the notes saved with it.

    Raises:
        FileNotFoundError: the folder holds no model.
    """
    raw = json.loads((folder / CONFIG).read_text())
    return ModelConfig(**raw.pop("model")), raw


def load_tensors(folder: Path) -> dict[str, Tensor]:
    with safe_open(folder / WEIGHTS, framework="pt") as file:
        return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a dict)


def load_into(module: nn.Module, tensors: Mapping[str, Tensor], *, partial: bool = False) -> None:
    """Load tensors, naming every key that does not fit.

    Args:
        partial: Keys may be missing (a fresh head on a pretrained backbone) or superfluous (the
            pretraining heads); shapes must agree all the same.

    Raises:
        ValueError: keys are missing or unexpected, or shapes differ.
    """
    own = module.state_dict()
    problems = [
        f"{key}: has shape {list(value.shape)}, expected {list(own[key].shape)}"
        for key, value in tensors.items()
        if key in own and own[key].shape != value.shape
    ]
    if not partial:
        problems += [f"{key}: missing" for key in own if key not in tensors]
        problems += [f"{key}: unexpected" for key in tensors if key not in own]
    if problems:
        raise ValueError("weights do not fit the model:\n  " + "\n  ".join(problems[:50]))
    module.load_state_dict({k: v for k, v in tensors.items() if k in own}, strict=not partial)


def from_released(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The released backbone's tensors under this project's names.

    Raises:
        ValueError: a key of the released layout is missing.
    """
    converted: dict[str, Tensor] = {}
    try:
        for ours, theirs in _pairs(config):
            parts = [tensors[name] for name in theirs]
            converted[ours] = torch.cat(parts) if len(parts) > 1 else parts[0]
    except KeyError as error:
        raise ValueError(f"released weights: key {error.args[0]!r} is missing") from error
    for ours in ("vision_embedding.cls_token", "vision_embedding.mask_token"):
        converted[ours] = converted[ours].reshape(-1)
    for ours in ("vision_embedding.positions", "text_positions"):
        converted[ours] = converted[ours][UNUSED_POSITIONS:]
    return converted


def to_released(tensors: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """This project's backbone tensors under the released names; unused position rows are zero."""
    converted: dict[str, Tensor] = {}
    for ours, theirs in _pairs(config):
        value = tensors[ours]
        if ours in ("vision_embedding.positions", "text_positions"):
            value = torch.cat([value.new_zeros(UNUSED_POSITIONS, value.shape[1]), value])
        elif ours in ("vision_embedding.cls_token", "vision_embedding.mask_token"):
            value = value.reshape(1, 1, -1)
        for name, part in zip(theirs, value.chunk(len(theirs)), strict=True):
            converted[name] = part.clone()
    return converted


def _pairs(config: ModelConfig) -> list[tuple[str, list[str]]]:
    """Each of our backbone's keys with the released keys it is made of, in order."""
    if config.attention != "per_modality" or config.vl_layers or not config.sub_ln:
        raise ValueError(
            "the released layout has attention='per_modality', vl_layers=0 and sub_ln=True; "
            f"this model has {config.attention!r}, {config.vl_layers}, {config.sub_ln}"
        )
    pairs = [
        ("vision_embedding.cls_token", ["beit3.vision_embed.cls_token"]),
        ("vision_embedding.mask_token", ["beit3.vision_embed.mask_token"]),
        ("vision_embedding.projection.weight", ["beit3.vision_embed.proj.weight"]),
        ("vision_embedding.projection.bias", ["beit3.vision_embed.proj.bias"]),
        ("vision_embedding.positions", ["beit3.encoder.embed_positions.A.weight"]),
        ("text_positions", ["beit3.encoder.embed_positions.B.weight"]),
        ("text_embedding.weight", ["beit3.text_embed.weight"]),
    ]
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


def strip_prefix(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix`, without it."""
    pattern = re.compile("^" + re.escape(prefix))
    return {pattern.sub("", k): v for k, v in tensors.items() if pattern.match(k)}
