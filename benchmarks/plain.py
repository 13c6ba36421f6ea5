"""The plain formulation of masked pretraining: the baseline for `beit3`.

A library for `benchmarks/pretraining_step.py`; run by itself it does nothing.

This is BEiT-3's pretraining as one would write it from the released code (microsoft/torchscale,
model `BEiT3`; microsoft/unilm, folder `beit3`), which has the model but no pretraining step:

- one forward for each kind of data (images, texts, pairs), each a padded batch
  `[samples, longest, hidden]`; texts are padded to the longest of the batch;
- every module that is kept per modality splits its input along the length, runs both copies and
  concatenates;
- queries, keys and values are three projections; attention is a matrix product, a softmax in fp32
  with -inf on padded keys, and a matrix product;
- both heads are computed at every position of their modality, and cross-entropy ignores the
  positions that are not masked. `heads="masked"` computes them at masked positions only, as the
  released captioning model does: a stronger baseline than a plain pretraining loop.

It computes the same loss and the same gradients as `beit3.objectives.MaskedDataModelling`, from the
same weights (`from_ours`); `tests/benchmarks/test_plain.py` proves it. It computes no accuracies.

Dropout and stochastic depth are left out, as the released recipe doesn't use them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import ModelConfig
from beit3.objectives import MaskedDataModelling, normalise
from beit3.text import PAD
from benchmarks._samples import Samples

IGNORED = -100
Heads = Literal["all", "masked"]


@dataclass(frozen=True)
class Padded:
    """Samples of one kind, padded to their longest text.

    images: uint8 `[samples, 3, height, width]`.
    hidden_patches: bool `[samples, patches]`.
    visual_words: `[samples, patches]`, IGNORED where a patch is shown; None if all are.
    text: `[samples, longest]`, masked tokens replaced by `<mask>`.
    padding: bool `[samples, longest]`, True where there is no token.
    words: `[samples, longest]`, IGNORED where a token is shown; None if all are.
    """

    images: Tensor | None = None
    hidden_patches: Tensor | None = None
    visual_words: Tensor | None = None
    text: Tensor | None = None
    padding: Tensor | None = None
    words: Tensor | None = None


@dataclass(frozen=True)
class PaddedBatch:
    """One step's samples, by kind; None for a kind without samples."""

    images: Padded | None
    texts: Padded | None
    pairs: Padded | None


def pad(samples: Samples) -> PaddedBatch:
    """The samples as padded batches."""
    images, texts, pairs = len(samples.images) - samples.pairs, samples.documents, samples.pairs
    alone = _pictures(samples, slice(0, images))
    paired = _pictures(samples, slice(images, None))
    captions = _texts(samples.captions, samples.token_masks[:pairs], samples.mask_id)
    documents = _texts(texts, samples.token_masks[pairs:], samples.mask_id)
    return PaddedBatch(
        images=Padded(**alone) if images else None,
        texts=Padded(**documents) if texts else None,
        pairs=Padded(**paired, **captions) if pairs else None,
    )


def _pictures(samples: Samples, which: slice) -> dict[str, Tensor | None]:
    hidden = samples.hidden_patches[which]
    targets = samples.visual_words[which].masked_fill(~hidden, IGNORED)
    return {
        "images": samples.images[which],
        "hidden_patches": hidden,
        "visual_words": targets if bool(hidden.any()) else None,
    }


def _texts(
    texts: Sequence[Sequence[int]], masks: Sequence[np.ndarray], mask_id: int
) -> dict[str, Tensor | None]:
    longest = max((len(text) for text in texts), default=0)
    padded = torch.full((len(texts), longest), PAD)
    masked = torch.zeros(len(texts), longest, dtype=torch.bool)
    padding = torch.ones(len(texts), longest, dtype=torch.bool)
    for row, (text, mask) in enumerate(zip(texts, masks, strict=True)):
        padded[row, : len(text)] = torch.tensor(text)
        masked[row, : len(text)] = torch.from_numpy(mask)
        padding[row, : len(text)] = False
    return {
        "text": padded.masked_fill(masked, mask_id),
        "padding": padding,
        "words": padded.masked_fill(~masked, IGNORED) if bool(masked.any()) else None,
    }


