"""Computes the probability of each text of a random writer, by enumerating its random draws.

    outcomes(lambda rng: caption(scene, rng))      # {"a red circle on sand": 0.0019, ...}

The writer is run once for every sequence of draws, so the result can't diverge from the writer.
"""

from __future__ import annotations

import random
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, TypeVar, cast

T = TypeVar("T")


def outcomes(make: Callable[[random.Random], str]) -> dict[str, float]:
    """Return the probability of each text that `make` can return; they sum to 1.

    `make` may call `random` (whose result it may only compare with numbers), `choice`, `randint`
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
    """A draw with several outcomes, and the outcome being followed."""

    def __init__(self, weights: list[float]) -> None:
        self.weights, self.taken = weights, 0


class _Draws:
    """Replaces a random generator: takes the outcomes the course gives, then the first ones."""

    def __init__(self, course: list[_Fork]) -> None:
        self.course, self.place = course, 0

    def fork(self, weights: list[float]) -> int:
        """Return which of several outcomes to take."""
        if len(weights) == 1:
            return 0
        if self.place == len(self.course):
            self.course.append(_Fork(weights))
        self.place += 1
        return self.course[self.place - 1].taken

    def random(self) -> float:
        return cast(float, _Between(self))

    def choice(self, options: Sequence[T]) -> T:
        try:  # equal options are one outcome
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
    """A random number from 0 to 1, drawn only as precisely as comparisons demand."""

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
