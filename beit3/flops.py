"""Estimates the FLOPs of a training step, by formula, and measures a device's peak FLOP/s.

Counts only what the losses need: matrix products and attention of real tokens, heads at masked
positions. Padding and the recomputation of activation checkpointing are not counted. Divided by
time and by the device's peak, this is the model FLOPs utilisation (MFU; "PaLM", arXiv 2204.02311,
appendix B).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median

import torch

from beit3.config import ModelConfig
from beit3.device import synchronise
from beit3.objectives import IMAGE_OBJECTIVES, TEXT_OBJECTIVES, MaskedBatch

_CPU_SIDES, _GPU_SIDES = (1024,), (4096, 8192)


@dataclass(frozen=True)
class StepShape:
    """The properties of a batch that decide its cost.

    images: pictures, those of pairs included.
    lengths: tokens of each text; the first `pairs` of them belong to pairs.
    masked_patches, masked_tokens: positions that are predicted.
    """

    images: int
    pairs: int
    lengths: tuple[int, ...]
    masked_patches: int = 0
    masked_tokens: int = 0

    @staticmethod
    def of(batch: MaskedBatch) -> StepShape:
        patches, tokens = (
            sum(len(batch.masked[kind].targets) for kind in kinds if kind in batch.masked)
            for kinds in (IMAGE_OBJECTIVES, TEXT_OBJECTIVES)
        )
        return StepShape(len(batch.images), batch.pairs, batch.lengths, patches, tokens)

    @property
    def read(self) -> int:
        """Tokens whose output is read: masked ones, each `[CLS]` and each `<s>`."""
        return self.masked_patches + self.masked_tokens + self.images + len(self.lengths)

    def tokens(self, config: ModelConfig) -> int:
        return self.images * (1 + config.patches) + sum(self.lengths)

    def sequences(self, config: ModelConfig) -> Iterator[int]:
        """Tokens of each sample; within it, each token sees all others."""
        picture = 1 + config.patches
        yield from [picture] * (self.images - self.pairs)
        yield from (picture + length for length in self.lengths[: self.pairs])
        yield from self.lengths[self.pairs :]


def masked_step(config: ModelConfig, shape: StepShape, *, pixels: bool = False) -> float:
    """FLOPs of a step of masked data modelling, forward and backward.

    After the last block's attention only the tokens that are read continue. A matrix product costs
    two FLOPs per weight and row, its backward pass twice that. Pixels need no gradient.

    Args:
        pixels: The pixels of hidden patches are predicted, not their visual words.
    """
    codes = shape.masked_patches * image_outputs(config, pixels=pixels) * config.hidden
    words = shape.masked_tokens * config.vocab_size * config.hidden
    return _trained(config, shape, shape.read, codes + words)


def image_outputs(config: ModelConfig, *, pixels: bool) -> int:
    """Outputs of the image head for a patch."""
    return 3 * config.patch_size**2 if pixels else config.codebook_size


def contrastive_step(config: ModelConfig, images: int, lengths: Sequence[int]) -> float:
    """FLOPs of a contrastive step: pictures and texts encoded apart, every token in every layer.

    The product of all images with all texts is left out: it depends on the other workers.
    """
    shape = StepShape(images, 0, tuple(lengths))
    heads = (images + len(lengths)) * config.hidden**2
    return _trained(config, shape, shape.tokens(config), heads)


def _trained(config: ModelConfig, shape: StepShape, read: int, heads: float) -> float:
    """FLOPs of encoder and heads, given the multiplications of the heads."""
    qkv, rest = 3 * config.hidden**2, config.hidden**2 + 2 * config.hidden * config.mlp
    linear = config.layers * shape.tokens(config) * qkv
    linear += ((config.layers - 1) * shape.tokens(config) + read) * rest
    attention = 2 * config.hidden * sum(n * n for n in shape.sequences(config))
    patches = shape.images * config.patches * 3 * config.patch_size**2 * config.hidden
    return 2.0 * (3 * (linear + config.layers * attention + heads) + 2 * patches)


def matmul_peak(
    device: torch.device,
    dtype: torch.dtype,
    sides: Sequence[int] = (),
    repeats: int = 3,
) -> float:
    """FLOP/s of large square matrix products: the median over `repeats`, of the fastest size.

    fp32 is fp32: on a GPU, TF32 stays off unless the caller turned it on.

    Args:
        sides: Rows of the matrices; the defaults take a fraction of a second.
    """
    best = 0.0
    noise = torch.Generator(device).manual_seed(0)  # a run's own random numbers stay as they are
    for side in sides or (_GPU_SIDES if device.type == "cuda" else _CPU_SIDES):
        a, b = (torch.randn(side, side, device=device, generator=noise).to(dtype) for _ in range(2))
        out = torch.empty_like(a)
        torch.mm(a, b, out=out)
        times = [_seconds_of_product(a, b, out) for _ in range(repeats)]
        best = max(best, 2 * side**3 / median(times))
    return best


def _seconds_of_product(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> float:
    synchronise(a.device)
    start = time.perf_counter()
    torch.mm(a, b, out=out)
    synchronise(a.device)
    return time.perf_counter() - start
