"""Guesses of answers without looking at the images."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from beit3.tasks import Example


def by_first_words(
    known: Iterable[Example],
    examples: Sequence[Example],
    answers_of: Callable[[Any], Sequence[Any]] = lambda target: [target],
) -> list[Any]:
    """For each example the most common answer among the known texts that begin as its own does,
    for as many words as any does: a model may learn that much from texts alone.

    Args:
        answers_of: The answers in a known example's target.

    Raises:
        ValueError: no answer is known.
    """
    answers: dict[tuple[str, ...], Counter[Any]] = defaultdict(Counter)
    answers[()] = Counter()
    for example in known:
        given, words = answers_of(example.target), _words(example)
        for count in range(len(words) + 1):
            answers[words[:count]].update(given)
    if not answers[()]:
        raise ValueError("no answers are known to guess from")
    guesses = []
    for example in examples:
        words = _words(example)
        while words not in answers:
            words = words[:-1]
        guesses.append(answers[words].most_common(1)[0][0])
    return guesses


def _words(example: Example) -> tuple[str, ...]:
    return tuple((example.text or "").lower().split())
