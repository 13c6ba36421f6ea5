"""BEiT-3: embeddings and the Multiway encoder.

One set of weights serves five modes, chosen by the arguments:

    vision encoder      model(images=...)
    language encoder    model(text=..., lengths=...)
    dual encoder        model(images=..., text=..., lengths=...)            nothing is paired
    fusion encoder      model(images=..., text=..., lengths=..., pairs=n)
    image-to-text       the same with causal_text=True; `beit3.generate` decodes with it
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.config import ModelConfig
from beit3.device import to_device
from beit3.multiway import Encoder, Layout, Read, Streams


class Encoded(NamedTuple):
    """The encoder's output for a packed batch; a tuple, so that engines find its tensors.

    vision: `[images, 1 + patches, hidden]`, `[CLS]` first, or None.
    text: `[text tokens, hidden]`, the texts one after another, or None.
    text_starts: `[texts]` where each text begins in `text`.
    """

    vision: Tensor | None
    text: Tensor | None
    text_starts: Tensor

    @property
    def image_summary(self) -> Tensor:
        """`[images, hidden]`: the `[CLS]` of each picture."""
        assert self.vision is not None
        return self.vision[:, 0]

    @property
    def text_summary(self) -> Tensor:
        """`[texts, hidden]`: the `<s>` of each text."""
        assert self.text is not None
        return self.text.index_select(0, self.text_starts)


class PatchEmbedding(nn.Module):
    """Embeds pictures: patches, the mask vector, `[CLS]`, learned positions.

    Positions are interpolated (bicubic) when a picture's grid is not the table's.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.patch_size = config.patch_size
        self.grid = config.grid
        self.projection = nn.Conv2d(3, config.hidden, config.patch_size, config.patch_size)
        self.cls_token = nn.Parameter(torch.zeros(config.hidden))
        self.mask_token = nn.Parameter(torch.zeros(config.hidden))
        self.positions = nn.Parameter(torch.empty(1 + config.patches, config.hidden))
        nn.init.normal_(self.positions, std=0.02)
        nn.init.normal_(self.cls_token, std=0.02)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, images: Tensor, hidden_patches: Tensor | None = None) -> Tensor:
        """`[images, 3, height, width] -> [images, 1 + patches, hidden]`.

        Args:
            hidden_patches: bool `[images, patches]`, True where the mask vector replaces a patch.

        Raises:
            ValueError: the size is not divisible by the patch, or the mask has the wrong shape.
        """
        rows, columns = self.grid_of(images)
        # Under autocast the projection is in bf16; the residual stream stays in full precision.
        x = self.projection(images.to(self.projection.weight.dtype)).to(self.positions.dtype)
        x = x.flatten(2).transpose(1, 2)
        if hidden_patches is not None:
            if hidden_patches.shape != x.shape[:2]:
                raise ValueError(
                    f"hidden_patches: expected {list(x.shape[:2])}, "
                    f"got {list(hidden_patches.shape)}"
                )
            x = torch.where(hidden_patches.bool()[..., None], self.mask_token, x)
        cls = self.cls_token.expand(len(x), 1, -1)
        return torch.cat([cls, x], 1) + self._positions(rows, columns)

    def grid_of(self, images: Tensor) -> tuple[int, int]:
        """Rows and columns of the patch grid of `[images, 3, height, width]`.

        Raises:
            ValueError: the shape is wrong, or its sides are not divisible by the patch.
        """
        if images.ndim != 4 or images.shape[1] != 3:
            raise ValueError(f"images: expected [n, 3, height, width], got {list(images.shape)}")
        height, width = images.shape[2:]
        if height % self.patch_size or width % self.patch_size or not height * width:
            raise ValueError(
                f"images: {[height, width]} is not divisible by the patch {self.patch_size}"
            )
        return height // self.patch_size, width // self.patch_size

    def _positions(self, rows: int, columns: int) -> Tensor:
        if (rows, columns) == (self.grid, self.grid):
            return self.positions
        return interpolate_positions(self.positions, rows, columns)


def interpolate_positions(table: Tensor, rows: int, columns: int) -> Tensor:
    """Resample a `[1 + grid*grid, hidden]` table, `[CLS]` first, to another grid (bicubic)."""
    grid = round((len(table) - 1) ** 0.5)
    picture = table[1:].T.reshape(1, -1, grid, grid).float()
    picture = F.interpolate(picture, (rows, columns), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], picture[0].flatten(1).T.to(table.dtype)])


