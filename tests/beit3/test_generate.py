"""Caption decoding: against the whole model run anew for every word."""

from __future__ import annotations

import io
import itertools
from dataclasses import replace

import pytest
import sentencepiece
import torch
from torch import Tensor, nn

from beit3.config import PRESETS, ModelConfig
from beit3.generate import generate, never_emitted
from beit3.model import BEiT3
from beit3.objectives import normalise
from beit3.text import BOS, EOS, TextTokenizer

SHAPES = {
    "shared, fusion expert": replace(PRESETS["tiny"], layers=2, hidden=32, mlp=64, vocab_size=128),
    "per modality, sub-LN": ModelConfig(
        layers=2,
        hidden=32,
        mlp=64,
        heads=4,
        patch_size=8,
        image_size=16,
        vocab_size=128,
        max_text_length=40,
    ),
    "standard": replace(
        PRESETS["tiny"],
        layers=2,
        hidden=32,
        mlp=64,
        vocab_size=128,
        multiway=False,
        vl_layers=0,
        max_text_length=40,
    ),
}


@pytest.fixture(scope="module")
def tokenizer() -> TextTokenizer:
    words = ("a red circle", "two blue squares on sand", "one star above a cross", "the night sky")
    out = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(words * 20),
        model_writer=out,
        vocab_size=60,
        hard_vocab_limit=False,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=2,
    )
    return TextTokenizer(out.getvalue())


def make(shape: str, pictures: int = 3) -> tuple[BEiT3, nn.Linear, Tensor]:
    """A model of random weights large enough that every step matters, and pictures."""
    torch.manual_seed(1)
    config = SHAPES[shape]
    backbone, head = BEiT3(config).eval(), nn.Linear(config.hidden, config.vocab_size)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
        head.bias[EOS] += 1.5  # so that captions end now and then
    side = config.image_size
    images = torch.randint(0, 256, (pictures, 3, side, side), dtype=torch.uint8)
    return backbone, head, images


@torch.no_grad()
def naive_logprobs(
    backbone: BEiT3, head: nn.Linear, image: Tensor, ids: tuple[int, ...], tokenizer: TextTokenizer
) -> Tensor:
    """The next word's log probabilities, everything computed anew."""
    text = [BOS, *ids, tokenizer.mask_id]
    out = backbone(
        normalise(image[None]), torch.tensor(text), [len(text)], pairs=1, causal_text=True
    )
    assert out.text is not None
    logits = head(out.text[-1])
    logits[never_emitted(tokenizer, backbone.config.vocab_size)] = -torch.inf
    return logits.log_softmax(-1)


def naive_greedy(
    backbone: BEiT3, head: nn.Linear, image: Tensor, tokenizer: TextTokenizer, most: int
) -> tuple[tuple[int, ...], float]:
    ids: tuple[int, ...] = ()
    total = 0.0
    for _ in range(most):
        logprobs = naive_logprobs(backbone, head, image, ids, tokenizer)
        word = int(logprobs.argmax())
        total += float(logprobs[word])
        if word == EOS:
            return ids, total
        ids = (*ids, word)
    return ids, total


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_equals_the_uncached_model(shape: str, tokenizer: TextTokenizer) -> None:
    backbone, head, images = make(shape)
    captions = generate(backbone, head, images, tokenizer, max_length=12, beams=1)
    for image, caption in zip(images, captions, strict=True):
        ids, logprob = naive_greedy(backbone, head, image, tokenizer, 10)
        assert caption.ids == ids
        assert caption.logprob == pytest.approx(logprob, abs=1e-3)


@pytest.mark.parametrize("shape", SHAPES)
def test_a_beam_captions_logprob_is_that_of_the_uncached_model(
    shape: str, tokenizer: TextTokenizer
) -> None:
    backbone, head, images = make(shape)
    for image, caption in zip(
        images, generate(backbone, head, images, tokenizer, max_length=9, beams=4), strict=True
    ):
        words = [*caption.ids, EOS] if caption.finished else list(caption.ids)
        total = sum(
            float(naive_logprobs(backbone, head, image, tuple(words[:i]), tokenizer)[word])
            for i, word in enumerate(words)
        )
        assert caption.logprob == pytest.approx(total, abs=1e-3)
        assert caption.score == pytest.approx(total / len(words) ** 0.6, abs=1e-3)


def test_wide_beams_find_the_best_caption(tokenizer: TextTokenizer) -> None:
    """With room for every caption of two words, the search is exhaustive."""
    backbone, head, images = make("shared, fusion expert", pictures=1)
    allowed = [i for i in range(tokenizer.vocab_size) if i not in (0, 1, 2, 3, tokenizer.mask_id)]
    first = naive_logprobs(backbone, head, images[0], (), tokenizer)
    scores = [float(first[EOS])]
    for word in allowed:
        second = naive_logprobs(backbone, head, images[0], (word,), tokenizer)
        best = float(second[[*allowed, EOS]].max())
        scores.append((float(first[word]) + best) / 2**0.6)
    found = generate(backbone, head, images, tokenizer, max_length=4, beams=len(allowed))[0]
    assert found.score == pytest.approx(max(scores), abs=1e-4)


def test_beams_are_no_worse_than_greedy(tokenizer: TextTokenizer) -> None:
    backbone, head, images = make("per modality, sub-LN", pictures=6)
    greedy = generate(backbone, head, images, tokenizer, max_length=10, beams=1)
    beams = generate(backbone, head, images, tokenizer, max_length=10, beams=5)
    assert sum(b.score for b in beams) > sum(g.score for g in greedy)
    assert all(b.score >= g.score - 1e-4 for b, g in zip(beams, greedy, strict=True))


def test_only_words_are_emitted(tokenizer: TextTokenizer) -> None:
    backbone, head, images = make("shared, fusion expert")
    with torch.no_grad():  # what must not be emitted is what the model wants most
        head.bias[never_emitted(tokenizer, 128)] += 50.0
        head.bias[EOS] -= 20.0
    plain = generate(backbone, head, images, tokenizer, max_length=8)
    emitted = set(itertools.chain.from_iterable(c.ids for c in plain))
    assert emitted and not emitted & {BOS, EOS, *never_emitted(tokenizer, 128)}
    banned = sorted(emitted)[0]
    without = generate(backbone, head, images, tokenizer, max_length=8, banned=[banned])
    assert all(banned not in caption.ids for caption in without)
    assert all(len(caption.ids) <= 6 for caption in plain)


def test_a_picture_s_caption_does_not_depend_on_its_neighbours(tokenizer: TextTokenizer) -> None:
    backbone, head, images = make("per modality, sub-LN")
    together = generate(backbone, head, images, tokenizer, max_length=10)
    apart = [generate(backbone, head, image[None], tokenizer, max_length=10)[0] for image in images]
    assert [c.ids for c in together] == [c.ids for c in apart]


def test_impossible_arguments(tokenizer: TextTokenizer) -> None:
    backbone, head, images = make("standard")
    with pytest.raises(ValueError, match="beams"):
        generate(backbone, head, images, tokenizer, beams=0)
    with pytest.raises(ValueError, match="max_length"):
        generate(backbone, head, images, tokenizer, max_length=41)
