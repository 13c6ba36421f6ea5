"""Measures image ingestion over HTTP: against bare img2dataset, for few and many, and repeated.

    python -m benchmarks.ingestion                    # a quarter of an hour on 2 idle cores
    python -m benchmarks.ingestion --large 0          # the comparison alone
    python -m benchmarks.ingestion --repeats 0        # the small and the large alone

A web server in a process of its own serves noise JPEGs of 400 to 640 pixels (`benchmarks/_photos`).
`ours` is `pipelines.ingest.run` on a local Ray, one shard per core at a time. `bare` is
`img2dataset.download` with the same number of processes and threads in each, the same shards,
shorter side, filter and JPEG quality, also to Parquet, with its own default checks. Both write to a
folder. (Ours uses `--downscale area` here, as `bare` does; its own default is hamming.) The data
report that a job makes of its images is not included unless asked for.

Every measurement has a fresh process. Its life has two parts, told apart by the server:

- start-up: from the process's start to the first request. Imports, Ray, the workers' imports;
- work: from the first request until the dataset is committed (`ours`) or `download` returns.

Images per second are of the work alone. Both take turns, so that a busy moment of a shared machine
hits both; medians are printed. CPU seconds are of the process and all its children, without the
server: other programs on the machine disturb them less. Memory is the sum of their PSS (resident
memory, shared parts counted once). Sampling is twice a second: what a process does in its last half
second is lost.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median

import numpy as np
import psutil

from benchmarks import _measure, _photos
from pipelines.images import FILTERS

FORMULATIONS = ("ours", "bare")
_SAMPLING_SECONDS = 0.5
_MB = 1e6


@dataclass
class Measured:
    """One process's life."""

    images: int
    startup: float
    work: float
    whole: float
    cpu: float
    """CPU seconds of the work."""
    cpu_startup: float
    peak: float
    """Bytes, all processes together."""
    at_peak: dict[str, int]
    """MB of each kind of process at the peak."""
    stored: float
    """Bytes in the output's folder."""


# -- what is measured -----------------------------------------------------------------------------


def ours(folder: Path, options: argparse.Namespace) -> int:
    from pipelines import cluster

    cluster.start(cpus=options.cores)
    return again(folder, options)


def again(folder: Path, options: argparse.Namespace) -> int:
    from pipelines.ingest import IngestConfig, run

    config = IngestConfig(
        source="cc3m",
        annotations=str(folder),
        store=str(folder / "store"),
        allow_loopback=True,
        threads=options.threads,
        shard_size=options.shard_size,
        short_side=options.short_side,
        downscale=options.downscale,
        report=options.report,
    )
    return run(config).rows


def bare(folder: Path, options: argparse.Namespace) -> int:
    from img2dataset import download

    from pipelines.images import ImagePolicy

    out = folder / "bare"
    download(
        url_list=str(folder / "urls.tsv"),
        input_format="tsv",
        url_col="url",
        caption_col="caption",
        output_folder=str(out),
        output_format="parquet",
        processes_count=options.cores,
        thread_count=options.threads,
        number_sample_per_shard=options.shard_size,
        image_size=options.short_side,
        resize_mode="keep_ratio",
        resize_only_if_bigger=True,
        encode_quality=ImagePolicy.encode_quality,
        timeout=10,
        retries=1,
    )
    return sum(json.loads(file.read_text())["successes"] for file in out.glob("*_stats.json"))


