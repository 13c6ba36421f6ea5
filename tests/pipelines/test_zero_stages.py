"""ZeRO stages on two workers agree, with each other and with one worker, also after a stop."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from small_corpus import SHAPE, SIZE
from small_net import (
    DECAY,
    STAGES,
    STEPS,
    Net,
    Recipe,
    agree,
    begun,
    close,
    evaluated,
    same,
    state,
    train,
    train_config,
)
from torch import Tensor, nn
from two_workers import on_two_workers, run

from beit3.objectives import MaskedBatch, MaskedDataModelling, of_one_step
from pipelines import budget, bundles, checkpoints, engine
from pipelines.run_logger import Logger
from pipelines.storage import Store


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


@dataclass(frozen=True)
class Uneven(Masked):
    """The same samples on one worker or two, or in two batches, of which each hides another number
    of places."""

    parts: int = 1
    """Batches of a step."""

    def of_one_step(self, batches: Sequence[MaskedBatch]) -> Sequence[MaskedBatch]:
        return of_one_step(batches)

    def batches(self, rank: int, world: int) -> Callable[[int], MaskedBatch]:
        def batch(number: int) -> MaskedBatch:
            step, part = divmod(number, self.parts)
            rng = np.random.default_rng(step)
            images = rng.integers(0, 256, (4, 3, SIZE, SIZE), dtype=np.uint8)
            hidden = rng.random((4, SHAPE.patches)) < np.array([[0.2], [0.7], [0.4], [0.6]])
            words = rng.integers(0, SHAPE.codebook_size, (4, SHAPE.patches))
            texts = [rng.integers(4, SHAPE.vocab_size, length) for length in (5, 14, 6, 17)]
            masked = [rng.random(len(text)) < 0.4 for text in texts]
            # Two images alone, two pairs; two pairs, two texts alone.
            own = range(rank + part, 4, world * self.parts)
            return MaskedBatch.collate(
                torch.from_numpy(images[own]),
                torch.from_numpy(hidden[own]),
                torch.from_numpy(words[own]),
                [texts[i].tolist() for i in own],
                [masked[i] for i in own],
                mask_id=3,
                pairs=2 // (world * self.parts),
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
    recipe: Recipe = field(default_factory=Recipe)
    begin: tuple[Path, int] | None = None
    bucket: int = 0


# Runs that only slow tests look at.
SLOW = {
    *("offload-1", "offload-2", "again-2", "from-1-to-3"),
    *("masked-1", "masked-2", "uneven-1", "lacking-1", "lacking-2"),
    *("compiled-0", "compiled-2", "accumulated", "overlapping-1", "overlapping-2", "overlapping-3"),
    *("zero-3-bf16", "again-3-bf16"),
}


def cases(runs: str, *values: int | str) -> list[Any]:
    """A case for each value, which fills the name in `runs`; a slow one if that run is."""
    marks = {value: [pytest.mark.slow] * (runs.format(value) in SLOW) for value in values}
    return [pytest.param(value, marks=marks[value]) for value in values]


def _all(root: Path, jobs: list[Job], rank: int) -> None:
    largest = budget._BUCKET
    engine._COMPILER = "aot_eager"  # the graphs of inductor, without its minutes
    counters = torch._dynamo.utils.counters
    for job in jobs:
        budget._BUCKET = job.bucket or largest
        if rank == 0 and job.begin:
            begun(Store(job.begin[0]), root / job.name, job.begin[1])
        dist.barrier()
        config = train_config(workers=2, keep_checkpoints=STEPS, **job.changes)
        torch._dynamo.reset()
        counters.clear()
        run(Store(root / job.name), "run", job.recipe, config)
        assert bool(counters["stats"]["unique_graphs"]) == config.compile
        assert not counters["graph_break"]


@pytest.fixture(scope="module")
def pairs(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Store]:
    """Stores of runs of two workers, by name; `alone`, without dropout, `uneven` and `in-parts` are
    of one."""
    root = tmp_path_factory.mktemp("pairs")
    train(Store(root / "alone"), keep_checkpoints=STEPS, dropout=0.0)
    train(Store(root / "uneven"), recipe=Uneven(), keep_checkpoints=STEPS)
    train(Store(root / "in-parts"), recipe=Uneven(parts=2), keep_checkpoints=STEPS, accumulate=2)
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
        *(Job(f"compiled-{s}", {"zero_stage": s, "compile": True}, Masked()) for s in (0, 1, 2)),
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
    asked = [item for item in request.session.items if item.path == request.path]
    if not any(item.get_closest_marker("slow") for item in asked):
        jobs = [job for job in jobs if job.name not in SLOW]
    on_two_workers(partial(_all, root, jobs), root)
    names = ("alone", "uneven", "in-parts", *(job.name for job in jobs))
    return {name: Store(root / name) for name in names}


@pytest.mark.parametrize("name", ["zero-1", "zero-2", "zero-3"])
def test_stages_agree_on_two_workers(name: str, pairs: dict[str, Store]) -> None:
    for step in range(1, STEPS):
        where = checkpoints.folder("runs/run", step)
        found, wanted = state(pairs[name], where), state(pairs["zero-0"], where)
        assert found.keys() == wanted.keys() == {"model", "optimizer", "average"}
        for file, tensors in found.items():
            close(tensors, wanted[file])
    close(state(pairs[name], "models/run")["model"], state(pairs["zero-0"], "models/run")["model"])


@pytest.mark.parametrize("stage", cases("offload-{}", 1, 2, 3))
def test_an_offloaded_optimizer_agrees(stage: int, pairs: dict[str, Store]) -> None:
    agree(pairs[f"offload-{stage}"], pairs[f"zero-{stage}"], STEPS - 1)


@pytest.mark.parametrize("stage", cases("again-{}", "2", "3", "3-bf16"))
def test_two_workers_go_on_to_the_bit(stage: str, pairs: dict[str, Store]) -> None:
    whole, resumed = pairs[f"zero-{stage}"], pairs[f"again-{stage}"]
    where = checkpoints.folder("runs/run", STEPS - 1)
    for file, tensors in state(whole, where).items():
        assert same(tensors, state(resumed, where)[file]), file
    assert same(state(whole, "models/run")["model"], state(resumed, "models/run")["model"])


@pytest.mark.parametrize("name", cases("{}", "from-3-to-1", "from-1-to-3"))
def test_two_workers_go_on_at_another_stage(name: str, pairs: dict[str, Store]) -> None:
    """And with the optimizer offloaded, which it was not before."""
    agree(pairs[name], pairs["zero-0"], STEPS - 1)


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


@pytest.mark.parametrize("stage", cases("masked-{}", 1, 2, 3))
def test_masked_pretraining_agrees_at_every_stage(stage: int, pairs: dict[str, Store]) -> None:
    one, other = (pairs[f"masked-{number}"] for number in (0, stage))
    close(state(one, "models/run")["model"], state(other, "models/run")["model"])
    losses = [bundles.info(store, "models/run")["metrics"]["loss"] for store in (one, other)]
    assert losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.parametrize("stage", cases("compiled-{}", 0, 1, 2))
def test_compiled_steps_compute_the_same(stage: int, pairs: dict[str, Store]) -> None:
    plain, compiled = (pairs[name] for name in ("masked-0", f"compiled-{stage}"))
    close(state(compiled, "models/run")["model"], state(plain, "models/run")["model"])


def test_parameters_that_are_in_pieces_are_not_compiled() -> None:
    with pytest.raises(ValueError, match=r"train.compile: not with train.zero_stage 3"):
        train_config(zero_stage=3, compile=True)


@pytest.mark.parametrize("name", cases("{}", "uneven-1", "uneven-3", "in-parts"))
def test_masked_places_count_alike_in_whichever_batch_they_are(
    name: str, pairs: dict[str, Store]
) -> None:
    """The loss is the mean over all of them, not of the means of workers or batches."""
    names = ("uneven", name)
    for step in (1, 2):  # of each step's gradient the first moment holds a tenth
        where = checkpoints.folder("runs/run", step)
        one, two = (state(pairs[name], where) for name in names)
        for key, moment in one["optimizer"].items():
            torch.testing.assert_close(two["optimizer"][key], moment, rtol=1e-3, atol=1e-7)
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


@pytest.mark.parametrize("stage", cases("lacking-{}", 1, 2, 3))
def test_workers_whose_batches_differ_in_kind_agree(stage: int, pairs: dict[str, Store]) -> None:
    one, other = (state(pairs[f"lacking-{s}"], "models/run")["model"] for s in (0, stage))
    close(one, other)


@pytest.mark.parametrize("stage", cases("overlapping-{}", 1, 2, 3))
def test_reducing_beside_the_backward_pass_changes_nothing(
    stage: int, pairs: dict[str, Store]
) -> None:
    for step in range(1, STEPS):
        agree(pairs[f"overlapping-{stage}"], pairs["accumulated"], step)


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
