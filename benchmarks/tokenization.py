"""Measures tokenizing a corpus: overhead over the encoders, memory, and what stored tokens save.

    python -m benchmarks.tokenization                       # tiny images: seconds on a CPU
    python -m benchmarks.tokenization --preset base --images 64
    python -m benchmarks.tokenization --device cuda --preset base --images 20000 --batch-size 0
    python -m benchmarks.tokenization --memory 2000 50000   # peak memory of parts of these sizes
    python -m benchmarks.tokenization --offline             # tokens stored, or made in each step

Pictures are random JPEGs, texts random words (a SentencePiece model is trained on them first);
tokenizers have random weights: no time depends on them. Everything runs in fresh processes, each
kind `--repeats` times in turns, so that a busy moment of a shared machine hits all; the medians are
printed.

CPU seconds, which other programs on the machine disturb less, stand beside the rates.

- images: views per second of the worker that `pipelines/tokenize_corpus.py` runs on every part
  (Parquet in, decoding, views, words, table out), beside those of the encoder alone on tensors in
  memory, same batch, device and threads;
- texts: characters per second of the worker with one process per CPU, each with its own part,
  beside plain single-threaded SentencePiece times the number of processes;
- memory: the image worker's peak, and how far it is above the start, for parts of both sizes;
- offline: the seconds of a forward and backward pass of pretraining with stored words and with the
  tokenizer inside the step, at the sizes of `base`.
"""

from __future__ import annotations

import argparse
import io
import json
import multiprocessing
import os
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from PIL import Image

from beit3 import vqkd
from beit3.config import PRESETS as MODELS
from beit3.device import DTYPES, to_device
from beit3.objectives import MaskedDataModelling, ObjectiveWeights
from beit3.text import TOKENIZER_FILE, TextTokenizer
from beit3.vqkd import PRESETS, VQKD
from benchmarks import _measure
from benchmarks._samples import draw
from pipelines import bundles, train_text_tokenizer
from pipelines.dataset import ROW_GROUP_ROWS
from pipelines.ingest import IMAGE_SCHEMA, TEXT_SCHEMA
from pipelines.storage import Store
from pipelines.tokenize_corpus import ImagePart, TextPart, TokenizeConfig
from pipelines.tokenizers import load_text_tokenizer
from pipelines.train_text_tokenizer import TextTokenizerConfig
from pipelines.words_in_step import WordsInStep

MIB = 1 << 20
_DISTINCT = 64  # drawn pictures; a part repeats them


