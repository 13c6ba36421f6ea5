"""Weights on disk: safetensors with their configuration beside them.

A model is a folder: `model.safetensors`, `config.json`, and whatever the caller adds (tokenizer,
card). `beit3.released` reads and writes the authors' files.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path

from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from beit3.config import ModelConfig

WEIGHTS, CONFIG = "model.safetensors", "config.json"


def save(folder: Path, module: nn.Module, config: ModelConfig, **notes: object) -> None:
    """Write a module's tensors and its configuration; `notes` go into `config.json` too."""
    save_tensors(folder, module.state_dict(), config, **notes)


def save_tensors(
    folder: Path, tensors: Mapping[str, Tensor], config: ModelConfig, **notes: object
) -> None:
    """`save` for tensors that no module holds."""
    folder.mkdir(parents=True, exist_ok=True)
    plain = {k: v.detach().cpu().contiguous() for k, v in tensors.items()}
    save_file(plain, folder / WEIGHTS)
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
