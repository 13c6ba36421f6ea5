"""Learning-rate schedule, layer-wise decay and weight-decay groups of BEiT-3's recipes.

Source: microsoft/unilm `beit3/optim_factory.py`; "Image as a Foreign Language" table 11.
"""

from __future__ import annotations

import math
import re
from collections import defaultdict
from typing import Any

from torch import nn

# Positions of VQ-KD's encoder and decoder (beit2 `modeling_vqkd.py`, no_weight_decay).
_TOKENIZER_POSITIONS = ("tokenizer.embedding.positions", "tokenizer.decoder_positions")
_BLOCK = re.compile(r"encoder\.blocks\.(\d+)\.")


def cosine_schedule(
    step: int, *, peak: float, warmup: int, steps: int, floor: float = 0.0
) -> float:
    """Learning rate of a step: linear warm-up from 0, then a half cosine down to `floor`."""
    if step < warmup:
        return peak * (step + 1) / warmup
    done = (step - warmup) / max(1, steps - warmup)
    return floor + (peak - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done)))


def layer_scale(name: str, layers: int, decay: float) -> float:
    """Learning-rate multiplier of a parameter: `decay ** (layers above it)`.

    Embeddings and positions count as layer 0, block `i` as layer `i + 1`, heads and final norms as
    layer `layers + 1`.
    """
    block = _BLOCK.search(name)
    if block:
        layer = int(block.group(1)) + 1
    elif "embedding" in name or "positions" in name:
        layer = 0
    else:
        layer = layers + 1
    return decay ** (layers + 1 - layer)


def decays(name: str, parameter: nn.Parameter) -> bool:
    """Whether to decay a parameter: not biases, norms, `[CLS]`, vision positions, logit scale."""
    exempt = name.endswith(("vision_embedding.positions", *_TOKENIZER_POSITIONS))
    return parameter.ndim > 1 and not exempt


def parameter_groups(
    module: nn.Module,
    *,
    weight_decay: float,
    layers: int = 0,
    layer_decay: float = 1.0,
    head_scale: float = 1.0,
) -> list[dict[str, Any]]:
    """Optimizer groups, each with its `weight_decay` and its `lr_scale`.

    Args:
        layers: Blocks of the backbone, for layer-wise decay.
        layer_decay: Factor per layer; 1 gives every layer the same rate.
        head_scale: Multiplier of parameters outside `backbone.` (VQA's head learns 20x faster).
    """
    groups: dict[tuple[float, float], list[nn.Parameter]] = defaultdict(list)
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        scale = layer_scale(name, layers, layer_decay) if layer_decay != 1.0 else 1.0
        if "backbone." not in name:
            scale *= head_scale
        groups[(scale, weight_decay if decays(name, parameter) else 0.0)].append(parameter)
    return [
        {"params": parameters, "lr_scale": scale, "weight_decay": decay}
        for (scale, decay), parameters in sorted(groups.items())
    ]