def parse(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.tokenization",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), default="tiny")
    parser.add_argument("--images", type=int, default=512)
    parser.add_argument("--views", type=int, default=2)
    parser.add_argument("--batch-size", type=int, default=64, help="0: by the device's memory")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--precision", choices=tuple(DTYPES), default="fp32")
    parser.add_argument("--decoders", type=int, default=1, help="threads that decode")
    parser.add_argument("--texts", type=int, default=60000, help="documents of a process's part")
    parser.add_argument("--processes", type=int, default=os.cpu_count() or 1, help="of texts")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--memory", type=int, nargs=2, metavar=("FEW", "MANY"))
    parser.add_argument("--offline", action="store_true")
    parser.add_argument("--pictures", type=int, default=4, help="of a step, with --offline")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    parser.add_argument("--store", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    for name in ("images", "views", "texts", "processes", "repeats", "decoders", "pictures"):
        if getattr(options, name) < 1:
            parser.error(f"--{name}: expected at least 1")
    return options


# -- what is tokenized -----------------------------------------------------------------------------


def pictures(count: int, side: int = 288) -> list[bytes]:
    """JPEGs of smooth colours and noise, of about the size that ingestion leaves."""
    rng = np.random.default_rng(0)
    found = []
    for _ in range(count):
        small = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
        pixels = np.asarray(small.resize((side * 4 // 3, side), Image.Resampling.BICUBIC))
        noisy = pixels + rng.normal(0, 6, pixels.shape)
        out = io.BytesIO()
        Image.fromarray(noisy.clip(0, 255).astype(np.uint8)).save(out, "JPEG", quality=92)
        found.append(out.getvalue())
    return found


def sentences(count: int, seed: int) -> list[str]:
    """Documents of words of one vocabulary, common ones more often, about 1,000 characters each."""
    words = np.random.default_rng(0)
    vocabulary = [
        "".join(words.choice(list("etaoinshrdlucmfw"), int(words.integers(2, 9))))
        for _ in range(5000)
    ]
    rng = np.random.default_rng(seed)
    ranks = np.minimum(rng.zipf(1.3, (count, 180)) - 1, 4999)
    return [" ".join(vocabulary[i] for i in row) for row in ranks]


def image_part(store: Store, name: str, count: int) -> None:
    """`images/<name>/part-00000.parquet`, row group by row group: it may be large."""
    drawn = pictures(_DISTINCT)
    path = Path(store.path(f"images/{name}", "part-00000.parquet"))
    path.parent.mkdir(parents=True, exist_ok=True)
    with pq.ParquetWriter(path, IMAGE_SCHEMA) as writer:
        for start in range(0, count, ROW_GROUP_ROWS):
            rows = [
                {"id": str(i), "image": {"bytes": drawn[i % _DISTINCT]}, "captions": ["a picture"]}
                for i in range(start, min(count, start + ROW_GROUP_ROWS))
            ]
            writer.write_table(pa.Table.from_pylist(rows, IMAGE_SCHEMA))


def prepare(options: argparse.Namespace, root: Path) -> Store:
    """A store with both tokenizers and the parts."""
    store = Store(root)
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        vqkd.save(Path(folder), VQKD(PRESETS[options.preset]))
        bundles.save(store, "tokenizers/image/vqkd", Path(folder), {})
    learn = TextTokenizerConfig(texts=("a",), vocab_size=1500, threads=1)
    model = train_text_tokenizer.train(sentences(400, 0), learn)
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / TOKENIZER_FILE).write_bytes(model)
        bundles.save(store, "tokenizers/text/sentencepiece", Path(folder), {})
    for number, count in enumerate(options.memory or [options.images]):
        image_part(store, f"part-{number}", count)
    for number in range(options.processes if not options.memory else 0):
        rows = [
            {"id": str(i), "text": t} for i, t in enumerate(sentences(options.texts, number + 1))
        ]
        table = pa.Table.from_pylist(rows, TEXT_SCHEMA)
        store.dataset("text/words").write_table(f"part-{number:05d}.parquet", table)
    return store


def config_of(options: argparse.Namespace) -> TokenizeConfig:
    gpu = options.device == "cuda"
    return TokenizeConfig(
        store=options.store,
        images=("part-0",),
        views=options.views,
        batch_size=options.batch_size,
        precision=options.precision,
        actors=1,
        gpus_per_actor=1.0 if gpu else 0.0,
        cpus_per_actor=options.decoders,
    )


# -- what is measured ------------------------------------------------------------------------------


def image_worker(options: argparse.Namespace) -> dict[str, Any]:
    """The worker's rate on its part, after one picture to warm up."""
    worker = ImagePart(config_of(options), "images/part-0")
    unit = {"name": "00000", "path": "part-00000.parquet"}
    device = torch.device(options.device)
    worker._encode([np.zeros((3, *[worker.images.config.image_size] * 2), np.uint8)])
    total, busy = options.images * options.views, time.process_time()
    took = _measure.seconds(lambda: worker(unit), device)
    busy = time.process_time() - busy
    return {"rate": total / took, "busy": busy / total, "batch": worker.batch}


def image_encoder(options: argparse.Namespace) -> dict[str, Any]:
    """The encoder alone, on tensors in memory, with the worker's batch size."""
    worker = ImagePart(config_of(options), "images/part-0")  # the same threads and device
    size, total = worker.images.config.image_size, options.images * options.views
    device = torch.device(options.device)
    batch = min(total, max(1, worker.batch // options.views) * options.views)
    images = torch.randint(0, 256, (batch, 3, size, size), dtype=torch.uint8, device=device)
    worker.images.encode(images[:1], options.precision)

    def work() -> None:
        for start in range(0, total, batch):
            worker.images.encode(images[: min(batch, total - start)], options.precision).cpu()

    busy = time.process_time()
    took = _measure.seconds(work, device)
    return {"rate": total / took, "busy": (time.process_time() - busy) / total}


def memory(options: argparse.Namespace, number: int) -> dict[str, Any]:
    """Peak memory, and how far it is above the level before the part."""
    worker = ImagePart(config_of(options), f"images/part-{number}")
    worker._encode([np.zeros((3, *[worker.images.config.image_size] * 2), np.uint8)] * 8)
    level = _measure.resident_bytes()
    with _measure.peak_memory(torch.device("cpu")) as peak:
        start = time.perf_counter()
        output = worker({"name": "00000", "path": "part-00000.parquet"})
        took = time.perf_counter() - start
    sizes = {"peak": level + peak.bytes, "above": peak.bytes, "tokens": output.table.nbytes}
    return sizes | {"seconds": took}


def _text_part(store: str, number: int, start: Any, ends: Any) -> None:
    worker = TextPart(TokenizeConfig(store=store, texts=("words",)), "text/words")
    unit = {"name": f"{number:05d}", "path": f"part-{number:05d}.parquet"}
    worker(unit)  # the first run is slower, with or without us
    start.wait()
    began, busy = time.perf_counter(), time.process_time()
    worker(unit)
    ends.put((time.perf_counter() - began, time.process_time() - busy))


def text_workers(options: argparse.Namespace) -> dict[str, Any]:
    """All processes at once, each with a part; the slowest decides."""
    context = multiprocessing.get_context("spawn")
    start, ends = context.Barrier(options.processes), context.Queue()
    arguments = [(options.store, n, start, ends) for n in range(options.processes)]
    processes = [context.Process(target=_text_part, args=one) for one in arguments]
    for process in processes:
        process.start()
    times = [ends.get(timeout=600) for _ in processes]
    for process in processes:
        process.join()
    total = sum(len(t) for n in range(options.processes) for t in _texts(options, n))
    took, busy = max(t for t, _ in times), sum(b for _, b in times)
    return {"rate": total / took, "busy": busy / total}


def text_plain(options: argparse.Namespace) -> dict[str, Any]:
    """SentencePiece alone, one text after another in one thread."""
    tokenizer: TextTokenizer = load_text_tokenizer(Store(options.store), "sentencepiece")
    texts = _texts(options, 0)
    took = busy = 0.0
    for _ in range(2):  # the first time to warm up, as the workers do
        began, busy = time.perf_counter(), time.process_time()
        for text in texts:
            tokenizer.pieces.EncodeAsIds(text)
        took, busy = time.perf_counter() - began, time.process_time() - busy
    total = sum(map(len, texts))
    return {"rate": total / took, "busy": busy / total}


def _texts(options: argparse.Namespace, number: int) -> list[str]:
    path = Store(options.store).path("text/words", f"part-{number:05d}.parquet")
    return pq.read_table(path, columns=["text"])["text"].to_pylist()


def step(options: argparse.Namespace, inside: bool) -> dict[str, Any]:
    """A pretraining step of `base` on pictures and pairs, its words made inside or given."""
    device = torch.device(options.device)
    torch.manual_seed(0)
    if inside:
        tokenizer = VQKD(PRESETS["base"])
        model = WordsInStep(MODELS["base"], ObjectiveWeights(), tokenizer, options.precision)
    else:
        model = MaskedDataModelling(MODELS["base"])
    model = model.to(device).train()
    half = options.pictures // 2
    samples = draw(MODELS["base"], images=options.pictures - half, texts=0, pairs=half, seed=0)
    batch = to_device(samples.packed(), device)

    def work() -> None:
        model.zero_grad(set_to_none=True)
        model(batch)["loss"].backward()

    work()
    return {"seconds": median(_measure.seconds(work, device) for _ in range(3))}


WORKERS = {
    "image-worker": image_worker,
    "image-encoder": image_encoder,
    "memory-few": lambda options: memory(options, 0),
    "memory-many": lambda options: memory(options, 1),
    "text-workers": text_workers,
    "text-plain": text_plain,
    "step-inside": lambda options: step(options, True),
    "step-at-hand": lambda options: step(options, False),
}


# -- what is printed -------------------------------------------------------------------------------


def compare(
    options: argparse.Namespace, arguments: Sequence[str], store: str, tasks: Sequence[str]
) -> dict[str, list[dict[str, Any]]]:
    """Run fresh processes of each task, in turns."""
    found: dict[str, list[dict[str, Any]]] = {task: [] for task in tasks}
    for repeat in range(options.repeats):
        for task in tasks if repeat % 2 == 0 else reversed(tasks):
            extra = ["--worker", task, "--store", store]
            found[task].append(_measure.fresh("benchmarks.tokenization", [*arguments, *extra]))
            print(f"  {task}: {found[task][-1]}", file=sys.stderr)
    return found


def middle(found: dict[str, list[dict[str, Any]]], task: str, key: str) -> float:
    return float(median(one[key] for one in found[task]))


def report(options: argparse.Namespace, arguments: Sequence[str], store: str) -> list[str]:
    lines = [f"{options.preset}, {_measure.machine(torch.device(options.device))}"]
    if options.memory:
        found = compare(options, arguments, store, ["memory-few", "memory-many"])
        for task, count in zip(found, options.memory, strict=True):
            peak, above, tokens = (
                middle(found, task, key) / MIB for key in ("peak", "above", "tokens")
            )
            rate = count * options.views / middle(found, task, "seconds")
            lines.append(
                f"a part of {count:,} images: peak {peak:.0f} MiB, {above:.0f} above the start, "
                f"of it {tokens:.0f} tokens; {rate:,.0f} views/s"
            )
        few, many = (middle(found, task, "peak") for task in found)
        lines.append(f"peak memory, many / few: {many / few:.3f}")
        return lines
    if options.offline:
        found = compare(options, arguments, store, ["step-at-hand", "step-inside"])
        plain, inside = (middle(found, task, "seconds") for task in found)
        lines += [
            f"a step of {options.pictures} pictures, half of them with captions",
            f"words at hand: {plain:.3f} s; tokenizer inside: {inside:.3f} s, "
            f"{inside / plain:.2f} times",
            "Tokenizing once costs what the tokenizer inside the step costs once: it pays as soon "
            "as a view is seen twice.",
        ]
        return lines
    found = compare(
        options, arguments, store, ["image-worker", "image-encoder", "text-workers", "text-plain"]
    )
    worker, encoder = (middle(found, f"image-{k}", "rate") for k in ("worker", "encoder"))
    batch = found["image-worker"][0]["batch"]
    busy = {task: 1e6 * middle(found, task, "busy") for task in found}
    workers, plain = middle(found, "text-workers", "rate"), middle(found, "text-plain", "rate")
    return [
        *lines,
        f"images: {worker:,.1f} views/s in the worker, {encoder:,.1f} in the encoder alone "
        f"({worker / encoder:.0%}); {batch} at once, {options.decoders} decoding; a million views "
        f"take {busy['image-worker']:,.0f} s of CPUs, {busy['image-encoder']:,.0f} the encoder",
        f"texts: {workers / 1e6:,.2f}M characters/s in {options.processes} processes, "
        f"{plain / 1e6:,.2f}M in SentencePiece alone on one thread "
        f"({workers / plain / options.processes:.0%} of {options.processes} times that); a million "
        f"take {busy['text-workers']:.3f} s of CPUs, {busy['text-plain']:.3f} alone",
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = sys.argv[1:] if arguments is None else arguments
    options = parse(arguments)
    if options.worker:
        print(json.dumps(WORKERS[options.worker](options)))
        return
    with tempfile.TemporaryDirectory(prefix="beit3-tokenization-") as folder:
        prepare(options, Path(folder))
        print("\n".join(report(options, arguments, folder)))


if __name__ == "__main__":
    main()