def files(options: argparse.Namespace) -> None:
    """One core, no cluster: a tar of photos, and a file of texts; medians of CPU time."""
    from pipelines.ingest_config import IngestConfig
    from pipelines.ingest_workers import FileWorker
    from pipelines.sample_world import texts
    from pipelines.sample_world.formats import json_lines, tar_bytes
    from pipelines.storage import Store

    folder = Path(options.folder)
    rng = np.random.default_rng(options.seed)
    photos = [_photos.draw(rng) for _ in range(options.photos)]
    names = [f"n00000001_{i}.JPEG" for i in range(1_000)]
    tar = tar_bytes([(name, photos[i % len(photos)]) for i, name in enumerate(names)])
    drawn = random.Random(options.seed)
    lines = json_lines({"text": texts.article(drawn)} for _ in range(5_000))
    found: dict[str, float] = {}
    for source, name, data in (
        ("imagenet21k", "n00000001.tar", tar),
        ("text_files", "a.jsonl", lines.encode()),
    ):
        (folder / source).mkdir()
        (folder / source / name).write_bytes(data)
        config = IngestConfig(source, str(folder / source), store=str(folder / "store"))
        worker = FileWorker(config, Store(config.store).dataset(config.dataset), "0" * 16)
        seconds = []
        for _ in range(3):
            start = time.process_time()
            worker({"name": "00000", "file": name, "bytes": len(data)})
            seconds.append(time.process_time() - start)
        found[source] = median(seconds)
    per_image = 1e3 * found["imagenet21k"] / len(names)
    per_second = len(lines.encode()) / _MB / found["text_files"]
    print(f"one core: {per_image:.1f} CPU ms for an image in a tar; {per_second:.1f} MB of texts "
          "in a CPU second")  # fmt: skip


def once(options: argparse.Namespace) -> None:
    """Run it in this process, and print the number of images and the end time."""
    os.environ.setdefault("NO_ALBUMENTATIONS_UPDATE", "1")
    work = {"ours": ours, "bare": bare, "again": again}[options.once]
    images = work(Path(options.folder), options)
    print(json.dumps({"images": images, "end": time.monotonic()}), flush=True)


# -- measuring ------------------------------------------------------------------------------------


