"""Measures how busy a sweep keeps its workers.

    python -m benchmarks.sweep                                    # 16 trials on 2 workers
    python -m benchmarks.sweep --trials 8 --workers 2 --steps 400 --scheduler asha

A worker is room for one trial, a CPU of this machine. Each trial finetunes a small model on the
sample world's retrieval task (`pipelines/sample_world`). A worker is busy from the moment at which
a process takes up a trial until Tune hears that the trial has ended; loading data, building the
model and evaluating are part of the trial. Time is lost in *waiting*, the start of the first
processes and the time between two trials; and in the *tail*, when fewer trials are left than there
are workers.

Prints the share of the workers' time in which they were busy, the aim (0.9), both losses, and how
long a trial took and a worker waited for one.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

# Before torch loads: threads that spin while they wait starve each other on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch

from beit3 import weights
from beit3.config import PRESETS
from beit3.objectives import MaskedDataModelling
from beit3.text import TextTokenizer
from pipelines import bundles, cluster, finetune, models, prepare_task, train_text_tokenizer
from pipelines.sample_world import WorldSize, generate
from pipelines.storage import Store
from pipelines.train_text_tokenizer import TextTokenizerConfig
from tuning import sweep
from tuning.sweep import SweepConfig

AIM = 0.9


def prepare(store: Store, world_folder: Path) -> None:
    """Make a pretrained model, with random weights, and the data of a retrieval task."""
    world = generate(world_folder, size=WorldSize.tiny(), base_url="http://127.0.0.1:1")
    prepare_task.run(
        replace(
            prepare_task.PRESETS["retrieval"],
            store=store.uri,
            in_process=True,
            annotations=str(world.annotations("coco")),
            images=str(world.images("coco")),
            splits=("train", "val"),
            short_side=48,
        )
    )
    rows = store.dataset("tasks/retrieval/train").read_table().to_pylist()
    sentences = [example["text"] for row in rows for example in row["examples"]]
    tokenizer = TextTokenizerConfig(images=("x",), vocab_size=60, character_coverage=1.0, threads=1)
    shape = replace(PRESETS["tiny"], vocab_size=64)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        weights.save(Path(folder), MaskedDataModelling(shape), shape, kind="pretrained")
        learned = TextTokenizer(train_text_tokenizer.train(sentences, tokenizer))
        models.add_tokenizer(Path(folder), learned)
        bundles.save(store, "models/pretrained", Path(folder), {"kind": "pretrained"})


def sweep_config(options: argparse.Namespace, store: Store) -> SweepConfig:
    base = finetune.preset("tiny", "retrieval")
    evaluations = 4
    train = replace(
        base.train,
        steps=options.steps,
        warmup=options.steps // 10,
        evaluate_every=max(1, options.steps // evaluations),
        log_every=options.steps,
        threads=1,
    )
    return SweepConfig(
        name="benchmark",
        samples=options.trials,
        scheduler=options.scheduler,
        search=options.search,
        finetune=replace(base, store=store.uri, train=train),
    )


def report(options: argparse.Namespace, outcome: dict[str, Any], seconds: float) -> str:
    used = outcome["seconds"]
    workers, trials = outcome["workers"], len(outcome["trials"])
    whole = sum(used.values()) / workers
    share = outcome["busy"]
    return "\n".join(
        [
            f"{trials} trials of at most {options.steps} steps on {workers} workers, "
            f"{options.search} search, scheduler {options.scheduler}",
            f"busy {100 * share:.1f} % of {whole:.1f} s; the aim is {100 * AIM:.0f} %: "
            f"{'met' if share >= AIM else 'not met'}",
            f"lost waiting {100 * used['waiting'] / workers / whole:.1f} %, "
            f"in the tail {100 * used['tail'] / workers / whole:.1f} %",
            f"a trial took {used['busy'] / trials:.1f} s; "
            f"a worker waited {used['waiting'] / trials:.1f} s for one",
            f"with the table, the page and the best model: {seconds:.1f} s",
        ]
    )


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--trials", type=int, default=16)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--scheduler", choices=("asha", "pbt", "none"), default="none")
    parser.add_argument("--search", choices=("random", "optuna"), default="random")
    parser.add_argument("--store", help="a new folder that keeps the sweep and its page")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as temporary:
        store = Store(options.store or f"{temporary}/store")
        prepare(store, Path(temporary) / "world")
        cluster.start(cpus=options.workers)
        begun = time.monotonic()
        outcome = sweep.run(sweep_config(options, store))
        print(report(options, outcome, time.monotonic() - begun))


if __name__ == "__main__":
    main()
