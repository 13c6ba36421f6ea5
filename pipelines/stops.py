"""Stops that keep the work: SIGTERM, limits of hours and money, a spot machine's last minutes.

The job's process learns of a signal or a limit, the workers may be on other machines: it leaves
a note in the run's folder, which rank 0 looks for once a second. All workers agree on it at their
next step, write a checkpoint and leave a note that says how the run ended. They return as if all
were well: an error would have Ray start them again.

Each start of a job has a name, which is also in the names of these notes, and in `run.json`.
Workers of an earlier start that find another's there end without a checkpoint: the later start goes
on from the newest one.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import queue
import signal
import threading
import time
import urllib.request
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from pipelines import budget, console
from pipelines.recipe import Run, TrainConfig
from pipelines.storage import Store, StoreError

NOTE = "run.json"  # a run's provenance, and the name of its latest start
BEGUN = "progress.json"  # a run's, from when its workers are there
POLL_SECONDS = 1.0
START_POLL_SECONDS = 10.0
SPOT_POLL_SECONDS = 5.0  # as AWS advises
METADATA = "169.254.169.254"  # EC2's and Google's; a name could take long not to be found
SIGTERM_CODE = 143
LIMIT_CODE = 75  # EX_TEMPFAIL: nothing is wrong, run it again


class Stopped(SystemExit):
    """The run was stopped before its end and left a checkpoint; `code` is the exit code."""


class Ended(Exception):
    """All workers end the run here. Without an exit code it has failed, with an `error`."""

    def __init__(
        self,
        message: str,
        code: int | None = None,
        error: type[Exception] = FloatingPointError,
    ) -> None:
        super().__init__(message)
        self.code, self.error = code, error


class TakenOver(StoreError):
    """The same training was started again, and goes on there."""


# Of the job's process, where the workers have failed in a way that they would again.
ERRORS = {
    error.__name__: error for error in (FloatingPointError, StoreError, TakenOver, ValueError)
}


# -- the job's process -----------------------------------------------------------------------------


@contextlib.contextmanager
def stoppable(store: Store, run: Run, begun: float) -> Iterator[None]:
    """Have the workers stop when this process gets SIGTERM, or a limit is reached.

    A second SIGTERM ends it at once, for workers that don't answer. Where they have not begun, as
    when a cluster has no machines for them, there is nothing to keep, and the first ends it.

    Args:
        begun: When the job began, by the monotonic clock.

    Raises:
        Stopped: the workers have stopped.
        FloatingPointError: they gave up at a bad step.
        StoreError, ValueError: they can't begin, and couldn't if they were started again.
        TakenOver: they gave way to a later start.
    """
    heard: queue.SimpleQueue[bool] = queue.SimpleQueue()  # a signal may interrupt its own put
    abandoned: list[int] = []  # with this exit code

    def ask(reason: str, hint: str, code: int) -> None:
        store.write_json(note(run, "stop"), {"reason": reason, "hint": hint, "code": code})
        console.say(f"{run.name}: {reason}; the workers write a checkpoint and stop")

    def end(reason: str, hint: str, code: int) -> None:
        if not interruptible or report(store, run):
            ask(reason, hint, code)
            return
        console.say(f"{run.name}: {reason}, and no worker has begun: {hint}")
        abandoned.append(code)
        os.kill(os.getpid(), signal.SIGTERM)

    def watch() -> None:
        left = None
        if limit is not None:
            left = min(max(0.0, begun + limit[0] - time.monotonic()), threading.TIMEOUT_MAX)
        try:
            signalled = heard.get(timeout=left)
        except queue.Empty:
            assert limit is not None
            end(*limit[1:])
        else:
            if signalled:
                end("SIGTERM received", "run the same command to go on", SIGTERM_CODE)

    limit, interruptible = _limit(run.config), threading.current_thread() is threading.main_thread()
    thread = threading.Thread(target=watch, daemon=True)
    if limit is not None and time.monotonic() - begun >= limit[0]:
        ask(*limit[1:])  # before the workers look for it
    else:
        thread.start()
    try:
        with _on_sigterm(lambda: heard.put(True), abandoned):
            yield
    finally:
        heard.put(False)
        if thread.is_alive():
            thread.join()
    store.delete(note(run, "stop"))
    with contextlib.suppress(FileNotFoundError):
        ended = store.read_json(note(run, "ended"))
        store.delete(note(run, "ended"))
        if ended["code"] is None:
            raise ERRORS[ended["error"]](ended["message"])
        console.say(f"{run.name}: {ended['message']}")
        raise Stopped(ended["code"])


def _limit(config: TrainConfig) -> tuple[float, str, str, int] | None:
    """Seconds that the job may take, and what to say when they are over."""
    found = budget.limit(config)
    if found is None:
        return None
    hours, name = found
    option = name.split()[0]
    return (
        hours * 3600,
        f"{name} is reached",
        f"run the same command to go on for as long again, or with a larger {option}",
        LIMIT_CODE,
    )


@contextlib.contextmanager
def _on_sigterm(first: Callable[[], None], abandoned: Sequence[int]) -> Iterator[None]:
    """Call `first` at the first SIGTERM; raise `Stopped` at the second, or once abandoned."""
    if threading.current_thread() is not threading.main_thread():  # in a trial of Tune
        yield
        return
    signals = 0

    def handler(*_: object) -> None:
        nonlocal signals
        signals += 1
        if abandoned or signals > 1:
            raise Stopped(abandoned[0] if abandoned else SIGTERM_CODE)
        first()

    before = signal.signal(signal.SIGTERM, handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


# -- the workers -----------------------------------------------------------------------------------


class Watch:
    """Notices, beside the steps, that a worker should stop or save. Use as a context manager."""

    def __init__(
        self, run: Run, store: Store, rank: int, say: Callable[[str], None] = console.say
    ) -> None:
        self.run, self.store, self.say = run, store, say
        self.stop = threading.Event()
        """The job's process asks to stop; rank 0 alone sees it."""
        self.lost = threading.Event()
        """A later start has taken the run over; rank 0 alone sees it."""
        self.save = threading.Event()
        """This worker's machine is about to go."""
        self.asked: dict[str, Any] = {}
        self._clouds: Sequence[Callable[[], bool | None]] = (ec2_notice, gce_notice)
        self._without_notice = False  # which has been said
        self._closed = threading.Event()
        self._threads: list[threading.Thread] = []
        if rank == 0 and not self._stop_asked():
            self._watch(self._stop_asked, POLL_SECONDS)
        if rank == 0 and not self._taken_over():
            self._watch(self._taken_over, START_POLL_SECONDS)
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
            self.asked = self.store.read_json(note(self.run, "stop"))
            self.stop.set()
        return self.stop.is_set()

    def _taken_over(self) -> bool:
        with contextlib.suppress(OSError, ValueError):
            noted = self.store.read_json(f"{self.run.name}/{NOTE}")
            if noted.get("start", self.run.start) != self.run.start:
                self.lost.set()
        return self.lost.is_set()

    def _spot_notice(self) -> bool:
        if drained():
            self.save.set()
            return True
        for cloud in self._clouds:
            taken = cloud()
            if taken is not None:
                self._clouds = (cloud,)
                if taken:
                    self.save.set()
                return taken
        if len(self._clouds) > 1 and not self._without_notice:
            self._without_notice = True
            self.say(
                f"{self.run.name}: train.spot_notice: no metadata service answers here, neither "
                "EC2's nor Google's. Unless Ray is told to drain this node, as Kubernetes does by "
                "ending its pod, what is kept is the newest checkpoint, of each "
                "train.checkpoint_every steps"
            )
        return False


