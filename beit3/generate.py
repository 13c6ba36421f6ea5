"""Captions by image-to-text generation: the released decoding scheme, with cached keys and values.

Each step feeds the words so far and a `<mask>` behind them, and reads the next word off the
`<mask>`. Under the generation mask a picture sees only itself and a word only what stands before
it, so the keys and values of both are computed once; a step computes two tokens per caption, the
last word and the new `<mask>`.

Source: microsoft/unilm `beit3/` (captioning); "Image as a Foreign Language" section 3.1.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model import BEiT3
from beit3.multiway import Block
from beit3.objectives import normalise
from beit3.text import BOS, EOS, PAD, UNK, TextTokenizer

CANDIDATES_PER_BEAM = 3


@dataclass(frozen=True)
class Caption:
    """Generated ids without `<s>` and `</s>`.

    logprob: log probability of the ids and, if `finished`, of `</s>`.
    score: what beams are ranked by: logprob / length ** length_penalty, `</s>` counted.
    """

    ids: tuple[int, ...]
    logprob: float
    score: float
    finished: bool


def never_emitted(tokenizer: TextTokenizer, vocab_size: int) -> list[int]:
    """Ids that are no words: `<s>`, `<pad>`, `<unk>`, `<mask>`, and the vocabulary's padding."""
    return [BOS, PAD, UNK, tokenizer.mask_id, *range(tokenizer.vocab_size, vocab_size)]


@torch.no_grad()
def generate(
    backbone: BEiT3,
    text_head: nn.Module,
    images: Tensor,
    tokenizer: TextTokenizer,
    *,
    max_length: int = 32,
    beams: int = 3,
    length_penalty: float = 0.6,
    banned: Sequence[int] = (),
) -> list[Caption]:
    """Caption a batch of pictures by beam search; `beams=1` is greedy.

    Args:
        text_head: `[n, hidden]` to logits `[n, vocabulary]`.
        images: uint8 `[n, 3, height, width]`.
        max_length: Most tokens of a caption, `<s>` and `</s>` included.
        length_penalty: Exponent of the length that a caption's log probability is divided by.
        banned: Further ids that must not be emitted.

    Raises:
        ValueError: `beams` or `max_length` is impossible.
    """
    if beams < 1:
        raise ValueError(f"beams: expected at least 1, got {beams}")
    if not 3 <= max_length <= backbone.config.max_text_length:
        limit = backbone.config.max_text_length
        raise ValueError(f"max_length: {max_length} is not within 3..{limit}")
    config = backbone.config
    forbidden = torch.zeros(config.vocab_size, dtype=torch.bool, device=images.device)
    forbidden[[*never_emitted(tokenizer, config.vocab_size), *banned]] = True
    decoder = _Decoder(backbone, text_head, images, tokenizer.mask_id, forbidden)
    search = _BeamSearch(len(images), beams, length_penalty)
    last = torch.full((len(images),), BOS, device=images.device)
    for _ in range(max_length - 2):
        parents, words = search.step(decoder.step(last))
        if search.done:
            break
        decoder.keep(torch.tensor(parents, device=images.device))
        last = torch.tensor(words, device=images.device)
    return search.best()


class _Decoder:
    """Log probabilities of the next word for rows of captions; rows of a picture stand together."""

    def __init__(
        self, backbone: BEiT3, text_head: nn.Module, images: Tensor, mask: int, forbidden: Tensor
    ) -> None:
        self.backbone, self.text_head = backbone, text_head
        self.mask, self.forbidden = mask, forbidden
        self.pictures: list[tuple[Tensor, Tensor]] = []
        self.words: list[tuple[Tensor, Tensor]] = []
        self.length = 0
        x = backbone.vision_embedding(normalise(images))
        nothing = x.new_zeros(len(images), backbone.config.heads, 0, _head_width(backbone))
        for block in _blocks(backbone):
            x, own = _block(block, x, vision=True)
            self.pictures.append(own)
            self.words.append((nothing, nothing))

    def step(self, last: Tensor) -> Tensor:
        """Last words `[rows]` to log probabilities `[rows, vocabulary]`."""
        backbone, place = self.backbone, self.length
        pair = torch.stack([last, torch.full_like(last, self.mask)], 1)
        x = backbone.text_embedding(pair) + backbone.text_positions[place : place + 2]
        picture_length = self.pictures[0][0].shape[2]
        seen = torch.ones(2, picture_length + place + 2, dtype=torch.bool, device=x.device)
        seen[0, -1] = False  # the word does not see the <mask> behind it
        for layer, block in enumerate(_blocks(backbone)):
            before = [
                torch.cat([_repeat(picture, len(x)), word], 2)
                for picture, word in zip(self.pictures[layer], self.words[layer], strict=True)
            ]
            x, own = _block(block, x, vision=False, before=before, seen=seen)
            k, v = (
                torch.cat([word, new[:, :, :1]], 2)
                for word, new in zip(self.words[layer], own, strict=True)
            )
            self.words[layer] = (k, v)
        self.length += 1
        hidden = backbone.encoder.norm(x[:, 1], 0)
        logits = self.text_head(hidden).float()
        return F.log_softmax(logits.masked_fill(self.forbidden, -torch.inf), -1)

    def keep(self, rows: Tensor) -> None:
        """Go on with these rows, in this order: parents of the next step's captions."""
        self.words = [(k[rows], v[rows]) for k, v in self.words]


