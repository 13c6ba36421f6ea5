"""Checkpoints: a run that was stopped ends as if it never had been.

Runs of two workers are two processes that gloo joins, without Ray, started once for all of them.
"""

from __future__ import annotations

import itertools
import os
import shutil
import tempfile
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from small_corpus import SHAPE, SIZE
from torch import Tensor, nn

from beit3.objectives import MaskedBatch, MaskedDataModelling
from pipelines import budget, bundles, checkpoints, trainer, zero
from pipelines import engine as engines
from pipelines.recipe import Run, TrainConfig
from pipelines.storage import Store, StoreError
from pipelines.tracking import Logger
from pipelines.trainer import fit

STEPS = 7
STAGES = (0, 1, 2, 3)
DECAY = 0.3


class Net(nn.Module):
    """Two groups of parameters, of odd sizes and one too large for ZeRO 3 to keep whole, a frozen
    one, a buffer, and dropout."""

    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.first = nn.Linear(6, 17)
        self.norm = nn.LayerNorm(17)
        self.wide = nn.Linear(17, 6001)
        self.drop = nn.Dropout(dropout)
        self.last = nn.Linear(6001, 3)
        self.frozen = nn.Parameter(torch.randn(3), requires_grad=False)
        self.register_buffer("seen", torch.zeros((), dtype=torch.long))

    def forward(self, batch: Tensor) -> dict[str, Tensor]:
        if self.training:
            self.seen += len(batch)
        hidden = self.drop(self.wide(self.norm(self.first(batch))))
        out = self.last(hidden) + self.frozen
        return {"loss": (out - batch[:, :3]).pow(2).mean()}


@dataclass(frozen=True)
class Recipe:
    stop_at: int | None = None
    """The number of the batch at which the run is interrupted."""
    dropout: float = 0.3

    def build(self) -> nn.Module:
        return Net(self.dropout)

    def layers(self) -> int:
        return 1

    def flops(self, batch: Any) -> float:
        return 0.0

    def samples_per_batch(self) -> int:
        return 8

    def batches(self, rank: int, world: int) -> Callable[[int], Tensor]:
        def batch(step: int) -> Tensor:
            if step == self.stop_at:
                raise KeyboardInterrupt
            return torch.randn(8, 6, generator=torch.Generator().manual_seed(step))[rank::world]

        return batch

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(1_000))
        return {"loss": float(module(batch)["loss"])}

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        tensors = {k: v.clone() for k, v in module.state_dict().items()}
        save_file(tensors, folder / "model.safetensors")
        return {}


def train(
    store: Store, stop_at: int | None = None, *, name: str = "run", **changes: Any
) -> dict[str, Tensor]:
    """Train to the end, or until it is interrupted; the trained weights."""
    recipe = changes.pop("recipe", None) or Recipe(stop_at, changes.pop("dropout", 0.3))
    fit(
        store, name=name, output=f"models/{name}", fingerprint="same", recipe=recipe,
        config=train_config(**changes), parameters={}, track=False,
    )  # fmt: skip
    return state(store, f"models/{name}")["model"]


def train_config(**changes: Any) -> TrainConfig:
    start = TrainConfig(
        steps=STEPS, warmup=2, learning_rate=1e-2, workers=0, checkpoint_every=1,
        keep_checkpoints=2, log_every=1, threads=1, zero_stage=1,
    )  # fmt: skip
    return replace(start, **changes)


def evaluated(store: Store, bundle: str = "models/run") -> float:
    """The loss of an exported model, as the recipe's evaluation computes it."""
    net = Net(0.0).eval().requires_grad_(False)
    net.load_state_dict(state(store, bundle)["model"])
    return Recipe().evaluate(net, 0, Logger(None))["loss"]


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


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5, msg=name)


def steps_of(store: Store) -> list[int]:
    names = store.list("runs/run/checkpoints")
    return [int(name.removeprefix("step-")) for name in names]


# -- two workers ----------------------------------------------------------------------------------


class Masked(Recipe):
    """Masked pretraining, whose positions of text are used outside of their module's forward."""

    def build(self) -> nn.Module:
        # So many positions that ZeRO 3 does not keep them whole.
        return MaskedDataModelling(replace(SHAPE, max_text_length=4_000))

    def batches(self, rank: int, world: int) -> Callable[[int], MaskedBatch]:
        def batch(step: int) -> MaskedBatch:
            rng = np.random.default_rng((step, rank))
            images, patches = 4, SHAPE.patches
            texts = [rng.integers(4, SHAPE.vocab_size, int(n)).tolist() for n in (9, 7, 12)]
            return MaskedBatch.collate(
                torch.from_numpy(rng.integers(0, 256, (images, 3, SIZE, SIZE), dtype=np.uint8)),
                torch.from_numpy(np.arange(patches)[None].repeat(images, 0) % 2 == 0),
                torch.from_numpy(rng.integers(0, SHAPE.codebook_size, (images, patches))),
                texts,
                [np.arange(len(text)) % 3 == 1 for text in texts],
                mask_id=3,
                pairs=2,
            )

        return batch

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        return {"loss": float(module(self.batches(0, 1)(1_000))["loss"])}


