"""Masked data modelling and contrastive alignment: heads, losses, accuracies.

Sources: "Image as a Foreign Language" section 2.2 (mask-then-predict on images, texts and pairs)
and appendix A (the contrastive stage).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import ModelConfig
from beit3.model import BEiT3


def normalise(images: Tensor) -> Tensor:
    """uint8 `[..., 3, height, width]` to floats in [-1, 1]: mean and deviation 0.5."""
    return images.float() / 127.5 - 1.0


@dataclass
class MaskedBatch:
    """One step's images, texts and pairs, already corrupted.

    images: uint8 `[images, 3, height, width]`, pictures of pairs last.
    hidden_patches: bool `[images, patches]`.
    visual_words: `[images, patches]` codes of the image tokenizer: the targets.
    text: `[tokens]` packed ids, texts of pairs first, masked ones replaced by `<mask>`.
    lengths: tokens of each text.
    masked_tokens: `[masked]` places in `text` that are to be predicted.
    words: `[masked]` the ids that were there.
    pairs: how many of the pictures and texts are pairs.
    ids: where the samples came from, for inspection.
    """

    images: Tensor
    hidden_patches: Tensor
    visual_words: Tensor
    text: Tensor
    lengths: list[int]
    masked_tokens: Tensor
    words: Tensor
    pairs: int
    ids: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class ObjectiveWeights:
    """Weight of each objective in the loss; 0 turns it off."""

    image: float = 1.0
    """Visual words of images alone."""
    text: float = 1.0
    """Words of texts alone."""
    pair_image: float = 1.0
    """Visual words of images with a caption."""
    pair_text: float = 1.0
    """Words of captions with an image."""


class MaskedDataModelling(nn.Module):
    """BEiT-3 with its two pretraining heads, computed at masked positions only."""

    def __init__(self, config: ModelConfig, weights: ObjectiveWeights | None = None) -> None:
        super().__init__()
        self.backbone = BEiT3(config)
        self.image_head = nn.Linear(config.hidden, config.codebook_size)
        self.text_head = nn.Linear(config.hidden, config.vocab_size)
        self.weights = weights or ObjectiveWeights()
        for head in (self.image_head, self.text_head):
            nn.init.trunc_normal_(head.weight, std=0.02)
            nn.init.zeros_(head.bias)

    def predict(self, batch: MaskedBatch) -> tuple[Tensor, Tensor]:
        """Logits at the masked patches `[masked patches, codes]` and tokens `[masked, words]`."""
        has_images, has_text = len(batch.images) > 0, len(batch.lengths) > 0
        out = self.backbone(
            images=normalise(batch.images) if has_images else None,
            text=batch.text if has_text else None,
            lengths=batch.lengths,
            pairs=batch.pairs,
            hidden_patches=batch.hidden_patches if has_images else None,
        )
        hidden = self.text_head.weight.new_zeros(0, self.backbone.config.hidden)
        patches = out.vision[:, 1:][batch.hidden_patches] if out.vision is not None else hidden
        tokens = out.text.index_select(0, batch.masked_tokens) if out.text is not None else hidden
        return self.image_head(patches), self.text_head(tokens)

    def forward(self, batch: MaskedBatch) -> dict[str, Tensor]:
        """The loss and, per objective present, `loss/*` and `accuracy/*` (scalars)."""
        image_logits, text_logits = self.predict(batch)
        singles = len(batch.images) - batch.pairs
        image_targets = batch.visual_words[batch.hidden_patches]
        hidden_singles = int(batch.hidden_patches[:singles].sum())
        pair_tokens = sum(batch.lengths[: batch.pairs])
        in_pair = batch.masked_tokens < pair_tokens
        results: dict[str, Tensor] = {}
        loss = image_logits.sum() * 0.0 + text_logits.sum() * 0.0  # keeps every head in the graph
        for name, logits, targets in (
            ("image", image_logits[:hidden_singles], image_targets[:hidden_singles]),
            ("pair_image", image_logits[hidden_singles:], image_targets[hidden_singles:]),
            ("text", text_logits[~in_pair], batch.words[~in_pair]),
            ("pair_text", text_logits[in_pair], batch.words[in_pair]),
        ):
            if len(targets) == 0:
                continue
            results[f"loss/{name}"] = part = F.cross_entropy(logits.float(), targets)
            results[f"accuracy/{name}"] = (logits.argmax(-1) == targets).float().mean()
            loss = loss + getattr(self.weights, name) * part
        results["loss"] = loss
        return results


class DualEncoder(nn.Module):
    """Images and texts apart, projected into one space: the contrastive stage and retrieval."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.backbone = BEiT3(config)
        self.vision_head = nn.Linear(config.hidden, config.hidden, bias=False)
        self.language_head = nn.Linear(config.hidden, config.hidden, bias=False)
        # One element, not a scalar: DeepSpeed broadcasts parameters as bytes, which scalars lack.
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))
        for head in (self.vision_head, self.language_head):
            nn.init.xavier_normal_(head.weight)

    def encode_images(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, height, width]` to unit vectors `[n, hidden]`."""
        out = self.backbone(images=normalise(images))
        return F.normalize(self.vision_head(out.image_summary), dim=-1)

    def encode_patches(self, images: Tensor) -> Tensor:
        """uint8 `[n, 3, height, width]` to projected patch features `[n, patches, hidden]`."""
        out = self.backbone(images=normalise(images))
        assert out.vision is not None
        return self.vision_head(out.vision[:, 1:])

    def encode_texts(self, text: Tensor, lengths: Sequence[int]) -> Tensor:
        """Packed ids `[sum(lengths)]` to unit vectors `[texts, hidden]`."""
        out = self.backbone(text=text, lengths=lengths)
        return F.normalize(self.language_head(out.text_summary), dim=-1)

    def forward(self, images: Tensor, text: Tensor, lengths: Sequence[int]) -> dict[str, Tensor]:
        """Symmetric contrastive loss of `n` pictures and their `n` texts over all workers."""
        out = self.backbone(images=normalise(images), text=text, lengths=lengths)
        pictures = F.normalize(self.vision_head(out.image_summary), dim=-1)
        texts = F.normalize(self.language_head(out.text_summary), dim=-1)
        all_pictures, all_texts = gather(pictures), gather(texts)
        scale = self.logit_scale.exp()
        first = dist.get_rank() * len(images) if dist.is_initialized() else 0
        targets = torch.arange(first, first + len(images), device=images.device)
        by_picture = scale * pictures @ all_texts.T
        by_text = scale * texts @ all_pictures.T
        loss = (F.cross_entropy(by_picture, targets) + F.cross_entropy(by_text, targets)) / 2
        accuracy = (by_picture.argmax(-1) == targets).float().mean()
        return {"loss": loss, "accuracy/contrastive": accuracy}


def gather(x: Tensor) -> Tensor:
    """Rows of all workers, in rank order, with gradients; the input itself on one worker."""
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return x
    from torch.distributed.nn.functional import all_gather

    return torch.cat(all_gather(x))
