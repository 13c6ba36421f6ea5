"""Measures how long saving a checkpoint holds up training, and how soon a run resumes from one.

    python -m benchmarks.checkpoints                      # base, one worker, this machine's CPU
    python -m benchmarks.checkpoints --zero-stage 3 --store s3://bucket/benchmark

Masked pretraining of random samples (`benchmarks/_samples.py`) by one worker, whose checkpoints
(weights and both Adam moments) go to `--store`, by default a temporary folder.

A save is synchronous if the training waits until the checkpoint is committed, and asynchronous if
it waits only until the state is copied. Both are measured in one process, `--repeats` of each in
turns. The cost of writing during training counts too: the time of the steps until the commit, less
that of as many steps without it.

Prints the seconds of both kinds and their ratio; the share of time that is lost with a checkpoint
every `--every` steps; the seconds from the start of restoring, in a new process, until the engine
is ready; and those from the start of that process until its first step is done.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any, cast

# Before torch loads: threads that spin while they wait starve each other on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
import torch.distributed as dist

from beit3.config import PRESETS
from beit3.device import to_device
from beit3.objectives import MaskedBatch
from beit3.text import TextTokenizer
from benchmarks import _measure
from benchmarks._samples import draw
from pipelines import bundles, checkpoints
from pipelines import engine as engines
from pipelines.pretrain import PretrainRecipe
from pipelines.pretrain_config import PretrainConfig
from pipelines.recipe import Run, TrainConfig
from pipelines.storage import Store

NAME = "runs/benchmark"


def start(options: argparse.Namespace) -> tuple[Any, Callable[[], None]]:
    """An engine of one worker, and a function that trains it for a step."""
    device = torch.device(options.device)
    if device.type == "cpu":
        os.environ["DS_ACCELERATOR"] = "cpu"
    os.environ["LOCAL_RANK"] = "0"
    meeting = Path(tempfile.mkdtemp()) / "group"
    backend = "gloo" if device.type == "cpu" else "nccl"
    dist.init_process_group(backend, init_method=f"file://{meeting}", rank=0, world_size=1)
    torch.manual_seed(options.seed)
    config = PretrainConfig(model=PRESETS[options.preset])
    recipe = PretrainRecipe(config, cast(TextTokenizer, None))  # nothing is read or exported
    module = recipe.build().to(device)
    engine = engines.build(Run("", NAME, "", "", recipe, train_config(options)), module)
    sizes = {"images": options.samples, "texts": options.samples, "pairs": options.samples}
    samples = draw(PRESETS[options.preset], **sizes, seed=options.seed)
    batch: MaskedBatch = to_device(samples.packed(), device)

    def step() -> None:
        engine.backward(engine(batch)["loss"])
        engine.step()

    return engine, step


def train_config(options: argparse.Namespace) -> TrainConfig:
    return TrainConfig(
        precision=options.precision, zero_stage=options.zero_stage, keep_checkpoints=1
    )


def measure_saves(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds of steps alone, of saves of both kinds, and of the steps beside a save."""
    device = torch.device(options.device)
    engine, step = start(options)
    found: dict[str, Any] = {"steps": [], "synchronous": [], "asynchronous": [], "beside": []}
    found["parameters"] = sum(p.numel() for p in engine.module.parameters())
    store = Store(options.store)
    number = 0
    with checkpoints.Writer(store, NAME, train_config(options), print) as writer:

        def save() -> None:
            writer.save(number, engine)

        def save_and_wait() -> None:
            save()
            writer.wait()

        step()
        for _ in range(options.repeats):
            found["steps"] += [_measure.seconds(step, device) for _ in range(options.steps)]
            number += 1
            found["synchronous"].append(_measure.seconds(save_and_wait, device))
            number += 1
            found["asynchronous"].append(_measure.seconds(save, device))
            beside = []
            while writer.writing:
                beside.append(_measure.seconds(step, device))
            found["beside"].append(beside)
    manifest = store.read_json(f"{checkpoints.folder(NAME, number)}/{bundles.MANIFEST}")
    found["bytes"] = sum(file["bytes"] for file in manifest["files"].values())
    return found


