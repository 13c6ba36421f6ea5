"""Counts a preset's parameters, part by part, without allocating any.

    python -m beit3.parameters --preset giant

The parts are those of table 2 of "Image as a Foreign Language" (arXiv 2208.10442).
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence

import torch
from torch import nn

from beit3.config import PRESETS, ModelConfig
from beit3.objectives import MaskedDataModelling

PARTS: tuple[str, ...] = (
    "V-FFN",
    "L-FFN",
    "VL-FFN",
    "attention",
    "norms",
    "text embedding",
    "vision embedding",
    "MLM head",
    "MIM head",
)
_EXPERTS = {"vision_expert": "V-FFN", "language_expert": "L-FFN", "fusion_expert": "VL-FFN"}
_BEGINNINGS = {
    "backbone.text_": "text embedding",
    "backbone.vision_embedding.": "vision embedding",
    "text_head.": "MLM head",
    "image_head.": "MIM head",
}


def count(config: ModelConfig) -> dict[str, int]:
    """Parameters of each part of the model as it is pretrained, heads included.

    A standard Transformer's one feed-forward network counts as V-FFN.
    """
    with torch.device("meta"):
        model = MaskedDataModelling(config)
    parts = dict.fromkeys(PARTS, 0)
    for name, module in model.named_modules():
        for key, parameter in module.named_parameters(name, recurse=False):
            parts[_part(key, module)] += parameter.numel()
    return parts


def _part(key: str, module: nn.Module) -> str:
    for beginning, part in _BEGINNINGS.items():
        if key.startswith(beginning):
            return part
    if isinstance(module, nn.LayerNorm):
        return "norms"
    if ".attention." in key:
        return "attention"
    return next(part for expert, part in _EXPERTS.items() if f".{expert}." in key)


def table(config: ModelConfig) -> str:
    """The parts and their sum, in millions."""
    parts = count(config)
    rows = [*parts.items(), ("total", sum(parts.values()))]
    return "\n".join(f"{name:<17} {number / 1e6:9.2f}M" for name, number in rows if number)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        prog="python -m beit3.parameters", description="Parameters of a preset, part by part."
    )
    parser.add_argument("--preset", choices=PRESETS, default="giant")
    print(table(PRESETS[parser.parse_args(arguments).preset]))


if __name__ == "__main__":
    main()
