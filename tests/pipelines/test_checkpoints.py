"""Checkpoints: a run that was stopped ends as if it never had been."""

from __future__ import annotations

import itertools
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import small_run
import torch
from safetensors.torch import load_file, save_file
from small_net import (
    DECAY,
    STAGES,
    STEPS,
    Net,
    Recipe,
    begun,
    close,
    interrupted,
    same,
    state,
    train,
    train_config,
)
from torch import Tensor, nn

from pipelines import bundles, checkpoints, stops, training_worker, zero
from pipelines import engine as engines
from pipelines.recipe import Run
from pipelines.run_logger import Logger
from pipelines.storage import Store, StoreError
from pipelines.trainer import fit


def steps_of(store: Store) -> list[int]:
    names = store.list("runs/run/checkpoints")
    return [int(name.removeprefix("step-")) for name in names]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Store]:
    """By ZeRO stage, a store with an unbroken run and each of its checkpoints."""
    stores = {stage: Store(tmp_path_factory.mktemp(f"zero-{stage}")) for stage in STAGES}
    for stage, store in stores.items():
        train(store, zero_stage=stage, keep_checkpoints=STEPS)
    return stores


# -- resuming -------------------------------------------------------------------------------------


def test_the_average_is_exported_and_survives_a_stop(
    unbroken: dict[int, Store], tmp_path: Path
) -> None:
    whole, stopped = Store(tmp_path / "whole"), Store(tmp_path / "stopped")
    exported = train(whole, ema=DECAY)
    weights = state(unbroken[1], "models/run")["model"]  # which averaging does not change
    before = state(whole, checkpoints.folder("runs/run", STEPS - 1))["average"]
    for name, average in before.items():
        wanted = DECAY * average + (1 - DECAY) * weights[name]
        torch.testing.assert_close(exported[name], wanted, rtol=1e-5, atol=1e-6)
    assert torch.equal(exported["frozen"], weights["frozen"])
    interrupted(stopped, 4, ema=DECAY)
    assert same(train(stopped, ema=DECAY), exported)


@pytest.mark.parametrize("stage", STAGES)
def test_state_is_saved_and_restored_to_the_bit(
    stage: int, unbroken: dict[int, Store], tmp_path: Path
) -> None:
    """Weights, buffers, moments and dropout: every later checkpoint is equal in each of them."""
    whole, resumed = unbroken[stage], begun(unbroken[stage], tmp_path, 3)
    final = train(resumed, zero_stage=stage, keep_checkpoints=STEPS)
    assert steps_of(resumed) == [3, 4, 5, 6]
    for step in (4, 5, 6):
        name = checkpoints.folder("runs/run", step)
        for file, tensors in state(whole, name).items():
            assert same(tensors, state(resumed, name)[file]), (step, file)
    assert same(final, state(whole, "models/run")["model"])
    assert int(final["seen"]) == 8 * STEPS


def test_a_checkpoint_holds_all_of_the_state(unbroken: dict[int, Store]) -> None:
    early, late = (state(unbroken[1], checkpoints.folder("runs/run", n)) for n in (2, 3))
    layers = itertools.product(("first", "norm", "wide", "last"), ("weight", "bias"))
    trained = {f"{layer}.{part}" for layer, part in layers}
    assert late["model"].keys() == trained | {"frozen", "seen"}
    moments = itertools.product(trained, zero.MOMENTS)
    assert late["optimizer"].keys() == {f"{name}:{moment}" for name, moment in moments}
    assert late.keys() == {"model", "optimizer"}
    for name, tensor in late["optimizer"].items():
        assert not torch.equal(tensor, early["optimizer"][name]), name
        assert tensor.abs().sum() > 0


class Unread(Recipe):
    """With a layer that no batch reads."""

    def build(self) -> nn.Module:
        net = Net(self.dropout)
        net.unread = nn.Linear(5, 4)
        return net


def test_what_no_batch_reads_decays_alike_at_every_stage(tmp_path: Path) -> None:
    changes: dict[str, Any] = {"recipe": Unread(), "weight_decay": 0.5}
    plain = train(Store(tmp_path / "plain"), zero_stage=0, **changes)
    split = train(Store(tmp_path / "split"), zero_stage=1, **changes)
    close(plain, split)
    torch.manual_seed(train_config().seed)
    start = Unread().build().state_dict()
    assert plain["unread.weight"].norm() < 0.99 * start["unread.weight"].norm()