def _blocks(backbone: BEiT3) -> list[Block]:
    return [block for block in backbone.encoder.blocks if isinstance(block, Block)]


def _head_width(backbone: BEiT3) -> int:
    return backbone.config.hidden // backbone.config.heads


def _repeat(pictures: Tensor, rows: int) -> Tensor:
    """`[pictures, ...]` to `[rows, ...]`, each picture for its neighbouring rows."""
    return pictures.repeat_interleave(rows // len(pictures), 0)


def _block(
    block: Block,
    x: Tensor,
    *,
    vision: bool,
    before: Sequence[Tensor] = (),
    seen: Tensor | None = None,
) -> tuple[Tensor, tuple[Tensor, Tensor]]:
    """One block over `[rows, length, hidden]` tokens of one modality of pairs.

    Returns the new hidden states, and these tokens' keys and values
    `[rows, heads, length, head width]`.
    """
    rows, length, hidden = x.shape
    flat = x.flatten(0, 1)
    split = len(flat) if vision else 0
    attention = block.attention
    qkv = attention.qkv(block.norm1(flat, split), split)
    qkv = qkv.view(rows, length, 3, attention.heads, -1)
    q, k, v = qkv.permute(2, 0, 3, 1, 4)
    keys = torch.cat([before[0], k], 2) if before else k
    values = torch.cat([before[1], v], 2) if before else v
    mixed = F.scaled_dot_product_attention(q, keys, values, attn_mask=seen)
    mixed = mixed.transpose(1, 2).reshape(-1, hidden)
    flat = flat + attention.out(attention.norm(mixed, split), split)
    experts = block.experts
    expert = experts.fusion_expert
    if expert is None:
        own = experts.vision_expert if vision else experts.language_expert
        expert = own or experts.vision_expert  # a standard Transformer has only one
    flat = flat + expert(block.norm2(flat, split))
    return flat.view(rows, length, hidden), (k, v)


class _BeamSearch:
    """Beams of several pictures, their finished captions, and when to stop."""

    def __init__(self, pictures: int, beams: int, length_penalty: float) -> None:
        self.beams, self.length_penalty = beams, length_penalty
        # Before the first word each picture has one row; afterwards `beams`.
        self.alive: list[list[tuple[tuple[int, ...], float]]] = [[((), 0.0)]] * pictures
        self.finished: list[list[Caption]] = [[] for _ in range(pictures)]
        self.complete = [False] * pictures

    @property
    def done(self) -> bool:
        return all(self.complete)

    def step(self, logprobs: Tensor) -> tuple[list[int], list[int]]:
        """Extend every beam by a word; returns each new row's parent row and last word."""
        pictures, vocabulary = len(self.alive), logprobs.shape[1]
        width = len(self.alive[0])
        past = torch.tensor([[beam[1] for beam in alive] for alive in self.alive])
        total = past.to(logprobs)[:, :, None] + logprobs.view(pictures, width, vocabulary)
        count = min(CANDIDATES_PER_BEAM * self.beams, width * vocabulary)
        values, places = total.flatten(1).topk(count, 1)
        parents: list[int] = []
        words: list[int] = []
        for picture, (scores, choices) in enumerate(
            zip(values.tolist(), places.tolist(), strict=True)
        ):
            alive = self.alive[picture]
            new: list[tuple[tuple[int, ...], float]] = []
            if not self.complete[picture]:
                for score, choice in zip(scores, choices, strict=True):
                    parent, word = divmod(choice, vocabulary)
                    ids = alive[parent][0]
                    if score == -float("inf"):
                        break
                    if word == EOS:
                        self.finished[picture].append(self._caption(ids, score, finished=True))
                    else:
                        new.append(((*ids, word), score))
                        parents.append(picture * width + parent)
                        words.append(word)
                    if len(new) == self.beams:
                        break
                self._judge(picture, new)
            # Rows must stay rectangular: a picture that is complete, or short of candidates, is
            # filled with rows that can't win.
            while len(new) < self.beams:
                new.append(((), -float("inf")))
                parents.append(picture * width)
                words.append(EOS)
            self.alive[picture] = new
        return parents, words

    def best(self) -> list[Caption]:
        """The best caption of each picture, finished or cut at the greatest length."""
        chosen = []
        for alive, finished in zip(self.alive, self.finished, strict=True):
            cut = [self._caption(i, s, finished=False) for i, s in alive if s > -float("inf")]
            # An unfinished caption is taken only where beams were still open at the end.
            pool = finished if len(finished) >= self.beams else finished + cut
            chosen.append(max(pool, key=lambda caption: caption.score))
        return chosen

    def _caption(self, ids: tuple[int, ...], logprob: float, *, finished: bool) -> Caption:
        length = max(1, len(ids) + finished)
        return Caption(ids, logprob, logprob / length**self.length_penalty, finished)

    def _judge(self, picture: int, alive: list[tuple[tuple[int, ...], float]]) -> None:
        """A picture is complete once it has enough captions and no beam can overtake them."""
        finished = sorted(self.finished[picture], key=lambda caption: -caption.score)
        self.finished[picture] = finished[: self.beams]
        if not alive:
            self.complete[picture] = True
        elif len(finished) >= self.beams:
            ids, score = max(alive, key=lambda beam: beam[1])
            best = score / len(ids) ** self.length_penalty
            self.complete[picture] = best <= self.finished[picture][-1].score
