"""Terminal output: one line per event, one bar per long piece of work."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager

from tqdm import tqdm


def say(message: str) -> None:
    """Print a line without tearing a running bar."""
    tqdm.write(message, file=sys.stdout)
    sys.stdout.flush()


@contextmanager
def bar(label: str, total: int, *, done: int = 0, unit: str = "") -> Iterator[tqdm]:
    """A progress bar with rate and time left; without a terminal, a line every ten seconds."""
    watched = sys.stdout.isatty()
    with tqdm(
        total=total,
        initial=done,
        desc=label,
        unit=unit or "it",
        file=sys.stdout,
        mininterval=0.5 if watched else 10.0,
        maxinterval=10.0,
        leave=True,
        dynamic_ncols=watched,
        ncols=None if watched else 100,
        delay=0.0 if watched else 1.0,
    ) as progress:
        yield progress


@contextmanager
def stage(title: str) -> Iterator[None]:
    """Announce a stage and say how long it took."""
    say(f"== {title}")
    start = time.monotonic()
    yield
    say(f"   {title}: {time.monotonic() - start:.1f} s")
