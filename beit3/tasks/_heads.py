"""Initialisation that the tasks' classifiers share."""

from __future__ import annotations

from torch import nn

HEAD_INIT = 0.001
"""Factor on the usual initial weights: the first answers are even odds (microsoft/unilm)."""


def start_small(*layers: nn.Linear, scale: float = HEAD_INIT) -> None:
    for layer in layers:
        nn.init.trunc_normal_(layer.weight, std=0.02, a=-0.02, b=0.02)
        nn.init.zeros_(layer.bias)
        layer.weight.data.mul_(scale)
