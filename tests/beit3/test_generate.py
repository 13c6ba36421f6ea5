"""Caption decoding: against the whole model run anew for every word."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import replace

import pytest
import torch
from small_models import small_tokenizer
from torch import Tensor, nn

from beit3.config import PRESETS, ModelConfig
from beit3.generate import Caption, generate, narrow, never_emitted, sample
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
    "no final norm": ModelConfig(
        layers=2,
        hidden=32,
        mlp=64,
        heads=4,
        patch_size=8,
        image_size=16,
        vocab_size=128,
        max_text_length=40,
        final_norm=False,
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
    return small_tokenizer(words * 20, 60)


def make(shape: str, pictures: int = 3) -> tuple[BEiT3, nn.Linear, Tensor]:
    """A model of random weights large enough that every step matters, and pictures."""
    torch.manual_seed(1)
    config = SHAPES[shape]
    backbone, head = BEiT3(config).eval(), nn.Linear(config.hidden, config.vocab_size)
    with torch.no_grad():
        for parameter in backbone.parameters():
            if parameter.ndim > 1:
                parameter.mul_(2.0)
        head.bias[EOS] += 0.5  # so that captions end now and then
    side = config.image_size
    images = torch.randint(0, 256, (pictures, 3, side, side), dtype=torch.uint8)
    return backbone, head, images


@torch.no_grad()
def naive_logprobs(
    backbone: BEiT3,
    head: nn.Linear,
    image: Tensor,
    ids: tuple[int, ...],
    tokenizer: TextTokenizer,
    banned: Sequence[int] = (),
) -> Tensor:
    """The next word's log probabilities, everything computed anew."""
    text = [BOS, *ids, tokenizer.mask_id]
    out = backbone(
        normalise(image[None]), torch.tensor(text), [len(text)], pairs=1, causal_text=True
    )
    assert out.text is not None
    logits = head(out.text[-1])
    logits[[*never_emitted(tokenizer, backbone.config.vocab_size), *banned]] = -torch.inf
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


@pytest.mark.parametrize("shape", ["shared, fusion expert", "per modality, sub-LN"])
def test_wide_beams_equal_brute_force_over_longer_captions(
    shape: str, tokenizer: TextTokenizer
) -> None:
    """Three words of a vocabulary of four: every caption, `</s>` anywhere, is scored."""
    backbone, head, images = make(shape)
    words = (10, 20, 30, 40)
    banned = [i for i in range(128) if i not in (*words, EOS)]
    penalty = 0.9
    for image in images:
        scores: dict[tuple[int, ...], float] = {}
        beams: dict[tuple[int, ...], float] = {(): 0.0}
        for length in (1, 2, 3):
            longer = {}
            for ids, total in beams.items():
                logprobs = naive_logprobs(backbone, head, image, ids, tokenizer, banned)
                scores[(*ids, EOS)] = (total + float(logprobs[EOS])) / length**penalty
                longer |= {(*ids, word): total + float(logprobs[word]) for word in words}
            beams = longer
        scores |= {ids: total / 3**penalty for ids, total in beams.items()}
        found = generate(
            backbone,
            head,
            image[None],
            tokenizer,
            max_length=5,
            beams=4**3,
            length_penalty=penalty,
            banned=banned,
        )[0]
        best = max(scores, key=lambda ids: scores[ids])
        assert (*found.ids, *([EOS] if found.finished else [])) == best
        assert found.score == pytest.approx(scores[best], abs=1e-4)


def test_beams_find_better_captions_than_greedy(tokenizer: TextTokenizer) -> None:
    backbone, head, images = make("per modality, sub-LN", pictures=6)
    greedy = generate(backbone, head, images, tokenizer, max_length=10, beams=1)
    beams = generate(backbone, head, images, tokenizer, max_length=10, beams=5)
    # Of each picture that holds only mostly: a beam may be lost to candidates that come to nothing.
    assert sum(b.score for b in beams) > sum(g.score for g in greedy) + 1.0


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


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(
    "narrowing", [{"top_k": 1}, {"top_p": 1e-6}, {"temperature": 1e-30}], ids=str
)
def test_drawing_the_likeliest_word_is_greedy(
    shape: str, narrowing: dict, tokenizer: TextTokenizer
) -> None:
    backbone, head, images = make(shape)
    greedy = generate(backbone, head, images, tokenizer, max_length=12, beams=1)
    drawn = sample(
        backbone, head, images, tokenizer, generator=seeded(0), max_length=12, **narrowing
    )
    assert [(c.ids, c.finished) for c in drawn] == [(c.ids, c.finished) for c in greedy]
    assert [c.logprob for c in drawn] == pytest.approx([c.logprob for c in greedy], abs=1e-4)


def test_draws_repeat_with_their_seed_and_differ_with_another(tokenizer: TextTokenizer) -> None:
    backbone, head, images = make("per modality, sub-LN")

    def draw(seed: int) -> list[Caption]:
        return sample(backbone, head, images, tokenizer, generator=seeded(seed), max_length=10)

    assert draw(1) == draw(1)
    assert [c.ids for c in draw(1)] != [c.ids for c in draw(2)]


@pytest.mark.parametrize("shape", ["shared, fusion expert", "per modality, sub-LN"])
def test_a_drawn_captions_logprob_is_that_of_the_uncached_model(
    shape: str, tokenizer: TextTokenizer
) -> None:
    backbone, head, images = make(shape, pictures=16)
    drawn = sample(
        backbone, head, images, tokenizer, generator=seeded(3), max_length=9, temperature=0.7
    )
    assert len({c.finished for c in drawn}) == 2  # both endings are looked at
    for image, caption in zip(images, drawn, strict=True):
        words = [*caption.ids, EOS] if caption.finished else list(caption.ids)
        total = sum(
            float(naive_logprobs(backbone, head, image, tuple(words[:i]), tokenizer)[word])
            for i, word in enumerate(words)
        )
        assert caption.logprob == caption.score == pytest.approx(total, abs=1e-3)