class Uneven(Masked):
    """The same samples on one worker or two, of which each hides another number of places."""

    def batches(self, rank: int, world: int) -> Callable[[int], MaskedBatch]:
        def batch(step: int) -> MaskedBatch:
            rng = np.random.default_rng(step)
            images = rng.integers(0, 256, (4, 3, SIZE, SIZE), dtype=np.uint8)
            hidden = rng.random((4, SHAPE.patches)) < np.array([[0.2], [0.7], [0.4], [0.6]])
            words = rng.integers(0, SHAPE.codebook_size, (4, SHAPE.patches))
            texts = [rng.integers(4, SHAPE.vocab_size, length) for length in (5, 14, 6, 17)]
            masked = [rng.random(len(text)) < 0.4 for text in texts]
            own = range(rank, 4, world)  # two images alone, two pairs; two pairs, two texts alone
            return MaskedBatch.collate(
                torch.from_numpy(images[own]),
                torch.from_numpy(hidden[own]),
                torch.from_numpy(words[own]),
                [texts[i].tolist() for i in own],
                [masked[i] for i in own],
                mask_id=3,
                pairs=2 // world,
            )

        return batch


class Lacking(Recipe):
    """Masked pretraining where a worker has nothing of what the other has, now of this, now that:
    nothing to predict of texts, or of pictures, no pairs, nothing alone."""

    def build(self) -> nn.Module:
        return MaskedDataModelling(replace(SHAPE, checkpoint_activations="blocks"))

    def batches(self, rank: int, world: int) -> Callable[[int], MaskedBatch]:
        def batch(step: int) -> MaskedBatch:
            rng = np.random.default_rng((step, rank))
            lacks = ("", "words", "patches", "pairs", "alone")[step % 5] if step % 2 == rank else ""
            pairs = 0 if lacks == "pairs" else 2
            images, texts = (pairs, pairs) if lacks == "alone" else (4, 3)
            hidden = np.arange(SHAPE.patches)[None].repeat(images, 0) % 2 == 0
            lengths = rng.integers(5, 12, texts)
            return MaskedBatch.collate(
                torch.from_numpy(rng.integers(0, 256, (images, 3, SIZE, SIZE), dtype=np.uint8)),
                torch.from_numpy(hidden & (lacks != "patches")),
                torch.from_numpy(rng.integers(0, SHAPE.codebook_size, hidden.shape)),
                [rng.integers(4, SHAPE.vocab_size, n).tolist() for n in lengths],
                [(np.arange(n) % 3 == 1) & (lacks != "words") for n in lengths],
                mask_id=3,
                pairs=pairs,
            )

        return batch

    def evaluate(self, module: nn.Module, step: int, logger: Logger) -> dict[str, float]:
        return {}


@dataclass(frozen=True)
class Job:
    """A run of two workers, from the start or from a checkpoint of another run's.

    bucket: Elements of the buffers that gradients are reduced in; 0: all of them.
    """

    name: str
    changes: dict[str, Any]
    recipe: Recipe = Recipe()
    begin: tuple[Path, int] | None = None
    bucket: int = 0


def _two(rank: int, root: Path, jobs: list[Job]) -> None:
    """What each of the two processes does."""
    os.environ |= {"DS_ACCELERATOR": "cpu", "LOCAL_RANK": str(rank)}
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{root}/group", rank=rank, world_size=2,
        timeout=timedelta(minutes=1),
    )  # fmt: skip
    trainer._join = lambda config: (rank, 2, torch.device("cpu"))
    largest = budget._BUCKET
    for job in jobs:
        budget._BUCKET = job.bucket or largest
        if rank == 0 and job.begin:
            begun(Store(job.begin[0]), root / job.name, job.begin[1])
        dist.barrier()
        config = train_config(workers=2, keep_checkpoints=STEPS, **job.changes)
        uri = Store(root / job.name).uri
        trainer._worker(
            {"run": Run(uri, "runs/run", "models/run", "same", job.recipe, config)},
        )


