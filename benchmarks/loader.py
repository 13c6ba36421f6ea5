"""Measures the loader alone: pretraining batches in training order, against bare decoding.

    python -m benchmarks.loader                    # one process per CPU
    python -m benchmarks.loader --processes 0      # a thread of this process, as jobs do by default
    python -m benchmarks.loader --jitter 0.4       # views with the paper's colour jitter

Pictures are random JPEGs with the spectrum of photos, shrunk to a shorter side of 288 pixels and
encoded as in ingestion; they are in committed Parquet, each with the tokens of four views. The
loader (`pipelines.loader_workers.prefetch`) feeds batches of images alone for `base` at 224 pixels:
it finds the rows in the run's order, reads, decodes, crops, masks, collates, and brings the batches
into this process, which only takes them. No picture comes twice.

The baseline does only what can't be left out, on bytes in memory: it decodes the same pictures and
applies the same views, in equally many processes. Both run `--repeats` times in turns; batches that
the loader made ahead are taken before its clock starts. Reading is not measured: the first batches
need rows of every row group, and all of them fit into the loader's memory. Prints the medians of
images per second, and their ratio.
"""

from __future__ import annotations

import argparse
import io
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from statistics import median

import numpy as np
import pyarrow as pa
from PIL import Image

from beit3.config import PRESETS as MODELS
from beit3.config import ModelConfig
from beit3.text import TextTokenizer
from beit3.transforms import View, apply_view, decode
from benchmarks._photos import draw
from pipelines import cluster
from pipelines.ingest import IMAGE_SCHEMA
from pipelines.lineage import fingerprint
from pipelines.loader_workers import AHEAD, prefetch
from pipelines.pretrain import PretrainRecipe
from pipelines.pretrain_config import PretrainConfig
from pipelines.recipe import TrainConfig
from pipelines.samples import ViewConfig
from pipelines.storage import Store
from pipelines.tokenize_corpus import image_tokens

MODEL = MODELS["base"]
SIDE, QUALITY = 288, 92
VIEWS = 4  # tokenized per picture; the first epoch shows the first of them
PART = 2048  # rows of a file
QUEUE = 3  # batches that wait in this process


class Mask(TextTokenizer):
    """The part of a tokenizer that batches need."""

    def __init__(self, model: ModelConfig) -> None:
        self.model = b""
        self.of = model

    @property
    def mask_id(self) -> int:
        return self.of.vocab_size - 1

    def __reduce__(self) -> tuple[type[Mask], tuple[ModelConfig]]:
        return Mask, (self.of,)


