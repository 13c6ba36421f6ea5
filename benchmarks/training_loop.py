"""Measures what Ray Train, the loader and MLflow cost a training job over a bare PyTorch loop.

    python -m benchmarks.training_loop                                  # base, this machine's CPU
    python -m benchmarks.training_loop --device cuda --precision bf16 --loader-workers 8

The job is the real one (`pipelines.trainer.fit`, as `pipelines/pretrain.py` calls it): a Ray Train
worker with its DeepSpeed engine and its guards, batches made from committed Parquet during the
steps, curves and the machine's use in MLflow (a SQLite file, or MLFLOW_TRACKING_URI). Checkpoints
are off: `benchmarks/checkpoints.py` measures those. Its data are random JPEGs, alone and with
captions, and documents (`benchmarks/_samples.py`).

The bare loop is what a competent person writes: the same model, fused AdamW of the same groups,
clipping by `torch.nn.utils`, on the same batches, which lie on the device before its clock starts.
It has no loader, engine, guard or log. After the same steps both must have the same loss.

Each runs in a fresh process, `--repeats` of each in turns. The steps up to the first log are
warm-up: they take the batches that were made ahead, and measure the machine's peak. For the other
steps, it prints, as medians over the turns and as a ratio, the steps per second and the training
process's CPU seconds per step, which other programs on the machine disturb less; and the ratio of
each turn.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

# Before torch loads, for both: threads that spin while they wait starve each other.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import pyarrow as pa
import torch
from torch import nn

from beit3.config import PRESETS
from beit3.device import DTYPES, computing_in, synchronise, to_device
from beit3.objectives import MaskedBatch
from beit3.optimisation import cosine_schedule, parameter_groups
from benchmarks import _measure
from benchmarks._samples import draw
from benchmarks.loader import Mask, photos, publish, views
from pipelines import cluster, config, tracking
from pipelines.lineage import fingerprint
from pipelines.pretrain import PretrainRecipe
from pipelines.pretrain_config import PretrainConfig
from pipelines.recipe import TrainConfig
from pipelines.storage import Store
from pipelines.tokenize_corpus import TEXT_TOKENS
from pipelines.trainer import fit

KINDS = ("bare", "job")
DIFFERENT = 64  # pictures


@dataclass(frozen=True)
class Recipe(PretrainRecipe):
    """Pretraining that notes when each of its steps begins, and leaves no model."""

    begun: list[tuple[float, float]] = field(default_factory=list)
    """The time, and the process's CPU seconds by then."""

    def flops(self, batch: MaskedBatch) -> float:
        self.begun.append(_now())  # its batch has come
        return super().flops(batch)

    def export(self, module: nn.Module, folder: Path) -> dict[str, Any]:
        return {"begun": self.begun}


def _now() -> tuple[float, float]:
    return time.monotonic(), time.process_time()


def recipe(options: argparse.Namespace) -> Recipe:
    batch, steps = options.samples, steps_of(options)
    return Recipe(
        PretrainConfig(
            store=options.store,
            name=f"turn-{options.turn}",
            images=("photos",),
            texts=("documents",),
            pairs=("captioned",),
            image_batch=batch,
            text_batch=batch,
            pair_batch=batch,
            model=PRESETS[options.preset],
            train=TrainConfig(
                steps=steps,
                warmup=steps - 1,
                precision=options.precision,
                zero_stage=options.zero_stage,
                gpus_per_worker=float(options.device != "cpu"),
                threads=options.threads,
                loader_workers=options.loader_workers,
                compile=options.compile,
                checkpoint_every=0,
                log_every=options.log_every,
                seed=options.seed,
            ),
        ),
        Mask(PRESETS[options.preset]),
    )


def steps_of(options: argparse.Namespace) -> int:
    """Steps of a run: warm-up, the timed ones, and one that ends the time of the last."""
    return options.log_every + options.steps + 1