class Multiway(nn.Module):
    """A module kept once for vision (A) and once for language (B), or, shared, once for both."""

    def __init__(self, make: Callable[[], nn.Module], *, shared: bool = False) -> None:
        super().__init__()
        self.A = make()
        self.B = None if shared else make()

    def forward(self, x: Tensor, split: int) -> Tensor:
        """`[samples, length, in] -> [samples, length, out]`; `split` vision tokens come first."""
        length = x.shape[1]
        if self.B is None or split == length:
            return self.A(x)
        if split == 0:
            return self.B(x)
        vision, language = x.split([split, length - split], dim=1)
        return torch.cat([self.A(vision), self.B(language)], dim=1)


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.mlp)
        self.ffn_layernorm = nn.LayerNorm(config.mlp) if config.sub_ln else None
        self.fc2 = nn.Linear(config.mlp, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        x = F.gelu(x.float()).type_as(x)
        if self.ffn_layernorm is not None:
            x = self.ffn_layernorm(x)
        return self.fc2(x)


class SelfAttention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, shared = config.hidden, config.attention == "shared"
        self.heads = config.heads
        self.scaling = (hidden // config.heads) ** -0.5
        self.q_proj = Multiway(lambda: nn.Linear(hidden, hidden), shared=shared)
        self.k_proj = Multiway(lambda: nn.Linear(hidden, hidden), shared=shared)
        self.v_proj = Multiway(lambda: nn.Linear(hidden, hidden), shared=shared)
        self.out_proj = Multiway(lambda: nn.Linear(hidden, hidden), shared=shared)
        self.inner_attn_ln = (
            Multiway(lambda: nn.LayerNorm(hidden), shared=shared) if config.sub_ln else None
        )

    def forward(self, x: Tensor, padding: Tensor | None, split: int) -> Tensor:
        samples, length, hidden = x.shape
        q = self._by_head(self.q_proj(x, split) * self.scaling)
        k = self._by_head(self.k_proj(x, split))
        v = self._by_head(self.v_proj(x, split))
        scores = torch.bmm(q, k.transpose(1, 2))
        if padding is not None:
            scores = scores.view(samples, self.heads, length, length)
            scores = scores.masked_fill(padding[:, None, None], -math.inf)
            scores = scores.view(samples * self.heads, length, length)
        shares = F.softmax(scores, dim=-1, dtype=torch.float32).type_as(scores)
        mixed = torch.bmm(shares, v).view(samples, self.heads, length, -1)
        mixed = mixed.transpose(1, 2).reshape(samples, length, hidden)
        if self.inner_attn_ln is not None:
            mixed = self.inner_attn_ln(mixed, split)
        return self.out_proj(mixed, split)

    def _by_head(self, x: Tensor) -> Tensor:
        """`[samples, length, hidden] -> [samples * heads, length, head width]`."""
        samples, length, _ = x.shape
        x = x.view(samples, length, self.heads, -1).transpose(1, 2)
        return x.reshape(samples * self.heads, length, -1)


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, *, fusion: bool) -> None:
        super().__init__()
        shared = config.attention == "shared"
        self.self_attn_layer_norm = Multiway(lambda: nn.LayerNorm(config.hidden), shared=shared)
        self.self_attn = SelfAttention(config)
        self.final_layer_norm = Multiway(lambda: nn.LayerNorm(config.hidden), shared=shared)
        self.ffn = Multiway(lambda: FeedForward(config))
        self.fusion = FeedForward(config) if fusion else None

    def forward(self, x: Tensor, padding: Tensor | None, split: int) -> Tensor:
        x = x + self.self_attn(self.self_attn_layer_norm(x, split), padding, split)
        normed = self.final_layer_norm(x, split)
        if self.fusion is not None and 0 < split < x.shape[1]:
            return x + self.fusion(normed)
        return x + self.ffn(normed, split)


class PlainMaskedDataModelling(nn.Module):
    """BEiT-3 with its two pretraining heads, on padded batches.

    Raises:
        ValueError: the configuration is one that the released code cannot express.
    """

    def __init__(self, config: ModelConfig, heads: Heads = "all") -> None:
        super().__init__()
        if not config.multiway or not config.final_norm:
            raise ValueError("config: the plain formulation has multiway=True and final_norm=True")
        if config.drop_path:
            raise ValueError("config: the plain formulation has drop_path=0")
        hidden, shared = config.hidden, config.attention == "shared"
        self.heads: Heads = heads
        self.proj = nn.Conv2d(3, hidden, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(hidden))
        self.mask_token = nn.Parameter(torch.zeros(hidden))
        self.vision_positions = nn.Parameter(torch.zeros(1 + config.patches, hidden))
        self.text_embed = nn.Embedding(config.vocab_size, hidden)
        self.text_positions = nn.Parameter(torch.zeros(config.max_text_length, hidden))
        fusion_from = config.layers - config.vl_layers
        self.layers = nn.ModuleList(
            Layer(config, fusion=number >= fusion_from) for number in range(config.layers)
        )
        self.layer_norm = Multiway(lambda: nn.LayerNorm(hidden), shared=shared)
        self.mim_head = nn.Linear(hidden, config.codebook_size)
        self.mlm_head = nn.Linear(hidden, config.vocab_size)

    def forward(self, batch: PaddedBatch) -> dict[str, Tensor]:
        """The loss and, per objective present, `loss/*`: as `MaskedDataModelling.forward`."""
        results: dict[str, Tensor] = {}
        if batch.images is not None:
            results |= self._losses(batch.images, image="loss/image")
        if batch.pairs is not None:
            results |= self._losses(batch.pairs, image="loss/pair_image", text="loss/pair_text")
        if batch.texts is not None:
            results |= self._losses(batch.texts, text="loss/text")
        results["loss"] = torch.stack(list(results.values())).sum()
        return results

    def _losses(self, batch: Padded, *, image: str = "", text: str = "") -> dict[str, Tensor]:
        """Encode samples of one kind; the objectives' losses under the names given."""
        x, split = self._encode(batch)
        losses = {}
        if batch.visual_words is not None:
            losses[image] = self._loss(self.mim_head, x[:, 1:split], batch.visual_words)
        if batch.words is not None:
            losses[text] = self._loss(self.mlm_head, x[:, split:], batch.words)
        return losses

    def _loss(self, head: nn.Module, x: Tensor, targets: Tensor) -> Tensor:
        if self.heads == "masked":
            masked = targets != IGNORED
            x, targets = x[masked], targets[masked]
        logits = head(x).float()
        return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=IGNORED)

    def _encode(self, batch: Padded) -> tuple[Tensor, int]:
        """`[samples, length, hidden]`, and how many of the tokens are vision tokens."""
        sides: list[Tensor] = []
        split, padding = 0, batch.padding
        if batch.images is not None:
            sides.append(self._embed_images(batch.images, batch.hidden_patches))
            split = sides[0].shape[1]
        if batch.text is not None:
            positions = self.text_positions[: batch.text.shape[1]]
            sides.append(self.text_embed(batch.text) + positions)
            if padding is not None and split:
                picture = padding.new_zeros(len(padding), split)
                padding = torch.cat([picture, padding], dim=1)
        x = torch.cat(sides, dim=1) if len(sides) > 1 else sides[0]
        if padding is not None:
            x = x * (1 - padding.unsqueeze(-1).type_as(x))
        for layer in self.layers:
            x = layer(x, padding, split)
        return self.layer_norm(x, split), split

    def _embed_images(self, images: Tensor, hidden_patches: Tensor | None) -> Tensor:
        x = self.proj(normalise(images)).flatten(2).transpose(1, 2)
        if hidden_patches is not None:
            hidden = hidden_patches.unsqueeze(-1).type_as(x)
            x = x * (1 - hidden) + self.mask_token * hidden
        cls = self.cls_token.expand(len(x), 1, -1)
        return torch.cat([cls, x], dim=1) + self.vision_positions


