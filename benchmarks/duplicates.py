"""Measures the search for duplicates: time per picture and memory, for few and many pictures.

    python -m benchmarks.duplicates                         # 2,000 and 50,000 signatures
    python -m benchmarks.duplicates --counts 2000 1000000

Signatures are drawn at random: smooth fields of colour. One in ten copies an earlier one, half of
the copies with some bits and colours changed. The search runs in one process, from side files to
lists, with slabs of 10,000 pictures and buckets of about 2,000. Each count has fresh processes, and
the counts take turns.

Prints, for each count, the median microseconds per picture (by the clock and of the CPU, which
tells more on a shared machine), the peak memory of the process and how far it is above the level at
the start; and the largest of each divided by the smallest.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Sequence
from statistics import median

import numpy as np
import pyarrow as pa
import torch

from benchmarks import _measure
from pipelines import duplicates, signature_files
from pipelines.duplicates import Sizes
from pipelines.storage import Store

_PART = 1_000
_SIZES = Sizes(slab_rows=10_000, bucket_rows=24_000)


def draw(rng: np.random.Generator, count: int) -> pa.Table:
    """Signatures of a part: random corner colours, interpolated, with noise."""
    corners = rng.integers(0, 256, (count, 4, 3)).astype(np.float32)
    side = np.linspace(0, 1, 8, dtype=np.float32)
    weights = np.stack([np.outer(a, b) for a in (1 - side, side) for b in (1 - side, side)])
    colours = np.einsum("ncd,cxy->nxyd", corners, weights).reshape(count, 192)
    colours = (colours + rng.normal(0, 12, colours.shape)).clip(0, 255)
    bits = rng.integers(0, 256, (count, 32), dtype=np.uint8)
    for place in range(10, count, 10):  # half the copies are exact
        of = int(rng.integers(place))
        colours[place], bits[place] = colours[of], bits[of]
        if place % 20:
            colours[place] = (colours[place] + rng.normal(0, 2, 192)).clip(0, 255)
            bits[place, rng.integers(0, 32, 8)] ^= 1 << int(rng.integers(8))
    packed = colours.astype(np.uint8)
    rows = [
        {"id": f"{i}", "sha256": rng.bytes(32), "bits": b.tobytes(), "colours": c.tobytes()}
        for i, (b, c) in enumerate(zip(bits, packed, strict=True))
    ]
    return pa.Table.from_pylist(rows, signature_files.SCHEMA)


def measure(count: int, seed: int) -> dict[str, float]:
    """Search once; returns seconds, and bytes at the peak and above the start."""
    rng = np.random.default_rng(seed)
    with tempfile.TemporaryDirectory(prefix="beit3-duplicates-") as folder:
        dataset = Store(folder).dataset("images/drawn")
        files = []
        for number, start in enumerate(range(0, count, _PART)):
            signed = draw(rng, min(_PART, count - start))
            record = dataset.write_part("d" * 16, f"{number:05d}", signed.select(["id"]))
            signature_files.write(dataset, record.file, signed)
            files.append(record.file)
        cpu = torch.device("cpu")
        level = _measure.resident_bytes()
        with _measure.peak_memory(cpu) as peak:
            used = time.process_time()
            found = []
            seconds = _measure.seconds(
                lambda: found.append(duplicates.find(dataset, files, sizes=_SIZES, here=True)), cpu
            )
            used = time.process_time() - used
    dropped = sum(found[0].counts.values())
    return {
        "seconds": seconds,
        "processor": used,
        "peak": level + peak.bytes,
        "above": peak.bytes,
        "found": dropped,
    }


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.duplicates",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[2_000, 50_000])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--once", type=int, help="measure this count here, and print JSON")
    options = parser.parse_args(arguments)
    if min(options.repeats, *options.counts) < 1:
        parser.error("--counts, --repeats: expected at least 1")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    options = parse(arguments)
    if options.once:
        measure(2 * _PART, options.seed)  # warm-up
        print(json.dumps(measure(options.once, options.seed)))
        return
    runs: dict[int, list[dict[str, float]]] = {count: [] for count in options.counts}
    for repeat in range(options.repeats):
        for count in options.counts:
            asked = ["--once", str(count), "--seed", str(options.seed + repeat)]
            runs[count].append(_measure.fresh("benchmarks.duplicates", asked))
    head = ("pictures", "us each", "us CPU", "peak, MB", "above, MB", "duplicates")
    print("".join(f"{name:>12}" for name in head))
    each: list[float] = []
    busy: list[float] = []
    peaks: list[float] = []
    for count, measured in runs.items():
        middle = {key: median(m[key] for m in measured) for key in measured[0]}
        each.append(middle["seconds"] / count * 1e6)
        busy.append(middle["processor"] / count * 1e6)
        peaks.append(middle["peak"] / 1e6)
        shown = (f"{each[-1]:.1f}", f"{busy[-1]:.1f}", f"{peaks[-1]:.0f}",
                 f"{middle['above'] / 1e6:.1f}", f"{middle['found']:,.0f}")  # fmt: skip
        print(f"{count:12,}" + "".join(f"{value:>12}" for value in shown), flush=True)
    ratios = {"time for each": each, "CPU time for each": busy, "peak memory": peaks}
    for what, values in ratios.items():
        print(f"{what}: largest / smallest = {max(values) / min(values):.3f}")


if __name__ == "__main__":
    main()