def prepare(options: argparse.Namespace) -> None:
    """Commit the rows of each kind that a run takes."""
    store, model = Store(options.store), PRESETS[options.preset]
    rows = options.samples * steps_of(options)
    texts = draw(model, images=0, texts=rows, pairs=rows, seed=options.seed)
    pictures = photos(min(DIFFERENT, rows), options.seed)
    drawn = views(pictures, rows, options.seed)
    publish(store, pictures, drawn, model=model)
    publish(store, pictures, drawn, model=model, name="captioned", captions=texts.captions)
    documents = [{"id": f"documents/{i}", "ids": ids} for i, ids in enumerate(texts.documents)]
    dataset, mark = store.dataset("tokens/documents"), fingerprint("benchmark", "documents")
    part = dataset.write_part(mark, "00000", pa.Table.from_pylist(documents, TEXT_TOKENS))
    dataset.publish(
        mark,
        [part],
        schema=TEXT_TOKENS,
        job="benchmark",
        inputs=[{"dataset": "text/documents", "tokenizers": {}}],
        stats={},
        config={},
    )


def run_job(options: argparse.Namespace) -> dict[str, Any]:
    """Train as a job does; returns seconds per timed step, last loss, and the wait for batches."""
    store, wanted = Store(options.store), recipe(options)
    cluster.start()
    cfg = wanted.cfg
    info = fit(
        store,
        name=cfg.name,
        output=f"models/{cfg.name}",
        fingerprint=fingerprint("benchmark", cfg.name),
        recipe=wanted,
        config=cfg.train,
        parameters=config.flatten(cfg),
    )
    handle = tracking.RunHandle(**store.read_json(f"runs/{cfg.name}/mlflow.json"))
    tracker = tracking.client(handle.uri)

    def logged(name: str) -> dict[int, float]:
        found = tracker.get_metric_history(handle.run_id, f"train/{name}")
        return {metric.step: metric.value for metric in found}

    begun, last = info["begun"][options.log_every :], options.log_every + options.steps
    waited = logged("data_wait_share")
    return {
        **_per_step(options, begun[0], begun[-1]),
        "loss": logged("loss")[last],
        "waited": waited[last],
    }


def _per_step(
    options: argparse.Namespace, start: Sequence[float], end: Sequence[float]
) -> dict[str, float]:
    seconds, busy = ((late - early) / options.steps for early, late in zip(start, end, strict=True))
    return {"seconds": seconds, "busy": busy}


def run_bare(options: argparse.Namespace) -> dict[str, Any]:
    """Train in a plain loop; returns seconds per timed step, and the last loss."""
    wanted, device = recipe(options), torch.device(options.device)
    train = wanted.cfg.train
    torch.manual_seed(train.seed)
    module = wanted.build().to(device).train()
    if options.compile:
        module.compile()
    optimizer = torch.optim.AdamW(
        parameter_groups(module, weight_decay=train.weight_decay),
        betas=train.betas,
        eps=train.eps,
        fused=True,  # as the job's
    )
    make = wanted.batches(0, 1)
    batches: list[MaskedBatch] = [to_device(make(step), device) for step in range(train.steps)]
    begun, loss = _now(), torch.zeros(())
    for step, batch in enumerate(batches[:-1]):
        if step == options.log_every:
            synchronise(device)
            begun = _now()
        rate = cosine_schedule(
            step, peak=train.learning_rate, warmup=train.warmup, steps=train.steps
        )
        for group in optimizer.param_groups:
            group["lr"] = rate
        with computing_in(options.precision, device):
            loss = module(batch)["loss"]
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), train.clip)
        optimizer.step()
    synchronise(device)
    return {**_per_step(options, begun, _now()), "loss": loss.item()}