# Prefixes and parts of names, ours and those here, replaced in this order.
_NAMES = {
    "backbone.encoder.blocks.": "layers.",
    "backbone.encoder.norm.": "layer_norm.",
    "backbone.vision_embedding.projection.": "proj.",
    "backbone.vision_embedding.positions": "vision_positions",
    "backbone.vision_embedding.": "",
    "backbone.text_embedding.": "text_embed.",
    "backbone.text_positions": "text_positions",
    "image_head.": "mim_head.",
    "text_head.": "mlm_head.",
    ".attention.norm.": ".self_attn.inner_attn_ln.",
    ".attention.out.": ".self_attn.out_proj.",
    ".attention.": ".self_attn.",
    ".norm1.": ".self_attn_layer_norm.",
    ".norm2.": ".final_layer_norm.",
    ".experts.vision_expert.": ".ffn.A.",
    ".experts.language_expert.": ".ffn.B.",
    ".experts.fusion_expert.": ".fusion.",
    ".norm.": ".ffn_layernorm.",
    ".vision.": ".A.",
    ".both.": ".A.",
    ".language.": ".B.",
}


def convert(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors named as in `MaskedDataModelling`, weights or gradients, under the names here."""
    converted = {}
    for ours, value in tensors.items():
        name = ours
        for old, new in _NAMES.items():
            name = name.replace(old, new)
        if ".qkv." in name:
            for part, third in zip("qkv", value.chunk(3), strict=True):
                converted[name.replace(".qkv.", f".{part}_proj.")] = third.clone()
        else:
            converted[name] = value
    return converted


def from_ours(module: MaskedDataModelling, heads: Heads = "all") -> PlainMaskedDataModelling:
    """The plain formulation of a module, with its weights; most tensors are shared."""
    with torch.device("meta"):
        plain = PlainMaskedDataModelling(module.backbone.config, heads)
    weights = {name: value.detach() for name, value in module.state_dict().items()}
    plain.load_state_dict(convert(weights), assign=True)
    return plain