class Watch:
    """CPU and memory of a process and all its children, sampled by a thread."""

    def __init__(self, pid: int, web: _photos.Web) -> None:
        self.root, self.web = psutil.Process(pid), web
        self.peak = self.cpu_startup = 0.0
        self.at_peak: dict[str, int] = {}
        self.first: float | None = None
        self._cpu: dict[tuple[int, float], float] = {}
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def cpu(self) -> float:
        return sum(self._cpu.values())

    def stop(self) -> None:
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_SAMPLING_SECONDS):
            memory: Counter[str] = Counter()
            with contextlib.suppress(psutil.NoSuchProcess):
                for process in (self.root, *self.root.children(recursive=True)):
                    memory[process.name()] += self._look(process)
            if memory.total() > self.peak:
                self.peak = memory.total()
                self.at_peak = {k: round(v / _MB) for k, v in memory.most_common()}
            if self.first is None:
                self.first = self.web.ask("/stats")["first"]
                self.cpu_startup = self.cpu

    def _look(self, process: psutil.Process) -> int:
        """Note a process's CPU seconds; return its share of memory in bytes."""
        with contextlib.suppress(psutil.Error, OSError, IndexError):
            times = process.cpu_times()
            self._cpu[process.pid, process.create_time()] = times.user + times.system
            lines = Path(f"/proc/{process.pid}/smaps_rollup").read_text().splitlines()
            return next(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
        return 0


def write_urls(folder: Path, web: _photos.Web, count: int) -> None:
    """Write the same list in both programs' formats."""
    with (
        (folder / "Train_GCC-training.tsv").open("w") as published,
        (folder / "urls.tsv").open("w") as plain,
    ):
        plain.write("url\tcaption\n")
        for number in range(count):
            url, caption = f"{web.url}/{number}.jpg", f"a picture with the number {number}"
            published.write(f"{caption}\t{url}\n")
            plain.write(f"{url}\t{caption}\n")


def measure(
    what: str, folder: Path, web: _photos.Web, count: int, arguments: Sequence[str]
) -> Measured:
    """Run one of the three in a fresh process.

    Raises:
        RuntimeError: it failed, or made fewer images than there are.
    """
    command = [sys.executable, "-m", "benchmarks.ingestion", *arguments]
    command += ["--once", what, "--folder", str(folder)]
    web.ask("/reset")
    start = time.monotonic()
    log = folder / f"{what}.log"
    with log.open("w") as sink:
        process = subprocess.Popen(
            command, cwd=_measure.ROOT, stdout=subprocess.PIPE, stderr=sink, text=True
        )
        watch = Watch(process.pid, web)
        said, _ = process.communicate()
    end = time.monotonic()
    watch.stop()
    lines = said.strip().splitlines()
    if process.returncode or not lines:
        raise RuntimeError(f"{' '.join(command)}: {log.read_text()[-2000:]}")
    done = json.loads(lines[-1])
    if done["images"] != count:
        raise RuntimeError(f"{what}: {done['images']} images of {count}")
    first = web.ask("/stats")["first"] or end
    out = folder / ("bare" if what == "bare" else "store")
    stored = sum(file.stat().st_size for file in out.rglob("*.parquet"))
    return Measured(
        images=count,
        startup=first - start,
        work=done["end"] - first,
        whole=end - start,
        cpu=watch.cpu - watch.cpu_startup,
        cpu_startup=watch.cpu_startup,
        peak=watch.peak,
        at_peak=watch.at_peak,
        stored=stored,
    )


@contextlib.contextmanager
def prepared(web: _photos.Web, count: int) -> Iterator[Path]:
    """A folder with the lists of `count` URLs."""
    with tempfile.TemporaryDirectory(prefix="beit3-benchmark-") as folder:
        write_urls(Path(folder), web, count)
        yield Path(folder)


# -- the table ------------------------------------------------------------------------------------


def row(name: str, runs: Sequence[Measured]) -> str:
    """A line of medians."""
    rates = [m.images / m.work for m in runs]
    values = (
        median(rates), min(rates), max(rates),
        1e3 * median(m.cpu / m.images for m in runs), median(m.startup for m in runs),
        median(m.cpu_startup for m in runs), median(m.whole for m in runs),
        median(m.peak for m in runs) / _MB, median(m.stored / m.images for m in runs) / 1e3,
    )  # fmt: skip
    shown = "".join(f"{v:10.1f}" for v in values)
    return f"{name:16}{shown}"


HEAD = f"{'':16}" + "".join(
    f"{name:>10}"
    for name in ("images/s", "slowest", "fastest", "CPU ms", "start, s", "its CPU", "whole, s",
                 "peak, MB", "stored kB")
)  # fmt: skip


def compare(web: _photos.Web, options: argparse.Namespace, arguments: Sequence[str]) -> None:
    runs: dict[str, list[Measured]] = {name: [] for name in FORMULATIONS}
    for repeat in range(options.repeats):
        for name in FORMULATIONS if repeat % 2 == 0 else FORMULATIONS[::-1]:
            with prepared(web, options.images) as folder:
                measured = measure(name, folder, web, options.images, arguments)
            print(f"  {name}: {json.dumps(asdict(measured))}", file=sys.stderr, flush=True)
            runs[name].append(measured)
    print(f"\n{options.images:,} images, {options.repeats} runs of each in turns; medians")
    print(HEAD)
    for name, measured in runs.items():
        print(row(name, measured))
    pairs = list(zip(runs["ours"], runs["bare"], strict=True))
    ratios = [b.work / a.work for a, b in pairs]
    cpu = [b.cpu / a.cpu for a, b in pairs]
    print(f"images/s, ours / bare: {median(ratios):.2f} (of each turn: {_list(ratios)})")
    print(f"images per CPU second, ours / bare: {median(cpu):.2f} (of each turn: {_list(cpu)})")


def _list(values: Sequence[float]) -> str:
    return ", ".join(f"{v:.2f}" for v in values)


def grow(web: _photos.Web, options: argparse.Namespace, arguments: Sequence[str]) -> None:
    """Measure few, more and many images, and a second run over the many."""
    middle = max(options.small + 1, 2 * options.large // 5)
    runs: dict[int, list[Measured]] = {options.small: [], middle: [], options.large: []}
    seconds, asked = 0.0, 0
    for count in (options.small, options.large, middle, options.small):
        with prepared(web, count) as folder:
            measured = measure("ours", folder, web, count, arguments)
            print(f"  {count}: {json.dumps(asdict(measured))}", file=sys.stderr, flush=True)
            runs[count].append(measured)
            if count == options.large:
                seconds = measure("again", folder, web, count, arguments).whole
                asked = web.ask("/stats")["count"]
    print(f"\nfew, more and many; the few before and after the many\n{HEAD}")
    for count, measured in runs.items():
        print(row(f"{count:,} images", measured))
    few, _, many = runs.values()
    print(f"at the peak of the many, MB: {many[0].at_peak}")
    for what, of in (
        ("time for an image", lambda m: m.work / m.images),
        ("CPU time for an image", lambda m: m.cpu / m.images),
        ("peak memory", lambda m: m.peak),
    ):
        ratio = median(map(of, many)) / median(map(of, few))
        print(f"{what}, {options.large:,} / {options.small:,}: {ratio:.3f}")
    # One-off work as the workers start cancels out in the differences.
    few_s, more_s, many_s = (median(m.work for m in measured) for measured in runs.values())
    first = (more_s - few_s) / (middle - options.small)
    later = (many_s - more_s) / (options.large - middle)
    print(f"time for a further image: {1e3 * first:.3f} ms from {options.small:,} to {middle:,}, "
          f"{1e3 * later:.3f} ms from there to {options.large:,}: {later / first:.3f}")  # fmt: skip
    print(f"a second run over {options.large:,}: {seconds:.1f} s, {asked} requests")


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ingestion",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--images", type=int, default=20_000, help="images of the comparison")
    parser.add_argument("--repeats", type=int, default=3, help="runs of each; 0: no comparison")
    parser.add_argument("--small", type=int, default=2_000)
    parser.add_argument("--large", type=int, default=50_000, help="0: not measured")
    parser.add_argument("--threads", type=int, default=64, help="of each process")
    parser.add_argument("--shard-size", type=int, default=1_000)
    parser.add_argument("--short-side", type=int, default=288)
    parser.add_argument("--downscale", choices=tuple(FILTERS), default="area",
                        help="the filter of ours; bare has area")  # fmt: skip
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="processes of each")
    parser.add_argument("--photos", type=int, default=200, help="different pictures of the web")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--report", action="store_true", help="make ours' data report, too")
    parser.add_argument("--once", choices=("ours", "bare", "again"), help=argparse.SUPPRESS)
    parser.add_argument("--folder", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    least = min(options.images, options.small, options.threads, options.shard_size, options.photos)
    if least < 1 or min(options.repeats, options.large) < 0:
        parser.error("expected counts of at least 1 (--repeats, --large: 0)")
    return options


def main(arguments: Sequence[str] | None = None) -> None:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    options = parse(arguments)
    if options.once:
        once(options)
        return
    with _photos.serve(options.photos, options.seed) as web:
        size = web.ask("/stats")["bytes"] / 1e3
        load = os.getloadavg()[0]
        said = f"{options.cores} processes of {options.threads} threads, {os.cpu_count()} CPUs"
        print(f"{said}, load before: {load:.1f}; JPEGs of {size:.0f} kB on average", flush=True)
        if options.repeats:
            compare(web, options, arguments)
        if options.large:
            grow(web, options, arguments)
    if options.large:
        with tempfile.TemporaryDirectory(prefix="beit3-benchmark-") as folder:
            options.folder = folder
            files(options)


if __name__ == "__main__":
    main()
