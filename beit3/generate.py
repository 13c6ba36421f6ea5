"""Captions by image-to-text generation: the released decoding scheme, with cached keys and values.

`generate` searches for the likeliest caption, `sample` draws one.

Each step feeds the words so far followed by a `<mask>`, and reads the next word off the `<mask>`.
Under the generation mask a picture sees only itself and a word only what precedes it, so the keys
and values of both are computed once; a step computes two tokens per caption, the last word and the
new `<mask>`.

Source: microsoft/unilm `beit3/` (captioning); "Image as a Foreign Language" section 3.1.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beit3.model import BEiT3
from beit3.multiway import Block, Modality
from beit3.objectives import normalise
from beit3.text import BOS, EOS, PAD, UNK, TextTokenizer

CANDIDATES_PER_BEAM = 3
_NEVER: tuple[tuple[int, ...], float] = ((), -math.inf)


@dataclass(frozen=True)
class Caption:
    """Generated ids without `<s>` and `</s>`.

    logprob: log probability of the ids and, if `finished`, of `</s>`.
    score: ranks beams: logprob / length ** length_penalty, `</s>` counted. For a sampled caption,
        the logprob under the model's own distribution, not the narrowed one.
    """

    ids: tuple[int, ...]
    logprob: float
    score: float
    finished: bool


def never_emitted(tokenizer: TextTokenizer, vocab_size: int) -> list[int]:
    """Ids that are not words: `<s>`, `<pad>`, `<unk>`, `<mask>`, and the vocabulary's padding."""
    return [BOS, PAD, UNK, tokenizer.mask_id, *range(tokenizer.vocab_size, vocab_size)]


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
        max_length: Maximum tokens of a caption, `<s>` and `</s>` included.
        length_penalty: Exponent of the length that a caption's log probability is divided by.
        banned: Further ids that must not be emitted.

    Raises:
        ValueError: an argument is impossible; the message names it.
    """
    if beams < 1:
        raise ValueError(f"beams: expected at least 1, got {beams}")
    search = _BeamSearch(len(images), beams, length_penalty)
    return _decode(backbone, text_head, images, tokenizer, search, beams, max_length, banned)


def sample(
    backbone: BEiT3,
    text_head: nn.Module,
    images: Tensor,
    tokenizer: TextTokenizer,
    *,
    generator: torch.Generator,
    max_length: int = 32,
    temperature: float = 1.0,
    top_k: int | None = None,
    top_p: float = 1.0,
    banned: Sequence[int] = (),
) -> list[Caption]:
    """Caption a batch of pictures, one caption each, by sampling its words.

    Args:
        generator: Source of the draws. The same seed and the same batch give the same captions.
        temperature: Below 1 prefers likely words, above 1 evens the words out.
        top_k: Draw among the likeliest `top_k` words only.
        top_p: Draw among the fewest likeliest words whose probabilities add up to this.

    The other arguments are those of `generate`.

    Raises:
        ValueError: an argument is impossible; the message names it.
    """
    if not 0.0 < temperature < math.inf:
        raise ValueError(f"temperature: expected a positive number, got {temperature}")
    if top_k is not None and top_k < 1:
        raise ValueError(f"top_k: expected at least 1, got {top_k}")
    if not 0.0 < top_p <= 1.0:
        raise ValueError(f"top_p: {top_p} is not within 0..1, 0 excluded")
    draw = _Sampling(len(images), generator, temperature, top_k, top_p)
    return _decode(backbone, text_head, images, tokenizer, draw, 1, max_length, banned)


def narrow(logprobs: Tensor, temperature: float, top_k: int | None, top_p: float) -> Tensor:
    """Probabilities to sample from, `[..., vocabulary]`, given the model's log probabilities."""
    best = logprobs.amax(-1, keepdim=True)
    chances = torch.softmax((logprobs - best) / temperature, -1)
    ordered, words = chances.sort(dim=-1, descending=True, stable=True)
    keep = torch.ones_like(ordered, dtype=torch.bool)
    if top_p < 1.0:
        keep = ordered.cumsum(-1) - ordered < top_p  # until the words before reach top_p
    if top_k is not None:
        keep[..., top_k:] = False
    kept = torch.zeros_like(chances).scatter(-1, words, ordered * keep)
    return kept / kept.sum(-1, keepdim=True)


