"""Estimates a pretraining run's memory, time and cost, without starting anything."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import torch

from beit3.config import ModelConfig
from beit3.flops import StepShape, masked_step
from beit3.memory import activation_bytes, hollow
from beit3.vqkd import VQKD, VQKDConfig
from pipelines import budget, console
from pipelines.budget import GIB, StepMemory
from pipelines.dataset import Dataset
from pipelines.loader import ParquetRows
from pipelines.pretrain_config import PretrainConfig

_TOKENS = {"texts": "ids", "pairs": "captions"}
_HEADROOM = 1.5  # decoding speed of the recommended loader processes, relative to computing


def plan(
    cfg: PretrainConfig, datasets: dict[str, list[Dataset]], tokenizer: VQKDConfig | None = None
) -> dict[str, Any]:
    """Counts and estimates for a run, under the assumptions `cfg.assume`.

    Operations are counted as in `beit3.flops`, activations estimated as in `beit3.memory`; both for
    batches whose texts have the lengths found in the first rows of the tokens. A step computes for
    operations / workers / (`gpu_tflops` * `mfu`) seconds. Meanwhile the next step's pictures are
    decoded, in pictures / workers / (`decoded_per_second` * `train.loader_workers`) seconds, a
    thread of the worker counting as one process; the step takes the longer of the two.
    cost = hours * workers * `train.price_per_hour`.

    Args:
        datasets: Tokens by kind (images, texts, pairs); those that don't exist yet are listed in
            `missing`.
        tokenizer: The image tokenizer that computes visual words in each step, if there is one. It
            computes in fp32, whatever the run's precision, and its time is not in the hours.

    Returns:
        Numbers by name, memory in bytes per worker; `loader_workers` is how many would suffice,
        None if no GPUs compute; `stop` is where `train.max_hours` or `train.max_cost` stops the
        run, None if neither does; `problem` says why the run is impossible.
    """
    train, assume = cfg.train, cfg.assume
    workers, pixels = max(1, train.workers), cfg.objectives.image_target == "pixels"
    shape, on_gpus = shape_of(cfg, datasets), train.gpus_per_worker > 0
    count = sum(p.numel() for p in hollow(cfg.model, pixels=pixels).parameters())
    memory = _memory(cfg, count, shape, _parameters(tokenizer))
    operations = masked_step(cfg.model, shape, pixels=pixels) * train.accumulate * workers
    computing = operations / workers / (assume.gpu_tflops * 1e12 * assume.mfu)
    by_one = shape.images * train.accumulate / assume.decoded_per_second
    decoding = by_one / max(1, train.loader_workers)
    hours = max(computing, decoding) * train.steps / 3600
    return {
        "parameters": count,
        "memory": memory,
        "datasets": [row for kind in datasets for row in _drawn(cfg, kind, datasets[kind])],
        "missing": [d.name for of_kind in datasets.values() for d in of_kind if not _rows(d)],
        "workers": workers,
        "steps": train.steps,
        "samples_per_step": sum(map(cfg.drawn, datasets)) * train.accumulate,
        "flops_per_step": operations,
        "computing": computing,
        "decoding": decoding,
        "loader_workers": math.ceil(_HEADROOM * by_one / computing) if on_gpus else None,
        "hours": hours,
        "cost": hours * workers * train.price_per_hour if train.price_per_hour else None,
        "stop": _stop(cfg, hours),
        "words_in_step": tokenizer is not None,
        "problem": budget.too_much(
            count,
            train,
            step_memory(cfg, shape, tokenizer),
            memory["of_the_GPU"],
            "assume.gpu_gib",
        )
        if on_gpus
        else "",
    }


def shape_of(cfg: PretrainConfig, datasets: dict[str, list[Dataset]]) -> StepShape:
    """The batch of one worker's forward pass, with text lengths from the first rows of the data."""
    return worker_shape(cfg, _lengths(cfg, datasets, "pairs"), _lengths(cfg, datasets, "texts"))


