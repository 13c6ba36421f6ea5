"""Estimates by formula the memory that a step of masked data modelling takes beside the model.

It counts what autograd keeps for the backward pass, the bf16 copies that autocast makes of weights,
and what the heads or one block need temporarily. It does not count the allocator's fragments,
libraries' workspaces or kernels that keep something else; leave a tenth of a GPU's memory free.
"""

from __future__ import annotations

import torch
from torch import nn

from beit3.config import ModelConfig, Precision
from beit3.flops import StepShape, image_outputs
from beit3.multiway import TEXT_GROUPS
from beit3.objectives import MaskedDataModelling, ObjectiveWeights

_FULL = 4  # bytes of a float in the residual stream, norms and losses, in any precision


def hollow(config: ModelConfig, *, pixels: bool = False) -> MaskedDataModelling:
    """The model with its pretraining heads, without memory for its parameters."""
    with torch.device("meta"):
        target = ObjectiveWeights(image_target="pixels" if pixels else "codes")
        return MaskedDataModelling(config, target)


def activation_bytes(
    config: ModelConfig, shape: StepShape, precision: Precision, *, pixels: bool = False
) -> int:
    """Peak bytes of a step beside parameters, gradients and optimizer state.

    Args:
        pixels: The pixels of hidden patches are predicted, not their visual words.
    """
    size = 2 if precision == "bf16" else _FULL
    tokens = shape.tokens(config)
    attended = _attended(config, shape)
    whole = _block(config, tokens, attended, tokens, size)
    last = _block(config, tokens, attended, shape.read, size)
    pictures = shape.images * 3 * config.image_size**2 * size
    logits = shape.masked_patches * image_outputs(config, pixels=pixels)
    logits += shape.masked_tokens * config.vocab_size
    masked = shape.masked_patches + shape.masked_tokens
    read = (shape.read * _FULL + masked * size) * config.hidden
    # The heads' log-probabilities stay. Computing the loss adds the logits or their gradient, in
    # bf16 also in full precision.
    losing = read + logits * (2 * _FULL if precision == "fp32" else 2 * _FULL + size)
    copies = 2 * _matrices(config, pixels) if precision == "bf16" else 0
    flowing = tokens * (config.mlp + config.hidden) * size  # gradients inside a block
    if config.checkpoint_activations == "none":
        blocks = (config.layers - 1) * whole + last
        return pictures + copies + blocks + max(losing, flowing)
    stays = tokens * config.hidden * _FULL  # the block's input
    if config.checkpoint_activations == "selective":  # and the results of products and attention
        stays += (tokens * (5 * config.hidden + config.mlp) + attended * config.hidden) * size
    # The peak is at the loss, or later, when one block before the last is whole again.
    repeated = max(0, config.layers - 2) * stays + whole + flowing
    return pictures + max(config.layers * stays + losing + copies, repeated)


def _block(config: ModelConfig, tokens: int, attended: int, read: int, size: int) -> int:
    """Bytes that the backward pass of a block needs, if `read` tokens go on after attention."""
    h, m = config.hidden, config.mlp
    attention = tokens * h * (_FULL + size)  # the norm's input and output
    attention += attended * 4 * h * size  # queries, keys, values, their mixture
    attention += read * h * size  # what the output projection reads
    experts = read * (h * (_FULL + size) + 2 * m * size)  # the norm; before and after the GELU
    if config.sub_ln:
        experts += read * (h + m) * _FULL  # the inputs of two more norms
    return attention + experts


def _attended(config: ModelConfig, shape: StepShape) -> int:
    """Tokens of all samples as attention sees them, padding included (`multiway.Layout`)."""
    picture = 1 + config.patches
    captions = shape.lengths[: shape.pairs]
    total = (shape.images - shape.pairs) * picture
    total += shape.pairs * (picture + max(captions, default=0))
    texts = torch.tensor(sorted(shape.lengths[shape.pairs :]))
    groups = [part for part in texts.tensor_split(TEXT_GROUPS) if len(part)]
    return total + sum(len(part) * int(part.max()) for part in groups)


def _matrices(config: ModelConfig, pixels: bool) -> int:
    """Parameters of the layers that autocast runs in bf16."""
    modules = hollow(config, pixels=pixels).modules()
    layers = (m for m in modules if isinstance(m, nn.Linear | nn.Conv2d))
    return sum(p.numel() for layer in layers for p in layer.parameters())