class _Strategy(Protocol):
    """Chooses the next words, given each beam's log probabilities."""

    @property
    def done(self) -> bool: ...

    def step(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Extend the beams by a word, given `[pictures, beams, vocabulary]`.

        Returns each new beam's parent and its last word, both `[pictures, beams]`.
        """
        ...

    def best(self) -> list[Caption]: ...


@torch.no_grad()
def _decode(
    backbone: BEiT3,
    text_head: nn.Module,
    images: Tensor,
    tokenizer: TextTokenizer,
    strategy: _Strategy,
    beams: int,
    max_length: int,
    banned: Sequence[int],
) -> list[Caption]:
    config = backbone.config
    if not 3 <= max_length <= config.max_text_length:
        raise ValueError(f"max_length: {max_length} is not within 3..{config.max_text_length}")
    if images.dtype != torch.uint8:
        raise ValueError(f"images: expected uint8, got {images.dtype}")
    if tokenizer.vocab_size > config.vocab_size:
        raise ValueError(
            f"tokenizer: has {tokenizer.vocab_size} ids, the model {config.vocab_size}"
        )
    outside = [word for word in banned if not 0 <= word < config.vocab_size]
    if outside:
        raise ValueError(f"banned: {outside[0]} is not within 0..{config.vocab_size - 1}")
    forbidden = torch.zeros(config.vocab_size, dtype=torch.bool, device=images.device)
    forbidden[[*never_emitted(tokenizer, config.vocab_size), *banned]] = True
    if bool(forbidden.all()):
        raise ValueError("banned: leaves no word to emit")
    if len(images) == 0:
        return []
    decoder = _Decoder(
        backbone,
        text_head,
        images,
        mask=tokenizer.mask_id,
        forbidden=forbidden,
        beams=beams,
        max_length=max_length,
    )
    last = torch.full((len(images), beams), BOS, device=images.device)
    for _ in range(max_length - 2):
        parents, words = strategy.step(decoder.step(last))
        if strategy.done:
            break
        decoder.keep(parents.to(images.device))
        last = words.to(images.device)
    return strategy.best()


class _Memory:
    """Keys and values of one block: each picture's, once, followed by those of its beams' words.

    keys, values: `[pictures, heads, image tokens + beams * slots, head width]`.
    """

    def __init__(self, keys: Tensor, values: Tensor, beams: int, slots: int) -> None:
        self.image_tokens, self.beams, self.slots = keys.shape[2], beams, slots
        room = (0, 0, 0, beams * slots)
        self.keys, self.values = F.pad(keys, room), F.pad(values, room)

    def words(self) -> tuple[Tensor, Tensor]:
        """The words' part, as views `[pictures, heads, beams, slots, head width]`."""
        both = (x[:, :, self.image_tokens :] for x in (self.keys, self.values))
        k, v = (x.unflatten(2, (self.beams, self.slots)) for x in both)
        return k, v

    def put(self, place: int, keys: Tensor, values: Tensor) -> None:
        """Store two tokens of each beam, `[pictures, heads, beams * 2, head width]`."""
        for kept, new in zip(self.words(), (keys, values), strict=True):
            kept[:, :, :, place : place + 2] = new.unflatten(2, (self.beams, 2))

    def keep(self, length: int, parents: Tensor) -> None:
        """Give each beam the first `length` words of its parent; parents: `[pictures, beams]`."""
        picture = torch.arange(len(parents), device=parents.device)[:, None]
        for kept in self.words():
            chosen = kept[picture, :, parents, :length]  # [pictures, beams, heads, length, width]
            kept[:, :, :, :length] = chosen.transpose(1, 2)


class _Decoder:
    """Log probabilities of the next word, for the same number of beams of every picture."""

    def __init__(
        self,
        backbone: BEiT3,
        text_head: nn.Module,
        images: Tensor,
        *,
        mask: int,
        forbidden: Tensor,
        beams: int,
        max_length: int,
    ) -> None:
        self.backbone, self.text_head = backbone, text_head
        self.mask, self.forbidden, self.beams = mask, forbidden, beams
        self.length = 0
        self.memories: list[_Memory] = []
        x = backbone.vision_embedding(normalise(images))
        for block in _blocks(backbone):
            q, k, v = _project(block, x, "vision")
            self.memories.append(_Memory(k, v, beams, max_length + 1))
            x = _finish(block, x, F.scaled_dot_product_attention(q, k, v), "vision")

    def step(self, last: Tensor) -> Tensor:
        """Last words `[pictures, beams]` to log probabilities `[pictures, beams, vocabulary]`."""
        backbone, place = self.backbone, self.length
        pair = torch.stack([last, torch.full_like(last, self.mask)], 2)
        x = backbone.text_embedding(pair) + backbone.text_positions[place : place + 2]
        x = x.flatten(1, 2)
        seen = self._seen(place).to(x.device)
        for block, memory in zip(_blocks(backbone), self.memories, strict=True):
            q, k, v = _project(block, x, "language")
            memory.put(place, k, v)
            mixed = F.scaled_dot_product_attention(q, memory.keys, memory.values, attn_mask=seen)
            x = _finish(block, x, mixed, "language")
        self.length += 1
        hidden = backbone.encoder.norm.of("language")(x[:, 1::2].flatten(0, 1))
        logits = self.text_head(hidden).float().masked_fill(self.forbidden, -torch.inf)
        return F.log_softmax(logits, -1).view(len(last), self.beams, -1)

    def keep(self, parents: Tensor) -> None:
        """Continue from these beams, `[pictures, beams]`."""
        for memory in self.memories:
            memory.keep(self.length, parents)

    def _seen(self, place: int) -> Tensor:
        """bool `[beams * 2, image tokens + beams * slots]`: what a step's tokens attend to."""
        memory = self.memories[0]
        slots = torch.arange(memory.slots)
        # The word sees up to itself, the <mask> after it itself too; neither sees other beams.
        own = torch.stack([slots <= place, slots <= place + 1])
        words = torch.eye(self.beams, dtype=torch.bool)[:, None, :, None] & own[None, :, None]
        picture = torch.ones(2 * self.beams, memory.image_tokens, dtype=torch.bool)
        return torch.cat([picture, words.flatten(2).flatten(0, 1)], 1)


def _blocks(backbone: BEiT3) -> list[Block]:
    return [block for block in backbone.encoder.blocks if isinstance(block, Block)]


def _project(block: Block, x: Tensor, modality: Modality) -> tuple[Tensor, Tensor, Tensor]:
    """`[samples, length, hidden]` of one modality to queries, keys and values
    `[samples, heads, length, head width]`."""
    qkv = block.attention.qkv.of(modality)(block.norm1.of(modality)(x))
    q, k, v = qkv.unflatten(2, (3, block.attention.heads, -1)).permute(2, 0, 3, 1, 4)
    return q, k, v


def _finish(block: Block, x: Tensor, mixed: Tensor, modality: Modality) -> Tensor:
    """The rest of a block after attention, `mixed`: `[samples, length, hidden]` of pairs."""
    attention, experts = block.attention, block.experts
    mixed = mixed.transpose(1, 2).flatten(2)
    x = x + attention.out.of(modality)(attention.norm.of(modality)(mixed))
    # The fusion expert reads whatever belongs to a pair.
    expert = experts.fusion_expert or experts.of(modality)
    return x + expert(block.norm2.of(modality)(x))


class _BeamSearch:
    """Beams of several pictures, their finished captions, and when to stop."""

    def __init__(self, pictures: int, beams: int, length_penalty: float) -> None:
        self.beams, self.length_penalty = beams, length_penalty
        # At first all beams are the same empty caption: only one of them may be extended.
        start = [((), 0.0), *[_NEVER] * (beams - 1)]
        self.alive: list[list[tuple[tuple[int, ...], float]]] = [start] * pictures
        self.finished: list[list[Caption]] = [[] for _ in range(pictures)]
        self.complete = [False] * pictures

    @property
    def done(self) -> bool:
        return all(self.complete)

    def step(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        past = torch.tensor([[score for _, score in alive] for alive in self.alive])
        total = past.to(logprobs)[:, :, None] + logprobs
        count = min(CANDIDATES_PER_BEAM * self.beams, total[0].numel())
        values, places = total.flatten(1).topk(count, 1)
        chosen = [
            self._extend(picture, scores, choices, logprobs.shape[2])
            for picture, (scores, choices) in enumerate(
                zip(values.tolist(), places.tolist(), strict=True)
            )
        ]
        parents = torch.tensor([[parent for parent, _ in beams] for beams in chosen])
        return parents, torch.tensor([[word for _, word in beams] for beams in chosen])

    def _extend(
        self, picture: int, scores: list[float], choices: list[int], vocabulary: int
    ) -> list[tuple[int, int]]:
        """Take a picture's best candidates, best first; returns parents and words."""
        alive: list[tuple[tuple[int, ...], float]] = []
        chosen: list[tuple[int, int]] = []
        if not self.complete[picture]:
            for score, choice in zip(scores, choices, strict=True):
                parent, word = divmod(choice, vocabulary)
                ids = self.alive[picture][parent][0]
                if score == -math.inf or len(alive) == self.beams:
                    break
                if word == EOS:
                    self.finished[picture].append(self._caption(ids, score, finished=True))
                else:
                    alive.append(((*ids, word), score))
                    chosen.append((parent, word))
            self._judge(picture, alive)
        # A picture that is complete, or short of candidates, is filled with beams that never win.
        missing = self.beams - len(alive)
        self.alive[picture] = alive + [_NEVER] * missing
        return chosen + [(0, EOS)] * missing

    def best(self) -> list[Caption]:
        """The best caption of each picture, finished or cut at the greatest length."""
        chosen = []
        for alive, finished in zip(self.alive, self.finished, strict=True):
            cut = [self._caption(i, s, finished=False) for i, s in alive if s > -math.inf]
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


class _Sampling:
    """Samples one caption per picture, word by word."""

    def __init__(
        self,
        pictures: int,
        generator: torch.Generator,
        temperature: float,
        top_k: int | None,
        top_p: float,
    ) -> None:
        self.generator = generator
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        self.ids: list[tuple[int, ...]] = [()] * pictures
        self.logprobs = [0.0] * pictures
        self.finished = [False] * pictures

    @property
    def done(self) -> bool:
        return all(self.finished)

    def step(self, logprobs: Tensor) -> tuple[Tensor, Tensor]:
        logprobs = logprobs[:, 0].to(self.generator.device)
        chances = narrow(logprobs, self.temperature, self.top_k, self.top_p)
        # Finished pictures draw too, so that the others' draws don't depend on them.
        words = torch.multinomial(chances, 1, generator=self.generator)
        gains = logprobs.gather(1, words)[:, 0].tolist()
        for picture, (word, gain) in enumerate(zip(words[:, 0].tolist(), gains, strict=True)):
            if self.finished[picture]:
                continue
            self.logprobs[picture] += gain
            if word == EOS:
                self.finished[picture] = True
            else:
                self.ids[picture] = (*self.ids[picture], word)
        return torch.zeros_like(words), words

    def best(self) -> list[Caption]:
        captions = zip(self.ids, self.logprobs, self.finished, strict=True)
        return [Caption(ids, logprob, logprob, finished) for ids, logprob, finished in captions]
