"""The Multiway Transformer: shared attention, one feed-forward expert per modality.

Every sample of a batch lives in one packed sequence of tokens, `[tokens, hidden]`, in this order:

    | vision of images alone | vision of pairs | language of pairs | language of texts alone |
    |<-------- vision expert --------------->|<---------- language expert ----------------->|
                             |<--- vision-language expert ----->|     (top layers, paper variant)

so each expert is one matrix product over one slice: nothing is routed token by token, and no
padding is computed except inside attention, where samples of one kind are laid side by side.

Source: "Image as a Foreign Language" (arXiv 2208.10442) section 2.1; torchscale's
`multiway_network.py` for the released variant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from beit3.config import ModelConfig


@dataclass(frozen=True)
class AttentionGroup:
    """Samples of one kind, side by side for attention.

    start: first token of the group's pictures in the packed sequence.
    samples, image_tokens: the pictures stand there one after another, `samples * image_tokens`
        tokens; no picture has tokens in a group of texts alone.
    text: `[samples, longest]` positions of the texts' tokens in the packed sequence, padding
        repeating the first; None in a group of pictures alone.
    inside: `[text tokens]` the places of `text`, flattened, that are no padding.
    mask: bool, broadcastable to `[samples, 1, length, length]`, True where a query may see a key;
        None where every token sees every other.
    """

    start: int
    samples: int
    image_tokens: int
    text: Tensor | None = None
    inside: Tensor | None = None
    mask: Tensor | None = None

    @property
    def pictures(self) -> int:
        """Tokens of the group's pictures."""
        return self.samples * self.image_tokens


@dataclass(frozen=True)
class Layout:
    """Where each sample's tokens stand in the packed sequence.

    It is made of numbers that are known before the batch reaches the model, so that the model
    itself is tensors only: made beside the batch, on the CPU, and moved with it.

    images, image_tokens: pictures, and the tokens of one, `[CLS]` included.
    vision: number of vision tokens; they come first.
    pair_span: start and end of the tokens of pairs, vision and language.
    groups: the samples as attention sees them, in the packed order: images alone, pairs, texts.
    sample: `[tokens]` the sample each token belongs to (a pair is one sample).
    places: `[text tokens]` each token's place in its text.
    starts: `[texts]` where each text begins among the text tokens.
    """

    images: int
    image_tokens: int
    vision: int
    pair_span: tuple[int, int]
    groups: tuple[AttentionGroup, ...]
    samples: int
    sample: Tensor
    places: Tensor
    starts: Tensor

    @staticmethod
    def build(
        images: int,
        image_tokens: int,
        text_lengths: Sequence[int],
        pairs: int,
        *,
        causal_text: bool = False,
    ) -> Layout:
        """Lay out a batch.

        Args:
            images: Number of pictures; the last `pairs` of them belong to pairs.
            image_tokens: Tokens of one picture, `[CLS]` included.
            text_lengths: Tokens of each text; the first `pairs` of them belong to pairs.
            pairs: Number of pairs.
            causal_text: A text token sees the picture and the text before it, and the picture
                sees only itself: the mask of image-to-text generation.

        Raises:
            ValueError: the counts don't fit, or a text is empty.
        """
        if not 0 <= pairs <= min(images, len(text_lengths)):
            raise ValueError(f"pairs: got {pairs} with {images} images, {len(text_lengths)} texts")
        if images + len(text_lengths) == 0:
            raise ValueError("empty batch: neither images nor texts")
        if any(length < 1 for length in text_lengths):
            raise ValueError("lengths: a text has no tokens")
        vision = images * image_tokens
        lengths = torch.tensor(list(text_lengths), dtype=torch.long)
        starts = torch.cumsum(lengths, 0) - lengths
        singles = images - pairs
        groups: list[AttentionGroup] = []
        if singles:
            groups.append(AttentionGroup(0, singles, image_tokens))
        for first, last, patches in ((0, pairs, image_tokens), (pairs, len(lengths), 0)):
            if last > first:
                text, valid = _side_by_side(vision + starts[first:last], lengths[first:last])
                start = singles * image_tokens if patches else vision
                mask = _visible(patches, valid, causal=causal_text)
                inside = valid.flatten().nonzero().flatten()
                groups.append(AttentionGroup(start, last - first, patches, text, inside, mask))
        owner = torch.arange(images).repeat_interleave(image_tokens)
        text_owner = torch.arange(len(lengths)) + singles
        pair_end = vision + int(lengths[:pairs].sum())
        places = torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths)
        return Layout(
            images=images,
            image_tokens=image_tokens,
            vision=vision,
            pair_span=(singles * image_tokens, pair_end) if pairs else (vision, vision),
            groups=tuple(groups),
            samples=images + len(lengths) - pairs,
            sample=torch.cat([owner, text_owner.repeat_interleave(lengths)]),
            places=places,
            starts=starts,
        )


