"""Language about scenes: captions, phrases, questions, and statements about two scenes.

All of it is true of the scene it is made for (statements are true or false as labelled).
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from .scenes import (
    BACKGROUNDS,
    COLOURS,
    RELATIONS,
    SHAPES,
    SIZES,
    Kind,
    Scene,
    Thing,
    relation,
    sides,
)

NUMBERS = ("no", "one", "two", "three", "four", "five", "six")
_PLACES = {
    "sand": ("on sand",),
    "grass": ("on grass",),
    "night sky": ("in the night sky", "in a night sky"),
    "snow": ("on snow", "in the snow"),
    "brick wall": ("on a brick wall", "in front of a brick wall"),
    "water": ("on water",),
}
_RELATION_WORDS = {
    "left of": ("to the left of", "left of"),
    "right of": ("to the right of", "right of"),
    "above": ("above",),
    "below": ("below", "under"),
}
_RELATION_TAILS = {
    "left of": "to its left",
    "right of": "to its right",
    "above": "above it",
    "below": "below it",
}
# VQAv2's question types for these questions; a question has the longest type that it begins with.
_QUESTION_TYPES = (
    "how many",
    "is there a",
    "is there",
    "what",
    "what color are the",
    "what color is the",
    "what is",
    "what is in the",
)


@dataclass(frozen=True)
class Question:
    """A VQAv2-style question, its true answer and the mistakes that people might make."""

    text: str
    answer: str
    question_type: str
    answer_type: str
    mistakes: tuple[str, ...]


def plural(shape: str) -> str:
    """Return the plural of a shape's name."""
    return shape + ("es" if shape.endswith("s") else "s")


def with_article(words: str) -> str:
    """Return the words preceded by "a" or "an"."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


def noun_phrase(
    kind: Kind, count: int = 1, *, size: bool = True, texture: bool = True, colour: bool = True
) -> str:
    """Return a phrase such as "a small striped blue square" or "three red circles"."""
    words = [
        word
        for word, wanted in ((kind.size, size), (kind.texture, texture), (kind.colour, colour))
        if wanted
    ]
    if count == 1:
        return with_article(" ".join([*words, kind.shape]))
    return " ".join([NUMBERS[count], *words, plural(kind.shape)])


def describe(kind: Kind, count: int, rng: random.Random, *, grey: bool) -> str:
    """Return a noun phrase with some of a kind's attributes; never the colour if `grey`."""
    texture = 0.08 if kind.texture == "plain" else 0.65
    return noun_phrase(
        kind,
        count,
        size=rng.random() < 0.45,
        texture=rng.random() < texture,
        colour=rng.random() < 0.85 and not grey,
    )


def caption(scene: Scene, rng: random.Random) -> str:
    """Return a true lower-case caption of the whole scene or a part; no colours if it is grey."""
    place = caption_place(scene, rng)
    return caption_around(caption_body(scene, rng), place, rng)


def caption_place(scene: Scene, rng: random.Random) -> str:
    """Return a caption's phrase for the background, such as "on sand"; "" if it has none."""
    return rng.choice(_PLACES[scene.background]) if rng.random() < 0.6 else ""


def caption_body(scene: Scene, rng: random.Random) -> str:
    """Return the part of a caption about the things, without the place."""
    groups = scene.groups()
    style = rng.random()
    pair = _related_pair(scene, rng) if len(groups) > 1 else None
    if pair and style < 0.55:
        a, b, how = pair
        first = describe(a.kind, 1, rng, grey=scene.grey)
        second = describe(b.kind, 1, rng, grey=scene.grey)
        if rng.random() < 0.75:
            return f"{first} {rng.choice(_RELATION_WORDS[how])} {second}"
        return f"{second} with {first} {_RELATION_TAILS[how]}"
    if 0.55 <= style < 0.62:
        n = len(scene.things)
        return f"{NUMBERS[n]} object{'s' if n > 1 else ''}"
    told = groups if style < 0.9 else rng.sample(groups, rng.randint(1, len(groups)))
    return join([describe(kind, n, rng, grey=scene.grey) for kind, n in told])


def caption_around(body: str, place: str, rng: random.Random) -> str:
    """Return a caption made of a body and a place."""
    deixis = "this is " if body.startswith(("a ", "an ")) else "here are "
    deixis = "here is " if body.startswith("one ") else deixis
    opening = rng.choice(("", "", "", "", "a picture of ", "a drawing of ", deixis))
    if place and rng.random() < 0.12:
        return f"{place}, {body}"
    return " ".join(filter(None, (opening + body, place)))