@pytest.mark.parametrize("stages", [(0, 1), (1, 0), (0, 3), (3, 0), (2, 3), (3, 1)])
def test_any_stage_goes_on_from_any_other(
    stages: tuple[int, int], unbroken: dict[int, Store], tmp_path: Path
) -> None:
    final = train(begun(unbroken[stages[0]], tmp_path, 3), zero_stage=stages[1])
    wanted = state(unbroken[stages[0]], "models/run")["model"]
    close(final, wanted)


@pytest.mark.parametrize("stop_at", [1, 5])
def test_a_stopped_run_ends_like_an_unbroken_one(
    stop_at: int,
    unbroken: dict[int, Store],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = Store(tmp_path)
    interrupted(store, stop_at)
    assert not bundles.exists(store, "models/run")
    capsys.readouterr()
    final = train(store)
    assert f"runs/run: resumed from step {stop_at}\n" in capsys.readouterr().out
    assert same(final, state(unbroken[1], "models/run")["model"])


def test_steps_without_a_checkpoint_are_done_again(
    unbroken: dict[int, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(tmp_path)
    interrupted(store, 5, checkpoint_every=3)
    assert steps_of(store) == [3]
    final = train(store, checkpoint_every=3)
    assert "resumed from step 3" in capsys.readouterr().out
    assert same(final, state(unbroken[1], "models/run")["model"])


@pytest.mark.parametrize("stage", [0, 1])
def test_accumulated_steps_resume_too(
    stage: int, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    changes: dict[str, Any] = {"accumulate": 2, "zero_stage": stage}
    whole = train(Store(tmp_path / "whole"), **changes)
    store = Store(tmp_path / "stopped")
    interrupted(store, 9, **changes)  # within the fifth step
    assert same(train(store, **changes), whole)
    assert "resumed from step 4" in capsys.readouterr().out


def test_checkpoints_in_a_bucket(
    unbroken: dict[int, Store], s3_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(s3_store)
    interrupted_at = 4
    with pytest.raises(KeyboardInterrupt):
        train(store, interrupted_at)
    fit(
        store, name="run", output="models/run", fingerprint="same", recipe=Recipe(),
        config=train_config(), parameters={}, track=False,
    )  # fmt: skip
    assert "resumed from step 4" in capsys.readouterr().out
    bundles.load(store, "models/run", tmp_path)
    wanted = state(unbroken[1], "models/run")["model"]
    assert same(load_file(tmp_path / "model.safetensors"), wanted)


# -- writing beside the training -------------------------------------------------------------------


class GuardedStore(Store):
    """Before a checkpoint's file is written, `before` is called."""

    def __init__(self, uri: Path, before: Callable[[], Any]) -> None:
        super().__init__(uri)
        self.before = before

    def write(self, name: str, data: bytes | memoryview) -> None:
        if "/checkpoints/" in name:
            self.before()
        super().write(name, data)


@pytest.fixture
def engine(tmp_path: Path) -> Iterator[Any]:
    """An engine that has stepped once."""
    import deepspeed.comm

    config = train_config()
    training_worker._join(config)
    made = engines.build(Run("", "runs/run", "", "", Recipe(), config), Net(0.0))
    step(made)
    yield made
    engines.close(made)
    deepspeed.comm.destroy_process_group()


def step(engine: Any) -> None:
    engine.backward(engine(torch.ones(2, 6))["loss"])
    engine.step()


def weights_of(engine: Any) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in engine.module.state_dict().items()}


def test_training_goes_on_while_a_checkpoint_is_written(engine: Any, tmp_path: Path) -> None:
    gate = threading.Event()
    store = GuardedStore(tmp_path, lambda: gate.wait(60))
    with checkpoints.Writer(store, "runs/run", train_config(), print) as writer:
        first = weights_of(engine)
        writer.save(1, engine)
        step(engine)
        second = weights_of(engine)
        assert not same(first, second)
        assert not bundles.exists(store, checkpoints.folder("runs/run", 1))
        another = threading.Thread(target=writer.save, args=(2, engine))
        another.start()
        another.join(0.2)
        assert another.is_alive()  # one at a time
        gate.set()
        another.join()
    for number, wanted in ((1, first), (2, second)):
        assert same(state(store, checkpoints.folder("runs/run", number))["model"], wanted)


def fail() -> None:
    raise OSError("no space left")


def test_a_checkpoint_that_could_not_be_written_is_raised(engine: Any, tmp_path: Path) -> None:
    store, said = GuardedStore(tmp_path, fail), list[str]()

    def writer() -> checkpoints.Writer:
        return checkpoints.Writer(store, "runs/run", train_config(), said.append)

    with pytest.raises(OSError, match="no space left"), writer() as at_the_end:
        at_the_end.save(1, engine)
    assert said == ["runs/run: the checkpoint of step 1 could not be written: no space left"]
    with pytest.raises(OSError, match="no space left"), writer() as after_others:
        for number in range(1, checkpoints.FAILURES + 1):
            after_others.save(number, engine)
        after_others.save(0, engine)
        pytest.fail("the last save went on")
    with pytest.raises(KeyboardInterrupt) as stopped, writer() as beside_another:
        beside_another.save(1, engine)
        raise KeyboardInterrupt
    assert "no space left" in stopped.value.__notes__[0]
    assert checkpoints.restore(store, "runs/run", engine, print) == (0, False)


def test_the_next_checkpoint_stands_in_for_one_that_could_not_be_written(
    engine: Any, tmp_path: Path
) -> None:
    out, said = [True], list[str]()
    store = GuardedStore(tmp_path, lambda: fail() if out[0] else None)
    with checkpoints.Writer(store, "runs/run", train_config(), said.append) as writer:
        for number in range(1, 7):
            out[0] = number % checkpoints.FAILURES != 0
            writer.save(number, engine)
            while writer.writing:
                time.sleep(0.01)
    assert steps_of(store) == [3, 6] and len(said) == 4
    assert checkpoints.restore(store, "runs/run", engine, print) == (6, False)


def test_what_cant_be_deleted_is_said(engine: Any, tmp_path: Path) -> None:
    class Undeletable(Store):
        def delete(self, name: str) -> None:
            if name.endswith("step-00000001"):
                fail()
            super().delete(name)

    said: list[str] = []
    config = train_config(keep_checkpoints=1)
    with checkpoints.Writer(Undeletable(tmp_path), "runs/run", config, said.append) as writer:
        writer.save(1, engine)
        writer.save(2, engine)
    assert steps_of(Store(tmp_path)) == [1, 2]
    assert said == ["runs/run: checkpoints before step 2 could not be deleted: no space left"]


# -- what is kept, and what is damaged -------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    store = Store(tmp_path)
    interrupted(store, 5, keep_checkpoints=keep)
    assert steps_of(store) == list(range(6 - keep, 6))
    assert all(bundles.exists(store, checkpoints.folder("runs/run", n)) for n in steps_of(store))


def test_some_are_kept_for_ever(tmp_path: Path) -> None:
    store = Store(tmp_path)
    interrupted(store, 5, keep_checkpoints=1, keep_every=2)
    assert steps_of(store) == [2, 4, 5]


def test_damaged_later_ones_drive_out_no_sound_one(
    unbroken: dict[int, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = begun(unbroken[1], tmp_path, 3)
    for number in (5, 6):
        begun(unbroken[1], tmp_path, number)
        truncate(tmp_path / checkpoints.folder("runs/run", number) / "model.safetensors")
    interrupted(store, 4)
    assert steps_of(store) == [3, 4, 5, 6]
    capsys.readouterr()
    assert same(train(store), state(unbroken[1], "models/run")["model"])
    assert "resumed from step 4" in capsys.readouterr().out


def test_no_checkpoints_are_written_where_none_are_wanted(tmp_path: Path) -> None:
    store = Store(tmp_path)
    train(store, checkpoint_every=0)
    assert store.list("runs/run/checkpoints") == []


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-7])


def flip_a_bit(file: Path) -> None:
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)


@pytest.mark.parametrize(
    ("harm", "file"),
    [
        (truncate, "optimizer.safetensors"),
        (flip_a_bit, "model.safetensors"),
        (Path.unlink, "model.safetensors"),
        (truncate, bundles.MANIFEST),
        (lambda file: file.write_bytes(b""), bundles.MANIFEST),
    ],
    ids=["truncated", "flipped", "missing", "truncated-manifest", "empty-manifest"],
)
def test_a_damaged_checkpoint_is_said_and_the_one_before_taken(
    harm: Callable[[Path], Any],
    file: str,
    unbroken: dict[int, Store],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    store = begun(unbroken[1], tmp_path, 3)
    begun(unbroken[1], tmp_path, 4)
    harm(tmp_path / checkpoints.folder("runs/run", 4) / file)
    final = train(store)
    said = capsys.readouterr().out
    assert "checkpoint of step 4 is damaged, trying an older" in said and file in said
    assert "resumed from step 3" in said
    assert same(final, state(unbroken[1], "models/run")["model"])


def test_a_checkpoint_without_its_manifest_was_never_finished(
    unbroken: dict[int, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = begun(unbroken[1], tmp_path, 3)
    for step in (2, 5):
        begun(unbroken[1], tmp_path, step)
        (tmp_path / checkpoints.folder("runs/run", step) / bundles.MANIFEST).unlink()
    final = train(store)
    assert "resumed from step 3" in capsys.readouterr().out
    assert steps_of(store) == [5, 6]  # what was left of step 2 is gone
    assert same(final, state(unbroken[1], "models/run")["model"])


def test_a_run_whose_checkpoints_are_all_damaged_ends_without_a_step(
    unbroken: dict[int, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = begun(unbroken[1], tmp_path, 3)
    truncate(tmp_path / checkpoints.folder("runs/run", 3) / "model.safetensors")
    with pytest.raises(StoreError, match=r"none of its checkpoints is sound .*model.safetensors"):
        train(store)
    assert "checkpoint of step 3 is damaged" in capsys.readouterr().out
    store.delete("runs/run/checkpoints")  # as the error says
    assert same(train(store), state(unbroken[1], "models/run")["model"])


class Unreachable(Store):
    """Checkpoints are there, and can't be read for now."""

    def _pieces(self, name: str) -> Iterator[bytes]:
        if "/checkpoints/" in name:
            error = OSError("please reduce your request rate")
            raise StoreError(f"{self.uri}/{name}: {error}") from error
        return super()._pieces(name)


def test_a_store_that_does_not_answer_is_no_damage(
    unbroken: dict[int, Store], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    store = begun(unbroken[1], tmp_path, 3)
    begun(unbroken[1], tmp_path, 4)
    with monkeypatch.context() as patch:
        patch.setattr(training_worker, "Store", Unreachable)
        with pytest.raises(StoreError, match="please reduce your request rate"):
            train(store)
    assert steps_of(store) == [3, 4]
    assert same(train(store), state(unbroken[1], "models/run")["model"])


def test_a_checkpoint_says_what_run_it_is_of(unbroken: dict[int, Store], tmp_path: Path) -> None:
    store = begun(unbroken[1], tmp_path, 3)
    info = bundles.info(store, checkpoints.folder("runs/run", 3))
    assert (
        info["fingerprint"] == "same" and info["parameters"] == {} and "beit3-ray" in info["code"]
    )
    rewrite(store, 3, lambda files: None, fingerprint="another")
    with pytest.raises(StoreError, match=r"_bundle.json: it was written by a run of other inputs"):
        train(store)


class Asked(Net):
    """In its fourth step it is told to save or to stop."""

    def __init__(self, ask: str) -> None:
        super().__init__(0.3)
        self.ask = ask

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        if self.training and int(self.seen) == 3 * len(batch):
            getattr(small_run.watch(), self.ask).set()
        return super().forward(batch)


@dataclass(frozen=True)
class Evaluated(Recipe):
    """Notes the steps that it is evaluated at."""

    file: str = ""
    ask: str = ""

    def build(self) -> nn.Module:
        small_run.keep_watches()
        return Asked(self.ask) if self.ask else super().build()

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        with Path(self.file).open("a") as notes:
            notes.write(f"{step} ")
        return super().evaluate(module, step, logger)


@pytest.mark.parametrize("ask", ["stop", "save"])
def test_a_step_that_was_saved_in_haste_is_evaluated_all_the_same(ask: str, tmp_path: Path) -> None:
    store, notes = Store(tmp_path / "store"), tmp_path / "notes"
    recipe = Evaluated(file=str(notes), ask=ask)
    every: dict[str, Any] = {"evaluate_every": 2, "checkpoint_every": 0, "steps": 6}
    if ask == "stop":
        with pytest.raises(stops.Stopped):
            train(store, recipe=recipe, **every)
        assert notes.read_text().split() == ["2"]
        assert bundles.info(store, checkpoints.folder("runs/run", 4))[checkpoints.EVALUATION_DUE]
        recipe = Evaluated(file=str(notes))
    train(store, recipe=recipe, **every)
    assert notes.read_text().split() == ["2", "4", "6"]


def test_a_checkpoint_comes_after_its_steps_evaluation(tmp_path: Path) -> None:
    store, notes = Store(tmp_path / "store"), tmp_path / "notes"
    train(store, recipe=Evaluated(file=str(notes)), evaluate_every=2, checkpoint_every=2, steps=6)
    assert notes.read_text().split() == ["2", "4", "6"]
    assert steps_of(store) == [2, 4]
    for step in (2, 4):
        info = bundles.info(store, checkpoints.folder("runs/run", step))
        assert not info[checkpoints.EVALUATION_DUE]


# -- other versions' checkpoints -------------------------------------------------------------------

Files = dict[str, dict[str, Tensor]]


def rewrite(store: Store, step: int, change: Callable[[Files], Any], **info: Any) -> None:
    """Give a checkpoint other tensors, and a sound manifest with other notes."""
    name = checkpoints.folder("runs/run", step)
    files = state(store, name)
    change(files)
    store.delete(name)
    with tempfile.TemporaryDirectory() as folder:
        for file, tensors in files.items():
            save_file(tensors, Path(folder) / f"{file}.safetensors")
        bundles.save(store, name, Path(folder), {"step": step, **info})


def test_a_checkpoint_from_before_formats_had_numbers_goes_on(
    unbroken: dict[int, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The weights lay beside the optimizer's moments too."""

    def as_it_was(files: Files) -> None:
        values = {f"{name}:value": tensor.clone() for name, tensor in files["model"].items()}
        files["optimizer"] |= values

    store = begun(unbroken[1], tmp_path, 3)
    assert bundles.info(store, checkpoints.folder("runs/run", 3))["format"] == checkpoints.FORMAT
    rewrite(store, 3, as_it_was)
    final = train(store)
    assert "resumed from step 3" in capsys.readouterr().out
    assert same(final, state(unbroken[1], "models/run")["model"])


@pytest.mark.parametrize(
    ("change", "info", "said"),
    [
        (lambda f: f["model"].pop("wide.bias"), {}, "model.safetensors: holds no wide.bias, which"),
        (
            lambda f: f["model"].update({"old.bias": torch.zeros(3)}),
            {},
            "model.safetensors: holds old.bias, which the model lacks",
        ),
        (
            lambda f: f["model"].update({"last.bias": torch.zeros(4)}),
            {},
            r"model.safetensors: last.bias is \[4\], and the model's is \[3\]",
        ),
        (
            lambda f: f["optimizer"].pop("last.bias:exp_avg"),
            {},
            "optimizer.safetensors: holds no last.bias:exp_avg, which the model has",
        ),
        (lambda f: f.pop("optimizer"), {}, "optimizer.safetensors: holds no first.weight:exp_avg"),
        (
            lambda f: f,
            {"format": checkpoints.FORMAT + 1},
            f"{bundles.MANIFEST}: the format is {checkpoints.FORMAT + 1}, and this version reads",
        ),
    ],
    ids=["fewer", "more", "other-shape", "no-moment", "no-optimizer", "later-format"],
)
def test_a_checkpoint_that_this_version_cant_read_is_named(
    change: Callable[[Files], Any],
    info: dict[str, Any],
    said: str,
    unbroken: dict[int, Store],
    tmp_path: Path,
) -> None:
    """It is sound: an older one is not taken in its place, and nothing is trained anew."""
    store = begun(unbroken[1], tmp_path, 2)
    begun(unbroken[1], tmp_path, 3)
    rewrite(store, 3, change, **info)
    with pytest.raises(StoreError, match=f"/runs/run/checkpoints/step-00000003/{said}") as raised:
        train(store)
    assert "train anew under another name, or delete runs/run first" in str(raised.value)
    assert steps_of(store) == [2, 3] and not bundles.exists(store, "models/run")
