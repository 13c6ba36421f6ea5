"""Thousands of hostile answers through `fetch_images`: nothing breaks, no good image is lost."""

from __future__ import annotations

import resource
import socket
from pathlib import Path

import hostile_web
import pytest
from hostile_web import Case, HostileServer

from pipelines.fetch import FetchPolicy, fetch_images
from pipelines.images import CleanImage, Rejected, clean_image

POLICY = FetchPolicy(
    threads=32, timeout=10, max_seconds=5, max_megabytes=4, retries=0, allow_loopback=True
)


@pytest.mark.parametrize(
    ("seed", "count"), [(1, 320), pytest.param(2, 4_000, marks=pytest.mark.slow)]
)
def test_a_hostile_web(seed: int, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(socket, "getaddrinfo", hostile_web.resolver(socket.getaddrinfo))
    with HostileServer() as server:
        cases = hostile_web.corpus(seed, count, server.url)
        cases += hostile_web.slow_cases(server.url)
        server.answers |= {case.name: case.answer for case in cases}
        files = _open_files()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        outcomes = fetch_images([case.url for case in cases], POLICY)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
        held = _open_files() - files
    wrong = {case.name: said for case in cases if (said := _wrong(case, outcomes[case.url]))}
    assert not wrong
    assert len(outcomes) == len(cases)  # each has a URL of its own
    assert grown < 400 << 10  # kilobytes
    assert held < 20  # the slow ones may still be on the server's side


def _open_files() -> int:
    folder = Path("/proc/self/fd")
    return len(list(folder.iterdir())) if folder.exists() else 0


def _wrong(case: Case, outcome: CleanImage | Rejected) -> str:
    """What about an outcome is not as it should be; "" if nothing."""
    if case.good is not None:
        if isinstance(outcome, Rejected):
            return f"a good image was lost: {outcome}"
        if b"SECRET" in outcome.data:
            return "metadata was kept"
        return "" if outcome == clean_image(case.good) else "not the bytes that were sent"
    if isinstance(outcome, CleanImage):
        return f"should have been {case.reasons}" if case.reasons else ""
    if case.reasons and outcome.reason not in case.reasons:
        return f"{outcome}, not one of {sorted(case.reasons)}"
    if outcome.reason not in hostile_web.REASONS or not outcome.detail.isprintable():
        return f"not one of the known reasons, or unprintable: {outcome}"
    return ""


def test_the_corpus_is_the_same_each_time() -> None:
    def names(seed: int) -> list[tuple[str, str, object, bytes | None]]:
        cases = hostile_web.corpus(seed, 100, "http://127.0.0.1:1")
        return [
            (c.name, c.url, c.answer if isinstance(c.answer, bytes) else 0, c.good) for c in cases
        ]

    assert names(3) == names(3) != names(4)
