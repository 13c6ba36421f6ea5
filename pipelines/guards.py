"""Detects steps that would spoil a run; all workers agree, and skip the step or stop the run.

A step is bad if its loss (the mean over its batches and the workers) is NaN, infinite or a spike,
or if its gradient is not finite. This is known before the optimizer steps, at the cost of one
all-reduce of four numbers, and every worker decides the same. A skipped step changes no parameter,
moment or buffer; its batches and its place in the learning rate schedule are used up.
"""

from __future__ import annotations

import contextlib
import math
import statistics
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from pipelines import zero
from pipelines.recipe import Run
from pipelines.stops import Ended, TakenOver, Watch
from pipelines.storage import Store

WINDOW = 64  # good steps whose median loss a spike is measured against
LEAST = 16  # with fewer good steps, nothing counts as a spike
SAID = 20  # skipped steps that the console reports


@dataclass(frozen=True)
class Verdict:
    """The workers' agreement after a step."""

    skipped: bool
    """The step was bad and was skipped."""
    stop: bool
    """The run was asked to stop."""
    save: bool
    """A worker wants a checkpoint: its machine is about to go."""
    gradient_norm: Any
    """2-norm of the gradient before it was clipped."""


class Guard:
    """Takes or skips a run's optimizer steps; every worker has a Guard.

    For each step, call `begin`, `add` after each backward pass, and `step`.
    """

    def __init__(
        self,
        run: Run,
        store: Store,
        engine: Any,
        watch: Watch,
        *,
        start: int,
        rank: int,
        say: Callable[[str], None],
    ) -> None:
        self.run, self.config, self.store, self.engine = run, run.config, store, engine
        self.watch, self.rank, self.say = watch, rank, say
        self.world = dist.get_world_size()
        self.stage: int = engine.zero_optimization_stage()
        self.skipped = _skipped(store, run.name, start)
        """Steps skipped since the run's beginning."""
        self.stepped = start > 0
        """The optimizer has a state that can be saved."""
        self._in_a_row = 0
        self._recent: deque[float] = deque(maxlen=WINDOW)
        self._kept: dict[str, list[float]] = {}
        if self.config.spike_factor:
            with contextlib.suppress(FileNotFoundError):
                found = store.read_json(f"{run.name}/recent-losses.json")
                self._kept = {k: v for k, v in found.items() if int(k) <= start}
            self._recent.extend(self._kept.get(str(start), []))
        self._losses: list[Tensor] = []
        self._ids: list[str] = []
        self._buffers: list[Tensor] = []

    def begin(self) -> None:
        self._losses, self._ids = [], []
        if self.config.on_bad_step == "skip":
            self._buffers = [buffer.clone() for buffer in self.engine.module.buffers()]

    def add(self, batch: Any, loss: Tensor) -> None:
        """Note a batch and its loss."""
        self._losses.append(loss.detach())
        for name in ("ids", "image_ids"):
            self._ids += [str(one) for one in getattr(batch, name, ())]

    def step(self, step: int) -> Verdict:
        """Let the optimizer step after the last backward pass, unless the step is bad.

        Args:
            step: Number of steps done, including this one.

        Raises:
            Ended: the step is bad and must not be skipped, or the run was taken over.
        """
        loss, stop, save, lost = self._agree()
        if lost:
            raise Ended(
                f"{self.run.name} was started again elsewhere, and goes on there; this job ends "
                f"at step {step - 1:,}",
                error=TakenOver,
            )
        bad, norm = self._fault(loss), None
        if bad:
            norm = gradient_norm(self.engine)
        elif not self.stage:
            norm = self._clip()
            if not math.isfinite(norm):
                bad = "the gradient is not finite"
        if bad:
            _drop_gradient(self.engine)
        else:
            self.engine.step()
            if self.stage:  # ZeRO checks the gradient itself, and clips it
                norm = self.engine.get_global_grad_norm()
                if not self.engine.was_step_applied():
                    bad = "the gradient is not finite"
        if bad:
            self._leave_out(step, bad, loss, norm)
        else:
            self.stepped, self._in_a_row = True, 0
            self._recent.append(loss)
        if self.skipped:
            _set_adam_steps(self.engine, step)
        return Verdict(bool(bad), stop and self.stepped, save, norm)

    def _clip(self) -> float:
        """Clip the gradient, which every worker has whole; returns its norm before that."""
        parameters = [p for _, p in zero.trainable(self.engine.module)]
        for parameter in parameters:
            if parameter.grad is None:  # no batch used it: weight decay still applies, as with ZeRO
                parameter.grad = torch.zeros_like(parameter)
        norm = get_total_norm([p.grad for p in parameters if p.grad is not None])
        if self.config.clip and bool(norm.isfinite()):
            clip_grads_with_norm_(parameters, self.config.clip, norm)
        return float(norm)

    def remember(self, step: int) -> None:
        """Store the losses that spikes are measured against, for resuming from this checkpoint."""
        if self.rank == 0 and self.config.spike_factor:
            self._kept[str(step)] = list(self._recent)
            newest = sorted(self._kept, key=int)[-self.config.keep_checkpoints - 2 :]
            self._kept = {k: self._kept[k] for k in newest}
            self.store.write_json(f"{self.run.name}/recent-losses.json", self._kept)

    def _agree(self) -> tuple[float, bool, bool, bool]:
        """The mean loss; whether any worker wants to stop or save; whether the run was lost."""
        own = torch.stack(self._losses).double().mean()
        watch = self.watch
        flags = (watch.stop.is_set(), self.stepped and watch.take_save(), watch.lost.is_set())
        told = torch.stack([own, *(own.new_tensor(float(flag)) for flag in flags)])
        if self.world > 1:
            dist.all_reduce(told)
        loss, *flags = told.tolist()
        stop, save, lost = (flag > 0 for flag in flags)
        return loss / self.world, stop, save, lost

    def _fault(self, loss: float) -> str:
        """The fault in the loss, in words; empty if there is none."""
        if math.isnan(loss):
            return "the loss is not a number"
        if math.isinf(loss):
            return "the loss is infinite"
        factor = self.config.spike_factor
        if factor and len(self._recent) >= LEAST:
            median = statistics.median(self._recent)
            if 0 < factor * median < loss:
                return (
                    f"the loss {loss:.4g} is above train.spike_factor {factor:g} times "
                    f"{median:.4g}, the median of the last {len(self._recent)} steps"
                )
        return ""

    def _leave_out(self, step: int, bad: str, loss: float, norm: Any) -> None:
        """Record a bad step; end the run if the step must not be skipped."""
        self._in_a_row += 1
        skip = self.config.on_bad_step == "skip"
        skip = skip and self._in_a_row < self.config.max_bad_steps
        file = f"{self.run.name}/bad-steps/step-{step:08d}-rank-"
        record = {
            "step": step,
            "rank": self.rank,
            "reason": bad,
            "action": "skipped" if skip else "stopped",
            "mean_loss": _plain(loss),
            "losses": [_plain(value) for value in torch.stack(self._losses).tolist()],
            "gradient_norm": None if norm is None else _plain(float(norm)),
            "ids": self._ids,
        }
        self.store.write_json(f"{file}{self.rank}.json", record)
        where = f"its samples are named in {self.store.uri}/{file}*.json"
        if not skip:
            raise Ended(f"{bad} at step {step}{self._how_many()}; {where}. {self._advice()}")
        self.skipped += 1
        for buffer, before in zip(self.engine.module.buffers(), self._buffers, strict=True):
            buffer.copy_(before)
        if self.skipped <= SAID:
            self.say(f"{self.run.name}: step {step} left out: {bad}; {where}")

    def _how_many(self) -> str:
        return f", after {self._in_a_row - 1} left out in a row" if self._in_a_row > 1 else ""

    def _advice(self) -> str:
        again = (
            "The same command goes on from the newest checkpoint and comes to this step again: "
            "look at these samples first, and "
        )
        other = "take another name with a smaller train.learning_rate or train.clip"
        if self.config.on_bad_step == "skip":
            return f"{again}raise train.max_bad_steps, or {other}."
        return f"{again}set train.on_bad_step to skip to leave it out, or {other}."