def measure_resume(options: argparse.Namespace) -> dict[str, Any]:
    """Seconds since this process began: engine built, checkpoint restored, first step done."""
    engine, step = start(options)
    built = time.time()
    checkpoints.restore(Store(options.store), NAME, engine, print)
    _measure.synchronise(torch.device(options.device))
    ready = time.time()
    step()
    _measure.synchronise(torch.device(options.device))
    times = {"built": built, "ready": ready, "stepped": time.time()}
    return {name: moment - options.began for name, moment in times.items()}


def report(
    options: argparse.Namespace, saves: dict[str, Any], resumes: list[dict[str, Any]]
) -> str:
    step = median(saves["steps"])
    held = [median(saves[kind]) for kind in ("synchronous", "asynchronous")]
    slower = median(sum(beside) - len(beside) * step for beside in saves["beside"])
    beside = median(len(beside) for beside in saves["beside"])
    lost = [held[0], held[1] + max(0.0, slower)]
    shares = [100 * own / (options.every * step + own) for own in lost]
    built, restored, first = (
        median(one[end] - one.get(begin, 0.0) for one in resumes)
        for begin, end in (("", "built"), ("built", "ready"), ("ready", "stepped"))
    )
    whole = median(one["stepped"] for one in resumes)
    machine = _measure.machine(torch.device(options.device))
    lines = [
        f"{options.preset}, {saves['parameters'] / 1e6:.0f}M parameters, {options.precision}, "
        f"ZeRO {options.zero_stage}, one worker, {machine}",
        f"checkpoint {saves['bytes'] / 2**30:.2f} GiB; a step takes {step:.2f} s, median of "
        f"{len(saves['steps'])} ({min(saves['steps']):.2f} to {max(saves['steps']):.2f})",
        "",
        f"{'':40}{'synchronous':>12}{'asynchronous':>14}{'ratio':>8}",
    ]

    def row(name: str, one: str, other: str, ratio: str = "") -> None:
        lines.append(f"{name:40}{one:>12}{other:>14}{ratio:>8}".rstrip())

    row(
        "seconds that a save holds training",
        f"{held[0]:.2f}",
        f"{held[1]:.2f}",
        f"{held[0] / held[1]:.2f}",
    )
    row(f"seconds that the {beside:.0f} steps beside it lose", "", f"{slower:.2f}")
    row(
        f"time lost, one in {options.every} steps of {step:.2f} s, %",
        f"{shares[0]:.3f}",
        f"{shares[1]:.3f}",
        f"{shares[0] / shares[1]:.2f}",
    )
    lines += [
        "",
        f"{'from the start of restoring until ready, s':52}{restored:8.2f}",
        f"{'from the start of the process to its first step, s':52}{whole:8.2f}",
        f"  imports, model and engine {built:.2f}, restoring {restored:.2f}, step {first:.2f}",
    ]
    return "\n".join(lines)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.checkpoints",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="base")
    parser.add_argument("--samples", type=int, default=4, help="of each kind in a step")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--zero-stage", type=int, choices=(0, 1, 2, 3), default=1)
    parser.add_argument("--device", default="cpu", help="cpu or cuda")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--store", help="where checkpoints go; default: a temporary folder")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=2, help="timed steps before each repeat")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--worker", choices=("saves", "resume"), help=argparse.SUPPRESS)
    parser.add_argument("--began", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if min(options.samples, options.every, options.steps, options.repeats) < 1:
        parser.error("--samples, --every, --steps, --repeats: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    if options.worker:
        tasks = {"saves": measure_saves, "resume": measure_resume}
        print(json.dumps(tasks[options.worker](options)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        given = [*arguments, "--store", options.store or temporary]

        def fresh(worker: str) -> dict[str, Any]:
            more = ["--worker", worker, "--began", str(time.time())]
            return _measure.fresh("benchmarks.checkpoints", [*given, *more])

        saves = fresh("saves")
        resumes = [fresh("resume") for _ in range(options.repeats)]
    print(report(options, saves, resumes))


if __name__ == "__main__":
    main()
