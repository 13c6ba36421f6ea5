"""The normalisation and accuracy of VQA's official evaluation.

Source: https://visualqa.org/evaluation.html: lower case, no full stop outside a decimal, numbers
as digits, no articles, apostrophes put back, other punctuation removed or made a space.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_PERIOD = re.compile(r"\.(?!\d)")
_COMMA_IN_NUMBER = re.compile(r"\d,\d")
_ARTICLES = {"a", "an", "the"}
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4"}
_NUMBERS |= {"five": "5", "six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't
haven't he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've
might've mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've
shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll
someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're
what's what've when's where'd where's where've who'd who'd've who'll who's who've why'll why're
why's won't would've wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're
you've
"""


def _without_one_apostrophe() -> dict[str, str]:
    """Maps spellings that lack one apostrophe to contractions."""
    table = {}
    for word in _CONTRACTED.split():
        for place, letter in enumerate(word):
            if letter == "'":
                table[word[:place] + word[place + 1 :]] = word
    # As in the official table, so that scores agree with the server's.
    table["somebody'd"] = "somebodyd"
    return table


_CONTRACTIONS = _without_one_apostrophe()


def clean(answer: str) -> str:
    """Clean white space as the evaluation does."""
    return answer.replace("\n", " ").replace("\t", " ").strip()


def normalise(answer: str) -> str:
    """An answer in the form that the evaluation compares."""
    text = answer = clean(answer)
    number = _COMMA_IN_NUMBER.search(answer) is not None
    for mark in _PUNCTUATION:
        apart = f"{mark} " in answer or f" {mark}" in answer or number
        text = text.replace(mark, "" if apart else " ")
    words = _PERIOD.sub("", text).lower().split()
    words = [_NUMBERS.get(word, word) for word in words]
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def accuracy(prediction: str, answers: Sequence[str]) -> float:
    """Official accuracy of a prediction among the annotators' answers (ten of them), 0..1.

    The mean, over the subsets that leave one annotator out, of min(matching answers / 3, 1). As in
    the official code, answers on which all annotators agree are compared as they stand.
    """
    answers = [clean(answer) for answer in answers]
    prediction = clean(prediction)
    if len(set(answers)) > 1:
        answers = [normalise(answer) for answer in answers]
        prediction = normalise(prediction)
    matches = [answer == prediction for answer in answers]
    total = sum(matches)
    return sum(min(1.0, (total - own) / 3) for own in matches) / max(1, len(answers))