@pytest.fixture(scope="module")
def pairs(unbroken: dict[int, Store], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Store]:
    """Stores of runs of two workers, by name; `alone`, without dropout, and `uneven` are of one."""
    root = tmp_path_factory.mktemp("pairs")
    train(Store(root / "alone"), keep_checkpoints=STEPS, dropout=0.0)
    train(Store(root / "uneven"), recipe=Uneven(), keep_checkpoints=STEPS)
    averaged = {"ema": DECAY}
    overlapping = {"gpus_per_worker": 1.0, "accumulate": 2}
    jobs = [
        *(Job(f"zero-{s}", {"zero_stage": s, **averaged}) for s in STAGES),
        *(Job(f"offload-{s}", {"zero_stage": s, "offload": True, **averaged}) for s in (1, 2, 3)),
        *(
            Job(f"again-{s}", {"zero_stage": s, **averaged}, begin=(root / f"zero-{s}", 3))
            for s in (2, 3)
        ),
        *(
            Job(
                f"from-{a}-to-{b}",
                {"zero_stage": b, "offload": True, **averaged},
                begin=(root / f"zero-{a}", 3),
            )
            for a, b in ((3, 1), (1, 3))
        ),
        Job("grown", {"zero_stage": 3}, Recipe(dropout=0.0), begin=(root / "alone", 3)),
        *(Job(f"masked-{s}", {"zero_stage": s}, Masked()) for s in STAGES),
        *(Job(f"uneven-{s}", {"zero_stage": s}, Uneven()) for s in (1, 3)),
        *(Job(f"lacking-{s}", {"zero_stage": s}, Lacking(), bucket=5_000) for s in STAGES),
        Job("accumulated", {"zero_stage": 0, "accumulate": 2}),
        # As on GPUs: gradients are reduced while others are computed; some exceed a bucket.
        *(
            Job(f"overlapping-{s}", {"zero_stage": s, **overlapping}, bucket=10_000)
            for s in (1, 2, 3)
        ),
        Job("zero-3-bf16", bf16 := {"zero_stage": 3, "precision": "bf16"}, Masked()),
        Job("again-3-bf16", bf16, Masked(), begin=(root / "zero-3-bf16", 3)),
    ]
    torch.multiprocessing.spawn(_two, (root, jobs), nprocs=2)
    names = ("alone", "uneven", *(job.name for job in jobs))
    return {name: Store(root / name) for name in names}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[int, Store]:
    """By ZeRO stage, a store with an unbroken run and each of its checkpoints."""
    stores = {stage: Store(tmp_path_factory.mktemp(f"zero-{stage}")) for stage in STAGES}
    for stage, store in stores.items():
        train(store, zero_stage=stage, keep_checkpoints=STEPS)
    return stores


def begun(unbroken: Store, folder: Path, step: int) -> Store:
    """A store with a run of that many steps, of which only the last checkpoint is there."""
    name = checkpoints.folder("runs/run", step)
    shutil.copytree(unbroken.path(name), folder / name)
    return Store(folder)


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "zero-3"])
def test_stages_agree_on_two_workers(name: str, pairs: dict[str, Store]) -> None:
    for step in range(1, STEPS):
        where = checkpoints.folder("runs/run", step)
        found, wanted = state(pairs[name], where), state(pairs["zero-0"], where)
        assert found.keys() == wanted.keys() == {"model", "optimizer", "average"}
        for file, tensors in found.items():
            close(tensors, wanted[file])
    close(state(pairs[name], "models/run")["model"], state(pairs["zero-0"], "models/run")["model"])


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_an_offloaded_optimizer_agrees(stage: int, pairs: dict[str, Store]) -> None:
    where = checkpoints.folder("runs/run", STEPS - 1)
    found, wanted = (state(pairs[f"{n}-{stage}"], where) for n in ("offload", "zero"))
    for file, tensors in found.items():
        close(tensors, wanted[file])


@pytest.mark.parametrize("stage", ["2", "3", "3-bf16"])
def test_two_workers_go_on_to_the_bit(stage: str, pairs: dict[str, Store]) -> None:
    whole, resumed = pairs[f"zero-{stage}"], pairs[f"again-{stage}"]
    where = checkpoints.folder("runs/run", STEPS - 1)
    for file, tensors in state(whole, where).items():
        assert same(tensors, state(resumed, where)[file]), file
    assert same(state(whole, "models/run")["model"], state(resumed, "models/run")["model"])