def _side_by_side(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Positions `[texts, longest]` of packed texts, and which of them are not padding."""
    column = torch.arange(int(lengths.max()))
    valid = column[None] < lengths[:, None]
    return torch.where(valid, starts[:, None] + column[None], starts[:, None]), valid


def _visible(image: int, valid: Tensor, *, causal: bool) -> Tensor | None:
    """bool `[samples or 1, 1, length or 1, length]` of a picture and a text side by side."""
    picture = torch.ones(len(valid), image, dtype=torch.bool)
    seen = torch.cat([picture, valid], 1)[:, None, None, :]
    if not causal:
        return None if bool(valid.all()) else seen
    length = image + valid.shape[1]
    before = torch.ones(length, length, dtype=torch.bool).tril()
    before[:image, :image] = True
    return seen & before


class PerModality(nn.Module):
    """Two copies of a module, one for vision tokens and one for language tokens."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.vision = make()
        self.language = make()

    def forward(self, x: Tensor, vision: int) -> Tensor:
        """`[tokens, in] -> [tokens, out]`; the first `vision` tokens are vision tokens."""
        if vision == len(x):
            return self.vision(x)
        if vision == 0:
            return self.language(x)
        return torch.cat([self.vision(x[:vision]), self.language(x[vision:])])


class Shared(nn.Module):
    """One module for the tokens of both modalities."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.both = make()

    def forward(self, x: Tensor, vision: int) -> Tensor:
        return self.both(x)


class FeedForward(nn.Module):
    """An expert: Linear, GELU, (sub-LN,) Linear. `[tokens, hidden] -> [tokens, hidden]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.mlp)
        self.norm = nn.LayerNorm(config.mlp) if config.sub_ln else nn.Identity()
        self.fc2 = nn.Linear(config.mlp, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x))))


class Attention(nn.Module):
    """Multi-head self-attention inside each sample of a packed sequence."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        copies = PerModality if config.attention == "per_modality" else Shared
        self.heads = config.heads
        self.qkv = copies(lambda: nn.Linear(config.hidden, 3 * config.hidden))
        self.norm = copies(lambda: nn.LayerNorm(config.hidden) if config.sub_ln else nn.Identity())
        self.out = copies(lambda: nn.Linear(config.hidden, config.hidden))

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[tokens, hidden] -> [tokens, hidden]`."""
        qkv = self.qkv(x, layout.vision)
        pictures, texts = [], []
        for group in layout.groups:
            picture, text = self._mix(qkv, group)
            pictures.append(picture)
            texts.append(text)
        mixed = torch.cat([part for part in (*pictures, *texts) if part is not None])
        return self.out(self.norm(mixed, layout.vision), layout.vision)

    def _mix(self, qkv: Tensor, group: AttentionGroup) -> tuple[Tensor | None, Tensor | None]:
        """A group's attention: its picture tokens and its text tokens, both `[tokens, hidden]`."""
        sides = []
        if group.image_tokens:
            own = qkv[group.start : group.start + group.pictures]
            sides.append(own.view(group.samples, group.image_tokens, -1))
        if group.text is not None:
            # index_select, not qkv[index]: its gradient is summed in a fixed order.
            own = qkv.index_select(0, group.text.flatten())
            sides.append(own.view(*group.text.shape, -1))
        side = torch.cat(sides, 1) if len(sides) > 1 else sides[0]
        q, k, v = side.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)
        mixed = mixed.transpose(1, 2).flatten(2)  # [samples, length, hidden]
        picture = mixed[:, : group.image_tokens].flatten(0, 1) if group.image_tokens else None
        if group.text is None or group.inside is None:
            return picture, None
        text = mixed[:, group.image_tokens :].flatten(0, 1)
        return picture, text.index_select(0, group.inside)


