"""Measures a masked pretraining step, forward and backward: `beit3` against the plain formulation.

    python -m benchmarks.pretraining_step                        # base, fp32, this machine's CPU
    python -m benchmarks.pretraining_step --profile              # and where the time goes
    python -m benchmarks.pretraining_step --device cuda --precision bf16
    python -m benchmarks.pretraining_step --plain-heads masked   # against a stronger baseline

The plain formulation (`benchmarks/plain.py`) is what a competent person writes from the released
code: padded batches, a forward per kind of data, explicit attention, both heads at every position.
Both have the same weights and the same samples (`benchmarks/_samples.py`: images alone, texts alone
of mixed length, pairs), and the losses must agree. The optimizer's step, the same for both, is not
measured; gradients start as None. `beit3` computes accuracies too, the plain formulation doesn't.

Each formulation is measured in fresh processes, `--repeats` of each in turns, so that memory is its
own and a busy moment of a shared machine hits both. A process's first steps are warm-up; the time
is the median over all other steps, peak memory the median over processes.

Prints, for both and as a ratio:

- samples per second and seconds per step, fastest and slowest beside the median, and CPU seconds
  per step, which other programs on the machine disturb less;
- peak memory above model and batch, gradients included (they are the same in both), and what
  `beit3.memory` estimates of ours;
- FLOPs of a step as counted while it runs (torch.utils.flop_counter), and the machine's peak: the
  fastest matrix product of the same precision and threads found in the same run (if the lowest
  found is far below it, the machine was busy, and the utilisation is too low);
- utilisation. `of the model`: the FLOPs that the step needs (matrix products of the real tokens,
  heads at masked positions, by formula) over time and peak: the comparable number.
  `of the hardware`: the counted FLOPs, padding and recomputation included.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any

import torch
from torch import nn

from beit3.config import PRESETS
from beit3.device import DTYPES, computing_in, to_device
from beit3.flops import StepShape, masked_step, matmul_peak
from beit3.memory import activation_bytes
from beit3.objectives import MaskedDataModelling
from benchmarks import _measure, plain
from benchmarks._samples import Samples, describe, draw

FORMULATIONS = ("ours", "plain")
GIB = 1 << 30


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretraining_step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="base")
    for kind in ("images", "texts", "pairs"):
        parser.add_argument(f"--{kind}", type=int, help="default: 4 on a CPU, 32 on a GPU")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--compile", action="store_true", help="torch.compile both")
    parser.add_argument("--repeats", type=int, default=3, help="processes of each formulation")
    parser.add_argument("--steps", type=int, default=3, help="timed steps of a process")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--plain-heads", choices=("all", "masked"), default="all")
    parser.add_argument("--profile", action="store_true", help="time by family of operators")
    parser.add_argument("--worker", choices=("step", "inspect", "peak"), help=argparse.SUPPRESS)
    parser.add_argument("--formulation", choices=FORMULATIONS, help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for kind in ("images", "texts", "pairs"):
        if getattr(options, kind) is None:
            setattr(options, kind, 4 if options.device == "cpu" else 32)
        if getattr(options, kind) < 0:
            parser.error(f"--{kind}: expected a count, got {getattr(options, kind)}")
    if options.images + options.texts + options.pairs == 0:
        parser.error("--images, --texts, --pairs: nothing to measure")
    if options.repeats < 1 or options.steps < 1:
        parser.error("--repeats, --steps: expected at least 1")
    return options


def samples_of(options: argparse.Namespace) -> Samples:
    return draw(
        PRESETS[options.preset],
        images=options.images,
        texts=options.texts,
        pairs=options.pairs,
        seed=options.seed,
    )


def build(options: argparse.Namespace) -> Callable[[], float]:
    """The step of a formulation, model and batch on the device; it returns the loss."""
    device = torch.device(options.device)
    torch.manual_seed(options.seed)
    samples = samples_of(options)
    module: nn.Module = MaskedDataModelling(PRESETS[options.preset])
    if options.formulation == "ours":
        batch = to_device(samples.packed(), device)
    else:
        module = plain.from_ours(module, options.plain_heads)
        batch = to_device(plain.pad(samples), device)
    module = module.to(device).train()
    if options.compile and options.worker == "step":
        module.compile()

    def step() -> float:
        module.zero_grad(set_to_none=True)
        with computing_in(options.precision, device):
            loss = module(batch)["loss"]
        loss.backward()
        return loss.item()

    return step


def measure_steps(options: argparse.Namespace) -> dict[str, Any]:
    """Times of a process's steps, peak memory and the loss."""
    device = torch.device(options.device)
    step = build(options)
    with _measure.peak_memory(device) as peak:
        for _ in range(3 if options.compile else 1):
            loss = step()
        busy = time.process_time()
        times = [_measure.seconds(step, device) for _ in range(options.steps)]
        busy = (time.process_time() - busy) / options.steps
    return {"loss": loss, "times": times, "busy": busy, "memory": peak.bytes}


def inspect_step(options: argparse.Namespace) -> dict[str, Any]:
    """FLOPs of a step, uncompiled, and on request its time by family of operators."""
    step = build(options)
    flops = _measure.counted_flops(step)
    device = torch.device(options.device)
    families = _measure.time_by_family(step, device) if options.profile else {}
    return {"flops": flops, "families": families}


def measure_peak(options: argparse.Namespace) -> dict[str, Any]:
    dtype = DTYPES[options.precision]
    device = torch.device(options.device)
    sides = (1024, 2048, 3072) if device.type == "cpu" else (4096, 8192, 12288)
    return {"peak": matmul_peak(device, dtype, sides, repeats=10)}


