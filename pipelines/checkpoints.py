"""Checkpoints that any number of workers and any ZeRO stage can resume.

DeepSpeed's own files are pickles cut to one world size. Here each parameter's fp32 value, its two
Adam moments and, where there is one, its average are gathered whole and written as safetensors, so
a checkpoint does not know how many workers wrote it. Training goes on while they are written.
"""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from pipelines import bundles, zero
from pipelines.recipe import TrainConfig
from pipelines.storage import Store, StoreError
from pipelines.zero import AVERAGE, MOMENTS

FORMAT = 1
"""Of a checkpoint's files, as its manifest says; one that says nothing is of the first."""


def folder(run: str, step: int) -> str:
    return f"{run}/checkpoints/step-{step:08d}"


class Writer:
    """Writes a run's checkpoints beside the training, one at a time; every worker has one.

    As a context it ends when the last one is written. What went wrong in writing one is raised by
    the next `save`, by `wait` or at the end, on rank 0.
    """

    def __init__(self, store: Store, run: str, config: TrainConfig) -> None:
        self.store, self.run, self.config = store, run, config
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._pending: Future[None] | None = None

    def save(self, step: int, engine: Any) -> None:
        """Copy the state after `step` steps to CPU memory, and begin to write it.

        Every worker must call this; rank 0 writes. It waits until the one before is written. Older
        checkpoints are deleted then, but `keep_checkpoints` and each `keep_every`-th step's.
        """
        self.wait()
        files = _copy(engine)
        if dist.get_rank() == 0:
            self._pending = self._thread.submit(self._write, step, files)

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

    def _write(self, step: int, files: dict[str, dict[str, Tensor]]) -> None:
        with tempfile.TemporaryDirectory() as temporary:
            for name, tensors in files.items():
                save_file(tensors, Path(temporary) / name)
            info = {"step": step, "format": FORMAT}
            bundles.save(self.store, folder(self.run, step), Path(temporary), info)
        for old in self._superfluous(step):
            self.store.delete(folder(self.run, old))

    def _superfluous(self, newest: int) -> list[int]:
        """Steps whose checkpoints may go; of later ones, which a run passed by, it says nothing."""
        config = self.config
        before = [s for s in _begun(self.store, self.run) if s <= newest]
        whole = [s for s in before if bundles.exists(self.store, folder(self.run, s))]
        kept = set(whole[-config.keep_checkpoints :])
        if config.keep_every:
            kept.update(s for s in whole if s % config.keep_every == 0)
        return [s for s in before if s not in kept]


def restore(store: Store, run: str, engine: Any, say: Callable[[str], None]) -> int:
    """Load the newest sound checkpoint into an engine that hasn't stepped yet; returns its step.

    0 if there is none. Every worker must call this; rank 0 reads. A damaged checkpoint is named to
    `say` and the one before it is taken.

    Raises:
        StoreError: the checkpoint is sound, but of a later format or of another model.
    """
    with tempfile.TemporaryDirectory() as temporary:
        step, wrong = 0, ""
        if dist.get_rank() == 0:
            step, kind = _fetch(store, run, Path(temporary), say)
            wrong = _unfit(Path(temporary) / str(step), kind, engine.module) if step else ""
        local = Path(temporary) / str(step)
        step, averaged, wrong = _agreed(step, (local / "average.safetensors").exists(), wrong)
        if wrong:
            raise StoreError(
                f"{store.uri}/{folder(run, step)}/{wrong}. Finish this run with the version of the "
                f"code that wrote it, or train anew under another name, or delete {run} first"
            )
        if not step:
            return 0
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
    return step


def newest(store: Store, run: str) -> int:
    """The step of a run's newest committed checkpoint; 0 if there is none."""
    committed = (s for s in reversed(_begun(store, run)) if bundles.exists(store, folder(run, s)))
    return next(committed, 0)


def inherit(store: Store, run: str, donor: str) -> int:
    """Give a run that has no checkpoint yet the newest sound one of another; returns its step.

    Raises:
        StoreError: the other run has none.
    """
    own = newest(store, run)
    if own:
        return own
    for _ in range(3):  # the other run may delete what is being read
        with tempfile.TemporaryDirectory() as temporary:
            step, kind = _fetch(store, donor, Path(temporary), lambda said: None)
            if step:
                info = {"step": step, "format": kind, "from": donor}
                bundles.save(store, folder(run, step), Path(temporary) / str(step), info)
                return step
    raise StoreError(f"{store.uri}/{donor}: has no sound checkpoint that {run} could go on from")


def _copy(engine: Any) -> dict[str, dict[str, Tensor]]:
    """A checkpoint's files, tensors by name, whole and in CPU memory; empty ones but on rank 0."""
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


def _fetch(store: Store, run: str, to: Path, say: Callable[[str], None]) -> tuple[int, int]:
    """Copy the newest sound checkpoint to `to/<step>`; returns its step, 0 if there is none, and
    its format."""
    for step in reversed(_begun(store, run)):
        name = folder(run, step)
        if not bundles.exists(store, name):
            continue
        try:
            info = bundles.load(store, name, to / str(step))
            return step, info.get("format", 1)
        except StoreError as error:
            say(f"checkpoint of step {step} is damaged, trying an older: {error}")
    return 0, FORMAT


def _unfit(local: Path, kind: int, module: nn.Module) -> str:
    """Why a checkpoint is none of this model's, with the file's name; empty if it is."""
    if kind > FORMAT:
        return f"{bundles.MANIFEST}: the format is {kind}, and this version reads up to {FORMAT}"
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
    """Steps of which there is a checkpoint or part of one, ascending."""
    names = [n for n in store.list(f"{run}/checkpoints") if n.startswith("step-")]
    return sorted(int(n.removeprefix("step-")) for n in names)


def _agreed(step: int, averaged: bool, wrong: str) -> tuple[int, bool, str]:
    """What rank 0 found."""
    found = [(step, averaged, wrong)]
    dist.broadcast_object_list(found, 0)
    return found[0]


@contextlib.contextmanager
def _reader(file: Path) -> Iterator[Callable[[str, Tensor], Tensor]]:
    """A function that reads a tensor, whole, on the device and of the type of a parameter.

    Rank 0 has the file and gives it to the other workers, which must read the same in turn.
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
