"""Measures what `pipelines/evaluate.py` adds to the bare model on tensors in memory.

    python -m benchmarks.evaluation                        # base, every task, this machine's CPU
    python -m benchmarks.evaluation --device cuda --pictures 2048 --batch-size 64 --decoders 8
    python -m benchmarks.evaluation --preset tiny --tasks retrieval --pictures 5000 --repeats 1
    python -m benchmarks.evaluation --scoring 5000 25000   # recall of 5,000 images, 25,000 texts

Pictures are random JPEGs in a prepared split, texts are random words, weights are random. Ours is
the worker that processes every part of a split: Parquet in, decoding, batches, predictions out. The
baseline is the same task's `predict` on the same batches, ready on the device. Both run in one
process, `--repeats` times in turns; medians are printed, with the ratio of times and that of CPU
seconds, which other programs on the machine disturb less. The program fails if the predictions
differ, or if the encoder sees a picture or a text of retrieval more than once.
"""

from __future__ import annotations

import argparse
import os
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import median
from typing import Any

# Before torch loads: threads that spin while they wait starve each other on a shared machine.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import numpy as np
import pyarrow as pa
import torch
from torch import nn

from beit3 import tasks
from beit3.config import PRESETS
from beit3.device import to_device
from beit3.tasks.retrieval import recalls
from beit3.text import TextTokenizer
from benchmarks import _measure
from benchmarks._photos import draw
from benchmarks.tokenization import sentences
from pipelines import evaluate, train_text_tokenizer
from pipelines.evaluate import EvaluateConfig, Predictor
from pipelines.finetuned import Finetuned
from pipelines.parts import Resources
from pipelines.storage import Store
from pipelines.task_data import SCHEMA
from pipelines.train_text_tokenizer import TextTokenizerConfig

TEXTS = {"retrieval": 5, "vqa": 5, "captioning": 1, "nlvr2": 2, "imagenet": 1}
"""Examples per record, about as many as in the benchmark."""
LABELS = {"vqa": 3129, "imagenet": 1000}
TARGETS: dict[str, str] = {"vqa": '{"answers": ["1"], "type": "other"}', "nlvr2": "true"}
_DISTINCT = 64  # drawn pictures; a split repeats them


def rows_of(task: str, count: int) -> Iterator[dict[str, Any]]:
    """Records of a prepared split."""
    rng = np.random.default_rng(0)
    pictures = [draw(rng) for _ in range(min(count, _DISTINCT))]
    words = [" ".join(text.split()[:10]) for text in sentences(count * TEXTS[task], 1)]
    for number in range(count):
        shown = range(number, number + tasks.load(task).about.images)
        examples = [
            {
                "id": f"dev-{number}-0-{i}" if task == "nlvr2" else str(number * 10 + i),
                "text": words[number * TEXTS[task] + i],
                "target": TARGETS.get(task, f'"{number}"'),
            }
            for i in range(TEXTS[task])
        ]
        images = [{"bytes": pictures[i % len(pictures)], "path": ""} for i in shown]
        yield {"id": str(number), "images": images, "examples": examples}


def publish(store: Store, task: str, count: int) -> None:
    """`tasks/<task>/val`."""
    table = pa.Table.from_pylist(list(rows_of(task, count)), SCHEMA)
    dataset = store.dataset(f"tasks/{task}/val")
    part = dataset.write_part("drawn", "00000", table)
    dataset.publish("drawn", [part], job="benchmark", schema=SCHEMA, stats={}, config={})


def build(options: argparse.Namespace, name: str, tokenizer: TextTokenizer) -> Finetuned:
    """A model with random weights and the task's published head."""
    torch.manual_seed(0)
    config = PRESETS[options.preset]
    labels = [f"n{i:08d}" for i in range(LABELS.get(name, 0))]
    task = tasks.create(name, labels=labels)
    module = task.build(config).eval().to(options.device)
    for parameter in module.parameters():  # heads that start near 0 can't tell answers apart
        if parameter.ndim == 2 and float(parameter.detach().std()) < 1e-3:
            nn.init.normal_(parameter, std=0.02)
    return Finetuned(f"models/{name}", name, task, module, tokenizer, config.image_size, {})


def config_of(options: argparse.Namespace, store: Store, task: str) -> EvaluateConfig:
    resources = Resources(actors=1, cpus=options.decoders)
    return EvaluateConfig(
        store=store.uri,
        data=f"tasks/{task}/val",
        batch_size=options.batch_size,
        resources=resources,
        in_process=True,
    )