def photos(count: int, seed: int) -> list[bytes]:
    """Different JPEGs, like those that ingestion stores."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(count):
        picture = decode(draw(rng))
        scale = SIDE / min(picture.size)
        size = (round(picture.width * scale), round(picture.height * scale))
        out = io.BytesIO()
        picture.resize(size, Image.Resampling.LANCZOS).save(out, "JPEG", quality=QUALITY)
        made.append(out.getvalue())
    return made


def views(pictures: Sequence[bytes], rows: int, seed: int, jitter: float = 0.0) -> list[View]:
    """A view of each row; row `i` has picture `i` modulo their number."""
    rng, config = np.random.default_rng(seed), ViewConfig(jitter=jitter)
    opened = [decode(data) for data in pictures]
    return [config.draw(opened[i % len(opened)], rng) for i in range(rows)]


def publish(
    store: Store,
    pictures: Sequence[bytes],
    drawn: Sequence[View],
    *,
    model: ModelConfig = MODEL,
    name: str = "photos",
    captions: Sequence[Sequence[int]] = (),
) -> None:
    """`images/<name>` and `tokens/<name>`, a row for each view, with a caption if there are any."""
    rng, jitter = np.random.default_rng(0), drawn[0].jitter is not None
    schema = image_tokens(model.patches, jitter=jitter)
    sources, tokens = store.dataset(f"images/{name}"), store.dataset(f"tokens/{name}")
    mark, records = fingerprint("benchmark", name), []
    for start in range(0, len(drawn), PART):
        numbers = range(start, min(start + PART, len(drawn)))
        images, words = [], []
        for i in numbers:
            data = {"bytes": pictures[i % len(pictures)], "path": None}
            images.append({"id": f"{name}/{i}", "image": data, "captions": [], "source": name})
            own = [
                {"box": view.box, "flip": view.flip, "jitter": view.jitter}
                | {"words": rng.integers(0, model.codebook_size, model.patches)}
                for view in (drawn[i], *(drawn[j] for j in rng.integers(0, len(drawn), VIEWS - 1)))
            ]
            said = [captions[i]] if captions else []
            words.append(
                {"id": f"{name}/{i}", "image_row": i - start, "views": own, "captions": said}
            )
        part = f"{start // PART:05d}"
        records.append(
            (
                sources.write_part(mark, part, pa.Table.from_pylist(images, IMAGE_SCHEMA)),
                tokens.write_part(mark, part, pa.Table.from_pylist(words, schema)),
            )
        )
    note = {"job": "benchmark", "stats": {}, "config": {}}
    sources.publish(mark, [one for one, _ in records], schema=IMAGE_SCHEMA, **note)
    inputs = [{"dataset": f"images/{name}", "tokenizers": {}}]
    tokens.publish(mark, [one for _, one in records], schema=schema, inputs=inputs, **note)


_held: list[tuple[bytes, View]] = []


def hold(pictures: Sequence[bytes], drawn: Sequence[View]) -> None:
    """Keep them in this process: handing them over is not part of decoding."""
    _held.extend((pictures[i % len(pictures)], view) for i, view in enumerate(drawn))


def bare(rows: range) -> int:
    """Decode and crop; returns the bytes made."""
    return sum(apply_view(decode(_held[i][0]), _held[i][1], MODEL.image_size).size for i in rows)


def compare(options: argparse.Namespace) -> tuple[list[float], list[float], float]:
    """Images per second of decoding alone and of the loader, and bytes of a picture.

    Raises:
        RuntimeError: the loader skipped or repeated a picture.
    """
    processes, batch = max(1, options.processes), options.batch_size
    ahead = AHEAD * options.processes + QUEUE
    rows = (options.batches + ahead) * options.repeats * batch
    pictures = photos(options.photos, options.seed)
    drawn = views(pictures, rows, options.seed, options.jitter)
    with tempfile.TemporaryDirectory() as folder:
        store = Store(folder)
        publish(store, pictures, drawn)
        recipe = PretrainRecipe(
            PretrainConfig(
                store=store.uri, images=("photos",), texts=(), pairs=(), image_batch=batch,
                text_batch=0, pair_batch=0, model=MODEL, train=TrainConfig(workers=0),
            ),
            Mask(MODEL),
        )  # fmt: skip
        batches = prefetch(recipe, 0, 1, range(rows // batch), options.processes)
        count = options.batches * batch
        held = (pictures, drawn[:count])
        pool = ProcessPoolExecutor(processes, get_context("spawn"), hold, held)
        seen: set[str] = set()

        def alone() -> float:
            shares = [range(i, count, processes) for i in range(processes)]
            list(pool.map(bare, [share[:100] for share in shares]))  # all have started
            return rate(count, lambda: list(pool.map(bare, shares)))

        def loaded() -> float:
            for _ in range(ahead):
                seen.update(next(batches).ids)
            taken = []
            found = rate(
                count, lambda: taken.extend(next(batches).ids for _ in range(options.batches))
            )
            seen.update(name for ids in taken for name in ids)
            return found

        try:
            turns = [(alone(), loaded()) for _ in range(options.repeats)]
        finally:
            batches.close()
            pool.shutdown()
    if len(seen) != rows:
        raise RuntimeError(f"{len(seen)} of {rows} pictures came")
    size = sum(map(len, pictures)) / len(pictures)
    return [one for one, _ in turns], [other for _, other in turns], size


def rate(count: int, work: Callable[[], object]) -> float:
    start = time.perf_counter()
    work()
    return count / (time.perf_counter() - start)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.loader",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    parser.add_argument("--processes", type=int, default=cores, help="default: one for each CPU")
    parser.add_argument("--photos", type=int, default=200, help="different pictures")
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--batches", type=int, default=24, help="in each measurement")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--jitter", type=float, default=0.0, help="of the views' colours")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args(arguments)
    if min(options.photos, options.batch_size, options.batches, options.repeats) < 1:
        parser.error("--photos, --batch-size, --batches, --repeats: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.processes:
        cluster.start(cpus=options.processes)
    alone, loaded, size = compare(options)
    print(
        f"base, {MODEL.image_size} px, JPEGs of shorter side {SIDE}, {size / 1000:.0f} kB; batches "
        f"of {options.batch_size}, made by {options.processes or 'a thread, not'} processes"
        + (f"; jitter {options.jitter:g}" if options.jitter else "")
    )
    print(f"{'':>10}{'decoding, images/s':>20}{'loader, images/s':>18}{'ratio':>8}")
    for name, of in (("median", median), ("slowest", min), ("fastest", max)):
        one, other = of(alone), of(loaded)
        ratio = f"{other / one:8.2f}" if name == "median" else ""
        print(f"{name:>10}{one:20.0f}{other:18.0f}{ratio}")


if __name__ == "__main__":
    main()