def step_memory(
    cfg: PretrainConfig, shape: StepShape, tokenizer: VQKDConfig | None = None
) -> StepMemory:
    """Memory that a step with a batch of this shape takes on a worker's GPU on top of the state."""
    words = 4 * _parameters(tokenizer)
    return StepMemory(
        words + _activations(cfg, cfg.model, shape),
        words + _activations(cfg, replace(cfg.model, checkpoint_activations="blocks"), shape),
    )


def worker_shape(cfg: PretrainConfig, captions: Sequence[int], texts: Sequence[int]) -> StepShape:
    """The batch of one worker's forward pass, masked as it is on average.

    Args:
        captions, texts: Lengths in tokens to draw from; the batch has their distribution.
    """
    workers, masking = max(1, cfg.train.workers), cfg.hidden
    alone, pairs, singles = (cfg.drawn(kind) // workers for kind in ("images", "pairs", "texts"))
    drawn = [_quantiles(captions, pairs), _quantiles(texts, singles)]
    of_picture = of_caption = 1.0
    if masking.pairs == "separate":
        of_caption = masking.pair_text_share
        of_picture = 1.0 - of_caption
    patches = round(masking.image * cfg.model.patches)
    inner = [sum(max(0, n - 2) for n in lengths) for lengths in drawn]
    return StepShape(
        images=alone + pairs,
        pairs=pairs,
        lengths=(*drawn[0], *drawn[1]),
        masked_patches=round(patches * (alone + pairs * of_picture)),
        masked_tokens=round(inner[0] * masking.pair_text * of_caption + inner[1] * masking.text),
    )


def show(found: dict[str, Any]) -> None:
    """Print a plan, marking estimates as such."""
    workers, hours = found["workers"], found["hours"]
    lines = [("parameters", f"{found['parameters']:,}"), ("memory of each worker, GiB", "")]
    lines += [
        (f"  {name.replace('_', ' ')}", f"{value / GIB:,.2f}")
        for name, value in found["memory"].items()
    ]
    lines += [
        ("steps", f"{found['steps']:,}"),
        ("samples", f"{found['steps'] * found['samples_per_step']:,}"),
    ]
    for row in found["datasets"]:
        seen = f"{row['samples']:,}"
        if row["rows"]:
            seen += f", {row['samples'] / row['rows']:,.2f} epochs of {row['rows']:,}"
        lines.append((f"  of {row['name']}", seen))
    cost = "unknown: set train.price_per_hour" if found["cost"] is None else f"{found['cost']:,.2f}"
    lines += [
        ("TFLOP of a step", f"{found['flops_per_step'] / 1e12:,.2f}"),
        ("seconds of a step, estimated", ""),
        ("  computing", f"{found['computing']:,.3f}"),
        ("  decoding pictures meanwhile", f"{found['decoding']:,.3f}"),
        (f"hours of {workers:,} workers, estimated", f"{hours:,.2f}"),
        ("cost, estimated", cost),
    ]
    width = max(len(label) for label, _ in lines)
    for label, value in lines:
        console.say(f"{label:{width}}  {value}".rstrip())
    if found["decoding"] > found["computing"]:
        enough = found["loader_workers"]
        console.say(
            "decoding takes longer than computing, and the hours are its"
            + (f": train.loader_workers {enough:,} would do, as assume has it" if enough else "")
        )
    if found["stop"]:
        stop = found["stop"]
        console.say(
            f"{stop['option']} stops the run after {stop['hours']:,.2f} hours, at about step "
            f"{stop['step']:,}: it takes {stop['starts']:,} starts of the command to the end, each "
            "from where the last one stopped, or a larger limit"
        )
    if found["words_in_step"]:
        console.say("the time in which each step finds its visual words is not in these hours")
    if found["missing"]:
        console.say(
            f"not checked, since not all tokens are there: {', '.join(found['missing'])} missing. "
            "Texts whose lengths aren't known are as long as assume.text_tokens and "
            "assume.caption_tokens say"
        )
    else:
        console.say("tokens, tokenizers and model fit together")


def _parameters(tokenizer: VQKDConfig | None) -> int:
    """Number of an image tokenizer's parameters; 0 if there is none."""
    if tokenizer is None:
        return 0
    with torch.device("meta"):
        return sum(p.numel() for p in VQKD(tokenizer).parameters())


def _memory(cfg: PretrainConfig, count: int, shape: StepShape, frozen: int) -> dict[str, int]:
    """Bytes per worker, by use; host memory only if something is offloaded."""
    state = budget.states(count, cfg.train)
    found = {
        "parameters": state.parameters,
        "gradients": state.gradients,
        "optimizer": state.optimizer,
        "average_of_the_weights": state.average,
        "communication": state.buffers,
        "image_tokenizer": 4 * frozen,
        "activations_estimated": _activations(cfg, cfg.model, shape),
    }
    found = {name: value for name, value in found.items() if value}
    found["in_all"] = sum(found.values())
    if cfg.train.gpus_per_worker:
        found["of_the_GPU"] = round(cfg.assume.gpu_gib * min(1.0, cfg.train.gpus_per_worker) * GIB)
    if state.host:
        found["in_host_memory"] = state.host
    return found


def _activations(cfg: PretrainConfig, model: ModelConfig, shape: StepShape) -> int:
    pixels = cfg.objectives.image_target == "pixels"
    return activation_bytes(model, shape, cfg.train.precision, pixels=pixels)


def _stop(cfg: PretrainConfig, hours: float) -> dict[str, Any] | None:
    """Where a limit stops a run of `hours` hours, and how many starts it needs in all."""
    found = budget.limit(cfg.train)
    if found is None or found[0] >= hours:
        return None
    limit, option = found
    step = max(1, int(cfg.train.steps * limit / hours))
    return {
        "option": option,
        "hours": limit,
        "step": step,
        "starts": math.ceil(cfg.train.steps / step),
    }


def _drawn(cfg: PretrainConfig, kind: str, datasets: list[Dataset]) -> list[dict[str, Any]]:
    """Samples drawn from each dataset in the whole run, or from a whole kind if shares are unknown.

    `rows` is the number of rows, 0 if that is unknown.
    """
    rows = [_rows(dataset) for dataset in datasets]
    samples = cfg.drawn(kind) * cfg.train.accumulate * cfg.train.steps
    weights = cfg.weights(kind) or (tuple(rows) if all(rows) else ())
    if not weights:
        return [{"name": kind, "rows": 0, "samples": samples}] if samples else []
    return [
        {"name": dataset.name, "rows": count, "samples": round(samples * weight / sum(weights))}
        for dataset, count, weight in zip(datasets, rows, weights, strict=True)
    ]


def _rows(dataset: Dataset) -> int:
    """Rows of a dataset, 0 if it doesn't exist."""
    commit = dataset.find_commit()
    return commit.rows if commit else 0


def _lengths(cfg: PretrainConfig, datasets: dict[str, list[Dataset]], kind: str) -> list[int]:
    """Lengths of some texts of a kind: from the first rows of each dataset, or as assumed."""
    found: list[int] = []
    for dataset in datasets.get(kind, ()):
        if _rows(dataset):
            source = ParquetRows([dataset], [_TOKENS[kind]])
            first = source.groups[0]
            column = source.table(0, first.path, first.index).column(0).combine_chunks()
            texts = column.flatten() if kind == "pairs" else column
            found += texts.value_lengths().to_pylist()
    assumed = cfg.assume.caption_tokens if kind == "pairs" else cfg.assume.text_tokens
    return found or [assumed]


def _quantiles(values: Sequence[int], count: int) -> tuple[int, ...]:
    """`count` numbers with the distribution of `values`."""
    places = (np.arange(count) + 0.5) / max(1, count)
    return tuple(np.quantile(values, places, method="nearest").astype(int).tolist())