@pytest.mark.parametrize("shape", ["shared, fusion expert", "per modality, sub-LN"])
@pytest.mark.parametrize(
    ("temperature", "top_k", "top_p"), [(1.0, None, 1.0), (0.5, None, 1.0), (0.7, 12, 0.8)]
)
def test_words_are_drawn_as_often_as_they_are_likely(
    shape: str, temperature: float, top_k: int | None, top_p: float, tokenizer: TextTokenizer
) -> None:
    backbone, head, images = make(shape, pictures=1)
    draws = 4000
    captions = sample(
        backbone,
        head,
        images.expand(draws, -1, -1, -1),
        tokenizer,
        generator=seeded(0),
        max_length=3,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
    )
    counts = torch.zeros(backbone.config.vocab_size)
    for caption in captions:
        counts[EOS if caption.finished else caption.ids[0]] += 1
    logprobs = naive_logprobs(backbone, head, images[0], (), tokenizer)

    def fits(chances: Tensor) -> bool:
        """Chi-square within five deviations, words of less than five draws taken together."""
        expected = draws * chances
        rare = expected < 5
        pairs = [(counts[~rare], expected[~rare]), (counts[rare].sum(), expected[rare].sum())]
        square = sum(float(((c - e) ** 2 / e.clamp_min(1e-9)).sum()) for c, e in pairs)
        freedom = int((~rare).sum())
        return square < freedom + 5 * math.sqrt(2 * freedom)

    assert fits(narrow(logprobs, temperature, top_k, top_p))
    assert not fits(narrow(logprobs, temperature * 1.5, top_k, top_p))


def test_narrowing_by_hand() -> None:
    logprobs = torch.tensor([0.1, 0.4, 0.2, 0.3, 0.0]).log()

    def narrowed(*options: float | None) -> list[float]:
        return narrow(logprobs, *options).tolist()  # type: ignore[arg-type]

    assert narrowed(1.0, None, 1.0) == pytest.approx([0.1, 0.4, 0.2, 0.3, 0.0])
    assert narrowed(1.0, 2, 1.0) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])
    assert narrowed(1.0, None, 0.69) == pytest.approx([0, 4 / 7, 0, 3 / 7, 0])
    assert narrowed(1.0, None, 0.71) == pytest.approx([0, 4 / 9, 2 / 9, 3 / 9, 0])
    assert narrowed(1.0, 1, 0.71) == pytest.approx([0, 1, 0, 0, 0])
    assert narrowed(0.5, None, 1.0) == pytest.approx([x / 30 for x in (1, 16, 4, 9, 0)])


def test_no_pictures_no_captions(tokenizer: TextTokenizer) -> None:
    backbone, head, images = make("standard")
    assert generate(backbone, head, images[:0], tokenizer) == []
    assert sample(backbone, head, images[:0], tokenizer, generator=seeded(0)) == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beams": 0}, "beams: expected at least 1, got 0"),
        ({"max_length": 41}, r"max_length: 41 is not within 3\.\.40"),
        ({"max_length": 2}, r"max_length: 2 is not within 3\.\.40"),
        ({"banned": [5, 128]}, r"banned: 128 is not within 0\.\.127"),
        ({"banned": [-1]}, r"banned: -1 is not within 0\.\.127"),
        ({"banned": range(128)}, "banned: leaves no word to emit"),
        ({"images": torch.zeros(1, 3, 48, 48)}, "images: expected uint8, got torch.float32"),
        ({"images": torch.zeros(1, 3, 44, 48).byte()}, r"images: \[44, 48\] is not divisible"),
        ({"images": torch.zeros(1, 1, 48, 48).byte()}, r"images: expected \[n, 3, height, width\]"),
    ],
    ids=str,
)
def test_impossible_arguments(options: dict, message: str, tokenizer: TextTokenizer) -> None:
    backbone, head, images = make("standard")
    arguments = {"images": images, **options}
    with pytest.raises(ValueError, match=message):
        generate(backbone, head, tokenizer=tokenizer, **arguments)
    if "beams" not in options:
        with pytest.raises(ValueError, match=message):
            sample(backbone, head, tokenizer=tokenizer, generator=seeded(0), **arguments)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"temperature": 0.0}, "temperature: expected a positive number, got 0.0"),
        ({"temperature": math.nan}, "temperature: .* got nan"),
        ({"top_k": 0}, "top_k: expected at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p: 0.0 is not within 0\.\.1"),
        ({"top_p": 1.1}, r"top_p: 1.1 is not within 0\.\.1"),
    ],
    ids=str,
)
def test_impossible_draws(options: dict, message: str, tokenizer: TextTokenizer) -> None:
    backbone, head, images = make("standard")
    with pytest.raises(ValueError, match=message):
        sample(backbone, head, images, tokenizer, generator=seeded(0), **options)


def test_a_tokenizer_larger_than_the_model_is_refused(tokenizer: TextTokenizer) -> None:
    config = replace(SHAPES["standard"], vocab_size=tokenizer.vocab_size - 1)
    images = torch.zeros(1, 3, 48, 48, dtype=torch.uint8)
    with pytest.raises(ValueError, match="tokenizer: has"):
        generate(BEiT3(config).eval(), nn.Linear(32, config.vocab_size), images, tokenizer)