class Experts(nn.Module):
    """The feed-forward networks of a block and the slice of tokens that each one sees."""

    def __init__(self, config: ModelConfig, *, fusion: bool) -> None:
        super().__init__()
        self.vision_expert = FeedForward(config)
        self.language_expert = FeedForward(config) if config.multiway else None
        self.fusion_expert = FeedForward(config) if fusion else None

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        if self.language_expert is None:
            return self.vision_expert(x)
        start, end = layout.pair_span if self.fusion_expert else (layout.vision, layout.vision)
        spans = (
            (self.vision_expert, 0, start),
            (self.fusion_expert, start, end),
            (self.language_expert, end, len(x)),
        )
        parts = [expert(x[a:b]) for expert, a, b in spans if expert is not None and b > a]
        return torch.cat(parts) if len(parts) > 1 else parts[0]


class Block(nn.Module):
    """Pre-norm residual block: attention, then the experts."""

    def __init__(self, config: ModelConfig, *, drop_path: float, fusion: bool) -> None:
        super().__init__()
        copies = PerModality if config.attention == "per_modality" else Shared
        self.norm1 = copies(lambda: nn.LayerNorm(config.hidden))
        self.attention = Attention(config)
        self.norm2 = copies(lambda: nn.LayerNorm(config.hidden))
        self.experts = Experts(config, fusion=fusion)
        self.drop_path = drop_path

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[tokens, hidden] -> [tokens, hidden]`."""
        x = x + self._drop(self.attention(self.norm1(x, layout.vision), layout), layout)
        return x + self._drop(self.experts(self.norm2(x, layout.vision), layout), layout)

    def _drop(self, branch: Tensor, layout: Layout) -> Tensor:
        """Stochastic depth: drop the branch for whole samples."""
        if not self.training or self.drop_path == 0.0:
            return branch
        keep = 1.0 - self.drop_path
        kept = torch.empty(layout.samples, 1, device=branch.device).bernoulli_(keep) / keep
        return branch * kept[layout.sample].to(branch.dtype)


_aten = torch.ops.aten
_PRODUCTS = {
    _aten.mm.default,
    _aten.addmm.default,
    _aten.bmm.default,
    _aten._scaled_dot_product_flash_attention.default,
    _aten._scaled_dot_product_flash_attention_for_cpu.default,
    _aten._scaled_dot_product_efficient_attention.default,
    _aten._scaled_dot_product_cudnn_attention.default,
}


def _keep_products(context: Any, op: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Selective checkpointing: norms, GELU and gathers are cheap to repeat, products are not."""
    keep = op in _PRODUCTS
    return CheckpointPolicy.MUST_SAVE if keep else CheckpointPolicy.PREFER_RECOMPUTE


def _selective_contexts() -> Any:
    return create_selective_checkpoint_contexts(_keep_products)


class Encoder(nn.Module):
    """A stack of blocks and the final norm."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        copies = PerModality if config.attention == "per_modality" else Shared
        depth = config.layers
        self.blocks = nn.ModuleList(
            Block(
                config,
                drop_path=config.drop_path * i / max(1, depth - 1),
                fusion=i >= depth - config.vl_layers,
            )
            for i in range(depth)
        )
        self.norm = copies(
            lambda: nn.LayerNorm(config.hidden) if config.final_norm else nn.Identity()
        )
        self.checkpointing = config.checkpoint_activations
        self._initialise(config)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[tokens, hidden] -> [tokens, hidden]`, normalised if there is a final norm."""
        for block in self.blocks:
            if self.checkpointing == "none" or not self.training:
                x = block(x, layout)
            elif self.checkpointing == "blocks":
                x = checkpoint(block, x, layout, use_reentrant=False)
            else:
                x = checkpoint(
                    block, x, layout, use_reentrant=False, context_fn=_selective_contexts
                )
        return self.norm(x, layout.vision)

    def _initialise(self, config: ModelConfig) -> None:
        """Sub-LN: Xavier with Magneto's gain; else BEiT's output matrices scaled by 1/sqrt(2l)."""
        gain = math.sqrt(math.log(2 * config.layers)) if config.sub_ln else 1.0
        for name, module in self.named_modules():
            if not isinstance(module, nn.Linear):
                continue
            nn.init.xavier_normal_(module.weight)
            nn.init.zeros_(module.bias)
            if config.sub_ln and ".qkv" in name:
                with torch.no_grad():
                    module.weight[2 * config.hidden :] *= gain  # the values, not queries and keys
            elif config.sub_ln:
                with torch.no_grad():
                    module.weight *= gain
        if not config.sub_ln:
            for layer, block in enumerate(self.blocks, start=1):
                for name, module in block.named_modules():
                    output = name.endswith("fc2") or ".out" in name
                    if isinstance(module, nn.Linear) and output:
                        with torch.no_grad():
                            module.weight /= math.sqrt(2.0 * layer)
