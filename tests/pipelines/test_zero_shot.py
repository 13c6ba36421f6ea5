"""Pictures ranked by how well they explain a caption."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from beit3.objectives import MaskedBatch
from pipelines.zero_shot import picture_recall

PAIRS = 8


class Reader:
    """Expects the words that a picture's first pixel names, or, blind, all words alike."""

    def __init__(self, blind: bool) -> None:
        self.blind = blind

    def predict(self, batch: MaskedBatch) -> dict[str, Tensor]:
        of_each = len(batch.masked["pair_text"].targets) // len(batch.images)
        named = batch.images[:, 0, 0, 0].long().repeat_interleave(of_each)
        logits = torch.zeros(len(named), 40)
        if not self.blind:
            logits[torch.arange(len(named)), named] = 3.0
        return {"pair_text": logits}


@pytest.mark.parametrize(("blind", "recalls"), [(False, (1.0, 1.0)), (True, (0.0, 1.0))])
def test_the_picture_that_explains_a_caption_is_found(
    blind: bool, recalls: tuple[float, float]
) -> None:
    pixels = torch.arange(10, 10 + PAIRS, dtype=torch.uint8)
    masks = [np.array([False, True, False, True, False])] * PAIRS  # as a training batch has some
    batch = MaskedBatch.collate(
        pixels[:, None, None, None].expand(PAIRS, 3, 8, 8),
        torch.zeros(PAIRS, 4, dtype=torch.bool),
        torch.zeros(PAIRS, 4, dtype=torch.long),
        [[0, 10 + i, 10 + i, 10 + i, 2] for i in range(PAIRS)],
        masks,
        39,
        pairs=PAIRS,
    )
    found = picture_recall(Reader(blind), batch, 39, torch.device("cpu"), count=PAIRS)
    # Of eight alike each has the mean place, 3.5.
    assert found == {"picture_recall_1": recalls[0], "picture_recall_5": recalls[1]}
    some = picture_recall(Reader(False), batch, 39, torch.device("cpu"), count=3)
    assert some["picture_recall_1"] == 1.0
