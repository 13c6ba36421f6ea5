"""Computes visual words in the training step, for tokens that were stored without them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from beit3.config import ModelConfig, Precision
from beit3.objectives import MaskedBatch, MaskedDataModelling, ObjectiveWeights
from beit3.vqkd import VQKD


class WordsInStep(MaskedDataModelling):
    """Masked data modelling of batches whose pictures a frozen tokenizer encodes first.

    The tokenizer reads the same views as the model, in its own precision, and so finds the words
    that `pipelines/tokenize_corpus.py` would have stored. It is not part of the module: it is
    neither trained, nor saved, nor sharded among workers.
    """

    def __init__(
        self, config: ModelConfig, weights: ObjectiveWeights, tokenizer: VQKD, precision: Precision
    ) -> None:
        super().__init__(config, weights)
        self._precision: Precision = precision
        self._tokenizer = (tokenizer.eval().requires_grad_(False),)  # a tuple is not registered

    def _apply(self, fn: Callable[[Any], Any], recurse: bool = True) -> WordsInStep:
        self._tokenizer[0]._apply(fn)  # keep it on the model's device
        return super()._apply(fn, recurse)

    def with_words(self, batch: MaskedBatch) -> MaskedBatch:
        """The batch with the visual words of its pictures."""
        if not len(batch.images):
            return batch
        return batch.with_visual_words(self._tokenizer[0].encode(batch.images, self._precision))

    def forward(self, batch: MaskedBatch) -> dict[str, torch.Tensor]:
        return super().forward(self.with_words(batch))
