"""How likely each text of a random writer is: every course its draws can take, with its weight.

    outcomes(lambda rng: caption(scene, rng))      # {"a red circle on sand": 0.0019, ...}

The writer is run once for every course, so that what is found can't drift from what is written.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

T = TypeVar("T")


def outcomes(make: Callable[[random.Random], str]) -> dict[str, float]:
    """Return the probability of each text that `make` can return; they sum to 1.

    `make` may call `random` (and compare what it gives with numbers, no more), `choice`, `randint`
    and `sample`.
    """
    found: dict[str, float] = defaultdict(float)
    course: list[_Fork] = []
    while True:
        draws = _Draws(course)
        text = make(cast(random.Random, draws))
        weight = 1.0
        for fork in course:
            weight *= fork.weights[fork.taken]
        found[text] += weight
        while course and course[-1].taken + 1 == len(course[-1].weights):
            course.pop()
        if not course:
            return dict(found)
        course[-1].taken += 1


class _Fork:
    """A place where the course can go several ways, and which of them is being followed."""

    def __init__(self, weights: list[float]) -> None:
        self.weights, self.taken = weights, 0


class _Draws:
    """In a random generator's place: takes the ways that the course says, then the first ones."""

    def __init__(self, course: list[_Fork]) -> None:
        self.course, self.place = course, 0

    def fork(self, weights: list[float]) -> int:
        """Return which of several ways to go."""
        if len(weights) == 1:
            return 0
        if self.place == len(self.course):
            self.course.append(_Fork(weights))
        self.place += 1
        return self.course[self.place - 1].taken

    def random(self) -> float:
        return cast(float, _Between(self))

    def choice(self, options: Sequence[T]) -> T:
        try:  # equal options are one way
            counts = Counter(options)
        except TypeError:
            return options[self.fork([1 / len(options)] * len(options))]
        distinct = list(counts)
        return distinct[self.fork([counts[o] / len(options) for o in distinct])]

    def randint(self, low: int, high: int) -> int:
        return self.choice(range(low, high + 1))

    def sample(self, population: Sequence[T], k: int) -> list[T]:
        left = list(population)
        return [left.pop(self.fork([1 / len(left)] * len(left))) for _ in range(k)]


class _Between:
    """A number from 0 to 1 that is drawn no more exactly than comparing it demands."""

    def __init__(self, draws: _Draws) -> None:
        self.draws, self.low, self.high = draws, 0.0, 1.0

    def _below(self, limit: float) -> bool:
        if limit <= self.low:
            return False
        if limit >= self.high:
            return True
        share = (limit - self.low) / (self.high - self.low)
        below = self.draws.fork([share, 1 - share]) == 0
        self.low, self.high = (self.low, limit) if below else (limit, self.high)
        return below

    def __lt__(self, limit: Any) -> bool:
        return self._below(limit)

    def __le__(self, limit: Any) -> bool:
        return self._below(limit)

    def __gt__(self, limit: Any) -> bool:
        return not self._below(limit)

    def __ge__(self, limit: Any) -> bool:
        return not self._below(limit)