@dataclass
class Result:
    """Measurements of one formulation's processes."""

    times: list[float]
    busy: list[float]
    memory: list[int]
    losses: list[float]
    flops: int
    families: dict[str, float]


def measure(
    options: argparse.Namespace, arguments: Sequence[str]
) -> tuple[dict[str, Result], list[float]]:
    """Measure both formulations, in turns, and the peak in FLOP/s before each turn."""

    def worker(task: str, formulation: str = "ours") -> dict[str, Any]:
        extra = ["--worker", task, "--formulation", formulation]
        return _measure.fresh("benchmarks.pretraining_step", [*arguments, *extra])

    results = {name: Result([], [], [], [], 0, {}) for name in FORMULATIONS}
    peaks = []
    for repeat in range(options.repeats):
        peaks.append(worker("peak")["peak"])
        for name in FORMULATIONS if repeat % 2 == 0 else reversed(FORMULATIONS):
            found = worker("step", name)
            print(
                f"  {name}: {median(found['times']):.3f} s, {found['memory'] / GIB:.2f} GiB",
                file=sys.stderr,
            )
            results[name].times += found["times"]
            results[name].busy.append(found["busy"])
            results[name].memory.append(found["memory"])
            results[name].losses.append(found["loss"])
    for name in FORMULATIONS:
        found = worker("inspect", name)
        results[name].flops, results[name].families = found["flops"], found["families"]
    return results, peaks


def report(options: argparse.Namespace, results: dict[str, Result], peaks: list[float]) -> str:
    config, samples = PRESETS[options.preset], samples_of(options)
    ours, other = results["ours"], results["plain"]
    shape = StepShape.of(samples.packed())
    needed, peak = masked_step(config, shape), max(peaks)
    with torch.device("meta"):
        parameters = sum(p.numel() for p in MaskedDataModelling(config).parameters())
    lines = [
        f"{options.preset}, {config.image_size} px, {parameters / 1e6:.0f}M parameters, "
        f"{options.precision}{', compiled' if options.compile else ''}, "
        f"{_measure.machine(torch.device(options.device))}",
        f"images alone: {options.images}; pairs: captions {describe(samples.captions)}; "
        f"texts alone: {describe(samples.documents)}",
        f"loss {ours.losses[0]:.5f}, plain {other.losses[0]:.5f}; "
        f"plain heads at {options.plain_heads} positions",
        "",
        f"{'':34}{'ours':>10}{'plain':>10}{'ratio':>8}",
    ]

    def row(label: str, mine: float, theirs: float, digits: int = 2) -> None:
        ratio = f"{mine / theirs:8.2f}" if theirs else f"{'-':>8}"
        lines.append(f"{label:34}{mine:10.{digits}f}{theirs:10.{digits}f}{ratio}")

    def both(label: str, value: float, digits: int = 2) -> None:
        lines.append(f"{label:34}{value:10.{digits}f}{value:10.{digits}f}")

    mine, theirs = median(ours.times), median(other.times)
    row("samples/s", samples.count / mine, samples.count / theirs)
    row("seconds per step, median", mine, theirs, 3)
    row("  fastest", min(ours.times), min(other.times), 3)
    row("  slowest", max(ours.times), max(other.times), 3)
    row("CPU seconds per step", median(ours.busy), median(other.busy), 3)
    row("peak memory, GiB", median(ours.memory) / GIB, median(other.memory) / GIB)
    both("  of it gradients", parameters * 4 / GIB)
    estimate = activation_bytes(config, shape, options.precision)
    lines.append(f"{'  estimated':34}{(estimate + parameters * 4) / GIB:10.2f}")
    row("counted GFLOP per step", ours.flops / 1e9, other.flops / 1e9, 0)
    both("needed GFLOP per step", needed / 1e9, 0)
    both("matrix-product peak, GFLOP/s", peak / 1e9, 0)
    both("  found at least", min(peaks) / 1e9, 0)
    row("utilisation of the model, %", 100 * needed / mine / peak, 100 * needed / theirs / peak, 1)
    hardware = [100 * r.flops / median(r.times) / peak for r in (ours, other)]
    row("utilisation of the hardware, %", hardware[0], hardware[1], 1)
    if options.profile:
        lines += ["", *_families(results)]
    return "\n".join(lines)


def _families(results: dict[str, Result]) -> list[str]:
    """Seconds and shares by family of operators, from one profiled, uncompiled step of each."""
    lines = [f"{'time by operators':34}{'ours, s':>10}{'%':>6}{'plain, s':>12}{'%':>6}"]
    mine, theirs = (results[name].families for name in FORMULATIONS)
    totals = sum(mine.values()), sum(theirs.values())
    for family in {**mine, **theirs}:
        a, b = mine.get(family, 0.0), theirs.get(family, 0.0)
        lines.append(
            f"{family:34}{a:10.3f}{100 * a / totals[0]:6.1f}{b:12.3f}{100 * b / totals[1]:6.1f}"
        )
    return lines


def check_losses(options: argparse.Namespace, results: dict[str, Result]) -> None:
    """Check that both formulations computed the same.

    Raises:
        RuntimeError: the losses differ by more than rounding.
    """
    tolerance = 1e-4 if options.precision == "fp32" else 1e-2
    losses = [loss for result in results.values() for loss in result.losses]
    if not max(losses) - min(losses) <= tolerance * abs(max(losses)):
        raise RuntimeError(f"the losses differ: {losses}")


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    tasks = {"step": measure_steps, "inspect": inspect_step, "peak": measure_peak}
    if options.worker:
        print(json.dumps(tasks[options.worker](options)))
        return
    results, peaks = measure(options, arguments)
    check_losses(options, results)
    print(report(options, results, peaks))


if __name__ == "__main__":
    main()
