"""Stops that keep the work: SIGTERM, limits of hours and money, a spot machine's last minutes.

The job's process learns of a signal or a limit, the workers may be on other machines: it leaves
`runs/<name>/stop.json`, which rank 0 looks for once a second. All workers agree on it at their next
step, write a checkpoint and leave `ended.json`, which says how the run ended. They return as if all
were well: an error would have Ray start them again.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from typing import Any

from pipelines import console
from pipelines.recipe import Run, TrainConfig
from pipelines.storage import Store

POLL_SECONDS = 1.0
SPOT_POLL_SECONDS = 5.0  # as AWS advises
METADATA = "http://169.254.169.254"
SIGTERM_CODE = 143
LIMIT_CODE = 75  # EX_TEMPFAIL: nothing is wrong, run it again


class Stopped(SystemExit):
    """The run was stopped before its end and left a checkpoint; `code` is the exit code."""


class Ended(Exception):
    """All workers end the run here. Without an exit code it has failed."""

    def __init__(self, message: str, code: int | None = None) -> None:
        super().__init__(message)
        self.code = code


# -- the job's process -----------------------------------------------------------------------------


@contextlib.contextmanager
def stoppable(store: Store, run: Run, begun: float) -> Iterator[None]:
    """Have the workers stop when this process gets SIGTERM, or a limit is reached.

    A second SIGTERM ends it at once, for workers that don't answer or never started.

    Args:
        begun: When the job began, by the monotonic clock.

    Raises:
        Stopped: the workers have stopped.
        FloatingPointError: they gave up at a bad step.
    """
    for name in ("stop.json", "ended.json"):  # of an earlier start
        store.delete(f"{run.name}/{name}")
    heard: queue.SimpleQueue[bool] = queue.SimpleQueue()  # a signal may interrupt its own put

    def ask(reason: str, hint: str, code: int) -> None:
        store.write_json(f"{run.name}/stop.json", {"reason": reason, "hint": hint, "code": code})
        console.say(f"{run.name}: {reason}; the workers write a checkpoint and stop")

    def watch() -> None:
        left = None
        if limit is not None:
            left = min(max(0.0, begun + limit[0] - time.monotonic()), threading.TIMEOUT_MAX)
        try:
            signalled = heard.get(timeout=left)
        except queue.Empty:
            assert limit is not None
            ask(*limit[1:])
        else:
            if signalled:
                ask("SIGTERM received", "run the same command to go on", SIGTERM_CODE)

    limit = _limit(run.config)
    thread = threading.Thread(target=watch, daemon=True)
    if limit is not None and time.monotonic() - begun >= limit[0]:
        ask(*limit[1:])  # before the workers look for it
    else:
        thread.start()
    try:
        with _on_sigterm(lambda: heard.put(True)):
            yield
    finally:
        heard.put(False)
        if thread.is_alive():
            thread.join()
    with contextlib.suppress(FileNotFoundError):
        ended = store.read_json(f"{run.name}/ended.json")
        if ended["code"] is None:
            raise FloatingPointError(ended["message"])
        console.say(f"{run.name}: {ended['message']}")
        raise Stopped(ended["code"])


def _limit(config: TrainConfig) -> tuple[float, str, str, int] | None:
    """Seconds that the job may take, and what to say when they are over."""
    limits = []
    if config.max_hours:
        limits.append((config.max_hours, f"train.max_hours {config.max_hours:g}"))
    if config.max_cost:
        hours = config.max_cost / (config.price_per_hour * max(1, config.workers))
        limits.append((hours, f"train.max_cost {config.max_cost:g}"))
    if not limits:
        return None
    hours, name = min(limits)
    option = name.split()[0]
    return (
        hours * 3600,
        f"{name} is reached",
        f"run the same command to go on for as long again, or with a larger {option}",
        LIMIT_CODE,
    )


@contextlib.contextmanager
def _on_sigterm(first: Callable[[], None]) -> Iterator[None]:
    """Call `first` at the first SIGTERM; raise `Stopped` at the second."""
    if threading.current_thread() is not threading.main_thread():  # in a trial of Tune
        yield
        return
    signals = 0

    def handler(*_: object) -> None:
        nonlocal signals
        signals += 1
        if signals > 1:
            raise Stopped(SIGTERM_CODE)
        first()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- the workers -----------------------------------------------------------------------------------


class Watch:
    """Notices, beside the steps, that a worker should stop or save. Use as a context manager."""

    def __init__(self, run: Run, store: Store, rank: int) -> None:
        self.run, self.store = run, store
        self.stop = threading.Event()
        """The job's process asks to stop; rank 0 alone sees it."""
        self.save = threading.Event()
        """This worker's machine is about to go."""
        self.asked: dict[str, Any] = {}
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        if rank == 0 and not self._stop_asked():
            self._watch(self._stop_asked, POLL_SECONDS)
        if run.config.spot_notice:
            self._watch(self._spot_notice, SPOT_POLL_SECONDS)

    def __enter__(self) -> Watch:
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        for thread in self._threads:
            thread.join()

    def take_save(self) -> bool:
        """Whether to save now; true once for a notice."""
        wanted = self.save.is_set()
        self.save.clear()
        return wanted

    def ended(self, step: int) -> Ended:
        """What ends the run after the checkpoint of `step`, when it was asked to stop."""
        asked = self.asked or {"reason": "", "hint": "", "code": SIGTERM_CODE}  # not rank 0
        message = (
            f"stopped at step {step:,} of {self.run.config.steps:,}, with a checkpoint "
            f"({asked['reason']}): {asked['hint']}"
        )
        return Ended(message, asked["code"])

    def _watch(self, seen: Callable[[], bool], seconds: float) -> None:
        def look() -> None:
            while not seen() and not self._closed.wait(seconds):
                pass

        self._threads.append(threading.Thread(target=look, daemon=True))
        self._threads[-1].start()

    def _stop_asked(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            self.asked = self.store.read_json(f"{self.run.name}/stop.json")
            self.stop.set()
        return self.stop.is_set()

    def _spot_notice(self) -> bool:
        if spot_notice() is None:
            return False
        self.save.set()
        return True


def tell(store: Store, run: str, ended: Ended) -> None:
    """Say to the job's process how the run ended; rank 0 does."""
    store.write_json(f"{run}/ended.json", {"message": str(ended), "code": ended.code})


def spot_notice() -> dict[str, Any] | None:
    """EC2's notice that it takes this spot machine back, two minutes ahead; None without one.

    Source: the instance metadata service, version 2, at AWS_EC2_METADATA_SERVICE_ENDPOINT.
    """
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", METADATA).rstrip("/")
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    token = urllib.request.Request(
        f"{base}/latest/api/token",
        method="PUT",
        headers={"X-aws-ec2-metadata-token-ttl-seconds": "60"},
    )
    try:
        with direct.open(token, timeout=2) as answer:
            headers = {"X-aws-ec2-metadata-token": answer.read().decode()}
        notice = urllib.request.Request(
            f"{base}/latest/meta-data/spot/instance-action", headers=headers
        )
        with direct.open(notice, timeout=2) as answer:
            return json.loads(answer.read())
    except (OSError, ValueError):  # 404: no notice; no such service: not on EC2
        return None