@pytest.mark.parametrize("name", ["from-3-to-1", "from-1-to-3"])
def test_two_workers_go_on_at_another_stage(name: str, pairs: dict[str, Store]) -> None:
    """And with the optimizer offloaded, which it was not before."""
    where = checkpoints.folder("runs/run", STEPS - 1)
    for file, tensors in state(pairs[name], where).items():
        close(tensors, state(pairs["zero-0"], where)[file])


def test_fewer_and_more_workers_go_on(pairs: dict[str, Store], tmp_path: Path) -> None:
    """One worker at ZeRO 1, two at ZeRO 3, one at ZeRO 1: as if it had been one all along."""
    shrunk = train(begun(pairs["grown"], tmp_path, 5), dropout=0.0)
    for step in (4, 6):
        where = checkpoints.folder("runs/run", step)
        store = pairs["grown"] if step == 4 else Store(tmp_path)
        for file, tensors in state(pairs["alone"], where).items():
            close(but_seen(state(store, where)[file]), but_seen(tensors))
    wanted = state(pairs["alone"], "models/run")["model"]
    close(but_seen(shrunk), but_seen(wanted))
    close(but_seen(state(pairs["grown"], "models/run")["model"]), but_seen(wanted))


def but_seen(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without the buffer that counts a worker's own samples."""
    return {name: tensor for name, tensor in tensors.items() if name != "seen"}


@pytest.mark.parametrize("stage", STAGES)
def test_what_is_evaluated_is_what_is_exported(stage: int, pairs: dict[str, Store]) -> None:
    store = pairs[f"zero-{stage}"]
    metrics = bundles.info(store, "models/run")["metrics"]
    assert metrics["loss"] == pytest.approx(evaluated(store), rel=1e-5)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_masked_pretraining_agrees_at_every_stage(stage: int, pairs: dict[str, Store]) -> None:
    one, other = (pairs[f"masked-{number}"] for number in (0, stage))
    close(state(one, "models/run")["model"], state(other, "models/run")["model"])
    losses = [bundles.info(store, "models/run")["metrics"]["loss"] for store in (one, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("stage", [1, 3])
def test_masked_places_count_alike_whichever_worker_has_them(
    stage: int, pairs: dict[str, Store]
) -> None:
    """The loss is the mean over all of them, not of the workers' means."""
    for step in (1, 2):  # of each step's gradient the first moment holds a tenth
        where = checkpoints.folder("runs/run", step)
        one, two = (state(pairs[name], where) for name in ("uneven", f"uneven-{stage}"))
        for name, moment in one["optimizer"].items():
            torch.testing.assert_close(two["optimizer"][name], moment, rtol=1e-3, atol=1e-7)
    names = ("uneven", f"uneven-{stage}")
    one, two = (but_keys_bias(state(pairs[name], "models/run")["model"]) for name in names)
    close(two, one)


def but_keys_bias(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what no softmax sees: its gradient is rounding alone, of which Adam makes steps."""
    found = dict(tensors)
    for name in tensors:
        if "qkv" in name and name.endswith("bias"):
            queries, _, values = found[name].chunk(3)
            found[name] = torch.cat([queries, values])
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_workers_whose_batches_differ_in_kind_agree(stage: int, pairs: dict[str, Store]) -> None:
    one, other = (state(pairs[f"lacking-{s}"], "models/run")["model"] for s in (0, stage))
    close(one, other)


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_reducing_beside_the_backward_pass_changes_nothing(
    stage: int, pairs: dict[str, Store]
) -> None:
    for step in range(1, STEPS):
        where = checkpoints.folder("runs/run", step)
        wanted = state(pairs["accumulated"], where)
        for file, tensors in state(pairs[f"overlapping-{stage}"], where).items():
            close(tensors, wanted[file])


# -- the average of the weights --------------------------------------------------------------------


@pytest.mark.parametrize("stage", STAGES)
def test_the_average_is_what_a_plain_computation_finds(stage: int, pairs: dict[str, Store]) -> None:
    plain: dict[str, Tensor] = {}
    for step in range(1, STEPS):
        found = state(pairs[f"zero-{stage}"], checkpoints.folder("runs/run", step))
        decay = min(DECAY, (1 + step) / (10 + step))
        for name, average in found["average"].items():
            weight = found["model"][name].double()
            plain[name] = decay * plain.get(name, weight) + (1 - decay) * weight
            torch.testing.assert_close(average, plain[name].float(), rtol=1e-5, atol=1e-6)
            assert step < 3 or not torch.equal(average, found["model"][name])
    assert plain.keys() == {n for n, p in Net(0.0).named_parameters() if p.requires_grad}


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


# -- resuming -------------------------------------------------------------------------------------


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
