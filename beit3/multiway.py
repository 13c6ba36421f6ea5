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

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from beit3.config import ModelConfig


@dataclass(frozen=True)
class AttentionGroup:
    """Samples of one kind, side by side for attention.

    index: `[samples, length]` positions in the packed sequence; padding repeats position 0.
    mask: bool, broadcastable to `[samples, 1, length, length]`, True where a query may see a key;
        None where every token sees every other.
    """

    index: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class Layout:
    """Where each sample's tokens stand in the packed sequence.

    vision: number of vision tokens; they come first.
    pair_span: start and end of the tokens of pairs, vision and language.
    restore: `[tokens]` for each packed token, its place in the concatenated attention groups.
    sample: `[tokens]` the sample each token belongs to (a pair is one sample).
    """

    vision: int
    pair_span: tuple[int, int]
    groups: tuple[AttentionGroup, ...]
    restore: Tensor
    sample: Tensor
    samples: int

    @staticmethod
    def build(
        images: int,
        image_tokens: int,
        text_lengths: Sequence[int],
        pairs: int,
        *,
        causal_text: bool = False,
        device: torch.device | str = "cpu",
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
            raise ValueError("text_lengths: a text has no tokens")
        vision = images * image_tokens
        lengths = torch.tensor(list(text_lengths), dtype=torch.long)
        starts = vision + torch.cumsum(lengths, 0) - lengths
        singles = images - pairs
        tokens = vision + int(lengths.sum())

        groups: list[AttentionGroup] = []
        restore = torch.empty(tokens, dtype=torch.long)
        offset = 0

        def add(index: Tensor, valid: Tensor | None, mask: Tensor | None) -> None:
            nonlocal offset
            place = offset + torch.arange(index.numel()).view_as(index)
            if valid is None:
                restore[index.flatten()] = place.flatten()
            else:
                restore[index[valid]] = place[valid]
            offset += index.numel()
            device_mask = None if mask is None else mask.to(device)
            groups.append(AttentionGroup(index.to(device), device_mask))

        picture = torch.arange(vision).view(images, image_tokens)
        if singles:
            add(picture[:singles], None, None)
        if pairs:
            text, valid = _side_by_side(starts[:pairs], lengths[:pairs])
            seen = torch.ones(pairs, image_tokens, dtype=torch.bool)
            both = torch.cat([seen, valid], 1)
            mask = both[:, None, None, :]
            if causal_text:
                mask = mask & _generation_mask(image_tokens, text.shape[1])
            elif bool(valid.all()):
                mask = None
            add(torch.cat([picture[singles:], text], 1), both, mask)
        if len(lengths) > pairs:
            text, valid = _side_by_side(starts[pairs:], lengths[pairs:])
            mask = valid[:, None, None, :]
            if causal_text:
                mask = mask & _generation_mask(0, text.shape[1])
            elif bool(valid.all()):
                mask = None
            add(text, valid, mask)

        owner = torch.arange(images).repeat_interleave(image_tokens)
        text_owner = torch.arange(len(lengths)) + singles
        sample = torch.cat([owner, text_owner.repeat_interleave(lengths)])
        pair_end = vision + int(lengths[:pairs].sum())
        return Layout(
            vision=vision,
            pair_span=(singles * image_tokens, pair_end) if pairs else (vision, vision),
            groups=tuple(groups),
            restore=restore.to(device),
            sample=sample.to(device),
            samples=images + len(lengths) - pairs,
        )


def _side_by_side(starts: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Positions `[texts, longest]` of packed texts, and which of them are not padding."""
    column = torch.arange(int(lengths.max()))
    valid = column[None] < lengths[:, None]
    return torch.where(valid, starts[:, None] + column[None], 0), valid


def _generation_mask(image: int, text: int) -> Tensor:
    """`[1, 1, image + text, image + text]`: pictures see themselves, text sees all before it."""
    mask = torch.ones(image + text, image + text, dtype=torch.bool).tril()
    mask[:image, :image] = True
    return mask[None, None]


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
        tokens, hidden = x.shape
        qkv = self.qkv(x, layout.vision).view(tokens, 3, self.heads, hidden // self.heads)
        outputs = []
        for group in layout.groups:
            # index_select, not qkv[index]: its gradient is summed in a fixed order.
            side = qkv.index_select(0, group.index.flatten()).unflatten(0, group.index.shape)
            q, k, v = side.permute(2, 0, 3, 1, 4)  # each [samples, heads, length, dim]
            mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=group.mask)
            outputs.append(mixed.transpose(1, 2).reshape(-1, hidden))
        mixed = torch.cat(outputs).index_select(0, layout.restore)
        return self.out(self.norm(mixed, layout.vision), layout.vision)


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
        self.checkpoint_activations = config.checkpoint_activations
        self._initialise(config)

    def forward(self, x: Tensor, layout: Layout) -> Tensor:
        """`[tokens, hidden] -> [tokens, hidden]`, normalised if there is a final norm."""
        for block in self.blocks:
            if self.checkpoint_activations and self.training:
                x = checkpoint(block, x, layout, use_reentrant=False)
            else:
                x = block(x, layout)
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
