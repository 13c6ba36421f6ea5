"""What a person sees of a run: its numbers in MLflow, and how far it is on the job's console.

The workers may be on other machines, so they say how far they are through the store.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

from pipelines import console, tracking
from pipelines.recipe import Run
from pipelines.storage import Store


class Clock:
    """Logs a step's numbers and tells the job's process how far the run is."""

    def __init__(
        self, run: Run, store: Store, logger: tracking.Logger, start: int, said: list[str]
    ) -> None:
        self.run, self.store, self.logger, self.said = run, store, logger, said
        self.last_log, self.last_step = time.monotonic(), start
        self.last_shown = 0.0
        self.note = ""
        if said:
            self.show(start)

    def log(self, step: int, values: dict[str, float], engine: Any, wait: float) -> None:
        now = time.monotonic()
        steps = max(1, step - self.last_step)
        seconds = max(1e-9, now - self.last_log)
        per_step = self.run.recipe.samples_per_batch() * self.run.config.accumulate
        groups = engine.optimizer.param_groups
        extra = {
            "learning_rate": max(group["lr"] for group in groups),
            "samples_per_second": per_step * steps / seconds,
            "data_wait_seconds": wait,
        }
        norm = engine.get_global_grad_norm()
        if norm is not None:
            extra["gradient_norm"] = float(norm)
        self.logger.metrics(step, {f"train/{k}": v for k, v in {**values, **extra}.items()})
        self.last_log, self.last_step = now, step
        self.note = f"loss {values['loss']:.3f}"

    def show(self, step: int) -> None:
        now = time.monotonic()
        if now - self.last_shown > 1.0 or step == self.run.config.steps:
            self.last_shown = now
            body = json.dumps({"step": step, "note": self.note, "said": self.said})
            with contextlib.suppress(OSError):
                self.store.write(f"{self.run.name}/progress.json", body.encode())


def progress(store: Store, run: str) -> int:
    """Steps that a run has done, as it last said."""
    try:
        return int(json.loads(store.read(f"{run}/progress.json"))["step"])
    except (OSError, ValueError, KeyError):
        return 0


@contextlib.contextmanager
def shown(store: Store, run: Run) -> Iterator[None]:
    """Show the workers' progress on the console of the job's process."""
    stop = threading.Event()

    def watch() -> None:
        with console.bar(run.name, total=run.config.steps, unit="step") as bar:
            bar.set_postfix_str("starting workers", refresh=False)
            begun, said = False, []
            while True:
                ended = stop.wait(1.0)
                with contextlib.suppress(OSError, ValueError, KeyError):
                    seen = json.loads(store.read(f"{run.name}/progress.json"))
                    if seen["said"] != said:  # workers started, perhaps not for the first time
                        said = seen["said"]
                        for line in said:
                            console.say(line)
                    if not begun:  # the time left is of the steps, not of starting the workers
                        begun = True
                        bar.initial = bar.n = seen["step"]
                        bar.start_t = bar.last_print_t = time.time()
                    bar.set_postfix_str(seen["note"], refresh=False)
                    bar.update(seen["step"] - bar.n)
                if ended:
                    return

    thread = threading.Thread(target=watch, daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()
