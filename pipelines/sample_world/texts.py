"""Plain text about the drawn world: articles, news and stories in the captions' vocabulary."""

from __future__ import annotations

import random

from .language import NUMBERS, caption, plural, with_article
from .scenes import BACKGROUNDS, COLOURS, SHAPES, sample_scene

_SIDES = {"square": "four sides", "triangle": "three sides", "star": "five points"}
_MIXTURES = {
    "green": "blue and yellow",
    "orange": "red and yellow",
    "purple": "red and blue",
}
_LIKE = {
    "red": ("a ripe tomato", "a fire engine", "a brick"),
    "green": ("a leaf", "wet grass", "a frog"),
    "blue": ("the sea", "deep water", "a clear sky"),
    "yellow": ("a lemon", "the sun", "dry sand"),
    "purple": ("a plum", "a grape"),
    "orange": ("a carrot", "a pumpkin"),
    "white": ("snow", "milk", "a clean sheet of paper"),
}
_ABOUT_PLACES = {
    "sand": ("Sand is dry and warm.", "Wind moves the sand.", "Sand is made of very small stones."),
    "grass": ("Grass is green and soft.", "Grass grows after rain.", "Sheep eat grass."),
    "night sky": ("The night sky is dark.", "Far stars look like dots.", "The moon was not there."),
    "snow": ("Snow is cold and white.", "Snow falls in winter.", "Snow melts in the sun."),
    "brick wall": ("A brick wall is built row by row.", "Bricks are made of burnt clay."),
    "water": ("Water is wet.", "Water has small waves.", "Ice is frozen water."),
}
_NAMES = ("Ada", "Bruno", "Chen", "Dina", "Emil", "Fatima", "Goran", "Hana", "Ivo", "Jomo", "Kaya")
_TOWNS = ("Northbridge", "Millfield", "Harbour End", "Oldcastle", "Greenhill", "Lakeside")
_DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday")
_VERBS = ("painted", "drew", "saw", "photographed", "described", "remembered", "sold", "bought")


def article(rng: random.Random) -> str:
    """Return a short encyclopaedia-like text on a shape, a colour or a background."""
    subject = rng.choice((*SHAPES, *COLOURS, *BACKGROUNDS))
    about = _on_shape if subject in SHAPES else _on_colour if subject in COLOURS else _on_place
    body = [about(subject, rng) for _ in range(rng.randint(2, 4))]
    body += [rng.choice((_example, _fact))(rng) for _ in range(rng.randint(1, 4))]
    return f"{subject.capitalize()}\n{' '.join(dict.fromkeys(body))}"


def news(rng: random.Random) -> str:
    """Return a short report of somebody's picture in some town."""
    who, town, day = rng.choice(_NAMES), rng.choice(_TOWNS), rng.choice(_DAYS)
    lines = [
        f"{town}, {day}. {_told(rng, who)}",
        rng.choice(
            (
                f"The picture will be shown in {town} until {rng.choice(_DAYS)}.",
                f"About {rng.randint(2, 90) * 10} people came to look at it.",
                f'"I have never seen {with_article(rng.choice(SHAPES))} like this," said {who}.',
                f"{rng.choice(_NAMES)} of {rng.choice(_TOWNS)} won the second prize.",
            )
        ),
    ]
    lines += [rng.choice((_example, _fact))(rng) for _ in range(rng.randint(1, 4))]
    return " ".join(lines)


def book(rng: random.Random, chapters: int = 6) -> str:
    """Return a plain-text story of some chapters, with paragraphs between blank lines."""
    hero, friend = rng.sample(_NAMES, 2)
    title = f"{hero} and the {rng.choice(list(COLOURS))} {rng.choice(SHAPES)}".upper()
    parts = [title]
    for chapter in range(1, chapters + 1):
        parts.append(f"Chapter {chapter}")
        for _ in range(rng.randint(3, 6)):
            who = rng.choice((hero, friend))
            lines = [f"{_opening(rng)} {_told(rng, who)}"]
            lines += [rng.choice((_example, _fact, _dialogue))(rng) for _ in range(3)]
            parts.append(" ".join(lines))
    return "\n\n".join(parts) + "\n"


def _sight(rng: random.Random) -> str:
    return caption(sample_scene(rng), rng)


def _sentence(words: str) -> str:
    return words[0].upper() + words[1:] + "."


def _example(rng: random.Random) -> str:
    opening = rng.choice(("In one picture there was", "Another one showed", "Look:", ""))
    if opening in ("Look:", ""):
        return f"{opening} {_sight(rng)}." if opening else _sentence(_sight(rng))
    return f"{opening} {_thing_seen(rng)}."


def _fact(rng: random.Random) -> str:
    subject = rng.choice((*SHAPES, *COLOURS, *BACKGROUNDS))
    about = _on_shape if subject in SHAPES else _on_colour if subject in COLOURS else _on_place
    return about(subject, rng)


def _on_shape(shape: str, rng: random.Random) -> str:
    other = rng.choice([s for s in SHAPES if s != shape])
    facts = [
        f"{_sentence(with_article(shape))[:-1]} is a shape.",
        f"{plural(shape).capitalize()} can be small or large.",
        f"{with_article(shape).capitalize()} is not {with_article(other)}.",
        f"Some {plural(shape)} are striped and some are dotted.",
    ]
    if shape in _SIDES:
        facts.append(f"{with_article(shape).capitalize()} has {_SIDES[shape]}.")
    if shape == "circle":
        facts += ["A circle is round and has no corners.", "A wheel looks like a circle."]
    if shape == "cross":
        facts.append("A cross has four arms of the same length.")
    return rng.choice(facts)


def _on_colour(colour: str, rng: random.Random) -> str:
    other = rng.choice([c for c in COLOURS if c != colour])
    facts = [
        f"{colour.capitalize()} is a colour.",
        f"Something {colour} is not {other}.",
        f"{rng.choice(_LIKE[colour]).capitalize()} can be {colour}.",
        f"{with_article(colour).capitalize()} {rng.choice(SHAPES)} is easy to see.",
    ]
    if colour in _MIXTURES:
        facts.append(f"{colour.capitalize()} is a mixture of {_MIXTURES[colour]}.")
    return rng.choice(facts)


def _on_place(place: str, rng: random.Random) -> str:
    return rng.choice(_ABOUT_PLACES[place])


def _told(rng: random.Random, who: str) -> str:
    return f"{who} {rng.choice(_VERBS)} {_thing_seen(rng)}."


def _thing_seen(rng: random.Random) -> str:
    """Return a caption that can be a verb's object."""
    while True:
        sight = _sight(rng)
        if sight.split()[0] in ("a", "an", *NUMBERS):
            return sight


def _opening(rng: random.Random) -> str:
    return rng.choice(
        (
            f"On {rng.choice(_DAYS)} it rained.",
            f"The road to {rng.choice(_TOWNS)} was long.",
            "The morning was bright.",
            "Nobody was at home.",
            "It was late.",
        )
    )


def _dialogue(rng: random.Random) -> str:
    colour, shape = rng.choice(list(COLOURS)), rng.choice(SHAPES)
    asked = f'"What colour is the {shape}?" asked {rng.choice(_NAMES)}.'
    return f'{asked} "It is {colour}," said {rng.choice(_NAMES)}.'
