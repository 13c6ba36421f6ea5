"""The Multiway Transformer: shared attention, one feed-forward expert per modality.

The tokens of a batch form two packed sequences, one per modality, `[tokens, hidden]`. In both, the
samples of one kind stand together, and the pairs meet at their common border:

    vision:    | images alone | pictures of pairs |     the vision expert reads all of it
    language:  | captions of pairs | texts alone |      the language expert reads all of it

so each expert is one matrix product over one tensor: nothing is routed token by token, and no
padding is computed except inside attention, where samples of one kind are laid side by side. In the
paper's top layers the pictures and captions of pairs go through the vision-language expert.

Source: "Image as a Foreign Language" (arXiv 2208.10442) section 2.1; torchscale's
`multiway_network.py` for the released variant.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
)

from beit3.config import ModelConfig

Modality = Literal["vision", "language"]
TEXT_GROUPS = 8
"""Maximum groups in which texts alone attend. Neighbours share a group, so a batch whose texts are
sorted by length needs little padding."""


class Streams(NamedTuple):
    """One tensor for each modality; None if the batch has no tokens of it."""

    vision: Tensor | None
    language: Tensor | None


def each(function: Callable[..., Tensor], *streams: Streams) -> Streams:
    """Apply a function to the modalities that the first of the streams has."""
    one, other = (
        None if parts[0] is None else function(*parts) for parts in zip(*streams, strict=True)
    )
    return Streams(one, other)


@dataclass(frozen=True)
class AttentionGroup:
    """Samples of one kind, side by side for attention.

    samples, image_tokens: the pictures stand one after another in the vision stream,
        `samples * image_tokens` tokens; none in a group of texts alone.
    text_tokens: the texts stand one after another in the language stream; 0 in a group of pictures
        alone.
    text: `[samples, longest]` indices of the texts' tokens among these; padding repeats a text's
        first token. None if there is one text or none: nothing needs padding.
    inside: `[text_tokens]` indices into `text`, flattened, that are not padding; None if `text` is.
    mask: bool, broadcastable to `[samples, 1, length, length]`, True where a query may see a key;
        None where every token sees every other.
    """

    samples: int
    image_tokens: int
    text_tokens: int = 0
    text: Tensor | None = None
    inside: Tensor | None = None
    mask: Tensor | None = None

    @property
    def vision_tokens(self) -> int:
        return self.samples * self.image_tokens


@dataclass(frozen=True)
class Spans:
    """The sample of each token, where that matters after attention.

    singles: number of vision tokens of images alone; those of pairs follow.
    paired: number of language tokens of pairs; those of texts alone follow.
    sample: `[tokens]` per stream, the sample of each token (a pair is one sample).
    """

    singles: int
    paired: int
    sample: Streams


@dataclass(frozen=True)
class Read:
    """The tokens whose output is read; the last block computes no others.

    places: `[read]` per stream, ascending.
    """

    places: Streams
    spans: Spans


@dataclass(frozen=True)
class Layout:
    """Where each sample's tokens stand in the two streams.

    It depends only on numbers known before the batch reaches the model, so it is built with the
    batch, on the CPU, and moved with it; the model itself handles tensors only.

    images, image_tokens: number of pictures, and of tokens in each, `[CLS]` included.
    samples: number of images alone, pairs and texts alone.
    groups: the samples as attention sees them, in the streams' order: images alone, pairs, texts.
    positions: `[text tokens]` each token's place in its text.
    starts: `[texts]` where each text begins in the language stream.
    """

    images: int
    image_tokens: int
    samples: int
    groups: tuple[AttentionGroup, ...]
    spans: Spans
    positions: Tensor
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
        lengths = torch.tensor(list(text_lengths), dtype=torch.long)
        starts = torch.cumsum(lengths, 0) - lengths
        singles = images - pairs
        groups = [AttentionGroup(singles, image_tokens)] if singles else []
        if pairs:
            groups.append(_group(lengths[:pairs], image_tokens, causal=causal_text))
        groups += [
            _group(part, 0, causal=causal_text)
            for part in lengths[pairs:].tensor_split(TEXT_GROUPS)
            if len(part)
        ]
        owners = Streams(
            torch.arange(images).repeat_interleave(image_tokens) if images else None,
            (torch.arange(len(lengths)) + singles).repeat_interleave(lengths)
            if len(lengths)
            else None,
        )
        return Layout(
            images=images,
            image_tokens=image_tokens,
            samples=images + len(lengths) - pairs,
            groups=tuple(groups),
            spans=Spans(singles * image_tokens, int(lengths[:pairs].sum()), owners),
            positions=torch.arange(int(lengths.sum())) - starts.repeat_interleave(lengths),
            starts=starts,
        )

    def reading(self, vision: Tensor | None, language: Tensor | None) -> Read:
        """Read only these tokens, given as ascending places in the vision and language streams."""
        singles = 0 if vision is None else int((vision < self.spans.singles).sum())
        paired = 0 if language is None else int((language < self.spans.paired).sum())
        places = Streams(
            None if self.spans.sample.vision is None else vision,
            None if self.spans.sample.language is None else language,
        )
        owners = each(lambda at, owner: owner[at], places, self.spans.sample)
        return Read(places, Spans(singles, paired, owners))


def _group(lengths: Tensor, image_tokens: int, *, causal: bool) -> AttentionGroup:
    """An attention group of texts, all with a picture or all without."""
    samples, total = len(lengths), int(lengths.sum())
    starts = torch.cumsum(lengths, 0) - lengths
    column = torch.arange(int(lengths.max()))
    valid = column[None] < lengths[:, None]  # [samples, longest]
    text = torch.where(valid, starts[:, None] + column[None], starts[:, None])
    picture = torch.ones(samples, image_tokens, dtype=torch.bool)
    mask = torch.cat([picture, valid], 1)[:, None, None, :]
    if causal:
        length = image_tokens + len(column)
        before = torch.ones(length, length, dtype=torch.bool).tril()
        before[:image_tokens, :image_tokens] = True
        mask = mask & before
    if samples == 1:
        return AttentionGroup(1, image_tokens, total, mask=mask if causal else None)
    inside = valid.flatten().nonzero().flatten()
    return AttentionGroup(samples, image_tokens, total, text, inside, mask)


class PerModality(nn.Module):
    """Two copies of a module, one for vision tokens and one for language tokens."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.vision = make()
        self.language = make()

    def of(self, modality: Modality) -> nn.Module:
        return self.vision if modality == "vision" else self.language

    def forward(self, x: Streams) -> Streams:
        """`[tokens, in] -> [tokens, out]` of each stream."""
        return Streams(
            None if x.vision is None else self.vision(x.vision),
            None if x.language is None else self.language(x.language),
        )


