"""Checkpoints that any number of workers and any ZeRO stage can resume.

DeepSpeed's own files are pickles sharded for one world size. Here each parameter's fp32 value, its
two Adam moments and, if there is one, its average are gathered whole and written as safetensors, so
a checkpoint does not depend on how many workers wrote it. Training goes on while it is written.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines import bundles, zero
from pipelines.recipe import TrainConfig
from pipelines.storage import Store, StoreError
from pipelines.zero import AVERAGE, MOMENTS

T = TypeVar("T")

FORMAT = 1
"""Version of a checkpoint's format, noted in its manifest; without a note it is 1."""
EVALUATION_DUE = "evaluation_due"  # in the manifest: a step was saved before it was evaluated
FAILURES = 3  # the run ends when this many checkpoints in a row could not be written


def folder(run: str, step: int) -> str:
    return f"{run}/checkpoints/step-{step:08d}"


class Writer:
    """Writes a run's checkpoints during training, one at a time; every worker has a Writer.

    As a context manager it ends when the last checkpoint is written. A failed write is reported and
    the next checkpoint is tried: the run need not restart from an older one. `save` raises the
    error only after `FAILURES` in a row; `wait` and the context's end raise it after one. Both
    happen on rank 0.
    """

    def __init__(
        self,
        store: Store,
        run: str,
        config: TrainConfig,
        say: Callable[[str], None],
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """`notes`, the run's provenance, go into each manifest."""
        self.store, self.run, self.config, self.say = store, run, config, say
        self.notes = dict(notes or {})
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None
        self._failed = 0  # in a row

    def save(self, step: int, engine: Any, *, due: bool = False) -> None:
        """Copy the state after `step` steps to CPU memory, and begin to write it.

        `due`: the step's evaluation is still to come, also for a run that resumes from here.

        Every worker must call this; rank 0 writes. It first waits for the previous checkpoint to be
        written. Once this one is, older ones are deleted, except the last `keep_checkpoints` and
        each `keep_every`-th step's.

        Raises:
            StoreError, OSError: the last `FAILURES` checkpoints could not be written.
        """
        try:
            self.wait()
        except (StoreError, OSError):
            if self._failed >= FAILURES:
                raise
        files = _copy(engine)
        if dist.get_rank() == 0:
            self._pending = self._thread.submit(self._write, step, files, due)

    @property
    def writing(self) -> bool:
        return self._pending is not None and not self._pending.done()

    def wait(self) -> None:
        """Wait until the last checkpoint is written.

        Raises:
            StoreError, OSError: it could not be written.
        """
        pending, self._pending = self._pending, None
        if pending is not None:
            pending.result()

    def __enter__(self) -> Writer:
        return self

    def __exit__(self, kind: object, error: BaseException | None, at: object) -> None:
        try:
            self.wait()
        except Exception as failed:
            if error is None:
                raise
            error.add_note(f"nor was the last checkpoint written: {failed!r}")
        finally:
            self._thread.shutdown()

    def _write(self, step: int, files: dict[str, dict[str, Tensor]], due: bool) -> None:
        try:
            with tempfile.TemporaryDirectory() as temporary:
                for name, tensors in files.items():
                    save_file(tensors, Path(temporary) / name)
                info = {**self.notes, "step": step, "format": FORMAT, EVALUATION_DUE: due}
                bundles.save(self.store, folder(self.run, step), Path(temporary), info)
        except (StoreError, OSError) as error:
            self._failed += 1
            self.say(f"{self.run}: the checkpoint of step {step} could not be written: {error}")
            raise
        self._failed = 0
        try:
            for old in self._superfluous(step):
                self.store.delete(folder(self.run, old))
        except OSError as error:  # the next one deletes them
            self.say(f"{self.run}: checkpoints before step {step} could not be deleted: {error}")

    def _superfluous(self, newest: int) -> list[int]:
        """Steps up to `newest` whose checkpoints may be deleted; later ones are left alone."""
        config = self.config
        before = [s for s in _begun(self.store, self.run) if s <= newest]
        whole = [s for s in before if bundles.exists(self.store, folder(self.run, s))]
        kept = set(whole[-config.keep_checkpoints :])
        if config.keep_every:
            kept.update(s for s in whole if s % config.keep_every == 0)
        return [s for s in before if s not in kept]


def restore(
    store: Store, run: str, engine: Any, say: Callable[[str], None], fingerprint: str = ""
) -> tuple[int, bool]:
    """Load the newest sound checkpoint into an engine that hasn't stepped yet.

    Returns its step, 0 if there is none, and whether that step's evaluation is still to come. Every
    worker must call this; rank 0 reads. A damaged checkpoint is reported to `say` and the previous
    one is taken.

    Args:
        fingerprint: The run's, if it is to be compared with the one noted in a checkpoint.

    Raises:
        StoreError: the checkpoint is sound, but has a later format or belongs to another model or
            run; or there are checkpoints, but none is sound. Or, caused by an OSError, and on rank
            0 alone: the store doesn't answer.
    """
    with tempfile.TemporaryDirectory() as temporary:
        step, due, wrong = 0, False, ""
        if dist.get_rank() == 0:
            step, due, wrong = _chosen(store, run, Path(temporary), engine.module, fingerprint, say)
        local = Path(temporary) / str(step)
        averaged = (local / "average.safetensors").exists()
        step, due, averaged, wrong = _agreed((step, due, averaged, wrong))
        if wrong:
            raise StoreError(wrong)
        if not step:
            return 0, False
        with _reader(local / "model.safetensors") as read:
            for name, tensor in engine.module.state_dict(keep_vars=True).items():
                zero.set_weight(tensor, read(name, tensor))
        zero.refresh(engine)
        zero.create_state(engine, step, (*MOMENTS, AVERAGE) if averaged else MOMENTS)
        with _reader(local / "optimizer.safetensors") as read:
            for name, parameter in zero.trainable(engine.module):
                for moment in MOMENTS:
                    value = read(f"{name}:{moment}", parameter)
                    zero.set_state(engine, parameter, moment, value)
        if averaged:
            with _reader(local / "average.safetensors") as read:
                for name, parameter in zero.trainable(engine.module):
                    zero.set_state(engine, parameter, AVERAGE, read(name, parameter))
    return step, due


def newest(store: Store, run: str) -> int:
    """The step of a run's newest committed checkpoint; 0 if there is none."""
    committed = (s for s in reversed(_begun(store, run)) if bundles.exists(store, folder(run, s)))
    return next(committed, 0)


def inherit(store: Store, run: str, donor: str) -> int:
    """Copy the newest sound checkpoint of `donor` to a run that has none yet; returns its step.

    Raises:
        StoreError: `donor` has none.
    """
    own = newest(store, run)
    if own:
        return own
    for _ in range(3):  # the other run may delete what is being read
        with tempfile.TemporaryDirectory() as temporary, contextlib.suppress(bundles.Damaged):
            step, info = _fetch(store, donor, Path(temporary), lambda said: None)
            if step:
                info = {"step": step, "format": info.get("format", 1), "from": donor}
                bundles.save(store, folder(run, step), Path(temporary) / str(step), info)
                return step
    raise StoreError(f"{store.uri}/{donor}: has no sound checkpoint that {run} could go on from")


def _copy(engine: Any) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's files: tensors by name, whole, in CPU memory; empty except on rank 0."""
    module, first = engine.module, dist.get_rank() == 0
    zero.link_state(engine)
    model, optimizer, average = {}, {}, {}

    def keep(tensors: dict[str, Tensor], name: str, value: Tensor) -> None:
        if first:
            tensors[name] = value.to("cpu", copy=True).contiguous()

    for name, tensor in module.state_dict(keep_vars=True).items():
        keep(model, name, zero.whole_weight(tensor))
    averaged = zero.has_average(engine)
    for name, parameter in zero.trainable(module):
        for moment in MOMENTS:
            keep(optimizer, f"{name}:{moment}", zero.whole_state(engine, parameter, moment))
        if averaged:
            keep(average, name, zero.whole_state(engine, parameter, AVERAGE))
    files = {"model.safetensors": model, "optimizer.safetensors": optimizer}
    return files | ({"average.safetensors": average} if averaged else {})


def _fetch(
    store: Store, run: str, to: Path, say: Callable[[str], None]
) -> tuple[int, dict[str, Any]]:
    """Copy the newest sound checkpoint to `to/<step>`; returns its step, 0 if there is none, and
    the notes in its manifest.

    Raises:
        Damaged: there are checkpoints, but none is sound.
        StoreError, OSError: the store doesn't answer. That is no damage: no checkpoint is skipped.
    """
    damaged = []
    for step in reversed(_begun(store, run)):
        name = folder(run, step)
        if not bundles.exists(store, name):
            continue
        try:
            return step, bundles.load(store, name, to / str(step))
        except bundles.Damaged as error:
            say(f"checkpoint of step {step} is damaged, trying an older: {error}")
            damaged.append(error)
    if damaged:
        raise bundles.Damaged(
            f"{store.uri}/{run}: none of its checkpoints is sound ({damaged[0]}). Bring one back "
            f"from a copy, or delete {run}/checkpoints to begin anew"
        )
    return 0, {}


def _chosen(
    store: Store,
    run: str,
    to: Path,
    module: nn.Module,
    fingerprint: str,
    say: Callable[[str], None],
) -> tuple[int, bool, str]:
    """Like `_fetch`; returns the step, whether its evaluation is due, and why it can't be loaded
    (empty if it can)."""
    try:
        step, info = _fetch(store, run, to, say)
    except StoreError as error:
        if isinstance(error.__cause__, OSError):
            raise
        return 0, False, str(error)
    wrong = _unfit(to / str(step), info, module, fingerprint) if step else ""
    if wrong:
        wrong = (
            f"{store.uri}/{folder(run, step)}/{wrong}. Finish this run with the version of the "
            f"code that wrote it, or train anew under another name, or delete {run} first"
        )
    return step, info.get(EVALUATION_DUE, False), wrong


def _unfit(local: Path, info: Mapping[str, Any], module: nn.Module, fingerprint: str) -> str:
    """Why a checkpoint doesn't belong to this run, with the file's name; empty if it does."""
    kind = info.get("format", 1)
    if kind > FORMAT:
        return f"{bundles.MANIFEST}: the format is {kind}, and this version reads up to {FORMAT}"
    if fingerprint and info.get("fingerprint", fingerprint) != fingerprint:
        return f"{bundles.MANIFEST}: it was written by a run of other inputs or options"
    trained = zero.trainable(module)
    files = {
        "model.safetensors": module.state_dict(keep_vars=True),
        "optimizer.safetensors": {f"{n}:{m}": p for n, p in trained for m in MOMENTS},
        "average.safetensors": dict(trained) if (local / "average.safetensors").exists() else {},
    }
    for file, wanted in files.items():
        held = _shapes(local / file)
        for name, tensor in wanted.items():
            if name not in held:
                return f"{file}: holds no {name}, which the model has"
            if held[name] != list(zero.shape(tensor)):
                shape = list(zero.shape(tensor))
                return f"{file}: {name} is {held[name]}, and the model's is {shape}"
        if file == "model.safetensors" and held.keys() - wanted.keys():
            return f"{file}: holds {min(held.keys() - wanted.keys())}, which the model lacks"
    return ""


def _shapes(file: Path) -> dict[str, list[int]]:
    """The shapes of a file's tensors by name; none if it isn't there."""
    if not file.exists():
        return {}
    with safe_open(file, framework="pt") as opened:
        return {name: opened.get_slice(name).get_shape() for name in opened.keys()}  # noqa: SIM118


def _begun(store: Store, run: str) -> list[int]:
    """Steps with a whole or partial checkpoint, ascending."""
    names = [n for n in store.list(f"{run}/checkpoints") if n.startswith("step-")]
    return sorted(int(n.removeprefix("step-")) for n in names)


def _agreed(found: T) -> T:
    """Broadcast of what rank 0 found."""
    told = [found]
    dist.broadcast_object_list(told, 0)
    return told[0]


@contextlib.contextmanager
def _reader(file: Path) -> Iterator[Callable[[str, Tensor], Tensor]]:
    """A function that reads a whole tensor, with a given parameter's device and dtype.

    Rank 0 has the file and broadcasts; the other workers must read the same tensors in the same
    order.
    """

    with contextlib.ExitStack() as stack:
        source: Any = None
        if dist.get_rank() == 0:
            source = stack.enter_context(safe_open(file, framework="pt"))

        def read(name: str, like: Tensor) -> Tensor:
            if source is not None:
                value = source.get_tensor(name).to(like.device, like.dtype)
            else:
                value = torch.empty(zero.shape(like), device=like.device, dtype=like.dtype)
            dist.broadcast(value, 0)
            return value

        yield read
