"""Watches a sweep from within Tune: trials that end, and how busy the workers are.

A *worker* is room for one trial. It is busy while a trial's process is there and works on it. It
waits while a process starts, also between two trials; in the tail, when fewer trials are left than
workers, it is idle.
"""

from __future__ import annotations

import time
from typing import Any

from ray import tune
from ray.tune.experiment import Trial

from pipelines import console, placement
from pipelines.storage import Store
from tuning.trials import run_name
from tuning.trials import values as drawn

_ENDED = (Trial.TERMINATED, Trial.ERROR)


class Watch(tune.Callback):
    """Writes the outcome of the trials to `<folder>/ended.json`: see `ended`.

    Args:
        workers: Trials that can run at once.
        total: Trials of the whole sweep.
        metric: The score's name in a result.
    """

    def __init__(
        self, store: Store, folder: str, sweep: str, *, workers: int, total: int, metric: str
    ) -> None:
        self.store, self.folder, self.sweep, self.metric = store, folder, sweep, metric
        self.workers, self.total = workers, total
        self.seconds = {"busy": 0.0, "waiting": 0.0, "tail": 0.0}
        """Totals over all workers."""
        self._last: float | None = None
        self._running: set[str] = set()
        self._left: list[dict[str, str]] = []
        """Placement groups of ended or paused trials that are still to be removed."""

    def get_state(self) -> dict[str, Any]:
        return {"seconds": self.seconds}

    def set_state(self, state: dict[str, Any]) -> None:
        """Restore what Tune kept of a killed sweep."""
        self.seconds = dict(state["seconds"])

    def setup(self, *_: Any, **__: Any) -> None:
        self._last = time.monotonic()

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:
        now = time.monotonic()
        passed, self._last = now - (self._last or now), now
        running = min(self.workers, sum(trial.status == Trial.RUNNING for trial in trials))
        left = self.total - sum(trial.status in _ENDED for trial in trials)
        wanted = min(self.workers, left)
        self.seconds["busy"] += running * passed
        self.seconds["waiting"] += max(0, wanted - running) * passed
        self.seconds["tail"] += (self.workers - max(wanted, running)) * passed
        self._give_back(
            {run_name(self.sweep, t.config) for t in trials if t.status == Trial.RUNNING}
        )

    def on_trial_complete(
        self, iteration: int, trials: list[Trial], trial: Trial, **_: Any
    ) -> None:
        self._say(trials, trial, f"{trial.last_result.get(self.metric, float('nan')):.4f}")

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:
        self._say(trials, trial, f"failed: {_last_line(trial)}")

    def on_experiment_end(self, trials: list[Trial], **_: Any) -> None:
        for _second in range(30):
            self._give_back(set())
            if not self._left:
                break
            time.sleep(1.0)
        found = [
            {
                "values": trial.config,
                "result": {
                    k: v for k, v in trial.last_result.items() if isinstance(v, int | float)
                },
                "error": _last_line(trial) if trial.status == Trial.ERROR else None,
            }
            for trial in trials
        ]
        body = {"trials": found, "workers": self.workers, "seconds": self.seconds}
        self.store.write_json(f"{self.folder}/ended.json", body)

    def _give_back(self, running: set[str]) -> None:
        """Remove the placement groups of trials that no longer run."""
        ended = (placement.held(self.store, f"runs/{name}") for name in self._running - running)
        self._left = [
            room
            for room in (*self._left, *(room for room in ended if room))
            if not placement.release(room)
        ]
        self._running = running

    def _say(self, trials: list[Trial], trial: Trial, how: str) -> None:
        ended = sum(other.status in _ENDED for other in trials if other is not trial) + 1
        values = ", ".join(
            f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}"
            for name, value in sorted(drawn(trial.config).items())
        )
        step = trial.last_result.get("step", 0)
        console.say(f"   trial {ended}/{self.total}: {how} after {step} steps, {values}")


def ended(store: Store, folder: str) -> dict[str, Any]:
    """A sweep's outcome: `trials` with their values, last result and error, `workers`, and the
    workers' `seconds` by what they did."""
    return store.read_json(f"{folder}/ended.json")


def busy_share(seconds: dict[str, float]) -> float:
    """Share of the workers' time in which they ran a trial."""
    return seconds["busy"] / (sum(seconds.values()) or 1.0)


def _last_line(trial: Trial) -> str:
    """The last line of a failed trial's error."""
    lines = str(trial.get_error() or "").strip().splitlines()
    return lines[-1][:500] if lines else "unknown error"