def region_phrases(scene: Scene, rng: random.Random) -> list[tuple[str, tuple[int, int, int, int]]]:
    """Return phrases about parts of the picture, each with x, y, width and height in pixels."""
    regions = [
        (describe(thing.kind, 1, rng, grey=scene.grey), pixel_box(scene, thing.box()))
        for thing in scene.things
        for _ in range(rng.randint(1, 2))
    ]
    pair = None if scene.has_copies() else _related_pair(scene, rng)
    if pair:
        a, b, how = pair
        first = describe(a.kind, 1, rng, grey=scene.grey)
        second = describe(b.kind, 1, rng, grey=scene.grey)
        boxes = list(zip(a.box(), b.box(), strict=True))
        whole = (min(boxes[0]), min(boxes[1]), max(boxes[2]), max(boxes[3]))
        regions.append((f"{first} {_RELATION_WORDS[how][0]} {second}", pixel_box(scene, whole)))
    return regions


def pixel_box(scene: Scene, box: tuple[float, float, float, float]) -> tuple[int, int, int, int]:
    """Convert left, top, right, bottom to integer x, y, width, height inside the picture."""
    left, top = max(0, int(box[0])), max(0, int(box[1]))
    right, bottom = min(scene.width, int(box[2]) + 1), min(scene.height, int(box[3]) + 1)
    return left, top, right - left, bottom - top


def questions(scene: Scene, rng: random.Random, count: int) -> list[Question]:
    """Return up to `count` distinct questions about the scene; none about colour if it is grey."""
    makers = [_ask_count, _ask_presence, _ask_presence, _ask_background, _ask_size]
    if not scene.grey:
        makers += [_ask_colour, _ask_colour, _ask_shape, _ask_shape]
    if len(scene.groups()) > 1 and not scene.has_copies():
        makers += [_ask_neighbour, _ask_neighbour]
    asked: dict[str, Question] = {}
    for _ in range(12):
        question = rng.choice(makers)(scene, rng)
        if question and len(asked) < count:
            asked.setdefault(question.text, question)
    return list(asked.values())


def human_answers(question: Question, rng: random.Random) -> list[tuple[str, str]]:
    """Return ten answers with confidence (yes, maybe, no), at most two of them mistaken."""
    wrong = set(rng.sample(range(10), rng.choices((0, 1, 2), (5, 3, 2))[0]))
    answers = []
    for i in range(10):
        answer = rng.choice(question.mistakes) if i in wrong else question.answer
        weights = (2, 5, 3) if i in wrong else (16, 3, 1)
        answers.append((answer, rng.choices(("yes", "maybe", "no"), weights)[0]))
    return answers


def statement(left: Scene, right: Scene, truth: bool, rng: random.Random) -> str:
    """Return an NLVR2-style sentence about two images that is true if and only if `truth`.

    A kind of sentence is chosen only if it could be true or false for these images, so that words
    alone tell next to nothing (NLVR2 uses each sentence for pairs where it is true and where not).
    """
    for say in rng.sample(_STATEMENTS, len(_STATEMENTS)):
        sentence = say(left, right, truth, rng)
        if sentence:
            return sentence
    raise AssertionError("of one side something can always be said")


def join(phrases: list[str]) -> str:
    """Return "a", "a and b" or "a, b and c"."""
    return " and ".join(filter(None, (", ".join(phrases[:-1]), phrases[-1])))


def _related_pair(scene: Scene, rng: random.Random) -> tuple[Thing, Thing, str] | None:
    if scene.has_copies():
        return None
    pairs = [(a, b, relation(a, b)) for a in scene.things for b in scene.things if a is not b]
    clear = [(a, b, how) for a, b, how in pairs if how]
    return rng.choice(clear) if clear else None


def _question(text: str, answer: str, options: tuple[str, ...]) -> Question:
    fitting = [t for t in _QUESTION_TYPES if text.startswith(t + " ")]
    answer_type = "yes/no" if answer in ("yes", "no") else "other"
    mistakes = tuple(option for option in options if option != answer)
    kind = "number" if answer.isdigit() else answer_type
    return Question(text, answer, max(fitting, key=len), kind, mistakes)


def _ask_colour(scene: Scene, rng: random.Random) -> Question:
    kind, n = rng.choice(scene.groups())
    subject = f"is the {kind.shape}" if n == 1 else f"are the {plural(kind.shape)}"
    return _question(f"what color {subject}?", kind.colour, tuple(COLOURS))


def _ask_shape(scene: Scene, rng: random.Random) -> Question:
    kind, n = rng.choice(scene.groups())
    subject = f"is the {kind.colour} object" if n == 1 else f"are the {kind.colour} objects"
    return _question(f"what shape {subject}?", kind.shape, SHAPES)


def _ask_size(scene: Scene, rng: random.Random) -> Question:
    kind, n = rng.choice(scene.groups())
    subject = f"is the {kind.shape}" if n == 1 else f"are the {plural(kind.shape)}"
    return _question(f"what size {subject}?", kind.size, SIZES)


def _ask_count(scene: Scene, rng: random.Random) -> Question:
    if rng.random() < 0.6:
        what, n = "objects", len(scene.things)
    else:
        shape = rng.choice([*(kind.shape for kind, _ in scene.groups()), rng.choice(SHAPES)])
        what, n = plural(shape), scene.count(shape)
    return _question(f"how many {what} are there?", str(n), ("0", "1", "2", "3", "4"))


