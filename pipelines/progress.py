"""Reports a run's progress: its numbers in MLflow, and its steps on the job's console.

The workers may be on other machines, so they report their progress through the store.
"""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

from beit3.device import DTYPES
from beit3.flops import matmul_peak
from pipelines import console, run_logger
from pipelines.recipe import Run
from pipelines.stops import BEGUN, report
from pipelines.storage import Store


class Clock:
    """Logs a step's numbers and reports the run's progress to the job's process."""

    def __init__(
        self,
        run: Run,
        store: Store,
        logger: run_logger.Logger,
        start: int,
        said: list[str],
        device: torch.device,
    ) -> None:
        self.run, self.store, self.logger, self.said = run, store, logger, said
        self.device = device
        self.peak = 0.0  # FLOP/s of this worker's device, once it is known
        self.last_log, self.last_step = time.monotonic(), start
        self.waited = self.flops = 0.0  # by this worker, since `last_log`
        self.last_shown = 0.0
        self.note = ""
        self._thread = ThreadPoolExecutor(1, "progress")
        self._telling: Future[None] | None = None
        if said:
            self.show(start)

    def took(self, batches: Sequence[Any], waited: float) -> None:
        """Note that a step's batches have come, after `waited` seconds of waiting for them."""
        self.waited += waited
        self.flops += sum(map(self.run.recipe.flops, batches))

    def log(self, step: int, values: dict[str, float], engine: Any, gradient_norm: Any) -> None:
        """Log a step's values, and how the time since the last logged step was spent."""
        now = time.monotonic()
        steps = max(1, step - self.last_step)
        seconds = max(1e-9, now - self.last_log)
        per_step = self.run.recipe.samples_per_batch() * self.run.config.accumulate
        groups = engine.optimizer.param_groups
        extra = {
            "learning_rate": max(group["lr"] for group in groups),
            "samples_per_second": per_step * steps / seconds,
            "data_wait_share": self.waited / seconds,
            "gradient_norm": float(gradient_norm),
        }
        if self.flops:
            self.peak = self.peak or matmul_peak(self.device, DTYPES[self.run.config.precision])
            extra["tflops_per_worker"] = self.flops / seconds / 1e12
            extra["mfu"] = self.flops / seconds / self.peak
        if self.device.type == "cuda":
            extra |= _gpu_memory(self.device)
        self.logger.metrics(step, {f"train/{k}": v for k, v in {**values, **extra}.items()})
        self.logger.machine(step)
        self.last_log, self.last_step = time.monotonic(), step
        self.waited = self.flops = 0.0
        self.note = f"loss {values['loss']:.3f}"

    def show(self, step: int) -> None:
        """Report progress once a second, in the background: steps never wait for the store."""
        now, last = time.monotonic(), step == self.run.config.steps
        told = self._telling is None or self._telling.done()
        if last or (told and now - self.last_shown > 1.0):
            self.last_shown = now
            told = {"step": step, "note": self.note, "said": self.said, "start": self.run.start}
            body = json.dumps(told)
            self._telling = self._thread.submit(self._tell, body.encode())
        if last:
            self._thread.shutdown()

    def _tell(self, body: bytes) -> None:
        with contextlib.suppress(OSError):
            self.store.write(f"{self.run.name}/{BEGUN}", body)


def _gpu_memory(device: torch.device) -> dict[str, float]:
    """GiB that tensors use now, that PyTorch reserves, and that tensors used at their peak."""
    found = {
        "gpu_allocated_gib": torch.cuda.memory_allocated(device),
        "gpu_reserved_gib": torch.cuda.memory_reserved(device),
        "gpu_peak_gib": torch.cuda.max_memory_allocated(device),
    }
    torch.cuda.reset_peak_memory_stats(device)
    return {name: value / (1 << 30) for name, value in found.items()}


def begin(store: Store, run: Run, said: Sequence[str]) -> None:
    """Tell the job's process that the workers have started, though no step is done."""
    store.write_json(f"{run.name}/{BEGUN}", {"said": list(said), "start": run.start})


def progress(store: Store, run: str) -> int:
    """Steps that a run has done, as it last reported."""
    try:
        return int(json.loads(store.read(f"{run}/{BEGUN}"))["step"])
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
                with contextlib.suppress(KeyError):
                    seen = report(store, run) or {}
                    if seen["said"] != said:  # there are new lines, or the workers have restarted
                        known = len(said) if seen["said"][: len(said)] == said else 0
                        said = seen["said"]
                        for line in said[known:]:
                            console.say(line)
                    if not begun:  # the time left counts steps, not the start of the workers
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
