"""Node-hours that a job used, by type of node, and their cost where prices are known.

Every few seconds, each node that Ray reports alive is counted for the time since the last look,
busy or idle; nodes that come and go count while they are there. So two concurrent jobs on one
cluster count the same nodes twice. A machine that is starting up or shutting down costs money but
isn't counted: Ray doesn't see it yet, or no longer does.

    BEIT3_PRICES="head=1 cpu=0.5 gpu=20"

sets the hourly price of a node of each type, in any currency. Types are those of the cluster's
file; a machine by itself is `machine`. A training run also prints what its workers cost by
`train.price_per_hour`, as `train.max_cost` counts it.
"""

from __future__ import annotations

import contextlib
import logging
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping

from pipelines import config, console, tracking
from pipelines.recipe import TrainConfig

PRICES = "BEIT3_PRICES"
ALONE = "machine"
LOOK_SECONDS = 5.0


class Meter:
    """Counts node-hours in the background. Use as a context manager."""

    def __init__(self, now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._since = now, now()
        self._seconds: dict[str, float] = {}
        self._lock, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> Meter:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._closed.set()
        self._thread.join()

    def look(self) -> None:
        """Count the nodes that are alive now, since the last look that found any."""
        with self._lock, contextlib.suppress(Exception):  # Ray may be starting, or just gone
            alive = _alive()
            now = self._now()
            if alive:
                for kind in alive:
                    self._seconds[kind] = self._seconds.get(kind, 0.0) + now - self._since
                self._since = now

    def hours(self) -> dict[str, float]:
        """Node-hours so far, by type; without Ray, those of this machine."""
        self.look()
        with self._lock:
            seconds = dict(self._seconds) or {ALONE: self._now() - self._since}
        return {kind: count / 3600 for kind, count in sorted(seconds.items())}

    def _run(self) -> None:
        while not self._closed.wait(LOOK_SECONDS):
            self.look()


def _alive() -> list[str]:
    """The types of the nodes that Ray reports alive; empty before this process joins a cluster."""
    if "ray" not in sys.modules:  # importing it takes seconds
        return []
    import ray

    if not ray.is_initialized():
        return []
    kinds = [n["Labels"].get("ray.io/node-group") or ALONE for n in ray.nodes() if n["Alive"]]
    # KubeRay names the head's group by itself.
    return ["head" if kind == "headgroup" else kind for kind in kinds]


def prices() -> dict[str, float]:
    """The hourly price of a node of each type, from BEIT3_PRICES.

    Raises:
        ValueError: it is not written as `type=price`, separated by spaces or commas.
    """
    found: dict[str, float] = {}
    for one in os.environ.get(PRICES, "").replace(",", " ").split():
        kind, _, price = one.partition("=")
        try:
            found[kind] = float(price)
        except ValueError:
            raise ValueError(
                f'{PRICES}: expected a price after "{kind}=", got "{one}"; say "cpu=0.5 gpu=20"'
            ) from None
    return found


def cost(hours: Mapping[str, float], prices: Mapping[str, float]) -> float | None:
    """The cost of the hours; None if a type has no price."""
    if not set(hours) <= set(prices):
        return None
    return sum(count * prices[kind] for kind, count in hours.items())


def sentence(hours: Mapping[str, float], prices: Mapping[str, float]) -> str:
    """The bill in words."""
    used = ", ".join(f"{kind} {count:.3f}" for kind, count in hours.items())
    money = cost(hours, prices)
    if money is not None:
        return f"node-hours: {used}; cost: {money:,.2f}"
    unknown = ", ".join(sorted(set(hours) - set(prices)))
    return f"node-hours: {used}; cost: unknown, {PRICES} has no price of {unknown}"


@contextlib.contextmanager
def printed() -> Iterator[None]:
    """Print what the block used when it ends, even by an exception; wraps a job.

    Prices that can't be parsed end the program before the job begins.
    """
    try:
        known = prices()
    except ValueError as error:
        config.stop(str(error))
    with Meter() as meter:
        try:
            yield
        finally:
            console.say(sentence(meter.hours(), known))


@contextlib.contextmanager
def of_training(handle: tracking.RunHandle | None, train: TrainConfig) -> Iterator[None]:
    """Log to MLflow what a training used when it ends, even by an exception, and print what its
    workers cost if their price is known."""
    begun = time.monotonic()
    with Meter() as meter:
        try:
            yield
        finally:
            hours = (time.monotonic() - begun) / 3600
            if train.price_per_hour:
                workers = max(1, train.workers)
                money = hours * workers * train.price_per_hour
                console.say(f"workers: {workers} for {hours:.3f} hours; cost: {money:,.2f}")
            if handle is not None:
                track(handle, meter.hours())


def track(handle: tracking.RunHandle, hours: Mapping[str, float]) -> None:
    """Add what this start of an MLflow run used to its `bill/*`; earlier starts stay counted."""
    values = {f"bill/node_hours_{kind}": count for kind, count in hours.items()}
    money = cost(hours, prices())
    if money is not None:
        values["bill/cost"] = money
    try:
        client = tracking.client(handle.uri)
        before = client.get_run(handle.run_id).data.metrics
        for name, value in values.items():
            client.log_metric(handle.run_id, name, before.get(name, 0.0) + value)
    except Exception as error:  # the job itself must not fail for it
        logging.getLogger(__name__).warning("tracking: the bill is not logged: %s", error)
