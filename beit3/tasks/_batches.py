"""Helpers for the tasks' batches: stack images, pack texts."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from beit3.tasks import Sample
from beit3.text import TextTokenizer


def stack_images(samples: Sequence[Sample]) -> Tensor:
    """The first image of each sample: uint8 `[samples, 3, size, size]`."""
    return torch.from_numpy(np.stack([sample.images[0] for sample in samples]))


def owners(samples: Sequence[Sample]) -> Tensor:
    """`[examples]`: the sample that each example belongs to."""
    counts = torch.tensor([len(sample.examples) for sample in samples])
    return torch.arange(len(samples)).repeat_interleave(counts)


def pack_texts(
    texts: Sequence[str | None], tokenizer: TextTokenizer, max_length: int
) -> tuple[Tensor, list[int]]:
    """Texts as `<s> ids </s>`, cut to `max_length` tokens, one after another; and their lengths."""
    packed, lengths = tokenizer.encode_packed([text or "" for text in texts], max_length)
    return torch.from_numpy(packed), lengths
