"""Zero-shot retrieval by a pretrained model: ranks pictures by how well they explain a caption."""

from __future__ import annotations

from typing import Protocol

import numpy as np
import torch
from torch import Tensor

from beit3.device import to_device
from beit3.masking import token_mask
from beit3.objectives import MaskedBatch

KS = (1, 5)


class Predictor(Protocol):
    """A model with the interface of `MaskedDataModelling`."""

    def predict(self, batch: MaskedBatch) -> dict[str, Tensor]: ...


@torch.no_grad()
def picture_recall(
    model: Predictor, batch: MaskedBatch, mask_id: int, device: torch.device, *, count: int
) -> dict[str, float]:
    """Share of captions whose own picture is among the best 1 or 5 of `count`, 0..1.

    Half of a caption's words are hidden; a picture's score is the log-likelihood of these words
    given the picture. Each caption is compared across pictures, with the same words hidden, so that
    the caption's own likelihood does not matter; that is why captions are not ranked. The model
    reads `count` squared pairs. Pictures with equal scores share their mean rank.

    Args:
        batch: Pairs, on CPU; the first `count` of them take part.
    """
    count = min(count, batch.pairs)
    first = len(batch.images) - batch.pairs
    images = batch.images[first : first + count]
    text = batch.original_text()
    captions = [part.tolist() for part in text.split(list(batch.lengths))[:count]]
    nothing = torch.zeros(count, batch.hidden_patches.shape[1], dtype=torch.bool)
    ranks = []
    for number, caption in enumerate(captions):
        hidden = token_mask(len(caption), 0.5, np.random.default_rng(number))
        if not hidden.any():
            continue
        pairs = MaskedBatch.collate(
            images,
            nothing,
            nothing.long(),
            [caption] * count,
            [hidden] * count,
            mask_id,
            pairs=count,
        )
        pairs = to_device(pairs, device)
        likely = model.predict(pairs)["pair_text"].float().log_softmax(-1)
        own = likely.gather(1, pairs.masked["pair_text"].targets[:, None])
        scores = own.view(count, -1).sum(1)
        better = (scores > scores[number]).sum() + ((scores == scores[number]).sum() - 1) / 2
        ranks.append(float(better))
    return {f"picture_recall_{k}": float(np.mean(np.array(ranks) < k)) for k in KS if ranks}
