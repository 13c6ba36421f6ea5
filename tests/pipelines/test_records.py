"""Which captions and texts are kept, and which records a sample has."""

from __future__ import annotations

import pytest

from pipelines.records import (
    TextPolicy,
    detect,
    refuse_caption,
    refuse_language,
    repetition,
    sampled,
    sift,
)


@pytest.mark.parametrize(
    ("caption", "policy", "reason"),
    [
        ("a red dog", TextPolicy(), ""),
        ("a red dog", TextPolicy(min_words=4), "caption: too few words"),
        ("a red dog", TextPolicy(min_words=3, max_words=3), ""),
        ("a red dog", TextPolicy(max_words=2), "caption: too many words"),
        ("a red dog", TextPolicy(min_chars=10), "caption: too few characters"),
        ("a red dog", TextPolicy(min_chars=9, max_chars=9), ""),
        ("a red dog", TextPolicy(max_chars=8), "caption: too many characters"),
        ("dog Dog dog dog", TextPolicy(max_repetition=0.5), "caption: repetition"),
        ("aaaaaaaaaaaaaaa", TextPolicy(max_repetition=0.5), "caption: repetition"),
        ("a red dog and a red cat", TextPolicy(max_repetition=0.5), ""),
    ],
)
def test_captions(caption: str, policy: TextPolicy, reason: str) -> None:
    refused = refuse_caption(caption, policy)
    assert (refused.reason if refused else "") == reason


def test_repetition() -> None:
    assert repetition("") == 0 and repetition("one two") == 0
    assert repetition("one one") == 0.5
    assert repetition("xx") == 0.5


def test_a_record_loses_only_the_captions_that_are_refused() -> None:
    kept, refused = sift(["a red dog", "dog", "a cat"], TextPolicy(min_words=2))
    assert kept == ["a red dog", "a cat"]
    assert [(r.reason, r.text) for r in refused] == [("caption: too few words", "dog")]
    captions = ["x"]
    assert sift(captions, TextPolicy())[0] is captions


@pytest.mark.parametrize(
    "text",
    ["cat on sofa", "Villa for sale in Marbella", "pasta carbonara", "IMG_2034.JPG", "a man", "?!"],
)
def test_short_and_uncertain_english_is_kept(text: str) -> None:
    assert refuse_language(text, "en") is None


@pytest.mark.parametrize(
    ("text", "language"),
    [
        ("zwei Hunde spielen im Schnee", "de"),
        ("el perro corre en la playa", "es"),
        ("красная машина", "ru"),
        ("vue de la plage\nau coucher du soleil", "fr"),
    ],
)
def test_other_languages_are_refused_by_name(text: str, language: str) -> None:
    refused = refuse_language(text, "en")
    assert refused is not None and refused.reason == f"language: {language}"
    assert refuse_language(text, language) is None
    assert refuse_language(text, "") is None
    assert detect(text)[0] == language


def test_a_sample_is_always_the_same_and_grows() -> None:
    ids = [f"cc3m/{i:09d}" for i in range(4000)]
    tenth = {i for i in ids if sampled(i, 0.1)}
    half = {i for i in ids if sampled(i, 0.5)}
    assert tenth < half and 300 < len(tenth) < 500 and 1850 < len(half) < 2150
    assert all(sampled(i, 1.0) for i in ids)
    assert [i for i in range(6) if sampled(f"x/{i}", 0.3)] == [0, 4]  # today and tomorrow