def tell(store: Store, run: Run, ended: Ended) -> None:
    """Say to the job's process how the run ended; rank 0 does."""
    said = {"message": str(ended), "code": ended.code, "error": ended.error.__name__}
    store.write_json(note(run, "ended"), said)


def note(run: Run, kind: str) -> str:
    """Where this start of the job keeps a note: `stop` to its workers, `ended` from them."""
    return f"{run.name}/{kind}-{run.start}.json"


def report(store: Store, run: Run) -> dict[str, Any] | None:
    """What the workers of this start of the job last reported; None before they are there."""
    with contextlib.suppress(OSError, ValueError):
        found = store.read_json(f"{run.name}/{BEGUN}")
        if found.get("start") == run.start:
            return found
    return None


def drained() -> bool:
    """Whether Ray is taking this worker's node out of the cluster.

    `ray start --block` drains its node when it gets SIGTERM, as from Kubernetes, for
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S, and then ends it. `ray.train.get_preemption_info` tells
    the same, but makes all workers wait for each other.
    """
    import ray
    from ray._private.state import state

    if not ray.is_initialized():
        return False
    return ray.get_runtime_context().get_node_id() in state.get_draining_nodes()


def ec2_notice() -> bool | None:
    """Whether EC2 takes this spot machine back, said two minutes ahead; None: EC2 doesn't answer.

    Source: the instance metadata service, version 2, at AWS_EC2_METADATA_SERVICE_ENDPOINT.
    """
    base = os.environ.get("AWS_EC2_METADATA_SERVICE_ENDPOINT", f"http://{METADATA}").rstrip("/")
    lives = {"X-aws-ec2-metadata-token-ttl-seconds": "60"}
    token = _answer(f"{base}/latest/api/token", lives, "PUT")
    if not token:
        return None
    headers = {"X-aws-ec2-metadata-token": token}
    return bool(_answer(f"{base}/latest/meta-data/spot/instance-action", headers))


def gce_notice() -> bool | None:
    """Whether Google takes this spot machine back, said 30 seconds ahead; None: Google doesn't
    answer.

    Source: Compute Engine's metadata server, at GCE_METADATA_HOST.
    """
    host = os.environ.get("GCE_METADATA_HOST", METADATA)
    url = f"http://{host}/computeMetadata/v1/instance/preempted"
    return {"TRUE": True, "FALSE": False}.get(_answer(url, {"Metadata-Flavor": "Google"}))


def _answer(url: str, headers: dict[str, str], method: str = "GET") -> str:
    """What a metadata service says; nothing if there is no such thing, or no service."""
    direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    asked = urllib.request.Request(url, method=method, headers=headers)
    try:
        with direct.open(asked, timeout=2) as answer:
            return answer.read().decode().strip()
    except (OSError, ValueError, http.client.HTTPException):
        return ""