class BEiT3(nn.Module):
    """The BEiT-3 backbone, without heads."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.vision_embedding = PatchEmbedding(config)
        self.text_embedding = nn.Embedding(config.vocab_size, config.hidden)
        self.text_positions = nn.Parameter(torch.empty(config.max_text_length, config.hidden))
        self.encoder = Encoder(config)
        nn.init.normal_(self.text_embedding.weight, std=config.hidden**-0.5)
        nn.init.normal_(self.text_positions, std=0.02)

    def forward(
        self,
        images: Tensor | None = None,
        text: Tensor | None = None,
        lengths: Sequence[int] = (),
        *,
        pairs: int = 0,
        hidden_patches: Tensor | None = None,
        causal_text: bool = False,
    ) -> Encoded:
        """Encode pictures, texts and pairs in one pass.

        Args:
            images: `[images, 3, height, width]`; the last `pairs` of them belong to pairs.
            text: `[sum(lengths)]` token ids, the texts one after another, unpadded; the first
                `pairs` of them belong to pairs, in the pictures' order.
            lengths: Tokens of each text.
            pairs: How many pictures and texts are read together.
            hidden_patches: bool `[images, patches]`, True where a patch is masked.
            causal_text: Use the mask of image-to-text generation.

        Raises:
            ValueError: an argument's shape or value is impossible; the message names it.
        """
        count = 0 if images is None else len(images)
        patches = 0
        if images is not None and count:
            rows, columns = self.vision_embedding.grid_of(images)
            patches = rows * columns
        lengths = list(lengths)
        self._check_text(text, lengths)
        layout = Layout.build(count, 1 + patches, lengths, pairs, causal_text=causal_text)
        return self.encode(
            images, text, to_device(layout, self.text_positions.device), hidden_patches
        )

    def encode(
        self,
        images: Tensor | None,
        text: Tensor | None,
        layout: Layout,
        hidden_patches: Tensor | None = None,
    ) -> Encoded:
        """`forward` for a batch whose arguments were checked when it was laid out."""
        hidden = self.hidden(images, text, layout, hidden_patches)
        vision = hidden.vision
        return Encoded(
            vision=None if vision is None else vision.unflatten(0, (layout.images, -1)),
            text=hidden.language,
            text_starts=layout.starts,
        )

    def hidden(
        self,
        images: Tensor | None,
        text: Tensor | None,
        layout: Layout,
        hidden_patches: Tensor | None = None,
        read: Read | None = None,
    ) -> Streams:
        """The encoder's output per stream: `[tokens, hidden]`, or `[read, hidden]`.

        Only this part touches the device, and `torch.compile` compiles all of it.
        """
        vision = language = None
        if images is not None and layout.images:
            vision = self.vision_embedding(images, hidden_patches).flatten(0, 1)
        if text is not None and len(text):
            positions = F.embedding(layout.positions, self.text_positions)
            language = self.text_embedding(text) + positions
        return self.encoder(Streams(vision, language), layout, read)

    def _check_text(self, text: Tensor | None, lengths: list[int]) -> None:
        given = 0 if text is None else len(text)
        if lengths and not given:
            raise ValueError(f"lengths: {len(lengths)} texts are announced, but text is empty")
        if text is None or not given:
            return
        if text.ndim != 1 or given != sum(lengths):
            raise ValueError(
                f"text: expected [{sum(lengths)}] packed ids (the sum of lengths), "
                f"got {list(text.shape)}"
            )
        if text.dtype not in (torch.int64, torch.int32):
            raise ValueError(f"text: expected integer ids, got {text.dtype}")
        longest = max(lengths)
        if longest > self.config.max_text_length:
            raise ValueError(
                f"text: a text has {longest} tokens; the position table ends at "
                f"{self.config.max_text_length}"
            )
        if text.device.type == "cpu":  # a check on GPU would wait for the device
            low, high = int(text.min()), int(text.max())
            if low < 0 or high >= self.config.vocab_size:
                raise ValueError(
                    f"text: ids span {low}..{high}, the vocabulary 0..{self.config.vocab_size - 1}"
                )


def pack_texts(padded: Tensor, padding: Tensor) -> tuple[Tensor, list[int]]:
    """Pack padded texts for the model: ids `[sum(lengths)]`, and the lengths.

    Args:
        padded: `[texts, longest]` token ids.
        padding: bool `[texts, longest]`, True where there is no token; each text's tokens come
            first.

    Raises:
        ValueError: the shapes differ, a text is all padding, or padding stands before a token.
    """
    if padded.ndim != 2 or padding.shape != padded.shape:
        raise ValueError(
            f"padding: expected the shape of padded, {list(padded.shape)}, "
            f"got {list(padding.shape)}"
        )
    real = ~padding.bool()
    lengths = real.sum(1)
    empty = (lengths == 0).nonzero().flatten().tolist()
    if empty:
        raise ValueError(f"padding: text {empty[0]} is all padding; leave it out")
    inner = (real != (torch.arange(padded.shape[1], device=real.device) < lengths[:, None])).any(1)
    if inner.any():
        raise ValueError(f"padding: text {int(inner.nonzero()[0])} has padding before a token")
    return padded[real], lengths.tolist()