class Counted:
    """Counts the pictures and texts that an encoder is given, alone and in pairs."""

    def __init__(self, backbone: nn.Module) -> None:
        self.seen: Counter[str] = Counter()
        backbone.register_forward_pre_hook(self._count, with_kwargs=True)

    def _count(self, module: nn.Module, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        images, lengths = given.get("images"), given.get("lengths")
        self.seen["pictures"] += 0 if images is None else len(images)
        self.seen["texts"] += 0 if lengths is None else len(lengths)


def compare(options: argparse.Namespace, store: Store, task: str, tokenizer: TextTokenizer) -> str:
    """A line of the table.

    Raises:
        RuntimeError: the predictions differ, or retrieval encodes something twice.
    """
    config, model = config_of(options, store, task), build(options, task, tokenizer)
    worker, units = Predictor(config, model), evaluate._units(config, store)
    device = torch.device(options.device)
    batches = []
    for unit in units:
        for rows, samples in worker.batches(worker.rows_of(unit)):
            sound = [sample for sample in samples if not isinstance(sample, Exception)]
            if len(sound) != len(rows):
                raise RuntimeError(f"{task}: not every record could be read")
            batches.append(to_device(model.task.collate(sound, tokenizer), device))
    found: dict[str, list[Any]] = {}

    def ours() -> None:
        outputs = [worker(unit).table.column("prediction").to_pylist() for unit in units]
        found["ours"] = [text for output in outputs for text in output]

    @torch.no_grad()
    def bare() -> None:
        predicted = [model.task.predict(model.module, batch, tokenizer) for batch in batches]
        found["bare"] = [one for batch in predicted for one in batch]

    with torch.no_grad():
        model.task.predict(model.module, batches[0], tokenizer)  # warm-up
    times: dict[str, list[float]] = {"ours": [], "bare": []}
    busy: dict[str, list[float]] = {"ours": [], "bare": []}
    works = [("ours", ours), ("bare", bare)]
    counted = Counted(model.module.get_submodule("backbone"))
    for repeat in range(options.repeats):
        for name, work in works if repeat % 2 == 0 else reversed(works):
            counted.seen.clear()
            start = time.process_time()
            times[name].append(_measure.seconds(work, device))
            busy[name].append(time.process_time() - start)
            if name == "ours" and task == "retrieval":
                wanted = {"pictures": options.pictures, "texts": options.pictures * TEXTS[task]}
                if dict(counted.seen) != wanted:
                    raise RuntimeError(f"encoded {dict(counted.seen)}, expected {wanted}")
        if found["ours"] != [evaluate.as_text(one) for one in found["bare"]]:
            raise RuntimeError(f"{task}: the predictions differ from the bare model's")
    took = {name: median(seconds) for name, seconds in times.items()}
    cpu = median(busy["bare"]) / median(busy["ours"])
    rate, ratio = options.pictures / took["ours"], took["bare"] / took["ours"]
    each = ", ".join(f"{b / o:.3g}" for o, b in zip(times["ours"], times["bare"], strict=True))
    return (
        f"{task:<12}{took['bare']:>9.3g}{took['ours']:>9.3g}{rate:>11.4g}{cpu:>8.3g}{ratio:>8.3g}"
        f"  ({each})"
    )


def scoring(images: int, texts: int, width: int) -> str:
    """Time and memory of recall both ways, on random vectors."""
    rng = np.random.default_rng(0)
    vectors = [rng.normal(size=(n, width)).astype(np.float32) for n in (images, texts)]
    owner = np.arange(texts) % images
    with _measure.peak_memory(torch.device("cpu")) as peak:
        start = time.perf_counter()
        recalls(vectors[0], vectors[1], owner)
        took = time.perf_counter() - start
    return (
        f"recall of {images:,} images and {texts:,} texts, {width} wide: {took:.2f} s, "
        f"{peak.bytes / (1 << 20):,.0f} MiB above the vectors"
    )


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.evaluation",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="base")
    parser.add_argument("--tasks", choices=tuple(TEXTS), nargs="+", default=list(TEXTS))
    parser.add_argument("--pictures", type=int, default=32, help="or pairs of them, of NLVR2")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--decoders", type=int, default=1, help="threads that decode")
    parser.add_argument("--device", default="cpu", help="cpu, cuda or cuda:N")
    parser.add_argument("--threads", type=int, help="default: PyTorch's own choice")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--scoring", type=int, nargs=2, metavar=("IMAGES", "TEXTS"))
    options = parser.parse_args(arguments)
    if min(options.pictures, options.batch_size, options.decoders, options.repeats) < 1:
        parser.error("--pictures, --batch-size, --decoders, --repeats: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.threads:
        torch.set_num_threads(options.threads)
    config = PRESETS[options.preset]
    if options.scoring:
        images, texts = options.scoring
        print(scoring(images, texts, config.hidden))
        return
    learn = TextTokenizerConfig(texts=("a",), vocab_size=min(1500, config.vocab_size - 2))
    tokenizer = TextTokenizer(train_text_tokenizer.train(sentences(400, 0), learn))
    print(
        f"{options.preset}, {config.image_size} px, {options.pictures} records, "
        f"{options.batch_size} at once, {options.decoders} decoding, fp32, "
        f"{_measure.machine(torch.device(options.device))}"
    )
    heads = f"{'task':<12}{'bare, s':>9}{'ours, s':>9}{'records/s':>11}"
    print(f"{heads}{'CPU':>8}{'ratio':>8}  (of each turn)")
    with tempfile.TemporaryDirectory(prefix="beit3-evaluation-") as folder:
        store = Store(Path(folder))
        for task in options.tasks:
            publish(store, task, options.pictures)
            print(compare(options, store, task, tokenizer), flush=True)


if __name__ == "__main__":
    main()
