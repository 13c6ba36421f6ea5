"""Checkpoints: a run that was stopped ends as if it never had been."""

from __future__ import annotations

import itertools
import tempfile
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
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

from pipelines import bundles, checkpoints, trainer, zero
from pipelines import engine as engines
from pipelines.recipe import Run
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
    trainer._join(config)
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
    with checkpoints.Writer(store, "runs/run", train_config()) as writer:
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
    store = GuardedStore(tmp_path, fail)

    def writer() -> checkpoints.Writer:
        return checkpoints.Writer(store, "runs/run", train_config())

    with pytest.raises(OSError, match="no space left"), writer() as at_the_end:
        at_the_end.save(1, engine)
    with pytest.raises(OSError, match="no space left"), writer() as at_the_next:
        at_the_next.save(1, engine)
        at_the_next.save(2, engine)
        pytest.fail("the second save went on")
    with pytest.raises(KeyboardInterrupt) as stopped, writer() as beside_another:
        beside_another.save(1, engine)
        raise KeyboardInterrupt
    assert "no space left" in stopped.value.__notes__[0]
    assert checkpoints.restore(store, "runs/run", engine, print) == 0


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


def test_a_run_whose_checkpoints_are_all_damaged_starts_anew(
    unbroken: dict[int, Store], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = begun(unbroken[1], tmp_path, 3)
    truncate(tmp_path / checkpoints.folder("runs/run", 3) / "model.safetensors")
    final = train(store)
    said = capsys.readouterr().out
    assert "checkpoint of step 3 is damaged" in said and "resumed" not in said
    assert same(final, state(unbroken[1], "models/run")["model"])


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