def _ask_presence(scene: Scene, rng: random.Random) -> Question:
    present = rng.random() < 0.5
    shape, colour = _some_look(scene, present, rng)
    words = shape if scene.grey else f"{colour} {shape}"
    answer = "yes" if present else "no"
    return _question(f"is there {with_article(words)}?", answer, ("yes", "no"))


def _ask_background(scene: Scene, rng: random.Random) -> Question:
    return _question("what is in the background?", scene.background, tuple(BACKGROUNDS))


def _ask_neighbour(scene: Scene, rng: random.Random) -> Question | None:
    anchor, how = rng.choice(scene.things), rng.choice(RELATIONS)
    # Exactly one thing must lie on that side, and clearly; otherwise the answer is disputable.
    there = [t for t in scene.things if t is not anchor and how in sides(t, anchor)]
    if len(there) != 1 or relation(there[0], anchor) != how:
        return None
    text = f"what is {_RELATION_WORDS[how][0]} the {anchor.kind.shape}?"
    others = tuple(shape for shape in SHAPES if shape != anchor.kind.shape)
    return _question(text, there[0].kind.shape, others)


def _some_look(scene: Scene, present: bool, rng: random.Random) -> tuple[str, str]:
    """Return a shape and colour present in the scene, or an absent pair that differs in one."""
    kind, _ = rng.choice(scene.groups())
    if present:
        return kind.shape, kind.colour
    if scene.grey:
        return rng.choice([s for s in SHAPES if not scene.count(s)]), kind.colour
    if rng.random() < 0.5:
        return rng.choice([s for s in SHAPES if not scene.count(s, kind.colour)]), kind.colour
    return kind.shape, rng.choice([c for c in COLOURS if not scene.count(kind.shape, c)])


def _say_one_side(left: Scene, right: Scene, truth: bool, rng: random.Random) -> str:
    side, scene, other = rng.choice((("left", left, right), ("right", right, left)))
    for attributes in _any_order(rng):
        here, there = _looks(scene, *attributes), _looks(other, *attributes)
        if there - here:
            look = rng.choice(sorted(here if truth else there - here))
            return f"there is {_some(*look)} in the {side} image"
    look = _some_look(scene, truth, rng)
    return f"there is {_some(*look)} in the {side} image"


def _say_how_many_images(left: Scene, right: Scene, truth: bool, rng: random.Random) -> str | None:
    for attributes in _any_order(rng):
        here, there = (_looks(scene, *attributes) for scene in (left, right))
        both, one = sorted(here & there), sorted(here ^ there)
        if both and one:
            one_only = rng.random() < 0.5
            claim = "exactly one image contains" if one_only else "both images contain"
            return f"{claim} {_some(*rng.choice(one if one_only == truth else both))}"
    return None


def _any_order(rng: random.Random) -> list[tuple[bool, bool]]:
    """Return in random order whether a sentence names a shape, and a colour: one, other, both."""
    return rng.sample(((True, False), (False, True), (True, True)), 3)


def _looks(scene: Scene, shape: bool, colour: bool) -> set[tuple[str, str]]:
    """Return the shapes and colours in a scene; "" for an attribute that isn't requested."""
    return {(kind.shape * shape, kind.colour * colour) for kind, _ in scene.groups()}


def _some(shape: str, colour: str) -> str:
    return with_article(f"{colour} {shape or 'object'}".strip())


def _say_more(left: Scene, right: Scene, truth: bool, rng: random.Random) -> str | None:
    a, b = len(left.things), len(right.things)
    if a == b:
        return None
    more, fewer = ("left", "right") if (a > b) == truth else ("right", "left")
    return f"the {more} image contains more objects than the {fewer} image"


def _say_total(left: Scene, right: Scene, truth: bool, rng: random.Random) -> str:
    total = n = len(left.things) + len(right.things)
    while not truth and n == total:
        n = sum(rng.choices((1, 2, 3), _COUNTS, k=2))
    return f"there are {NUMBERS[n]} objects in total"


def _say_background(left: Scene, right: Scene, truth: bool, rng: random.Random) -> str:
    side, scene, other = rng.choice((("left", left, right), ("right", right, left)))
    claimed = scene.background
    while not truth and claimed == scene.background:
        claimed = rng.choice((other.background, rng.choice(list(BACKGROUNDS))))
    return f"the background of the {side} image is {_bare(claimed)}"


def _bare(background: str) -> str:
    """Return a background's name as used in a predicate: "sand", but "a brick wall"."""
    return {"brick wall": "a brick wall", "night sky": "the night sky"}.get(background, background)


_COUNTS = (34, 42, 24)  # how often a scene has one, two and three things
_STATEMENTS = (
    _say_one_side,
    _say_one_side,
    _say_how_many_images,
    _say_how_many_images,
    _say_more,
    _say_total,
    _say_background,
)