def measure(options: argparse.Namespace, arguments: Sequence[str]) -> dict[str, list[Any]]:
    """Run both in turns; returns their measurements.

    Raises:
        RuntimeError: their losses differ.
    """
    found: dict[str, list[Any]] = {kind: [] for kind in KINDS}
    for turn in range(options.repeats):
        for kind in KINDS if turn % 2 == 0 else reversed(KINDS):
            more = ["--worker", kind, "--turn", str(turn)]
            one = _measure.fresh("benchmarks.training_loop", [*arguments, *more])
            print(f"  {kind}: {one['seconds']:.3f} s per step", file=sys.stderr)
            found[kind].append(one)
    losses = [one["loss"] for of_kind in found.values() for one in of_kind]
    tolerance = 1e-3 if options.precision == "fp32" else 2e-2
    if not max(losses) - min(losses) <= tolerance * abs(max(losses)):
        raise RuntimeError(f"the losses differ: {losses}")
    return found


def report(options: argparse.Namespace, found: dict[str, list[Any]]) -> str:
    model = PRESETS[options.preset]
    with torch.device("meta"):
        module = recipe(options).build()
    parameters = sum(p.numel() for p in module.parameters())
    bare, job = (median(one["seconds"] for one in found[kind]) for kind in KINDS)
    busy = [median(one["busy"] for one in found[kind]) for kind in KINDS]
    turns = zip(found["bare"], found["job"], strict=True)
    ratios = [b["seconds"] / j["seconds"] for b, j in turns]
    waited = 100 * median(one["waited"] for one in found["job"])
    losses = [found[kind][0]["loss"] for kind in KINDS]
    lines = [
        f"{options.preset}, {model.image_size} px, {parameters / 1e6:.0f}M parameters, "
        f"{options.precision}{', compiled' if options.compile else ''}, ZeRO {options.zero_stage}, "
        f"{_measure.machine(torch.device(options.device))}",
        f"a step has {options.samples} images alone, {options.samples} texts, {options.samples} "
        f"pairs; logged every {options.log_every}; batches made by "
        f"{options.loader_workers or 'a thread, not'} processes",
        f"loss after {options.log_every + options.steps} steps: bare {losses[0]:.4f}, "
        f"job {losses[1]:.4f}",
        f"{'':26}{'bare loop':>12}{'job':>12}{'ratio':>8}",
        f"{'steps/s':26}{1 / bare:12.4f}{1 / job:12.4f}{bare / job:8.3f}",
        f"{'seconds per step':26}{bare:12.3f}{job:12.3f}{job / bare:8.3f}",
        f"{'CPU seconds per step':26}{busy[0]:12.3f}{busy[1]:12.3f}{busy[1] / busy[0]:8.3f}",
        f"ratio of steps/s of each turn: {', '.join(f'{one:.3f}' for one in ratios)}",
        f"the job waited for batches {waited:.2f} % of its time",
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.training_loop",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="base")
    parser.add_argument("--samples", type=int, help="of each kind in a step; default: 4, GPU 32")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=0)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, default=0, help="default: one for each CPU")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--loader-workers", type=int, default=0)
    parser.add_argument("--log-every", type=int, default=5)
    parser.add_argument("--steps", type=int, default=10, help="timed, after those of the warm-up")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=KINDS, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    options.samples = options.samples or (4 if options.device == "cpu" else 32)
    if min(options.samples, options.log_every, options.steps, options.repeats) < 1:
        parser.error("--samples, --log-every, --steps, --repeats: expected at least 1")
    if options.steps % options.log_every:
        parser.error("--steps: expected a multiple of --log-every, so that all its cost is in")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    torch.set_num_threads(options.threads or os.cpu_count() or 1)  # as the job's worker does
    if options.worker:
        print(json.dumps({"bare": run_bare, "job": run_job}[options.worker](options)))
        return
    with tempfile.TemporaryDirectory() as folder:
        options.store = folder
        prepare(options)
        found = measure(options, [*arguments, "--store", folder])
    print(report(options, found))


if __name__ == "__main__":
    main()
