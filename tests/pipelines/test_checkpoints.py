"""Checkpoints: a run that was stopped ends as if it never had been."""

from __future__ import annotations

import itertools
import shutil
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from pipelines import bundles, checkpoints
from pipelines.recipe import TrainConfig
from pipelines.storage import Store
from pipelines.tracking import Logger
from pipelines.trainer import fit

STEPS = 7


class Net(nn.Module):
    """Two groups of parameters, a frozen one, a buffer, and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.norm = nn.LayerNorm(16)
        self.drop = nn.Dropout(0.3)
        self.last = nn.Linear(16, 3)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        self.seen += len(batch)
        out = self.last(self.drop(self.norm(self.first(batch)))) + self.frozen
        return {"loss": (out - batch[:, :3]).pow(2).mean()}


@dataclass(frozen=True)
class Recipe:
    stop_at: int | None = None
    """The number of the batch at which the run is interrupted."""

    def build(self) -> nn.Module:
        return Net()

    def layers(self) -> int:
        return 1

    def samples_per_batch(self) -> int:
        return 8

    def batches(self, rank: int, world: int) -> Callable[[int], Tensor]:
        def batch(step: int) -> Tensor:
            if step == self.stop_at:
                raise KeyboardInterrupt
            return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))

        return batch

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        return {}

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        tensors = {k: v.clone() for k, v in module.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        return {}


def train(
    store: Store, stop_at: int | None = None, *, name: str = "run", **changes: Any
) -> dict[str, Tensor]:
    """Train to the end, or until it is interrupted; the trained weights."""
    config = replace(
        TrainConfig(
            steps=STEPS, warmup=2, learning_rate=1e-2, workers=0, checkpoint_every=1,
            keep_checkpoints=2, log_every=1, threads=1,
        ),
        **changes,
    )  # fmt: skip
    fit(
        store, name=name, output=f"models/{name}", fingerprint="same", recipe=Recipe(stop_at),
        config=config, parameters={}, track=False,
    )  # fmt: skip
    return state(store, f"models/{name}")["model"]


def interrupted(store: Store, stop_at: int, **changes: Any) -> None:
    with pytest.raises(KeyboardInterrupt):
        train(store, stop_at, **changes)


def state(store: Store, bundle: str) -> dict[str, dict[str, Tensor]]:
    """The tensors of a bundle, by file."""
    found = store.read_json(f"{bundle}/{bundles.MANIFEST}")["files"]
    return {
        name.removesuffix(".safetensors"): load_file(store.path(bundle, name)) for name in found
    }


def same(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def steps_of(store: Store) -> list[int]:
    names = store.list("runs/run/checkpoints")
    return [int(name.removeprefix("step-")) for name in names]


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Store]:
    """By ZeRO stage, a store with an unbroken run and each of its checkpoints."""
    stores = {stage: Store(tmp_path_factory.mktemp(f"zero-{stage}")) for stage in (0, 1, 2)}
    for stage, store in stores.items():
        train(store, zero_stage=stage, keep_checkpoints=STEPS)
    return stores


def begun(unbroken: Store, folder: Path, step: int) -> Store:
    """A store with a run of that many steps, of which only the last checkpoint is there."""
    name = checkpoints.folder("runs/run", step)
    shutil.copytree(unbroken.path(name), folder / name)
    return Store(folder)


# -- resuming -------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 2])
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
    trained = {"first.weight", "first.bias", "norm.weight", "norm.bias", "last.weight", "last.bias"}
    assert late["model"].keys() == trained | {"frozen", "seen"}
    parts = ("value", *checkpoints.MOMENTS)
    assert late["optimizer"].keys() == {f"{n}:{p}" for n, p in itertools.product(trained, parts)}
    for name, tensor in late["optimizer"].items():
        assert not torch.equal(tensor, early["optimizer"][name]), name
        assert tensor.abs().sum() > 0


@pytest.mark.parametrize(
    "stages", [s for s in itertools.product((0, 1, 2), repeat=2) if s[0] != s[1]]
)
def test_any_stage_goes_on_from_any_other(
    stages: tuple[int, int], unbroken: dict[int, Store], tmp_path: Path
) -> None:
    final = train(begun(unbroken[stages[0]], tmp_path, 3), zero_stage=stages[1])
    wanted = state(unbroken[stages[0]], "models/run")["model"]
    for name, tensor in final.items():
        torch.testing.assert_close(tensor, wanted[name], rtol=1e-5, atol=1e-6, msg=name)


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


def test_accumulated_steps_resume_too(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    whole = train(Store(tmp_path / "whole"), accumulate=2)
    store = Store(tmp_path / "stopped")
    interrupted(store, 9, accumulate=2)  # within the fifth step
    assert same(train(store, accumulate=2), whole)
    assert "resumed from step 4" in capsys.readouterr().out


def test_checkpoints_in_a_bucket(
    unbroken: dict[int, Store], s3_store: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store = Store(s3_store)
    interrupted_at = 4
    with pytest.raises(KeyboardInterrupt):
        train(store, interrupted_at)
    config = TrainConfig(
        steps=STEPS, warmup=2, learning_rate=1e-2, workers=0, checkpoint_every=1, log_every=1,
        threads=1,
    )  # fmt: skip
    fit(
        store, name="run", output="models/run", fingerprint="same", recipe=Recipe(), config=config,
        parameters={}, track=False,
    )  # fmt: skip
    assert "resumed from step 4" in capsys.readouterr().out
    bundles.load(store, "models/run", tmp_path)
    wanted = state(unbroken[1], "models/run")["model"]
    assert same(load_file(tmp_path / "model.safetensors"), wanted)


# -- what is kept, and what is damaged -------------------------------------------------------------


@pytest.mark.parametrize("keep", [1, 3])
def test_only_the_newest_are_kept(keep: int, tmp_path: Path) -> None:
    store = Store(tmp_path)
    interrupted(store, 5, keep_checkpoints=keep)
    assert steps_of(store) == list(range(6 - keep, 6))
    assert all(bundles.exists(store, checkpoints.folder("runs/run", n)) for n in steps_of(store))


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
    begun(unbroken[1], tmp_path, 5)
    (tmp_path / checkpoints.folder("runs/run", 5) / bundles.MANIFEST).unlink()
    final = train(store)
    assert "resumed from step 3" in capsys.readouterr().out
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