class Shared(nn.Module):
    """One module for the tokens of both modalities."""

    def __init__(self, make: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.both = make()

    def of(self, modality: Modality) -> nn.Module:
        return self.both

    def forward(self, x: Streams) -> Streams:
        return each(self.both, x)


def _norm(config: ModelConfig, width: int = 0) -> nn.LayerNorm:
    return nn.LayerNorm(width or config.hidden, eps=config.norm_eps)


class FeedForward(nn.Module):
    """An expert: Linear, GELU, (sub-LN,) Linear. `[tokens, hidden] -> [tokens, hidden]`."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.hidden, config.mlp)
        self.norm = _norm(config, config.mlp) if config.sub_ln else nn.Identity()
        self.fc2 = nn.Linear(config.mlp, config.hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.norm(F.gelu(self.fc1(x))))


class Attention(nn.Module):
    """Multi-head self-attention inside each sample of packed streams."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        copies = PerModality if config.attention == "per_modality" else Shared
        self.heads = config.heads
        self.qkv = copies(lambda: nn.Linear(config.hidden, 3 * config.hidden))
        self.norm = copies(lambda: _norm(config) if config.sub_ln else nn.Identity())
        self.out = copies(lambda: nn.Linear(config.hidden, config.hidden))

    def forward(self, x: Streams, layout: Layout, read: Streams | None = None) -> Streams:
        """`[tokens, hidden] -> [tokens, hidden]` of each stream, or `[read, hidden]`."""
        mixed = self._mix(self.qkv(x), layout)
        if read is not None:
            mixed = pick(mixed, read)
        return self.out(self.norm(mixed))

    def _mix(self, qkv: Streams, layout: Layout) -> Streams:
        """Each head's weighted means of values, `[tokens, hidden]` of each stream."""
        # split, not slices: its gradient is one concatenation.
        vision = iter(_parts(qkv.vision, [g.vision_tokens for g in layout.groups]))
        language = iter(_parts(qkv.language, [g.text_tokens for g in layout.groups]))
        pictures, texts = [], []
        for group in layout.groups:
            sides = []
            if group.vision_tokens:
                sides.append(next(vision).view(group.samples, group.image_tokens, -1))
            if group.text_tokens:
                text = next(language)
                if group.text is not None:
                    # index_select, not text[index]: its gradient is summed in a fixed order.
                    text = text.index_select(0, group.text.flatten())
                sides.append(text.view(group.samples, -1, text.shape[1]))
            lengths = [side.shape[1] for side in sides]
            mixed = self._attend(torch.cat(sides, 1) if len(sides) > 1 else sides[0], group.mask)
            outputs = [part.flatten(0, 1) for part in mixed.split(lengths, 1)]
            if group.vision_tokens:
                pictures.append(outputs.pop(0))
            if group.text_tokens:
                text = outputs.pop()
                texts.append(text if group.inside is None else text.index_select(0, group.inside))
        return Streams(_joined(pictures), _joined(texts))

    def _attend(self, qkv: Tensor, mask: Tensor | None) -> Tensor:
        """`[samples, length, 3 * hidden] -> [samples, length, hidden]`."""
        q, k, v = qkv.unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return mixed.transpose(1, 2).flatten(2)


def pick(x: Streams, places: Streams) -> Streams:
    """Tokens `[read, width]` of each stream."""
    return each(lambda at, tokens: tokens.index_select(0, at), places, x)


def _parts(stream: Tensor | None, lengths: list[int]) -> list[Tensor]:
    """A stream cut into pieces of these lengths; those of length 0 are left out."""
    if stream is None:
        return []
    lengths = [length for length in lengths if length]
    return list(stream.split(lengths)) if len(lengths) > 1 else [stream]


def _cut(stream: Tensor | None, at: int) -> tuple[Tensor | None, Tensor | None]:
    """The parts of a stream before and after `at`."""
    if stream is None:
        return None, None
    before, behind = stream.split([at, len(stream) - at])
    return before, behind


def _joined(parts: Sequence[Tensor | None]) -> Tensor | None:
    some = [part for part in parts if part is not None]
    return torch.cat(some) if len(some) > 1 else next(iter(some), None)


class Experts(nn.Module):
    """The feed-forward networks of a block and the tokens that each one sees."""

    def __init__(self, config: ModelConfig, *, fusion: bool) -> None:
        super().__init__()
        self.vision_expert = FeedForward(config)
        self.language_expert = FeedForward(config) if config.multiway else None
        self.fusion_expert = FeedForward(config) if fusion else None

    def of(self, modality: Modality) -> FeedForward:
        """The expert for tokens outside pairs."""
        if modality == "language" and self.language_expert is not None:
            return self.language_expert
        return self.vision_expert

    def forward(self, x: Streams, spans: Spans) -> Streams:
        if self.fusion_expert is None:
            return self._apart(x)
        # Every expert is called, even with no tokens: workers must call the same modules in the
        # same order, whatever their batches hold.
        alone, pictures = _cut(x.vision, spans.singles)
        captions, texts = _cut(x.language, spans.paired)
        paired = [part for part in (pictures, captions) if part is not None]
        fused = self.fusion_expert(torch.cat(paired)).split([len(part) for part in paired])
        apart = self._apart(Streams(alone, texts))
        vision = [apart.vision, None if pictures is None else fused[0]]
        language = [None if captions is None else fused[-1], apart.language]
        return Streams(_joined(vision), _joined(language))

    def _apart(self, x: Streams) -> Streams:
        return Streams(
            None if x.vision is None else self.of("vision")(x.vision),
            None if x.language is None else self.of("language")(x.language),
        )


class Block(nn.Module):
    """Pre-norm residual block: attention, then the experts."""

    def __init__(self, config: ModelConfig, *, drop_path: float, fusion: bool) -> None:
        super().__init__()
        copies = PerModality if config.attention == "per_modality" else Shared
        self.norm1 = copies(lambda: _norm(config))
        self.attention = Attention(config)
        self.norm2 = copies(lambda: _norm(config))
        self.experts = Experts(config, fusion=fusion)
        self.drop_path = drop_path

    def forward(self, x: Streams, layout: Layout, read: Read | None = None) -> Streams:
        """`[tokens, hidden] -> [tokens, hidden]` of each stream, or `[read, hidden]`."""
        spans = layout.spans
        if read is None:
            mixed = self.attention(self.norm1(x), layout)
        else:
            mixed = self.attention(self.norm1(x), layout, read.places)
            x, spans = pick(x, read.places), read.spans
        x = self._add(x, mixed, layout.samples, spans)
        return self._add(x, self.experts(self.norm2(x), spans), layout.samples, spans)

    def _add(self, x: Streams, branch: Streams, samples: int, spans: Spans) -> Streams:
        """The residual sum; stochastic depth drops the branch for whole samples."""
        if not self.training or self.drop_path == 0.0:
            return each(torch.add, x, branch)
        keep = 1.0 - self.drop_path
        some = x.vision if x.vision is not None else x.language
        kept = torch.empty(samples, 1, device=None if some is None else some.device)
        kept = kept.bernoulli_(keep) / keep
        return each(
            lambda own, new, sample: own + new * kept[sample].to(new.dtype),
            x,
            branch,
            spans.sample,
        )


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
        self.norm = copies(lambda: _norm(config) if config.final_norm else nn.Identity())
        self.checkpointing = config.checkpoint_activations
        self._initialise(config)

    def forward(self, x: Streams, layout: Layout, read: Read | None = None) -> Streams:
        """`[tokens, hidden] -> [tokens, hidden]` of each stream, normalised if there is a final
        norm; if `read` is given, `[read, hidden]` of its tokens only."""
        last = len(self.blocks) - 1
        for number, block in enumerate(self.blocks):
            x = self._through(block, x, layout, read if number == last else None)
        return self.norm(x)

    def _through(self, block: nn.Module, x: Streams, layout: Layout, read: Read | None) -> Streams:
        if self.checkpointing == "none" or not self.training:
            return block(x, layout, read)
        if self.checkpointing == "blocks":
            return checkpoint(block, x, layout, read, use_reentrant=False)  # type: ignore[return-value]
        return checkpoint(  # type: ignore[return-value]
            block, x, layout, read, use_reentrant=False, context_fn=_selective_contexts
        )

    def _initialise(self, config: ModelConfig) -> None:
        """Sub-LN: Xavier with Magneto's gain on values and outputs (arXiv 2210.06423, section 3).
        Else BEiT's, as in the paper's footnote 4: uniform in a small range, with the output
        matrices of layer l divided by sqrt(2l). The range is 0.02 at the paper's width of 1408 and
        scales as 1 / sqrt(width), so that activations start alike at every size.
        """
        gain = math.sqrt(math.log(2 * config.layers)) if config.sub_ln else 1.0
        extent = 0.02 * math.sqrt(1408 / config.hidden)
        for layer, block in enumerate(self.blocks, start=1):
            for name, module in block.named_modules():
                if not isinstance(module, nn.Linear):
                    continue
                nn.init.zeros_(module.bias)
                if not config.sub_ln:
                    output = name.endswith("fc2") or ".out" in name
                    bound = extent / math.sqrt(2.0 * layer) if output else extent
                    nn.init.uniform_(module.weight, -bound, bound)
                    continue
                nn.init.xavier_normal_(module.weight)
                # Only the values, not the queries and keys.
                scaled = module.weight[2 * config.hidden :] if ".qkv" in name else module.weight
                with torch.no_grad():
                    scaled *= gain