def gradient_norm(engine: Any) -> float:
    """2-norm of the gradient before the optimizer steps; every worker must call this."""
    from deepspeed.utils import safe_get_full_grad

    squares = 0.0
    for _, parameter in zero.trainable(engine.module):  # one whole gradient at a time
        gradient = safe_get_full_grad(parameter)
        if gradient is not None:
            squares = squares + gradient.float().pow(2).sum()
    return math.sqrt(float(squares))


def _drop_gradient(engine: Any) -> None:
    """Make the engine step without changing anything. Every worker must call this.

    ZeRO skips its step and clears its gradients when their norm is NaN.
    """
    from deepspeed.utils import safe_set_full_grad, safe_set_local_grad

    stage: int = engine.zero_optimization_stage()
    parameter: Any = zero.trainable(engine.module)[0][1]
    if stage == 0:
        engine.zero_grad()
        engine.set_gradient_accumulation_boundary(False)  # so the optimizer does not step
        engine.step()
        engine.set_gradient_accumulation_boundary(None)
        return
    if stage == 3:
        safe_set_local_grad(parameter, torch.full_like(parameter.ds_tensor, torch.nan))
    elif engine.zero_offload_optimizer():  # offloading has computed the norms already
        norms = engine.optimizer.norm_for_param_grads
        norms.update(dict.fromkeys(norms, torch.tensor(torch.nan)))
    else:
        safe_set_full_grad(parameter, torch.full_like(parameter, torch.nan))
    engine.step()


def _set_adam_steps(engine: Any, step: int) -> None:
    """Make Adam's bias correction count skipped steps too, as in a run resumed after them."""
    for state in zero.states(engine).values():
        if state:
            state["step"].fill_(step)


def _skipped(store: Store, run: str, start: int) -> int:
    """Number of steps up to `start` that the run has skipped."""
    records = [n for n in store.list(f"{run}/bad-steps") if n.endswith("-rank-0.json")]
    before = [n for n in records if int(n.split("-")[1]) <= start]
    found = [store.read_json(f"{run}/bad-steps/{name}") for name in before]
    return sum(record["action"] == "skipped" for record in found)


def _plain(value: float) -> float | str:
    """A value for JSON, which cannot express NaN and infinity."""
    return value if math.isfinite(value) else str(value)
